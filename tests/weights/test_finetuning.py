"""Training from a file: its configuration is taken, classes go by name, and only what may change does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import BASE, CRITIC, enter_as_released, filled, outputs
from PIL import Image

import guided_diffusion as gd
from guided_diffusion import build
from guided_diffusion.cli.main import main, script
from guided_diffusion.config import classes_of
from guided_diffusion.weights import convert
from guided_diffusion.weights.load import check_pair
from guided_diffusion.weights.runs import load_weights, save_run

CLASSES = ("ant", "bee", "cat", "dog")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "diffusion": ("train", BASE),
    "unconditional": ("train", {**BASE, "class_cond": False, "num_classes": 0}),
    "classifier": ("train-classifier", CRITIC),
    "super_resolution": ("train-upsampler", {**BASE, "large_size": 8, "small_size": 4}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`KIND/`: a save at step 5 of a run on the classes ant, bee, cat, dog; `KIND.safetensors`: the same in one file."""
    root = tmp_path_factory.mktemp("files")
    for name, (_, flags) in KINDS.items():
        kind = "diffusion" if name == "unconditional" else name
        loaded = filled(kind, flags)
        names = CLASSES if classes_of(loaded.config.model) else ()
        state = loaded.net.state_dict()
        ema = {"0.9": {key: value * 1.5 for key, value in state.items()}}
        about = {"config": loaded.config.to_dict(), "kind": kind, "class_names": names}
        save_run(str(root / name), step=5, model=state, ema=ema, **about)  # type: ignore[arg-type]
        raw = gd.load(str(root / name / "model000005.pt"))
        convert.save_file(raw, str(root / f"{name}.safetensors"), "safetensors")
    return root


def images_of(folder: Path, classes: str = "ant bee cat dog") -> str:
    for n, name in enumerate(classes.split()):
        (folder / name).mkdir(parents=True)
        for k in range(3):
            noise = np.random.RandomState(10 * n + k).randint(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(noise).save(folder / name / f"{k}.png")
    return str(folder)


FIXED = "--batch_size 2 --lr 0 --ema_rate 0.9 --device cpu".split()


def start(path: Path, more: str = "") -> list[str]:
    return ["--resume_checkpoint", str(path), *more.split()]


def run(command: str, data: str, out: Path, *words: str, steps: int = 1) -> Path:
    """Train with a learning rate of 0: the weights stay those of the start. Returns the path of the last weights."""
    more = ["--max_steps", str(steps), *([] if command == "train-classifier" else ["--sample_interval", "-1"])]
    assert main([command, "--data_dir", data, "--out", str(out), *FIXED, *more, "--progress", "False", *words]) == 0
    return out / f"model{steps:06d}.pt"


def stored(path: Path) -> dict[str, Any]:
    return json.loads((path.parent / path.name.replace("model", "run").replace(".pt", ".json")).read_text())


def assert_same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, expected[name]) for name, value in load_weights(str(path)).items())


