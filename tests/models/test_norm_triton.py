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
from test_norm_kernels import DTYPES, TRITON, WAYS, answer, exactly, inputs, like, rounding

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
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from guided_diffusion.models.kernels import norm_triton
from guided_diffusion.models.kernels.lines import Lines

class NoGPU:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")
driver.set_active(NoGPU())
launch = triton.runtime.jit.JITFunction.run
def compiled(self, *args, grid, warmup, **kwargs):
    made = launch(self, *args, grid=grid, warmup=True, **kwargs)
    assert made.metadata.shared < 48 * 1024
    print(self.fn.__name__, len(made.asm["cubin"]))
triton.runtime.jit.JITFunction.run = compiled

for dtype in (torch.bfloat16, torch.float32):
    for size in ((2, 96, 8, 8), (1, 64, 130, 65), (2, 192, 64, 64), (1, 32, 1, 1)):
        x = torch.empty(size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        line, scale_shift = torch.empty(size[1]), torch.empty(size[0], 2 * size[1], dtype=dtype).chunk(2, dim=1)
        for lines in (Lines(None, line, line), Lines(line, line, line, *scale_shift)):
            for silu in (True, False):
                y, mean, rstd = norm_triton.forward(x, lines, 32, 1e-5, silu)
                norm_triton.backward(y, x, lines, mean, rstd, 32, silu)
        norm_triton.add(x, x, line)
"""


@needs_triton
def test_the_compiler_takes_every_kernel(tmp_path: Path) -> None:
    """The interpreter is more lenient than the compiler, which needs no GPU to translate, as it is called, for one."""
    said = run("-c", _COMPILE, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert {line.split()[0] for line in said} == {
        "_chunk_moments", "_group_moments", "_forward", "_chunk_gradients", "_group_gradients", "_backward", "_add"
    }  # fmt: skip
    assert len(said) == 2 * (4 * 4 * 2 + 2 * 4 * 4 + 4)


@pytest.mark.gpu  # every size and dtype is compiled, which takes a second or two: no more of them than show a difference
@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("size", [(3, 192, 5, 7), (1, 32, 130, 65), (4, 384, 32, 32)], ids=str)
def test_on_a_gpu_as_written_out(size: tuple[int, ...], way: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from guided_diffusion.models.kernels import norm_triton

    assert not TRITON
    monkeypatch.setattr(norm_triton, "_WHOLE", WAYS[way])
    given = inputs(size, "scaled", DTYPES[dtype], offset=True)
    given = [tensor.detach().cuda().requires_grad_() for tensor in given]
    y, (want, exact) = answer(norm_triton, given), exactly(given)
    step = max(2e-5, torch.finfo(DTYPES[dtype]).eps)
    torch.testing.assert_close(y.double(), want, rtol=step, atol=step)
    g = like(size).to("cuda", DTYPES[dtype])
    expected = torch.autograd.grad(want, exact, g.double())
    bounds = rounding(expected, given, 2 * step)
    for ours, theirs, atol in zip(torch.autograd.grad(y, given, g), expected, bounds):
        torch.testing.assert_close(ours.double(), theirs, rtol=2 * step, atol=atol)
