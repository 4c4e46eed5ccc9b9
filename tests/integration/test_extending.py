"""The examples of docs/extending.md, run from the page: each file is written as it stands there and given to the commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT, clean_environment

import guided_diffusion as gd
from guided_diffusion.cli.main import main
from guided_diffusion.data.listing import list_records
from guided_diffusion.data.sources import list_source

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.S))
SMALL = "--num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 4".split()
RUN = "--image_size 8 --batch_size 2 --diffusion_steps 50 --sample_interval -1 --device cpu".split()


@pytest.fixture(autouse=True)
def _tables_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = (gd.ARCHITECTURES, gd.SCHEDULES, gd.SOURCES, gd.WEIGHTS, gd.SAMPLERS, gd.GRIDS, gd.GUIDANCES)
    for table in tables:
        for name in {"dit", "sigmoid", "npz", "p2", "plain_euler", "even", "centred"} - set(table):
            monkeypatch.setitem(table, name, None)  # so that what a test enters is removed after it
            del table[name]


def example(name: str, folder: Path) -> str:
    (folder / name).write_text(EXAMPLES[name])
    return str(folder / name)


def train(data: Path, out: Path, *words: str, steps: int = 2) -> dict[str, object]:
    """The last line of the log of a short run."""
    end = ["--max_steps", str(steps), "--log_interval", "1", "--out", str(out)]
    assert main(["train", "--data_dir", str(data), *RUN, *end, *words]) == 0
    return json.loads((out / "progress.json").read_text().splitlines()[-1])


def test_a_schedule(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--noise_schedule", "sigmoid"]
    assert main(["train", "--data_dir", str(photos), *RUN, *words, "--out", str(tmp_path / "x")]) == 2
    assert "--noise_schedule is 'sigmoid'; it must be one of linear, cosine" in capsys.readouterr().err
    train(photos, tmp_path / "run", *words, "--import", example("sigmoid.py", tmp_path))
    process = gd.load(str(tmp_path / "run")).process
    assert torch.all(process.alpha_bar[1:] < process.alpha_bar[:-1])
    # half of the time is half of the way between start and end, where the sigmoid is 1/2 of its range
    assert process.alpha_bar[24] == pytest.approx(0.5, abs=1e-6)


def test_a_weight_of_the_loss(photos: Path, tmp_path: Path) -> None:
    words = [*SMALL, "--import", example("soft.py", tmp_path)]
    plain = train(photos, tmp_path / "plain", *SMALL, steps=1)
    weighted = train(photos, tmp_path / "soft", *words, "--loss_weight", "soft_min_snr", steps=1)
    assert plain["mse"] == weighted["mse"] == plain["loss"] and weighted["loss"] < plain["loss"]
    process = gd.build_process(gd.DiffusionConfig())
    i = torch.tensor([100, 500, 999])
    alpha_bar = process.alpha_bar[i].double()
    snr = alpha_bar / (1 - alpha_bar)
    for predicts, factor in (("eps", 1), ("x0", snr), ("v", alpha_bar)):
        expected = factor * 4 / (snr + 4)  # SNR / (1 + SNR) = alpha_bar
        torch.testing.assert_close(
            gd.WEIGHTS["soft_min_snr"](process, i, predicts).double(), expected, rtol=1e-4, atol=0
        )


def test_a_sampler_a_grid_and_a_guidance(photos: Path, tmp_path: Path) -> None:
    train(photos, tmp_path / "run", *SMALL)
    words = [
        "--model_path",
        str(tmp_path / "run"),
        "--num_samples",
        "2",
        "--batch_size",
        "2",
        "--steps",
        "5",
        "--device",
        "cpu",
    ]
    own = ["--import", example("chain.py", tmp_path), "--sampler", "plain_euler"]
    own_guided = [*own, "--guidance", "centred"]
    # Euler's method is DDIM, on any grid; and what --clip after does once an x0 is combined, ddim is told.
    nodes: list[str] = []
    for name, more in (("own", own), ("guided", own_guided)):
        assert main(["sample", *words, *more, "--out", str(tmp_path / name)]) == 0
        settings = json.loads((tmp_path / name / "sampling.json").read_text())["settings"]
        nodes.append(",".join(map(repr, settings["nodes"])))
    assert settings["guidance"] == [{"name": "centred", "scale": 0.5}] and len(settings["nodes"]) == 5
    listed = [*words[:-4], "--device", "cpu", "--sampler", "ddim", "--nodes", nodes[0]]
    assert main(["sample", *listed, "--out", str(tmp_path / "ddim")]) == 0
    made = {
        name: np.load(tmp_path / name / "samples_2x8x8x3.npz")["arr_0"].astype(int)
        for name in ("own", "ddim", "guided")
    }
    assert abs(made["own"] - made["ddim"]).max() <= 1 < abs(made["own"] - made["guided"]).max()


def test_a_backbone(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trains, saves, goes on, loads, samples and is converted; without its program none of them, and nothing is imported."""
    assert len(EXAMPLES["dit.py"].splitlines()) <= 60
    dit = ["--import", example("dit.py", tmp_path)]
    words = "--architecture dit --arch_options depth=2,width=32,heads=2 --class_cond True --learn_sigma True".split()
    out = tmp_path / "run"
    train(photos, out, *dit, *words, steps=2)
    train(photos, out, *dit, steps=4)  # the save says which network it is
    assert (out / "run000004.json").exists()

    model = gd.load(str(out))
    assert type(model.net).__name__ == "DiT" and len(model.net.blocks) == 2  # type: ignore[arg-type]
    assert model.config.model.to_dict()["architecture"] == "dit"
    x, time, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 40.0]), torch.tensor([0, 1])
    weights = torch.load(out / "ema_0.9999_000004.pt", weights_only=True)
    again = gd.ARCHITECTURES["dit"](8, 3, 6, 2, width=32, depth=2, heads=2)
    again.load_state_dict(weights)
    assert torch.equal(model.net(x, time, y), again(x, time, y))

    making = ["--timestep_respacing", "5", "--num_samples", "3", "--batch_size", "2", "--device", "cpu"]
    assert main(["sample", "--model_path", str(out), *dit, *making, "--out", str(tmp_path / "samples")]) == 0
    images = np.load(next((tmp_path / "samples").glob("*.npz")))["arr_0"]
    assert images.shape == (3, 8, 8, 3) and images.std() > 0
    assert main(["convert", str(out), str(tmp_path / "dit.safetensors"), *dit]) == 0
    assert "largest output difference on the same input: 0" in capsys.readouterr().out

    assert main(["inspect", str(out), *dit]) == 0
    assert "--architecture dit --arch_options depth=2,width=32,heads=2" in capsys.readouterr().out

    for wrong, told in (
        ([*dit, *words[:2], "--arch_options", "legs=4"], "unexpected keyword argument 'legs'"),
        ([*dit, *words[:2], "--num_channels", "32"], "--num_channels 32 is for the U-Net"),
    ):
        assert main(["train", "--data_dir", str(photos), *RUN, *wrong, "--out", str(tmp_path / "wrong")]) == 2
        assert told in capsys.readouterr().err
    del gd.ARCHITECTURES["dit"]
    for command in (["sample", "--model_path", str(out), *making], ["inspect", str(out)]):
        assert main(command) == 2
        assert "--architecture is 'dit'; it must be one of unet" in capsys.readouterr().err


