"""Bits per dimension of real images: independent of batches and processes, in the files of 2021, equal to the old loop."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import CRITIC, filled
from processes import TORCHRUN, run_script

import guided_diffusion as gd
from guided_diffusion import build
from guided_diffusion.cli.main import main
from guided_diffusion.config import RunConfig
from guided_diffusion.sampling import bounds
from guided_diffusion.weights.load import Loaded

STEPS = 20
NETWORK = {
    "image_size": 8, "image_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2",
    "attention_resolutions": "4", "learn_sigma": True, "class_cond": True, "num_classes": 10,
    "diffusion_steps": STEPS, "noise_schedule": "cosine",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real handwritten digits in folders by class, and a network that has something to say."""
    datasets = pytest.importorskip("sklearn.datasets")
    from PIL import Image

    root = tmp_path_factory.mktemp("nll")
    found = datasets.load_digits()
    for n, (pixels, label) in enumerate(zip(found.images[:30], found.target)):
        path = root / "digits" / str(label) / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(path)
    gd.save(replace(filled("diffusion", NETWORK), class_names=tuple("0123456789")), str(root / "model"))
    return root


def measure(place: Path, out: Path, *words: str) -> dict[str, Any]:
    command = ["nll", "--model_path", f"{place}/model", "--data_dir", f"{place}/digits", "--device", "cpu"]
    assert main([*command, "--num_samples", "7", "--out", str(out), *words]) == 0
    return json.loads((out / "likelihood.json").read_text())