def refused(capsys: pytest.CaptureFixture[str], command: str, data: str, out: Path, *words: str) -> str:
    assert main([command, "--data_dir", data, "--out", str(out), "--max_steps", "1", "--device", "cpu", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and not list(out.glob("model*"))
    return error


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_knows_itself_needs_no_flag(kind: str, place: Path, tmp_path: Path) -> None:
    data = images_of(tmp_path / "data")
    after = run(KINDS[kind][0], data, tmp_path / "out", "--resume_checkpoint", str(place / f"{kind}.safetensors"))
    before = gd.load(str(place / f"{kind}.safetensors"))
    config = stored(after)["config"]
    assert (config["model"], config["diffusion"]) == tuple(before.config.to_dict()[n] for n in ("model", "diffusion"))
    assert tuple(stored(after)["class_names"]) == before.class_names
    assert all(torch.equal(value, before.net.state_dict()[name]) for name, value in load_weights(str(after)).items())


@pytest.mark.parametrize(
    "words",
    ["--noise_schedule cosine", "--num_heads 4", "--predict v", "--num_channels 64", "--attention_resolutions 8,4",
     "--learn_sigma False", "--class_cond False", "--num_classes 5"],
)  # fmt: skip
def test_typed_flags_that_deny_the_file_are_refused(
    words: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = images_of(tmp_path / "data"), tmp_path / "out"
    flag = words.split()[0].removeprefix("--")
    for source in ("diffusion.safetensors", "diffusion", "diffusion/model000005.pt"):
        error = refused(capsys, "train", data, out, *words.split(), "--resume_checkpoint", str(place / source))
        assert "is another network than the flags say" in error and ("attention" in error or flag in error)


def test_flags_of_the_file_pass_and_what_may_change_does(place: Path, tmp_path: Path) -> None:
    data = images_of(tmp_path / "data")
    words = [w for name, value in BASE.items() for w in (f"--{name}", str(value))]
    more = start(place / "diffusion.safetensors", "--dropout 0.2 --precision bf16 --predict eps")
    after = run("train", data, tmp_path / "out", *words, *more)
    config = stored(after)["config"]
    assert config["model"]["dropout"] == 0.2 and config["train"]["precision"] == "bf16"


@pytest.mark.parametrize("kind", ["diffusion", "classifier", "super_resolution"])
def test_new_classes_keep_the_rows_of_the_same_name(kind: str, place: Path, tmp_path: Path) -> None:
    command, _ = KINDS[kind]
    data = images_of(tmp_path / "data", "bat bee dog")
    words = start(place / kind, "--new_classes True")
    after = run(command, data, tmp_path / "out", *words)
    assert (
        stored(after)["class_names"] == ["bat", "bee", "dog"] and stored(after)["config"]["model"]["num_classes"] == 3
    )
    before, now = load_weights(str(place / kind / "model000005.pt")), load_weights(str(after))
    other = {name for name, value in now.items() if value.shape != before[name].shape}
    assert other == ({"out.2.c_proj.weight", "out.2.c_proj.bias"} if kind == "classifier" else {"label_emb.weight"})
    assert all(torch.equal(value, before[name]) for name, value in now.items() if name not in other)
    for name in other:
        assert torch.equal(now[name][1:], before[name][[1, 3]])  # bee and dog
        assert not any(torch.equal(now[name][0], row) for row in before[name])
    # The same command again goes on with its own save and its own classes.
    again = run(command, data, tmp_path / "out", *words, steps=2)
    assert all(torch.equal(value, now[name]) for name, value in load_weights(str(again)).items())


def test_as_many_new_classes_are_still_new(place: Path, tmp_path: Path) -> None:
    data = images_of(tmp_path / "data", "bee cat dog eel")
    after = run("train", data, tmp_path / "out", *start(place / "diffusion", "--new_classes True"))
    rows = load_weights(str(after))["label_emb.weight"]
    before = filled("diffusion", BASE).net.state_dict()["label_emb.weight"]
    assert torch.equal(rows[:3], before[1:]) and not torch.equal(rows[3], before[0])


def test_classes_are_given_and_taken_away(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, source = images_of(tmp_path / "data"), str(place / "unconditional.safetensors")
    error = refused(capsys, "train", data, tmp_path / "no", "--resume_checkpoint", source, "--class_cond", "True")
    assert "the file has no classes" in error and "--new_classes True" in error
    after = run("train", data, tmp_path / "cond", "--resume_checkpoint", source, "--new_classes", "True")
    assert stored(after)["class_names"] == list(CLASSES)
    before, now = gd.load(source).net.state_dict(), load_weights(str(after))
    assert set(now) - set(before) == {"label_emb.weight"} and now["label_emb.weight"].shape[0] == 4
    words = start(place / "diffusion.safetensors", "--new_classes True --class_cond False")
    now = load_weights(str(run("train", data, tmp_path / "uncond", *words)))
    assert now.keys() == before.keys()


def test_another_image_size_keeps_the_levels(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = images_of(tmp_path / "data")
    after = run("train", data, tmp_path / "out", *start(place / "diffusion.safetensors", "--image_size 16"))
    model = stored(after)["config"]["model"]
    assert (model["image_size"], model["attention_resolutions"], model["channel_mult"]) == (16, "8", "1,2")
    before = gd.load(str(place / "diffusion.safetensors")).net.state_dict()
    assert_same(after, before)
    words = start(place / "super_resolution.safetensors", "--large_size 16 --small_size 8")
    model = stored(run("train-upsampler", data, tmp_path / "up", *words))["config"]["model"]
    assert (model["large_size"], model["small_size"], model["attention_resolutions"]) == (16, 8, "8")
    words = start(place / "classifier", "--image_size 16")
    assert "attention pool" in refused(capsys, "train-classifier", data, tmp_path / "no", *words)
    words = start(place / "diffusion", "--image_size 15")
    assert "15x15 cannot be halved" in refused(capsys, "train", data, tmp_path / "no", *words)


@pytest.mark.parametrize("which", ["ema", "model"])
def test_a_start_from_one_kind_of_weights_alone(which: str, place: Path, tmp_path: Path) -> None:
    data, source = images_of(tmp_path / "data"), place / "diffusion"
    expected = load_weights(str(source / ("ema_0.9_000005.pt" if which == "ema" else "model000005.pt")))
    after = run("train", data, tmp_path / "out", "--resume_checkpoint", str(source), "--resume_from", which)
    for path in (after, after.parent / "ema_0.9_000001.pt"):
        assert_same(path, expected)
    if which == "ema":  # the file itself says so too
        for k, more in enumerate(([], ["--resume_from", "ema"])):
            words = ["--resume_checkpoint", str(source / "ema_0.9_000005.pt"), *more]
            after = run("train", data, tmp_path / f"named{k}", *words)
            assert_same(after, expected)
    files = {"model": source / "model000005.pt", "ema": source / "ema_0.9_000005.pt"}
    both = {name: load_weights(str(path)) for name, path in files.items()}
    torch.save(both, tmp_path / "both.pt")
    flags = [w for name in ("diffusion_steps", "num_heads", "image_size") for w in (f"--{name}", str(BASE[name]))]
    table = tmp_path / "numbers.csv"
    table.write_text("".join(f"{name}/{k}.png,{n}\n" for n, name in enumerate(CLASSES) for k in range(3)))
    words = ["--resume_checkpoint", str(tmp_path / "both.pt"), "--weights", which, "--labels", str(table), *flags]
    after = run("train", data, tmp_path / "plain", *words, "--num_channels", "32")
    assert_same(after, expected)


def test_a_whole_save_of_another_run_is_continued(place: Path, tmp_path: Path) -> None:
    after = run("train", images_of(tmp_path / "data"), tmp_path / "out", *start(place / "diffusion"), steps=6)
    assert stored(after)["step"] == 6
    before = load_weights(str(place / "diffusion" / "ema_0.9_000005.pt"))
    now = load_weights(str(after.parent / "ema_0.9_000006.pt"))
    assert not torch.equal(now["out.2.bias"], before["out.2.bias"] / 1.5)


def test_a_whole_save_without_a_configuration_may_have_prefixed_names(place: Path, tmp_path: Path) -> None:
    """As programs that saved a wrapped network left it."""
    shutil.copytree(place / "diffusion", tmp_path / "again")
    for path in [*(tmp_path / "again").glob("ema_*.pt"), *(tmp_path / "again").glob("model*.pt")]:
        state = {
            f"module.{name}": value.clone() for name, value in load_weights(str(path)).items()
        }  # not of the mapped file
        torch.save(state, path)
    next((tmp_path / "again").glob("run*.json")).unlink()
    words = [f"--{name}={value}" for name, value in KINDS["diffusion"][1].items()]
    begin = start(tmp_path / "again" / "model000005.pt")
    after = run("train", images_of(tmp_path / "data"), tmp_path / "out", *begin, *words, steps=6)
    before = load_weights(str(place / "diffusion" / "model000005.pt"))
    assert_same(after, before)


def test_flags_about_a_start_need_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = images_of(tmp_path / "data"), tmp_path / "out"
    for words in (["--new_classes", "True"], ["--resume_from", "ema"], ["--weights", "model"]):
        assert "--resume_checkpoint" in refused(capsys, "train", data, out, *words)
    error = refused(capsys, "train", data, out, "--resume_from", "opt", "--resume_checkpoint", "x.pt")
    assert "--resume_from is 'opt'" in error


@pytest.mark.parametrize("name", ["64x64_diffusion", "64x64_classifier", "64_256_upsampler"])
def test_a_released_file_is_known_by_its_layout_and_name(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small network stands for the released one: its layout is entered as that one's."""
    kind = gd.presets.PRESETS[name].kind
    command, flags = KINDS[kind]
    flags = {**flags, "noise_schedule": "cosine"}
    released = filled(kind, flags)
    enter_as_released(monkeypatch, name, kind, {**flags, "num_classes": 4}, released)
    torch.save({"module." + k: v for k, v in released.net.state_dict().items()}, tmp_path / f"{name}.pt")
    source = ["--resume_checkpoint", str(tmp_path / f"{name}.pt")]
    after = run(command, images_of(tmp_path / "data"), tmp_path / "out", *source)  # four classes, as the file has
    assert stored(after)["config"]["diffusion"]["noise_schedule"] == "cosine"
    some = images_of(tmp_path / "some", "dog eel")
    error = refused(capsys, command, some, tmp_path / "no", *source)
    assert "dog, eel" in error and "4 classes without names" in error and "--new_classes True" in error
    after = run(command, some, tmp_path / "new", *source, "--new_classes", "True")
    assert stored(after)["class_names"] == ["dog", "eel"]
    numbers = images_of(tmp_path / "numbers", "1 3")
    assert stored(run(command, numbers, tmp_path / "numbered", *source))["class_names"] == list("0123")
    if kind != "classifier":  # which may learn from other noise
        error = refused(capsys, command, numbers, tmp_path / "no", *source, "--noise_schedule", "linear")
        assert "noise_schedule cosine" in error


def test_the_scripts_of_2021_start_the_same_way(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = images_of(tmp_path / "data")
    source = start(place / "diffusion.safetensors", "--sample_interval -1 --max_steps 1")
    words = ["--data_dir", data, *FIXED, *source, "--out", str(tmp_path / "out")]
    assert script("image_train", [*words, "--image_size", "8", "--num_channels", "32"]) == 0
    before = gd.load(str(place / "diffusion.safetensors"))
    assert torch.equal(outputs(gd.load(str(tmp_path / "out"))), outputs(before))
    assert script("image_train", [*words, "--out", str(tmp_path / "no"), "--noise_schedule", "cosine"]) == 2
    assert "noise_schedule linear; you asked for cosine" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Classes of a run that goes on


@pytest.mark.parametrize("kind", ["diffusion", "classifier", "super_resolution"])
def test_classes_of_a_run_keep_their_numbers(
    kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, _ = KINDS[kind]
    out = tmp_path / "out"
    run(command, images_of(tmp_path / "data"), out, "--resume_checkpoint", str(place / kind), "--resume_from", "model")
    seen: list[Any] = []
    monkeypatch.setattr(build, "build_batches", _noting(build.build_batches, seen))
    after = run(command, images_of(tmp_path / "fewer", "bee dog"), out, steps=2)
    assert stored(after)["class_names"] == list(CLASSES) and sorted(set(seen[0].labels.tolist())) == [1, 3]
    for classes in ("ant bee cat doggy", "ant bee cat dog eel", "1 2"):
        data = images_of(tmp_path / classes.replace(" ", "-"), classes)
        assert main([command, "--data_dir", data, "--out", str(out), "--max_steps", "3", "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert classes.split()[-1] in error and "--new_classes" in error and error.count("\n") == 1


def _noting(function: Any, seen: list[Any]) -> Any:
    def noting(records: Any, *args: Any, **options: Any) -> Any:
        seen.append(records)
        return function(records, *args, **options)

    return noting


def test_validation_data_goes_by_name(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(build, "build_batches", _noting(build.build_batches, seen))
    words = start(place / "classifier", "--resume_from model --eval_interval 1")
    words += ["--val_data_dir", images_of(tmp_path / "v", "cat dog")]
    run("train-classifier", images_of(tmp_path / "d"), tmp_path / "out", *words)
    assert {tuple(sorted(set(records.labels.tolist()))) for records in seen} == {(0, 1, 2, 3), (2, 3)}


def test_a_generator_without_classes_stores_no_names(place: Path, tmp_path: Path) -> None:
    """Whatever its file names look like; and it fits any classifier of its size."""
    data = Path(images_of(tmp_path / "data", "one"))
    for k, path in enumerate(sorted((data / "one").iterdir())):
        path.rename(data / "one" / f"dog{k % 2}_{k}.png")
    after = run("train", str(data), tmp_path / "out", "--resume_checkpoint", str(place / "unconditional.safetensors"))
    assert stored(after)["class_names"] == []
    again = gd.load(str(tmp_path / "out"))
    check_pair(again, gd.load(str(place / "classifier")))