def test_a_data_source(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels, arr_1=np.arange(6) % 3)
    with pytest.raises(ValueError, match="no images found"):
        list_records(str(tmp_path / "images.npz"))
    words = ["--class_cond", "True", "--import", example("npz.py", tmp_path)]
    train(tmp_path / "images.npz", tmp_path / "run", *SMALL, *words)
    records = list_records(str(tmp_path / "images.npz"))
    assert records.labels is not None and records.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert gd.load(str(tmp_path / "run")).class_names == ("0", "1", "2")
    packing = ["data", "pack", str(tmp_path / "images.npz"), str(tmp_path / "packed"), "--size", "8", *words[2:]]
    assert main(packing) == 0
    packed = list_source(str(tmp_path / "packed"))
    assert all(np.array_equal(packed.read(path), image) for path, image in zip(packed.paths, pixels, strict=True))


def test_a_metric(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    reference, samples = rng.standard_normal((40, 3)), rng.standard_normal((30, 3)) + 1
    for name, rows in (("reference", reference), ("samples", samples)):
        np.savez(tmp_path / f"{name}.npz", features=rows.astype(np.float32))
    words = f"{tmp_path}/reference.npz {tmp_path}/samples.npz --features npz --metrics energy,KID --json {tmp_path}/out.json --device cpu"
    command = [sys.executable, example("energy.py", tmp_path), *words.split()]
    environ = clean_environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    scores = {score["name"]: score["value"] for score in report["sets"][0]["scores"]}
    pairs = ((samples, reference), (samples, samples), (reference, reference))
    apart = [np.linalg.norm(a[:, None] - b[None], axis=2).mean() for a, b in pairs]
    assert scores["energy"] == pytest.approx(2 * apart[0] - apart[1] - apart[2], rel=1e-5)
    assert f"energy: {scores['energy']!r}" in done.stdout and "KID" in scores


def test_a_program_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for program in (str(tmp_path / "no.py"), "no_such_module"):
        assert main(["train", "--import", program, "--data_dir", str(tmp_path)]) == 2
        assert f"--import {program}: there is no such" in capsys.readouterr().err
