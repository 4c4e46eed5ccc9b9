"""Upsampling and the cascade: real small images in, labels kept, guidance, resumption, clear refusals."""

from __future__ import annotations

import json
import shlex
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import filled
from PIL import Image
from processes import TORCHRUN, run_script

import guided_diffusion as gd
from guided_diffusion.cli import upsample
from guided_diffusion.cli.main import main
from guided_diffusion.data.images import center_crop, low_res, to_float
from guided_diffusion.data.samples import open_images
from guided_diffusion.diffusion.process import add_noise
from guided_diffusion.sampling.pipeline import NOISE_OF_UPSAMPLERS

SIDES = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_heads": 2, "diffusion_steps": 100}
KNOWS = {"class_cond": True, "num_classes": 2, "learn_sigma": True}
BASE = {**SIDES, **KNOWS, "image_size": 8, "attention_resolutions": "4"}
LARGE = {**SIDES, **KNOWS, "large_size": 16, "small_size": 8, "attention_resolutions": "8", "resblock_updown": True}
CLASSIFIER = {
    "image_size": 16, "classifier_width": 32, "classifier_depth": 1, "classifier_attention_resolutions": "8",
    "classifier_channel_mult": "1,2", "classifier_num_head_channels": 32, "num_classes": 2, "diffusion_steps": 100,
}  # fmt: skip


def save(folder: Path, kind: str, flags: dict[str, Any], names: tuple[str, ...] = ("china", "flower")) -> Path:
    gd.save(replace(filled(kind, flags), class_names=names), str(folder))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces of two real photographs, classes by prefix."""
    datasets = pytest.importorskip("sklearn.datasets")
    from PIL import Image

    root = tmp_path_factory.mktemp("photos")
    for name, photo in zip(("china", "flower"), datasets.load_sample_images().images):
        for k in range(12):
            Image.fromarray(photo[30 * k : 30 * k + 48, 40 * k : 40 * k + 48]).save(root / f"{name}_{k}.png")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save(root / "base", "diffusion", BASE)
    save(root / "large", "super_resolution", LARGE)
    save(root / "classifier", "classifier", CLASSIFIER)
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small images with labels, as sample commands write them."""
    path = tmp_path_factory.mktemp("small") / "samples_5x8x8x3.npz"
    pixels = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    np.savez(path, pixels, np.array([1, 0, 1, 1, 0]))
    return path


def enlarge(models: Path, base: Path, out: Path, *words: str, code: int = 0) -> np.lib.npyio.NpzFile:
    command = ["upsample", "--model_path", str(models / "large"), "--base_samples", str(base), "--out", str(out)]
    assert main([*command, "--timestep_respacing", "4", "--grid", "0", *words]) == code
    return np.load(next(out.glob("samples_*.npz"))) if not code else None


def test_labels_are_kept_and_every_small_image_is_enlarged(models: Path, small: Path, tmp_path: Path) -> None:
    found = enlarge(models, small, tmp_path, "--batch_size", "2")
    assert found["arr_0"].shape == (5, 16, 16, 3) and found["arr_0"].dtype == np.uint8
    assert found["arr_1"].tolist() == [1, 0, 1, 1, 0]


def test_small_images_are_read_in_turn_again_and_again(models: Path, small: Path, tmp_path: Path) -> None:
    found = enlarge(models, small, tmp_path, "--num_samples", "7", "--batch_size", "3")
    assert found["arr_1"].tolist() == [1, 0, 1, 1, 0, 1, 0]
    again = open_images(str(small), 8, 3).low_res([0, 5, 6, 1])["low_res"]
    assert torch.equal(again[0], again[1]) and torch.equal(again[2], again[3])
    assert not np.array_equal(found["arr_0"][0], found["arr_0"][5])  # other noise


def test_conditions_are_the_small_images_themselves(small: Path) -> None:
    base = open_images(str(small), 8, 3)
    with np.load(small) as found:
        expected = found["arr_0"].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    torch.testing.assert_close(base.low_res(range(5))["low_res"], torch.from_numpy(expected))
    np.savez_compressed(small.parent / "packed.npz", np.load(small)["arr_0"])
    packed = open_images(str(small.parent / "packed.npz"), 8, 3)
    assert torch.equal(packed.low_res([4, 2])["low_res"], base.low_res([4, 2])["low_res"])
    assert packed.records.labels is None
    named = open_images(str(shutil.copy(small, small.parent / "of another name")), 8, 3)
    assert torch.equal(named.low_res([4, 2])["low_res"], base.low_res([4, 2])["low_res"])


