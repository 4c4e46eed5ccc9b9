"""Norm, scale, shift and SiLU as Triton kernels, against the same written out, without a GPU: Triton's interpreter runs the
kernels (the tests are in fused_norm_checks.py), and its compiler translates them for a GPU that need not be
there. Triton is a large download and not among the tests' needs: `pip install -e '.[triton]'` brings it, else these skip."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_norm_checks import DTYPES, SIZES, WAYS, answer, inputs, like
from small_networks import images, times, unet

from guided_diffusion.models import fused_norm, triton_norm
from guided_diffusion.models.layers import channels_last

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not fused_norm.available(), reason="needs Triton: pip install -e .[triton]")


@needs_triton
@pytest.mark.skipif(
    fused_norm.available() and tuple(map(int, version("triton").split(".")[:2])) < (3, 7),
    reason="older interpreters do not know NumPy 2.5: pip install -e .[triton]",
)
def test_kernels_in_the_interpreter() -> None:
    environ = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    checks = str(Path(__file__).with_name("fused_norm_checks.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", checks]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def layers() -> Any:
    return unet().input_blocks[1][0].in_layers


@pytest.mark.parametrize("member", [None, 0, 1])
def test_whoever_listens_to_a_layer_is_heard(member: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norm, "on_device", lambda x: True)
    monkeypatch.setattr(fused_norm, "works", lambda *_: True)
    chosen, x = layers(), channels_last(images(2, 32))
    assert fused_norm.fits(x, chosen)
    handle = (chosen if member is None else chosen[member]).register_forward_hook(lambda *_: None)
    assert not fused_norm.fits(x, chosen)
    handle.remove()
    assert fused_norm.fits(x, chosen)


def test_what_the_kernels_do_not_know_goes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, x = layers(), channels_last(images(2, 32))
    monkeypatch.setattr(fused_norm, "on_device", lambda x: True)
    monkeypatch.setattr(fused_norm, "works", lambda *_: True)
    assert fused_norm.fits(x, chosen) and fused_norm.fits(x.bfloat16(), chosen)
    assert not fused_norm.fits(x.contiguous(), chosen)
    assert not fused_norm.fits(x.double(), chosen)
    assert not torch.func.vmap(lambda part: torch.tensor(fused_norm.fits(part[None], chosen)))(x).any()
    chosen[1] = torch.nn.ReLU()
    assert not fused_norm.fits(x, chosen)


def test_on_where_it_fits_unless_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without Triton, or with one that fails, a network takes torch's norms, and says so only where it fails."""
    monkeypatch.setattr(fused_norm, "on_device", lambda x: True)
    used: list[int] = []
    monkeypatch.setattr(triton_norm, "fused", lambda *args: used.append(1) or triton_norm.plain(*args))
    net, x, t = unet(), images(), times()
    monkeypatch.setattr(fused_norm, "available", lambda: False)
    fused_norm.works.cache_clear()
    want = net(x, t)
    assert not used
    monkeypatch.setattr(fused_norm, "available", lambda: True)
    fused_norm.works.cache_clear()
    torch.testing.assert_close(net(x, t), want, rtol=2e-5, atol=2e-5)
    assert used
    used.clear()
    net.set_fused_norm(False)
    net(x, t)
    assert not used
    net.set_fused_norm(True)

    def fails(*_: Any) -> Any:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(triton_norm, "fused", fails)
    fused_norm.works.cache_clear()
    with pytest.warns(UserWarning, match="no C compiler"):
        torch.testing.assert_close(net(x, t), want, rtol=2e-5, atol=2e-5)
    fused_norm.works.cache_clear()


_COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from guided_diffusion.models import norm_kernels as kernels
floats = "means squares mean rstd weight bias sums products s1 s2 m1 m2".split()
constants = dict(GROUPS=32, SILU=True, ROWS=32, CHANNELS=64, CHUNKS=16)
names = "forward_whole backward_whole chunk_moments group_moments forward chunk_gradients group_gradients backward"
for name in names.split():
    kernel = getattr(kernels, name)
    for kind in ("*bf16", "*fp32"):
        for scaled in (True, False):
            for one in (True, False):  # numbers that are 1 when it is called are constants to the compiler
                known = dict(constants, SCALED=scaled, **(dict(chunks=1, rows=1, per_chunk=1) if one else {}))
                known = {key: value for key, value in known.items() if key in kernel.arg_names}
                types = {key: "constexpr" if key in known else "*fp32" if key in floats else "fp32" if key == "eps"
                         else kind if key in ("x", "y", "g", "dx", "scale", "shift") else "i32" for key in kernel.arg_names}
                made = triton.compile(ASTSource(kernel, types, known), target=GPUTarget("cuda", 90, 32))
                assert made.metadata.shared < 48 * 1024
                print(name, kind, scaled, one, len(made.asm["cubin"]))
"""


@needs_triton
def test_the_compiler_takes_every_kernel(tmp_path: Path) -> None:
    """The interpreter is more lenient than the compiler, which needs no GPU to translate for one."""
    environ = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == 8 * 8


@pytest.mark.real_gpu
@needs_triton
@pytest.mark.parametrize("size", [*SIZES, (4, 384, 32, 32), (1, 256, 256, 256)], ids=str)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("way", list(WAYS))
def test_on_a_gpu_as_written_out(size: tuple[int, ...], dtype: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_norm, "_WHOLE", WAYS[way])
    given = [tensor.detach().cuda().requires_grad_() for tensor in inputs(size, True, DTYPES[dtype])]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    y, want = answer(triton_norm.fused, given), answer(triton_norm.plain, exact)
    step = max(2e-5, torch.finfo(DTYPES[dtype]).eps)
    torch.testing.assert_close(y.double(), want, rtol=step, atol=step)
    g = like(size).to("cuda", DTYPES[dtype])
    for ours, theirs in zip(torch.autograd.grad(y, given, g), torch.autograd.grad(want, exact, g.double())):
        torch.testing.assert_close(ours.double(), theirs, rtol=2 * step, atol=2 * step * float(theirs.abs().max()))
