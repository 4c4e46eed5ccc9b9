"""Options of training from the command line to images: what is stored with the weights, and that sampling follows it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import guided_diffusion as gd
from guided_diffusion.cli.main import main

NETWORK = (
    "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 4 --device cpu "
    "--batch_size 4 --lr 1e-3 --ema_rate 0.9 --sample_interval -1 --progress False"
).split()


SAMPLES = "--num_samples 2 --batch_size 2 --device cpu".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for n in range(8):
        (folder / "ab"[n % 2]).mkdir(exist_ok=True)
        pixels = np.random.RandomState(n).randint(0, 255, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[n % 2] / f"{n}.png")
    return folder


def train(images: Path, out: Path, words: str) -> int:
    return main(["train", "--data_dir", str(images), "--out", str(out), *NETWORK, *words.split()])


def test_an_average_chosen_after_training(images: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    words = "--ema_sigma_rel 0.05,0.1 --save_interval 1 --keep_last 1"
    assert train(images, tmp_path / "run", f"{words} --max_steps 2") == 0
    assert train(images, tmp_path / "run", f"{words} --max_steps 4") == 0  # and goes on
    assert (
        len(list((tmp_path / "run").glob("ema_rel*.pt"))) == 8 and len(list((tmp_path / "run").glob("run*.json"))) == 1
    )
    assert main(["ema", "--run", run, "--sigma_rel", "0.15"]) == 0
    made = tmp_path / "run" / "ema" / "ema_rel0.15_000004.pt"
    out = tmp_path / "out"
    assert main(["sample", "--model_path", str(made), "--out", str(out), "--timestep_respacing", "2", *SAMPLES]) == 0
    assert json.loads((out / "sampling.json").read_text())["settings"]["model"]["step"] == 4
    assert gd.load(run).path.endswith("ema_0.9_000004.pt")


def test_velocity_without_a_trace_of_the_image_at_the_end(images: Path, tmp_path: Path) -> None:
    chosen = (
        "--predict v --zero_terminal_snr True --learn_sigma True --class_cond True --class_dropout 0.1 --loss_weight p2"
    )
    assert train(images, tmp_path / "run", f"{chosen} --max_steps 1") == 0
    assert train(images, tmp_path / "run", f"{chosen} --max_steps 2") == 0  # and goes on
    model = gd.load(str(tmp_path / "run"))
    assert model.reading["predicts"] == "v" and float(model.process.alpha_bar[-1]) < 1e-8 and model.null_label == 2
    for method in ("ancestral", "ddim"):
        where = tmp_path / method
        words = [*SAMPLES, "--timestep_respacing", "4", "--sampler", method]
        assert main(["sample", "--model_path", str(tmp_path / "run"), "--out", str(where), *words]) == 0
        pixels = np.load(next(where.glob("*.npz")))["arr_0"]
        assert pixels.shape == (2, 8, 8, 3) and len(np.unique(pixels)) > 8
    receipt = json.loads((tmp_path / "ddim" / "sampling.json").read_text())
    assert receipt["settings"]["diffusion"]["zero_terminal_snr"] is True