@pytest.mark.parametrize("name", ["pictures.zip", "pictures of no ending"])
def test_an_archive_of_pictures_is_read_as_training_reads_it(tmp_path: Path, name: str) -> None:
    picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(picture).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.write(tmp_path / "a.png", "cat/a.png")
    images = open_images(str(tmp_path / name), 8, 3)
    assert len(images) == 1 and np.array_equal(images.read(0), picture)


@pytest.mark.parametrize("sampler", [["--use_ddim", "True"], [], ["--sampler", "heun"]])
def test_images_do_not_depend_on_the_batch_size(models: Path, small: Path, tmp_path: Path, sampler: list[str]) -> None:
    one = enlarge(models, small, tmp_path / "one", "--batch_size", "1", *sampler)["arr_0"].astype(int)
    five = enlarge(models, small, tmp_path / "five", "--batch_size", "5", *sampler)["arr_0"].astype(int)
    assert np.abs(one - five).max() <= 1 and (one != five).mean() < 0.02


def test_ddim_is_honoured(models: Path, small: Path, tmp_path: Path) -> None:
    """DDIM without noise: what comes out is the sampler applied to the first noise, step by step."""
    made = enlarge(models, small, tmp_path, "--use_ddim", "True", "--batch_size", "5")["arr_0"]
    model = gd.load(str(models / "large"), flags={"timestep_respacing": "4"})
    from guided_diffusion.runtime.streams import SAMPLE, Streams, key_of

    noise = Streams(key_of(0, NOISE_OF_UPSAMPLERS), SAMPLE, ids=range(5)).normal((3, 16, 16))
    cond = {**open_images(str(small), 8, 3).low_res(range(5)), "y": torch.tensor([1, 0, 1, 1, 0])}
    denoise = gd.make_denoiser(model.net, model.process, cond, **model.config.diffusion.reading)
    images = gd.last(gd.ddim(denoise, noise, model.process))
    expected = ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    # The command lays its weights out for convolutions, this loop does not: other sums, rounded otherwise by each processor.
    difference = np.abs(made.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def test_base_and_upsampler_do_not_begin_with_the_same_noise(models: Path) -> None:
    from guided_diffusion.runtime.streams import SAMPLE, Streams, key_of

    base = Streams(0, SAMPLE, ids=[0]).normal((3, 8, 8)).flatten()
    large = Streams(key_of(0, NOISE_OF_UPSAMPLERS), SAMPLE, ids=[0]).normal((3, 16, 16)).flatten()
    assert abs(float((base * large[: len(base)]).mean())) < 0.3 and not torch.equal(base, large[: len(base)])


def test_guidance_changes_the_images_and_wants_the_large_size(models: Path, small: Path, tmp_path: Path) -> None:
    plain = enlarge(models, small, tmp_path / "plain")["arr_0"]
    words = ["--classifier_path", str(models / "classifier"), "--classifier_scale"]
    guided = enlarge(models, small, tmp_path / "guided", *words, "20")
    assert not np.array_equal(plain, guided["arr_0"]) and guided["arr_1"].tolist() == [1, 0, 1, 1, 0]
    np.testing.assert_array_equal(plain, enlarge(models, small, tmp_path / "zero", *words, "0")["arr_0"])


def test_a_classifier_of_the_small_size_is_refused(
    models: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {**CLASSIFIER, "image_size": 8, "classifier_attention_resolutions": "4"}
    save(tmp_path / "classifier8", "classifier", flags)
    enlarge(models, small, tmp_path / "out", "--classifier_path", str(tmp_path / "classifier8"), code=2)
    assert "they differ in image size" in capsys.readouterr().err


def test_an_interrupted_job_makes_only_what_is_missing(
    models: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = enlarge(models, small, tmp_path / "whole", "--batch_size", "2")["arr_0"]
    from guided_diffusion.sampling import queue

    made: list[int] = []
    real = queue.draw

    def stop_after_two(pipeline: Any, batch: Any, **options: Any) -> Any:
        if len(made) == 2:
            raise OSError("the machine is gone")
        made.append(len(batch))
        return real(pipeline, batch, **options)

    with monkeypatch.context() as patched:
        patched.setattr(queue, "draw", stop_after_two)
        enlarge(models, small, tmp_path / "cut", "--batch_size", "2", code=2)
    assert not list((tmp_path / "cut").glob("samples_*.npz"))
    np.testing.assert_array_equal(whole, enlarge(models, small, tmp_path / "cut", "--batch_size", "2")["arr_0"])


def test_a_folder_of_pictures_is_enlarged_with_its_classes(models: Path, photos: Path, tmp_path: Path) -> None:
    found = enlarge(models, photos, tmp_path)
    assert found["arr_0"].shape == (24, 16, 16, 3)
    assert found["arr_1"].tolist() == [0] * 12 + [1] * 12


def test_classes_go_by_name(photos: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder that lacks one, and of samples whose receipt has them in another order; a strange one is refused by name."""
    save(tmp_path / "large", "super_resolution", {**LARGE, "num_classes": 3}, ("bird", "china", "flower"))
    for name in ("china", "flower"):
        (tmp_path / "some" / name).mkdir(parents=True)
        shutil.copy(photos / f"{name}_0.png", tmp_path / "some" / name)
    assert enlarge(tmp_path, tmp_path / "some", tmp_path / "a")["arr_1"].tolist() == [1, 2]

    (tmp_path / "made").mkdir()
    base = shutil.copy(small, tmp_path / "made" / small.name)
    receipt = tmp_path / "made" / "sampling.json"
    receipt.write_text(json.dumps({"file": small.name, "class_names": ["flower", "bird"]}))
    assert enlarge(tmp_path, base, tmp_path / "b")["arr_1"].tolist() == [0, 2, 0, 0, 2]

    receipt.write_text(json.dumps({"file": small.name, "class_names": ["flower", "tree"]}))
    enlarge(tmp_path, base, tmp_path / "c", code=2)
    (tmp_path / "some" / "china").rename(tmp_path / "some" / "tree")
    enlarge(tmp_path, tmp_path / "some", tmp_path / "c", code=2)
    assert capsys.readouterr().err.count("has the classes tree (1), which") == 2


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ([np.zeros((2, 16, 16, 3), np.uint8)], r"holds uint8 images \[2, 16, 16, 3\]; the model takes uint8"),
        ([np.zeros((2, 8, 8, 3), np.float32)], "holds float32 images"),
        ([np.zeros((2, 8, 8, 3), np.uint8)], r"has no labels \(arr_1\), and the networks need classes; give --classes"),
        (
            [np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 7])],
            r"--base_samples \S+ has the label 7; the networks know the classes 0 to 1",
        ),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.array([0])], r"2 images and labels arr_1 of shape \[1\]"),
        (
            [np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 0.5])],
            r"of shape \[2\] and type float64; labels are whole numbers",
        ),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.array(["a", "b"])], "and type <U1; labels are whole numbers"),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.eye(2, dtype=int)], r"arr_1 of shape \[2, 2\]"),
        ([np.array([{"a": 1}], dtype=object)], "cannot be read as an npz of samples"),
    ],
)
def test_unsuitable_small_images_are_refused_in_words(
    models: Path, tmp_path: Path, arrays: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    np.savez(tmp_path / "base.npz", *arrays)
    enlarge(models, tmp_path / "base.npz", tmp_path / "out", code=2)
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and re.search(words, errors[0])


def test_classes_can_be_given_where_small_images_have_none(models: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "base.npz", np.zeros((3, 8, 8, 3), np.uint8))
    found = enlarge(models, tmp_path / "base.npz", tmp_path / "out", "--classes", "flower")
    assert found["arr_1"].tolist() == [1, 1, 1]


def test_kinds_are_not_confused(models: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path / "x")]
    assert main(["sample", "--model_path", str(models / "large"), *words]) == 2
    assert "is an upsampler; a diffusion model is needed here" in capsys.readouterr().err
    assert main(["upsample", "--model_path", str(models / "base"), "--base_samples", str(small), *words]) == 2
    assert "is a diffusion model; an upsampler is needed here" in capsys.readouterr().err
    assert main(["upsample", "--model_path", str(models / "large"), *words]) == 2
    assert "--base_samples is empty" in capsys.readouterr().err


def test_cascade_is_the_two_commands_in_one(models: Path, tmp_path: Path) -> None:
    shared = ["--num_samples", "5", "--timestep_respacing", "3", "--seed", "4", "--grid", "0"]
    first = ["--model_path", str(models / "base"), *shared, "--batch_size", "5"]
    second = ["--upsampler_timestep_respacing", "4", "--upsampler_use_ddim", "True", "--upsampler_batch_size", "3"]
    guide = ["--upsampler_classifier_path", str(models / "classifier"), "--upsampler_classifier_scale", "5"]
    command = ["cascade", *first, "--upsampler_path", str(models / "large"), *second, *guide]
    assert main([*command, "--out", str(tmp_path / "both")]) == 0

    assert main(["sample", *first, "--out", str(tmp_path / "s")]) == 0
    words = ["--use_ddim", "True", "--timestep_respacing", "4", "--batch_size", "3", "--seed", "4", "--grid", "0"]
    words += ["--classifier_path", str(models / "classifier"), "--classifier_scale", "5"]
    enlarged = f"upsample --model_path {models}/large --base_samples {tmp_path}/s/samples_5x8x8x3.npz".split()
    assert main([*enlarged, *words, "--out", str(tmp_path / "u")]) == 0
    for one, other, name in (("base", "s", "samples_5x8x8x3.npz"), ("upsampled", "u", "samples_5x16x16x3.npz")):
        with np.load(tmp_path / "both" / one / name) as a, np.load(tmp_path / other / name) as b:
            np.testing.assert_array_equal(a["arr_0"], b["arr_0"])
            np.testing.assert_array_equal(a["arr_1"], b["arr_1"])

    before = (tmp_path / "both/base/samples_5x8x8x3.npz").stat().st_mtime_ns
    assert main([*command, "--out", str(tmp_path / "both")]) == 0  # nothing is made twice
    assert (tmp_path / "both/base/samples_5x8x8x3.npz").stat().st_mtime_ns == before


def test_cascade_tells_what_is_missing(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cascade", "--model_path", str(models / "base")]) == 2
    assert "--upsampler_path is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "steps", "respacing"),
    [
        ("--steps 5", 5, ""),
        ("--timestep_respacing 6", 0, "6"),
        ("--steps 5 --upsampler_timestep_respacing 4", 0, "4"),
        ("--timestep_respacing 5 --upsampler_flags '--steps 4'", 4, ""),
        ("--steps 5 --upsampler_flags=--timestep-respacing=7", 0, "7"),
        ("--steps 5 --upsampler_flags '--nodes 900,500,0'", 0, ""),
    ],
)
def test_each_stage_says_where_its_steps_are(words: str, steps: int, respacing: str) -> None:
    options = upsample.Cascade.of(
        upsample.Cascade.flags(["--model_path", "a", "--upsampler_path", "b", *shlex.split(words)], "cascade")
    )
    second = upsample._upsampling_options(options)
    assert (second.steps, second.typed.get("timestep_respacing", "")) == (steps, respacing)


def test_what_is_given_to_cascade_wins_over_a_file_of_the_second_stage(tmp_path: Path) -> None:
    """A receipt holds a model, a seed and a number of images of its own; they count where cascade's command line is silent."""
    stored = {"model_path": "other.pt", "num_samples": 7, "seed": 5, "precision": "fp16", "eta": 0.25}
    (tmp_path / "file.json").write_text(json.dumps(stored))
    words = f"--model_path base --upsampler_path up --num_samples 3 --seed 1 --upsampler_flags '--config {tmp_path}/file.json'"
    asked = upsample.Cascade.of(upsample.Cascade.flags(shlex.split(words), "cascade"))
    second = upsample._upsampling_options(asked)
    assert (second.model_path, second.num_samples, second.seed) == ("up", 3, 1)
    assert (second.precision, second.eta) == ("fp16", 0.25)
    words = words.replace("--config", "--num_samples 4 --config")
    asked = upsample.Cascade.of(upsample.Cascade.flags(shlex.split(words), "cascade"))
    assert upsample._upsampling_options(asked).num_samples == 4


def test_how_both_stages_compute(tmp_path: Path) -> None:
    words = "--model_path base --upsampler_path up --deterministic True --compile False --cuda_graphs off"
    second = upsample._upsampling_options(upsample.Cascade.of(upsample.Cascade.flags(words.split(), "cascade")))
    assert (second.deterministic, second.compile, second.cuda_graphs, second.tf32) == (True, "off", "off", True)
    with pytest.raises(ValueError, match="--deterministic True computes without a compiler"):
        asked = upsample.Cascade.flags([*words.split(), "--upsampler_flags", "--compile on"], "cascade")
        upsample._upsampling_options(upsample.Cascade.of(asked))


def test_a_file_of_flags_runs_no_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "program.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for stored in ({"upsampler_flags": f"--import {tmp_path}/program.py"}, {"import": f"{tmp_path}/program.py"}):
        (tmp_path / "file.json").write_text(json.dumps(stored))
        assert main(f"cascade --config {tmp_path}/file.json --model_path a --upsampler_path b".split()) == 2
        assert "import" in capsys.readouterr().err and not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The scripts of 2021


NETWORK = (
    "--large_size 16 --small_size 8 --num_channels 32 --num_res_blocks 1 --num_heads 2 --num_heads_upsample -1 "
    "--num_head_channels -1 --attention_resolutions 8 --dropout 0.0 --class_cond True --use_checkpoint False "
    "--use_scale_shift_norm True --resblock_updown True --use_fp16 False --learn_sigma True --diffusion_steps 100 "
    "--noise_schedule linear --use_kl False --predict_xstart False --rescale_timesteps False --rescale_learned_sigmas False "
)
TRAIN = (
    "--schedule_sampler uniform --lr 1e-3 --weight_decay 0.0 --lr_anneal_steps 4 --batch_size 4 --microbatch 2 "
    "--ema_rate 0.9 --log_interval 2 --save_interval 2 --fp16_scale_growth 1e-3 "
)


@pytest.mark.slow
def test_the_scripts_of_2021_with_every_old_flag(photos: Path, small: Path, tmp_path: Path) -> None:
    words = f"--data_dir {photos} {NETWORK}{TRAIN}"
    told = run_script("super_res_train", words, tmp_path, OPENAI_LOGDIR=str(tmp_path / "run"))
    assert "OPENAI_LOGDIR" in told
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model000004.pt", "ema_0.9_000004.pt", "opt000004.pt", "progress.csv"} <= names
    words = f"{words.replace('steps 4', 'steps 6')} --resume_checkpoint {tmp_path}/run/model000004.pt"
    told = run_script("super_res_train", words, tmp_path, OPENAI_LOGDIR=str(tmp_path / "on"))
    assert "resuming from" in told and (tmp_path / "on" / "model000006.pt").exists()

    shutil.copy(tmp_path / "run" / "ema_0.9_000004.pt", tmp_path / "mine.pt")  # as 2021 code left it: no configuration
    sample = f"--clip_denoised True --num_samples 7 --batch_size 3 --timestep_respacing ddim5 --base_samples {small} "
    made = []
    for path, flags in (("mine.pt", NETWORK), (f"{tmp_path}/run", "")):
        out = tmp_path / f"made{len(made)}"
        words = f"--model_path {path} {sample}--use_ddim True {flags}"
        run_script("super_res_sample", words, tmp_path, OPENAI_LOGDIR=str(out))
        with np.load(out / "samples_7x16x16x3.npz") as found:
            made.append(found["arr_0"])
            assert found["arr_1"].tolist() == [1, 0, 1, 1, 0, 1, 0]
    np.testing.assert_array_equal(made[0], made[1])
    settings = json.loads((tmp_path / "made0" / "sampling.json").read_text())["settings"]
    assert settings["sampler"] == "ddim" and settings["steps"] == 5


@pytest.mark.slow
def test_two_processes_enlarge_what_one_does(models: Path, small: Path, tmp_path: Path) -> None:
    words = f"--model_path {models}/large --base_samples {small} --num_samples 7 --batch_size 2 --timestep_respacing 3 "
    run_script("super_res_sample", words + f"--out {tmp_path}/one", tmp_path)
    run_script("super_res_sample", words + f"--out {tmp_path}/two", tmp_path, before=TORCHRUN)
    one, two = (np.load(tmp_path / name / "samples_7x16x16x3.npz") for name in ("one", "two"))
    np.testing.assert_array_equal(one["arr_0"], two["arr_0"])
    np.testing.assert_array_equal(one["arr_1"], two["arr_1"])


def test_training_teaches_to_enlarge(photos: Path, tmp_path: Path) -> None:
    """After some steps the network uses what it is shown: with its own small image it predicts better than with another's."""
    flags = {**SIDES, "large_size": 16, "small_size": 8, "attention_resolutions": "8", "diffusion_steps": 100}
    words = [f"--{name}={value}" for name, value in {**flags, "channel_mult": "1,2", "learn_sigma": False}.items()]
    run = "--lr 5e-3 --batch_size 4 --lr_anneal_steps 150 --save_interval 150 --ema_rate 0.9 --log_interval 40".split()
    command = ["train-upsampler", "--data_dir", str(photos), *words, *run, "--labels", "none"]
    assert main([*command, "--out", str(tmp_path), "--progress", "False"]) == 0
    model = gd.load(str(tmp_path))
    pixels = [center_crop(np.asarray(Image.open(path).convert("RGB")), 16) for path in sorted(photos.iterdir())]
    x0 = to_float(torch.from_numpy(np.stack(pixels)))
    i = torch.full((len(x0),), 25)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    noisy = add_noise(model.process, x0, i, noise)
    shown = low_res(x0, 8)
    errors = [
        float((model.net(noisy, model.process.time_at(i), low_res=given) - noise).square().mean())
        for given in (shown, shown.roll(1, dims=0))
    ]
    assert errors[0] < 0.8 * errors[1], errors
