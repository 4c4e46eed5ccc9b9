"""The scripts as a user runs them: real images in, checkpoints and samples out."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, TORCHRUN, mpiexec, run_script

NETWORK = "--image_size 8 --image_channels 1 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 4 "
DIFFUSION = "--learn_sigma True --noise_schedule cosine --diffusion_steps 100 "
CLASSIFIER = (
    "--image_size 8 --image_channels 1 --classifier_width 32 --classifier_depth 1 --classifier_num_head_channels 32 "
)
SIX_STEPS = f"{NETWORK}{DIFFUSION}--class_cond True --lr_anneal_steps 6 --lr 1e-3 --ema_rate 0.5,0.9 --log_interval 2 "


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real handwritten digits, one folder per class, and a few held out."""
    datasets = pytest.importorskip("sklearn.datasets")
    root = tmp_path_factory.mktemp("digits")
    found = datasets.load_digits()
    for n, (pixels, label) in enumerate(zip(found.images[:220], found.target)):
        path = root / ("val" if n % 5 == 0 else "train") / f"digit{label}" / f"{n:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="session")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion model and a classifier, trained for a few steps."""
    root = tmp_path_factory.mktemp("trained")
    words = f"--data_dir {digits}/train {SIX_STEPS}--batch_size 8 --save_interval 3 --sample_interval 6 --out diffusion"
    run_script("image_train", words, root)
    words = (
        f"--data_dir {digits}/train --val_data_dir {digits}/val {CLASSIFIER}{DIFFUSION}--batch_size 8 --iterations 6 "
    )
    words += "--anneal_lr True --save_interval 3 --log_interval 3 --eval_interval 3 --out classifier"
    run_script("classifier_train", words, root)
    return root


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `scripts/NAME.py` in this process, which is far quicker; returns everything it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(name: str, words: str, *, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words.split()])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
        printed = "".join(capfd.readouterr())
        assert ended.value.code == code, printed
        return printed

    return run


def both(trained: Path, steps: int) -> str:
    """Flags that name the two networks and how many steps to sample."""
    return f"--model_path {trained}/diffusion --classifier_path {trained}/classifier --timestep_respacing {steps} "


def samples(folder: Path) -> tuple[np.ndarray, Any]:
    """Images and classes, if any, of the one file of samples, whose name says its shape."""
    (path,) = folder.glob("samples_*.npz")
    with np.load(path) as found:
        images, labels = found["arr_0"], found.get("arr_1")
    assert path.stem == "samples_" + "x".join(map(str, images.shape)) and images.dtype == np.uint8
    return images, labels


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_training_leaves_the_files_of_2021_and_their_meaning(trained: Path) -> None:
    run = trained / "diffusion"
    names = "model000003.pt ema_0.5_000006.pt ema_0.9_000006.pt opt000006.pt progress.csv samples_000006.png"
    assert set(names.split()) <= {path.name for path in run.iterdir()}
    told = json.loads((run / "run000006.json").read_text())
    assert told["config"]["model"]["num_classes"] == 10 and told["class_names"] == [f"digit{k}" for k in range(10)]
    assert {"step", "samples", "loss", "mse", "vb", "grad_norm", "param_norm"} <= set(rows(run)[0])
    assert [row["step"] for row in rows(run)] == ["2", "4", "6"]
    assert json.loads((run / "config.json").read_text())["train"]["lr_anneal_steps"] == 6


def test_classifier_training_reports_accuracy(trained: Path) -> None:
    last = rows(trained / "classifier")[-1]
    columns = "train_loss train_acc@1 train_acc@5 train_acc@1_q0 val_loss val_acc@1 val_acc@5"
    assert set(columns.split()) <= set(last)
    # By quarter of the noise steps, accuracy lies around that of all of them.
    quarters = [float(last[name]) for name in (f"val_acc@1_q{q}" for q in range(4)) if last.get(name)]
    assert quarters and min(quarters) <= float(last["val_acc@1"]) <= max(quarters)
    by_noise = json.loads((trained / "classifier" / "accuracy_by_noise.json").read_text())
    assert len(by_noise) == 10 and all(0 <= value <= 1 for value in by_noise.values())


