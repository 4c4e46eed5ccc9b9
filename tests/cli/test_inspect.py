"""What a file is, and the probe: a network whose denoising is known to be right under one reading only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import TWINS, filled, layouts, outputs
from PIL import Image

import guided_diffusion as gd
from guided_diffusion.cli.main import main
from guided_diffusion.config import RunConfig
from guided_diffusion.data.images import center_crop, to_float
from guided_diffusion.data.listing import list_records
from guided_diffusion.runtime.streams import EVALUATE, Streams
from guided_diffusion.weights import probe
from guided_diffusion.weights.load import Loaded
from guided_diffusion.weights.recognise import inspect_shapes

NETWORK = {
    "image_size": 8, "image_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2",
    "attention_resolutions": "8,4", "use_scale_shift_norm": True, "resblock_updown": True,
}  # fmt: skip
IMAGES = 4


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real handwritten digits."""
    datasets = pytest.importorskip("sklearn.datasets")
    from PIL import Image

    root = tmp_path_factory.mktemp("digits")
    for n, pixels in enumerate(datasets.load_digits().images[:48]):
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(root / f"{n}.png")
    return root


def denoiser_of(folder: Path, **open_flags: Any) -> Loaded:
    """A network of random features whose last layer is solved, by least squares, to name the noise in these digits.

    It is right for one reading of heads, order and schedule: another reading makes other features of the same image.
    """
    model = filled("diffusion", {**NETWORK, "channel_mult": "1,1", **open_flags})
    for name, weight in model.net.state_dict().items():  # attention and time must matter
        if name.endswith(("qkv.weight", "proj_out.weight", "emb_layers.1.weight")):
            weight.mul_(3.0)
    pictures = [
        center_crop(np.asarray(Image.open(path).convert("L")), 8)
        for path in list_records(folder, labels="none").paths[:IMAGES]
    ]
    x0 = to_float(torch.from_numpy(np.stack(pictures).reshape(IMAGES, 8, 8, 1)))
    noise = Streams(0, EVALUATE, ids=range(IMAGES)).normal((1, 8, 8))
    rows, wanted = [], []
    kept: list[torch.Tensor] = []
    model.net.out[1].register_forward_hook(lambda _m, _i, out: kept.append(out))
    for level in probe.LEVELS:
        i = int((model.process.alpha_bar - level).abs().argmin())
        with torch.no_grad():
            model.net(level**0.5 * x0 + (1 - level) ** 0.5 * noise, model.process.time[i].expand(len(x0)))
        patches = torch.nn.functional.unfold(kept.pop().contiguous(), 3, padding=1).transpose(1, 2).flatten(0, 1)
        rows.append(torch.cat([patches, torch.ones(len(patches), 1)], dim=1))
        wanted.append(noise.flatten())
    a, b = torch.cat(rows).double(), torch.cat(wanted).double()
    solved = torch.linalg.solve(a.T @ a + 1e-3 * torch.eye(a.shape[1], dtype=torch.float64), a.T @ b).float()
    model.net.out[2].weight.copy_(solved[:-1].reshape(model.net.out[2].weight.shape))
    model.net.out[2].bias.copy_(solved[-1:])
    return model


@pytest.mark.parametrize(
    "right",
    [
        {"num_heads": 4, "use_new_attention_order": True, "noise_schedule": "cosine", "diffusion_steps": 1000},
        {"num_head_channels": 16, "noise_schedule": "linear", "diffusion_steps": 4000},
    ],
)
def test_the_probe_finds_heads_order_and_schedule(
    digits: Path, tmp_path: Path, right: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = denoiser_of(digits, **right)
    torch.save(model.net.state_dict(), tmp_path / "mine.pt")
    words = ["--probe", str(digits), "--probe_images", str(IMAGES), "--image_size", "8", "--device", "cpu"]
    assert main(["inspect", str(tmp_path / "mine.pt"), *words]) == 0
    told = capsys.readouterr().out
    settled = next(line for line in told.splitlines() if line.startswith("settled:"))
    for name, value in {"use_new_attention_order": False, **right}.items():
        assert f"--{name} {value}" in settled, told


def test_readings_differ_in_what_they_compute() -> None:
    layout = inspect_shapes({k: tuple(v.shape) for k, v in filled("diffusion", NETWORK).net.state_dict().items()})
    assert layout.attention_widths == (32, 64, 64)
    found = list(probe.readings(layout))
    assert len(found) == len({tuple(sorted(flags.items())) for flags in found})
    heads = {(flags.get("num_heads"), flags.get("num_head_channels")) for flags in found}
    # Channels per head 16 and 32, or 1, 2, 4, 8 heads; no two of these are the same network.
    assert heads == {(None, 16), (None, 32), (1, None), (2, None), (4, None), (8, None)}


def test_verdict_names_what_is_open() -> None:
    trials = [
        probe.Trial(0.100, {"num_heads": 4, "noise_schedule": "cosine"}),
        probe.Trial(0.1005, {"num_heads": 2, "noise_schedule": "cosine"}),
        probe.Trial(0.2, {"num_heads": 2, "noise_schedule": "linear"}),
    ]
    told = probe.verdict(trials)
    assert (
        "settled: --noise_schedule cosine" in told and "not told apart by these images: --num_heads (2 readings" in told
    )


def test_a_file_of_ours_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = filled(*TWINS["256x256_diffusion"])
    named = Loaded(before.net, before.process, before.config, "", tuple("abcdefghij"), step=1234)
    gd.save(named, str(tmp_path))
    assert main(["inspect", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    for words in ("model001234.pt", "diffusion, after 1234 training steps", "10: a, b, c", "--num_head_channels 16"):
        assert words in told, words
    count = sum(p.numel() for p in before.net.parameters())
    assert f"{count / 1e6:.2f} million parameters, float32" in told
    assert "GFLOP per image" in told and "of float32 weights" in told


def test_cost_of_the_released_64_model_is_that_of_others() -> None:
    """The DiT paper's table counts 110 Gflops (multiply-adds) for the 64x64 network; ours counts both operations."""
    layout = layouts()["64x64_diffusion"]
    config = RunConfig.from_flags("diffusion", {**layout["flags"], "num_classes": 1000})
    flops, net = probe.forward_flops(config)
    assert flops / 2e9 == pytest.approx(110, rel=0.08)
    assert sum(p.numel() for p in net.parameters()) == layout["num_parameters"]


@pytest.mark.parametrize(
    ("network", "words", "message"),
    [
        (("diffusion", NETWORK), "", "Choose one of each line"),
        (("diffusion", NETWORK), "--probe .", "give --image_size"),
        (TWINS["64_256_upsampler"], "--probe .", "is a super_resolution network"),
    ],
)
def test_what_a_file_does_not_say_is_asked_for(
    network: Any, words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(filled(*network).net.state_dict(), tmp_path / "mine.pt")
    assert main(["inspect", str(tmp_path / "mine.pt"), *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_the_found_flags_load_the_file(digits: Path, tmp_path: Path) -> None:
    right = {"num_heads": 4, "noise_schedule": "linear", "diffusion_steps": 1000, "rescale_timesteps": False}
    before = filled("diffusion", {**NETWORK, **right})
    torch.save(before.net.state_dict(), tmp_path / "mine.pt")
    flags = {**right, "use_new_attention_order": False, "image_size": 8}
    assert torch.equal(outputs(gd.load(str(tmp_path / "mine.pt"), flags=flags)), outputs(before))
