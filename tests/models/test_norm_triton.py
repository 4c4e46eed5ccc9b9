"""Norm, scale, shift and SiLU by Triton without a GPU: its interpreter runs the kernels (the tests are those of
test_norm_kernels.py), and its compiler translates them for a GPU that need not be there. Triton is a large download and not among
the tests' needs: `pip install -e '.[triton]'` brings it, else these skip."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from test_norm_kernels import DTYPES, SIZES, TRITON, WAYS, answer, exactly, inputs, like

from guided_diffusion.models.kernels import norm

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not norm.available(), reason="needs Triton: pip install -e .[triton]")


def run(*command: str, **environ: str) -> str:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    done = subprocess.run(
        [sys.executable, *command], env=environ, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@needs_triton
@pytest.mark.skipif(
    norm.available() and tuple(map(int, version("triton").split(".")[:2])) < (3, 7),
    reason="older interpreters do not know NumPy 2.5: pip install -e .[triton]",
)
def test_kernels_in_the_interpreter() -> None:
    checks = str(Path(__file__).with_name("test_norm_kernels.py"))
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", checks, TRITON_INTERPRET="1")
    assert " passed" in said


_COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from guided_diffusion.models.kernels import norm_triton
constants = dict(GROUPS=32, WIDTH=64, ROWS=32, CHANNELS=64, CHUNKS=64)
for name in "_chunk_moments _group_moments _forward _chunk_gradients _group_gradients _backward".split():
    kernel = getattr(norm_triton, name)
    for kind in ("*bf16", "*fp32"):
        for whole in (True, False) if "WHOLE" in kernel.arg_names else (False,):
            for one in (True, False):  # numbers that are 1 when it is called are constants to the compiler
                known = dict(constants, WHOLE=whole, **(dict(chunks=1, rows=1, each=1) if one else {}))
                known = {key: value for key, value in known.items() if key in kernel.arg_names}
                kinds = {"x": kind, "y": kind, "g": kind, "dx": kind, "eps": "fp32"}
                kinds |= dict.fromkeys("rows channels each chunks stride".split(), "i32")
                types = {key: "constexpr" if key in known else kinds.get(key, "*fp32") for key in kernel.arg_names}
                made = triton.compile(ASTSource(kernel, types, known), target=GPUTarget("cuda", 90, 32))
                assert made.metadata.shared < 48 * 1024
                print(name, kind, whole, one, len(made.asm["cubin"]))
"""


@needs_triton
def test_the_compiler_takes_every_kernel(tmp_path: Path) -> None:
    """The interpreter is more lenient than the compiler, which needs no GPU to translate for one."""
    assert len(run("-c", _COMPILE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()) == (6 + 2) * 4


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("size", [*SIZES, (4, 384, 32, 32), (1, 256, 256, 256)], ids=str)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("way", list(WAYS))
def test_on_a_gpu_as_written_out(size: tuple[int, ...], dtype: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from guided_diffusion.models.kernels import norm_triton

    assert not TRITON
    monkeypatch.setattr(norm_triton, "_WHOLE", WAYS[way])
    given = [tensor.detach().cuda().requires_grad_() for tensor in inputs(size, False, DTYPES[dtype])]
    y, (want, exact) = answer(norm_triton, given), exactly(given)
    step = max(2e-5, torch.finfo(DTYPES[dtype]).eps)
    torch.testing.assert_close(y.double(), want, rtol=step, atol=step)
    g = like(size).to("cuda", DTYPES[dtype])
    for ours, theirs in zip(torch.autograd.grad(y, given, g), torch.autograd.grad(want, exact, g.double())):
        torch.testing.assert_close(ours.double(), theirs, rtol=2 * step, atol=2 * step * float(theirs.abs().max()))