def test_guided_samples_without_any_flag_of_the_networks(trained: Path, tmp_path: Path) -> None:
    words = both(trained, 5) + "--num_samples 10 --batch_size 4 --classifier_scale 2 --out s"
    told = run_script("classifier_sample", words, tmp_path)
    assert "EMA weights (decay 0.9)" in told and "guided by" in told
    images, labels = samples(tmp_path / "s")
    assert images.shape == (10, 8, 8, 1) and labels.shape == (10,) and labels.min() >= 0 and labels.max() < 10
    assert (tmp_path / "s" / "samples.png").exists()


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_samples_do_not_depend_on_the_batch_size(
    trained: Path, tmp_path: Path, script: Callable[..., str], sampler: str
) -> None:
    """Equal up to the order of sums: at most one grey level of 256 in a few pixels."""
    made = []
    for size in (1, 3, 8):
        words = both(trained, 5).replace("diffusion ", "diffusion/model000006.pt ")
        script("classifier_sample", f"{words} --sampler {sampler} --num_samples 7 --batch_size {size} --out s{size}")
        made.append(samples(tmp_path / f"s{size}"))
    first, first_labels = made[0]
    for pixels, labels in made[1:]:
        assert np.abs(pixels.astype(int) - first).max() <= 1 and (pixels != first).mean() < 0.02
        np.testing.assert_array_equal(labels, first_labels)


def test_chosen_and_balanced_classes(trained: Path, tmp_path: Path, script: Callable[..., str]) -> None:
    words = f"--model_path {trained}/diffusion --timestep_respacing 2 --num_samples 6 --classes digit3,7 --labels balanced --out s"
    script("image_sample", words)
    assert samples(tmp_path / "s")[1].tolist() == [3, 7, 3, 7, 3, 7]


def test_openai_logdir_names_the_folder(
    trained: Path, tmp_path: Path, script: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "logs"))
    told = script("image_sample", f"--model_path {trained}/diffusion --num_samples 2 --timestep_respacing 2")
    assert "OPENAI_LOGDIR" in told and (tmp_path / "logs" / "samples_2x8x8x1.npz").exists()


def test_a_bare_file_and_the_flags_of_2021(trained: Path, tmp_path: Path, script: Callable[..., str]) -> None:
    """A weights file without its JSON, as 2021 code wrote it, with the command line that was needed then."""
    shutil.copy(trained / "diffusion" / "ema_0.9_000006.pt", tmp_path / "mine.pt")
    shutil.copy(trained / "classifier" / "model000006.pt", tmp_path / "classifier.pt")
    making = "--num_samples 3 --batch_size 3 --timestep_respacing 3 "
    flags = f"{NETWORK}{DIFFUSION}{CLASSIFIER}--class_cond True {making}"
    script("classifier_sample", f"--model_path mine.pt --classifier_path classifier.pt {flags} --out bare")
    script("classifier_sample", f"{both(trained, 3)} {making} --out known")
    np.testing.assert_array_equal(samples(tmp_path / "bare")[0], samples(tmp_path / "known")[0])


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("classifier_sample", "--model_path {t}/diffusion", "--classifier_path is empty"),
        ("image_sample", "--model_path {t}/diffusion --num_heads 2", "the file has num_heads 4; you asked for 2"),
        ("image_sample", "--model_path {t}/classifier", "is a classifier; a diffusion model is needed"),
        ("image_sample", "--model_path {t}/diffusion --classes 10", "numbers 0 to 9"),
        ("image_train", "--data_dir {t}/nowhere", "no such folder"),
        ("image_train", "--data_dir {t} --num_channel 3", "did you mean --num_channels?"),
    ],
)
def test_mistakes_are_told_in_one_line(
    trained: Path, script: Callable[..., str], name: str, words: str, message: str
) -> None:
    told = script(name, words.format(t=trained) + " --out out", code=2)
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in told


