"""Flags of sampler and guidance, as `sample` reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import BASE, CRITIC, filled

import guided_diffusion as gd
from guided_diffusion.cli.main import main


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    plain = {**BASE, "class_cond": False, "num_classes": 0}
    networks = {"model": ("diffusion", BASE), "plain": ("diffusion", plain), "critic": ("classifier", CRITIC)}
    for name, (kind, flags) in networks.items():
        gd.save(filled(kind, flags), str(folder / name))
    return {name: str(folder / name) for name in networks}


def sample(files: dict[str, str], out: Path, flags: str) -> tuple[int, dict[str, Any]]:
    """(exit code, settings of the receipt)"""
    words = [files.get(word.removeprefix("@"), word) for word in flags.split()]
    code = main(["sample", "--model_path", files["model"], "--num_samples", "2", "--out", str(out), *words])
    receipt = out / "sampling.json"
    return code, json.loads(receipt.read_text())["settings"] if receipt.exists() else {}


def test_eta_0_is_not_the_same_as_none_given(files: dict[str, str], tmp_path: Path) -> None:
    for sampler, usual in (("euler_a", 1), ("sde_dpm_solver", 1), ("ddim", 0)):
        settings = [
            sample(files, tmp_path / f"{sampler}{k}", f"--steps 3 --sampler {sampler} {eta}")[1]
            for k, eta in enumerate(("", "--eta 0"))
        ]
        assert [each["options"]["eta"] for each in settings] == [usual, 0]
    # Flags stored by an earlier version have an eta of 0, which is none for samplers without it, and not one asked for by name.
    (tmp_path / "before.json").write_text(json.dumps({"config": {"eta": 0.0, "use_ddim": True}}))
    config = f"--config {tmp_path / 'before.json'} --steps 3"
    assert sample(files, tmp_path / "unipc", f"{config} --sampler unipc")[0] == 0
    assert sample(files, tmp_path / "again", f"{config} --sampler euler_a")[1]["options"]["eta"] == 1


def test_a_guidance_named_twice_acts_once(files: dict[str, str], tmp_path: Path) -> None:
    twice = "--steps 3 --guidance classifier,classifier,threshold,epsilon_scaling --threshold 0.9 --epsilon_scale 0.1,1"
    code, settings = sample(files, tmp_path / "a", f"{twice} --classifier_path @critic")
    scales = {guide["name"]: guide["scale"] for guide in settings["guidance"]}
    assert code == 0 and scales == {"epsilon_scaling": 1, "classifier": 1.0, "threshold": 0.9}
    assert len(settings["guidance"]) == 3 and settings["guidance"][0]["slope"] == 0.1
    usual = sample(files, tmp_path / "b", "--steps 3 --guidance threshold")[1]
    assert usual["guidance"][0]["scale"] == 0.995


def test_networks_of_guidance_that_does_nothing_are_not_read(
    files: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    for k, flags in enumerate(
        (
            "--classifier_path gone --classifier_scale 0",
            "--guidance autoguidance --guide_path gone --guidance_scale 1",
            "--guidance random_label --guidance_scale 1",
        )
    ):
        code, settings = sample(files, tmp_path / str(k), f"--steps 3 {flags}")
        assert code == 0 and settings["guidance"] == [] and "does nothing" in capsys.readouterr().out
    # Of these two either network may be the one with classes, which then samples.
    flags = "--steps 3 --guidance classifier_free --guidance_scale 1 --guide_path @plain"
    assert sample(files, tmp_path / "either", flags)[1]["guidance"] == []


MISTAKES = [
    ("--guidance_options nothing=3 --threshold 0.9", "--guidance_options has 'nothing', and no guidance has it"),
    ("--guidance random_label --guidance_scale 2 --guide_path @plain", "--guide_path is .* no guidance here uses it"),
    ("--guidance pag --guide_path @plain", "--guide_path is .* no guidance here uses it"),
    ("--guidance apg --guide_path @plain", "apg has no usual scale; give --guidance_scale"),
    ("--guidance pag --guidance_options layers=3", "pag: layers is 3; it must be a value such as"),
    ("--clip_denoised False --clip before", "--clip_denoised False and --clip 'before' contradict"),
    ("--grid sections", "give --timestep_respacing 90,60,60,20,20 instead"),
    ("--grid nodes", "give --nodes 999,850,736 instead"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES)
def test_mistakes_are_named(files: dict[str, str], tmp_path: Path, capsys: Any, flags: str, message: str) -> None:
    assert sample(files, tmp_path / "out", f"--steps 3 {flags}")[0] == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and re.search(message, error), error


def arrays(folder: Path) -> list[np.ndarray]:
    with np.load(next(folder.glob("*.npz"))) as found:
        return [found[name] for name in found.files]


def test_invert_finds_the_noise_of_images(files: dict[str, str], tmp_path: Path) -> None:
    def invert(name: str, flags: str, source: str = "images", code: int = 0) -> tuple[np.ndarray, list[int]]:
        assert sample(files, tmp_path / name, f"--invert {tmp_path / source} --num_samples 3 {flags}")[0] == code
        pixels, labels = arrays(tmp_path / name)
        return pixels.astype(int), labels.tolist()

    assert sample(files, tmp_path / "images", "--steps 40 --num_samples 3 --labels balanced")[0] == 0
    images, _ = arrays(tmp_path / "images")  # a folder of samples stands for its npz, not for its picture
    back, labels = invert("back", "--steps 40 --num_samples 4 --labels balanced")  # without --classes: with a warning
    assert labels == [0, 1, 2, 0] and np.abs(back[:3] - images).mean() < 7 and np.abs(back[3] - back[0]).max() <= 1
    assert np.abs(back[:3] - invert("one by one", "--steps 40 --batch_size 1")[0]).max() <= 1
    assert np.abs(invert("fast", "--steps 40 --sampler fast")[0] - images).mean() < 7
    other, labels = invert("other", "--steps 40 --classes 3")
    assert labels == [3, 3, 3] and np.abs(other - images).mean() > 20
    assert np.abs(invert("guided", "--steps 40 --classifier_path @critic")[0] - images).mean() > 20

    # Without labels, or with unknown ones, images are taken as of the class that is made of them.
    np.savez(tmp_path / "bare.npz", images)
    np.savez(tmp_path / "unknown.npz", images, np.array([7, 8, 9]))
    bare, unknown = (invert(name, "--steps 20 --classes 0", f"{name}.npz")[0] for name in ("bare", "unknown"))
    assert np.abs(bare - unknown).max() == 0

    # One folder: labels drawn from all classes are another job than the images' own.
    one = invert("one", "--steps 4 --seed 1 --classes 0,1,2")
    assert one[1] != [0, 1, 2] and invert("one", "--steps 4 --seed 1")[1] == [0, 1, 2]
    words = ["sample", "--config", str(tmp_path / "one" / "sampling.json"), "--out", str(tmp_path / "again")]
    assert main(words) == 0 and (arrays(tmp_path / "again")[0] == arrays(tmp_path / "one")[0]).all()
    every = ["--model_path", files["model"], "--invert", str(tmp_path / "images"), "--steps", "2"]
    assert main(["sample", *every, "--out", str(tmp_path / "every")]) == 0 and len(arrays(tmp_path / "every")[0]) == 3
    words = ["sample", "--config", str(tmp_path / "every" / "sampling.json"), "--out", str(tmp_path / "all again")]
    assert main(words) == 0 and len(arrays(tmp_path / "all again")[0]) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--sampler ancestral draws fresh noise here, and a random chain has no inverse; give --sampler ddim"),
        ("--steps 5 --eta 0.5", "--sampler ddim draws fresh noise here"),
        ("--steps 5 --sampler sa", "--sampler sa draws fresh noise here"),
        ("--steps 5 --sampler heun --churn 2", "--sampler heun draws fresh noise here"),
        ("--steps 5 --requests FILE", "--requests and --invert do not go together"),
        ("--steps 5 --classes 1 --out {folder}", "holds the images of --invert; give another folder"),
        ("--steps 5", r"--invert .*images\.npz has the label 9; the networks know the classes 0 to 3"),
    ],
)
def test_what_cannot_be_inverted(files: dict[str, str], tmp_path: Path, capsys: Any, flags: str, message: str) -> None:
    np.savez(tmp_path / "images.npz", np.zeros((1, 8, 8, 3), np.uint8), np.array([9]))
    assert (
        sample(files, tmp_path / "out", f"--invert {tmp_path / 'images.npz'} {flags.format(folder=tmp_path)}")[0] == 2
    )
    assert re.search(message, capsys.readouterr().err)


def test_clipping_before_guidance_is_for_the_samplers_of_2021(files: dict[str, str], tmp_path: Path) -> None:
    chosen = {
        flags: sample(files, tmp_path / str(k), f"--classifier_path @critic {flags}")[1]
        for k, flags in enumerate(
            ("--timestep_respacing 4", "--steps 4", "--nodes 90,50,0", "--sampler fast --steps 4")
        )
    }
    assert [each["clip"] for each in chosen.values()] == ["before", "before", "before", "after"]
    assert [each["sampler"] for each in chosen.values()] == ["ancestral", "ddim", "ddim", "unipc"]
    assert sample(files, tmp_path / "no", "--sampler fast --steps 4")[1]["clip"] == "before"  # as nothing guides