@pytest.fixture(scope="module")
def one_by_one(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a measurement in batches of one."""
    out = tmp_path_factory.mktemp("one")
    measure(place, out)
    return out


@pytest.fixture
def alone(one_by_one: Path) -> dict[str, Any]:
    """Its summary."""
    return json.loads((one_by_one / "likelihood.json").read_text())


def test_the_files_of_2021(one_by_one: Path) -> None:
    for name in ("vb", "mse", "xstart_mse"):
        with np.load(one_by_one / f"{name}_terms.npz") as found:
            assert found.files == ["arr_0"] and found["arr_0"].shape == (STEPS,)
            assert np.isfinite(found["arr_0"]).all()
    with np.load(
        one_by_one / "mse_terms.npz"
    ) as found:  # the noisiest step comes first: its noise is the easiest to see
        assert found["arr_0"][-1] > found["arr_0"][0]


def test_the_number_its_error_bar_and_its_parts(one_by_one: Path, alone: dict[str, Any]) -> None:
    told, values = alone, np.array(alone["by_image"])
    assert told["images"] == len(values) == 7
    assert told["bits_per_dim"] == pytest.approx(values.mean())
    assert told["standard_error"] == pytest.approx(values.std(ddof=1) / np.sqrt(7))
    assert sum(told["breakdown"].values()) == pytest.approx(told["bits_per_dim"], rel=1e-5)
    assert set(told["breakdown"]) == {"prior", "pixels (step 0)", *(f"steps, quarter {k}" for k in (1, 2, 3, 4))}
    with np.load(one_by_one / "vb_terms.npz") as found:
        assert found["arr_0"][-1] == pytest.approx(told["breakdown"]["pixels (step 0)"], rel=1e-5)
        assert found["arr_0"].sum() + told["breakdown"]["prior"] == pytest.approx(told["bits_per_dim"], rel=1e-5)


@pytest.mark.parametrize("size", ["3", "50"])
def test_batches_change_nothing(
    place: Path, one_by_one: Path, alone: dict[str, Any], tmp_path: Path, size: str
) -> None:
    found = measure(place, tmp_path, "--batch_size", size)
    np.testing.assert_allclose(found["by_image"], alone["by_image"], rtol=2e-5)
    for name in ("vb", "mse", "xstart_mse"):
        with np.load(tmp_path / f"{name}_terms.npz") as a, np.load(one_by_one / f"{name}_terms.npz") as b:
            np.testing.assert_allclose(a["arr_0"], b["arr_0"], rtol=1e-4, atol=1e-6)


def test_classes_of_a_part_of_the_folders_go_by_name(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders seven and three of ten classes: measured as with their numbers in a table, refused under another name."""
    names = tuple("zero one two three four five six seven eight nine".split())
    gd.save(replace(gd.load(f"{place}/model"), class_names=names), str(tmp_path / "model"))
    for number in (3, 7):
        shutil.copytree(place / "digits" / str(number), tmp_path / "digits" / names[number])
    pictures = sorted((tmp_path / "digits").glob("*/*.png"))

    def found(*labels: int) -> list[float]:
        """Of each picture; `labels` are the numbers of classes seven and three, else the folders' names count."""
        words = ["--timestep_respacing", "4"]
        if labels:
            rows = [f"{path.parent.name}/{path.name},{labels[path.parent.name == 'three']}" for path in pictures]
            (tmp_path / "labels.csv").write_text("\n".join(["path,class", *rows]))
            words += ["--labels", str(tmp_path / "labels.csv")]
        return measure(tmp_path, tmp_path / "out", *words)["by_image"]

    assert found() == found(7, 3) != found(0, 1)
    assert "classes go by name: seven is 7, three is 3 (2)" in capsys.readouterr().out
    (tmp_path / "digits" / "three").rename(tmp_path / "digits" / "drei")
    assert main(["nll", "--model_path", f"{tmp_path}/model", "--data_dir", f"{tmp_path}/digits"]) == 2
    assert "has the classes drei (1), which" in capsys.readouterr().err


def test_another_seed_measures_other_images(place: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    assert measure(place, tmp_path, "--seed", "1")["by_image"] != alone["by_image"]


def test_equal_noise_gives_what_the_old_loop_gives(place: Path) -> None:
    """`GaussianDiffusion.calc_bpd_loop` draws its noise step by step from the global generator; ours is handed the same."""
    from guided_diffusion.data.images import to_float
    from guided_diffusion.diffusion.likelihood import bits_per_dim
    from guided_diffusion.script_util import create_gaussian_diffusion

    model = gd.load(f"{place}/model")
    old = create_gaussian_diffusion(steps=STEPS, learn_sigma=True, noise_schedule="cosine")
    x0 = to_float(torch.from_numpy(np.random.RandomState(0).randint(0, 256, (3, 8, 8, 1)).astype(np.uint8)))
    y = torch.tensor([1, 2, 3])
    torch.manual_seed(5)
    expected = old.calc_bpd_loop(model.net, x0, clip_denoised=True, model_kwargs={"y": y})
    torch.manual_seed(5)
    denoise = gd.make_denoiser(model.net, model.process, {"y": y}, clip=True, **model.config.diffusion.reading)
    found = bits_per_dim(denoise, model.process, x0)
    names = {"total": "total_bpd", "prior": "prior_bpd", "vb": "vb", "eps_mse": "mse", "x0_mse": "xstart_mse"}
    for ours, theirs in names.items():
        torch.testing.assert_close(getattr(found, ours), expected[theirs], rtol=1e-5, atol=1e-6)


def test_half_precision_stays_close(place: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    found = measure(place, tmp_path, "--precision", "bf16")["by_image"]
    assert np.isfinite(found).all() and found != alone["by_image"]
    np.testing.assert_allclose(found, alone["by_image"], rtol=0.03)


def test_the_prior_lies_within_what_the_process_allows(place: Path, tmp_path: Path) -> None:
    """No pixel lies outside [-1, 1], and the prior of the process alone is largest there."""
    model = gd.load(f"{place}/model")
    found = measure(place, tmp_path, "--num_samples", "3")
    prior = found["breakdown"]["prior"]
    # Of this process alone: the KL between q(x_T | x0) and a standard normal, in bits.
    alpha_bar = float(model.process.alpha_bar[-1])
    highest = 0.5 * (alpha_bar * 1.0 + (1 - alpha_bar) - 1 - np.log(1 - alpha_bar)) / np.log(2)
    assert 0 < prior <= highest * (1 + 1e-6)


def test_more_images_than_there_are(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(place, tmp_path, "--num_samples", "99", "--batch_size", "30", "--timestep_respacing", "3")
    assert found["images"] == 30 and "has 30 images: each is used once" in capsys.readouterr().out


def test_mistakes_are_told(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nll", "--model_path", f"{place}/model"]) == 2
    assert "--data_dir is empty" in capsys.readouterr().err
    gd.save(filled("classifier", CRITIC), str(tmp_path / "classifier"))
    assert main(["nll", "--model_path", f"{tmp_path}/classifier", "--data_dir", f"{place}/digits"]) == 2
    assert "is a classifier; a diffusion model is needed here" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["random_crop True", "random_flip True", "val_data_dir elsewhere", "val_fraction 0.5"])
def test_flags_of_training_are_refused(flag: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"nll --model_path {place}/model --data_dir {place}/digits --{flag}".split()
    assert main(command) == 2
    assert f"--{flag.split()[0]} is " in (error := capsys.readouterr().err) and "is for training" in error


def test_flags_of_training_that_ask_for_nothing_are_accepted(place: Path, tmp_path: Path, one_by_one: Path) -> None:
    """As they stand in the summary of an earlier measurement, which `--config` reads."""
    off = "--random_crop False --random_flip False --val_fraction 0 --timestep_respacing 3"
    assert measure(place, tmp_path, *off.split(), "--val_data_dir", "")["images"] == 7


@pytest.mark.parametrize(("value", "batch_size"), [(np.nan, "1"), (np.inf, "3")])
def test_the_image_whose_bound_is_not_finite_is_named(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    batch_size: str,
) -> None:
    from PIL import Image

    from guided_diffusion.diffusion import likelihood

    Image.new("L", (8, 8), 255).save(tmp_path / "3_white.png")
    for k in range(4):
        Image.new("L", (8, 8), 10 * k).save(tmp_path / f"{k}_dark.png")

    def walked(denoise: Any, process: Any, x0: torch.Tensor, **options: Any) -> Any:
        bound = bits_per_dim(denoise, process, x0, **options)
        bound.eps_mse[x0.mean(dim=(1, 2, 3)) > 0.9, STEPS - 4 :] = value
        return bound

    bits_per_dim = likelihood.bits_per_dim
    monkeypatch.setattr(likelihood, "bits_per_dim", walked)
    command = f"nll --model_path {place}/model --data_dir {tmp_path} --device cpu --num_samples 5".split()
    assert main([*command, "--batch_size", batch_size, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert (
        "3_white.png: its values are not finite" in told
        and "timestep 3 of the process; all weights are finite\n" in told
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["diffusion", "classifier"])
def test_weights_that_are_not_finite_give_no_number(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    small = {"image_size": 8, "classifier_width": 32, "classifier_depth": 1, "classifier_attention_resolutions": "4"}
    same = {"image_channels": 1, "num_classes": 10, "diffusion_steps": STEPS, "noise_schedule": "cosine"}
    config = RunConfig.from_flags(kind, NETWORK if kind == "diffusion" else {**small, **same})
    net = build.build_network(config.model, config.diffusion, seed=0)
    with torch.no_grad():
        net.time_embed[0].bias[5] = np.nan
    gd.save(Loaded(net, build.build_process(config.diffusion), config, "", tuple("0123456789")), str(tmp_path / "m"))
    commands = {
        "diffusion": ["nll", "--model_path", f"{tmp_path}/m", "--data_dir", f"{place}/digits", "--num_samples", "2"],
        "classifier": ["features", f"{place}/digits", "--classifier_path", f"{tmp_path}/m"],
    }
    assert main([*commands[kind], "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert "hold 1 such values in time_embed.0.bias: take another file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_features_of_files_that_are_no_samples(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gd.save(filled("classifier", {**CRITIC, "image_channels": 1, "num_classes": 10}), str(tmp_path / "classifier"))
    images = np.zeros((3, 8, 8, 1), np.uint8)

    def run(*arrays: np.ndarray, **named: np.ndarray) -> tuple[int, str]:
        np.savez(tmp_path / "x.npz", *arrays, **named)
        if not arrays and not named:
            (tmp_path / "x.npz").write_bytes(b"PK cut off")
        words = ["features", f"{tmp_path}/x.npz", "--classifier_path", f"{tmp_path}/classifier", "--device", "cpu"]
        return main([*words, "--out", str(tmp_path / "out.npz")]), capsys.readouterr().err

    for arrays, named, words in (
        ((), {}, "x.npz cannot be read as an npz of samples"),
        ((), {"images": images}, "it has images and no arr_0"),
        ((images, np.array([0, 1])), {}, "3 images and labels arr_1 of shape [2]"),
        ((images, np.array([0, 1, 0.5])), {}, "labels are whole numbers"),
        ((images[:0],), {}, "holds uint8 images [0, 8, 8, 1]; the model takes uint8 images [N, 8, 8, 1]"),
        ((images / 255,), {}, "holds float64 images [3, 8, 8, 1]"),
    ):
        code, told = run(*arrays, **named)
        assert code == 2 and words in told, told
    assert run(images, np.array([4, 0, 9]))[0] == 0
    assert np.load(tmp_path / "out.npz")["arr_1"].tolist() == [4, 0, 9]


def test_one_image_has_no_error_bar(place: Path, tmp_path: Path) -> None:
    command = ["nll", "--model_path", f"{place}/model", "--data_dir", f"{place}/digits", "--timestep_respacing", "2"]
    assert main([*command, "--num_samples", "1", "--out", str(tmp_path)]) == 0
    assert np.isnan(bounds.standard_error(np.array([3.0])))


@pytest.mark.slow
def test_the_script_of_2021_and_two_processes(place: Path, one_by_one: Path, tmp_path: Path) -> None:
    flags = (
        "--image_size 8 --image_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 4 "
        f"--learn_sigma True --class_cond True --diffusion_steps {STEPS} --noise_schedule cosine "
    )
    (tmp_path / "mine.pt").write_bytes((place / "model" / "model000000.pt").read_bytes())
    words = (
        f"--model_path mine.pt --data_dir {place}/digits --num_samples 7 --batch_size 2 --clip_denoised True {flags}"
    )
    told = run_script("image_nll", words, tmp_path, OPENAI_LOGDIR=str(tmp_path / "logs"))
    assert "bpd=" in told and (tmp_path / "logs" / "vb_terms.npz").exists()
    run_script("image_nll", words + "--out two", tmp_path, before=TORCHRUN)
    before = json.loads((one_by_one / "likelihood.json").read_text())["by_image"]
    for folder in ("logs", "two"):
        found = json.loads((tmp_path / folder / "likelihood.json").read_text())
        np.testing.assert_allclose(found["by_image"], before, rtol=2e-5)
        with np.load(tmp_path / folder / "vb_terms.npz") as a, np.load(one_by_one / "vb_terms.npz") as b:
            np.testing.assert_allclose(a["arr_0"], b["arr_0"], rtol=1e-4, atol=1e-6)