def test_a_run_goes_on_without_its_flags(trained: Path, tmp_path: Path, script: Callable[..., str]) -> None:
    """Six steps at once and three, then three more, end in the same weights; the second call repeats no network flag."""
    shutil.copytree(trained / "diffusion", tmp_path / "again", ignore=shutil.ignore_patterns("*000006*", "run.lock"))
    told = run_script("image_train", "--out again --log_interval 2", tmp_path)
    assert "at step 3" in told
    folders = (trained / "diffusion", tmp_path / "again")
    one, two = (torch.load(folder / "model000006.pt", weights_only=True) for folder in folders)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    told = script("image_train", "--out again --num_channels 64", code=2)
    assert "the file has num_channels 32; you asked for 64" in told


def test_two_processes_train_what_one_does(digits: Path, trained: Path, tmp_path: Path) -> None:
    """The same global batch on two ranks of mpiexec: the same losses and gradients, quartile by quartile."""
    words = f"--data_dir {digits}/train {SIX_STEPS}--batch_size 4 --save_interval 6 --out two"
    told = run_script("image_train", words, tmp_path, before=mpiexec())
    assert "global batch size 8: 4 on each of 2 processes" in told
    # Figures, not weights: Adam turns the sign of a gradient that is zero but for rounding into a whole step.
    for one, two in zip(rows(trained / "diffusion"), rows(tmp_path / "two"), strict=True):
        assert one["step"] == two["step"] and one["samples"] == two["samples"]
        for column in ("loss", "mse", "grad_norm", "param_norm", "mse_q0", "mse_q3"):
            pair = one[column], two[column]
            assert pair == ("", "") or float(pair[0]) == pytest.approx(float(pair[1]), rel=1e-3), column


def test_two_processes_sample_what_one_does(trained: Path, tmp_path: Path, script: Callable[..., str]) -> None:
    words = both(trained, 3) + "--num_samples 7 --batch_size 3 --out "
    script("classifier_sample", words + "one")
    run_script("classifier_sample", words + "two", tmp_path, before=TORCHRUN)
    for one, two in zip(samples(tmp_path / "one"), samples(tmp_path / "two")):
        np.testing.assert_array_equal(one, two)


def test_asked_to_stop_it_saves_and_says_start_me_again(digits: Path, tmp_path: Path) -> None:
    """SIGTERM, as a cluster sends it before the time is up: exit code 85, and the same command goes on."""
    words = f"--data_dir {digits}/train {NETWORK}{DIFFUSION}--batch_size 4 --log_interval 1 --max_steps 100000 --out stopped"
    command = [sys.executable, str(ROOT / "scripts" / "image_train.py"), *words.split()]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("| step"):
            child.send_signal(signal.SIGTERM)
            break
    rest = child.stdout.read()
    assert child.wait(timeout=120) == 85 and "the same command goes on" in rest
    step = json.loads(next((tmp_path / "stopped").glob("run*.json")).read_text())["step"]
    told = run_script("image_train", f"--out stopped --max_steps {step + 1}", tmp_path)
    assert f"at step {step}" in told


def test_a_mistake_on_two_processes_is_a_line_each(trained: Path, tmp_path: Path) -> None:
    words = f"--model_path {trained}/diffusion --classes 99"
    told = run_script("image_sample", words, tmp_path, code=1, before=TORCHRUN)
    lines = [line for line in told.splitlines() if "error: --classes has '99'" in line]
    assert 1 <= len(lines) <= 2 and "choose_classes" not in told


def test_grey_images_that_are_not_square(digits: Path, tmp_path: Path, script: Callable[..., str]) -> None:
    words = f"--data_dir {digits}/train {NETWORK}--image_width 16 {DIFFUSION}--batch_size 4 --max_steps 1 --out wide"
    script("image_train", words)
    script("image_sample", "--model_path wide --num_samples 2 --timestep_respacing 2 --out s")
    assert samples(tmp_path / "s")[0].shape == (2, 8, 16, 1)
