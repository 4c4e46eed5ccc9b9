"""The row of the label embedding that stands for no class: made by --class_dropout, stored, counted nowhere, told from a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import BASE, filled, meta_shapes
from PIL import Image

import guided_diffusion as gd
from guided_diffusion import build
from guided_diffusion.cli.main import main
from guided_diffusion.config import RunConfig
from guided_diffusion.weights import convert
from guided_diffusion.weights.identify import identify
from guided_diffusion.weights.runs import load_weights, save_run

NAMES = ("ant", "bee", "cat", "dog")
FLAGS = {**BASE, "num_classes": 4}
ROWS = "label_emb.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/`; `plain/`: a save of four classes; `tuned/`: training that began there, with --class_dropout."""
    root = tmp_path_factory.mktemp("null_row")
    for n, name in enumerate(NAMES):
        (root / "images" / name).mkdir(parents=True)
        pixels = np.random.RandomState(n).randint(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / name / "0.png")
    loaded = filled("diffusion", FLAGS)
    state = loaded.net.state_dict()
    about: dict[str, Any] = {"config": loaded.config.to_dict(), "kind": "diffusion", "class_names": NAMES}
    save_run(str(root / "plain"), step=5, model=state, ema={"0.9": state}, state={"seed": 0}, **about)
    assert (
        train(root, root / "tuned", f"--resume_checkpoint {root / 'plain'} --resume_from ema --class_dropout 0.5") == 0
    )
    return root


def train(place: Path, out: Path, words: str) -> int:
    """One step with a learning rate of 0: the weights stay those of the start."""
    fixed = (
        "--batch_size 2 --lr 0 --ema_rate 0.9 --device cpu --max_steps 1 --sample_interval -1 --progress False".split()
    )
    return main(["train", "--data_dir", str(place / "images"), "--out", str(out), *fixed, *words.split()])


def test_a_file_of_classes_gets_the_row(place: Path) -> None:
    before = load_weights(str(place / "plain" / "model000005.pt"))
    after = load_weights(str(place / "tuned" / "model000001.pt"))
    assert torch.equal(after[ROWS][:4], before[ROWS]) and torch.equal(after[ROWS][4], before[ROWS].mean(0))
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != ROWS)


def test_the_config_says_so_and_no_count_of_classes_does(place: Path) -> None:
    tuned, plain = gd.load(str(place / "tuned")), gd.load(str(place / "plain"))
    assert (tuned.num_classes, tuned.null_label, tuned.class_names) == (4, 4, NAMES)
    assert (plain.num_classes, plain.null_label) == (4, None)
    assert "null_row" not in plain.config.model.to_dict()  # as in files of older versions
    x, time = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    assert tuned.net(x, time, y=torch.tensor([0, 4])).isfinite().all()
    images = gd.sample(plain, labels=[3], steps=2, sampler="ddim", seed=0)
    assert np.array_equal(images, gd.sample(tuned, labels=[3], steps=2, sampler="ddim", seed=0))
    with pytest.raises(ValueError, match="4"):
        gd.sample(tuned, labels=[4], steps=2)


def test_starting_again(place: Path, tmp_path: Path) -> None:
    def rows(out: str) -> torch.Tensor:
        return load_weights(str(tmp_path / out / "model000001.pt"))[ROWS]

    tuned = load_weights(str(place / "tuned" / "model000001.pt"))[ROWS]
    begin = f"--resume_checkpoint {place / 'tuned'} --resume_from model"
    assert train(place, tmp_path / "same", begin) == 0 and torch.equal(rows("same"), tuned)
    for name in NAMES[:2]:
        (tmp_path / "two" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "two" / "images" / name).symlink_to(place / "images" / name)
    assert train(tmp_path / "two", tmp_path / "new", f"{begin} --new_classes True --class_dropout 0.1") == 0
    assert torch.equal(rows("new"), tuned[[0, 1, 4]])
    assert train(tmp_path / "two", tmp_path / "none", f"{begin} --new_classes True --class_cond False") == 0
    assert gd.load(str(tmp_path / "none")).null_label is None


def test_a_run_that_goes_on_keeps_its_rows(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = f"--resume_checkpoint {place / 'plain'} --max_steps 6"
    assert train(place, tmp_path / "on", f"{begun} --class_dropout 0.1") == 2
    assert "--resume_from ema, and another --out" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["diffusion", "super_resolution", "classifier"])
def test_a_network_without_classes_drops_none(kind: str) -> None:
    with pytest.raises(ValueError, match="--class_dropout is 0.1"):
        RunConfig.from_flags(kind, {"class_dropout": 0.1})
    if kind != "classifier":
        with pytest.raises(ValueError, match="--null_row is True"):
            RunConfig.from_flags(kind, {"null_row": True})
        config = RunConfig.from_flags(kind, {"class_dropout": 0.1, "class_cond": True, "num_classes": 7})
        assert RunConfig.from_dict(kind, config.to_dict()) == config and config.model.null_row  # type: ignore[union-attr]
        assert build.network_options(config.model)["num_classes"] == 8


def shapes(rows: int) -> dict[str, tuple[int, ...]]:
    return meta_shapes("diffusion", {**FLAGS, "num_classes": rows})


TYPED = {name: FLAGS[name] for name in ("image_size", "num_channels") if name in FLAGS}


def test_a_bare_file_of_1001_rows_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="Give --null_row False for the former, --null_row True for the latter"):
        identify("mine.pt", shapes(1001), flags=TYPED)
    given = {(False, 1001): {"null_row": False}, (True, 1000): {"null_row": True}}
    given[False, 1001] = {"num_classes": 1001}
    for (null_row, classes), flags in given.items():
        model: Any = identify("mine.pt", shapes(1001), flags={**TYPED, **flags}).model
        assert (model.null_row, model.num_classes) == (null_row, classes)
    model = identify("mine.pt", shapes(11), flags=TYPED).model
    assert (model.null_row, model.num_classes) == (False, 11)
    model = identify("mine.pt", shapes(11), flags={**TYPED, "null_row": True, "num_classes": 10}).model
    assert (model.null_row, model.num_classes) == (True, 10)
    with pytest.raises(ValueError, match="num_classes 10; you asked for 11"):
        identify("mine.pt", shapes(11), flags={**TYPED, "null_row": True, "num_classes": 11})


def test_it_is_converted(place: Path, tmp_path: Path) -> None:
    before = gd.load(str(place / "tuned"))
    assert convert.arguments_for_unet2d(before.config.model, learn_sigma=True)["num_class_embeds"] == 5
    pytest.importorskip("safetensors")
    assert main(["convert", str(place / "tuned"), str(tmp_path / "one.safetensors")]) == 0
    after = gd.load(str(tmp_path / "one.safetensors"))
    assert (after.null_label, after.num_classes, after.class_names) == (4, 4, NAMES)
    assert torch.equal(after.net.state_dict()[ROWS], before.net.state_dict()[ROWS])


def test_inspect_takes_the_flag(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_weights(str(place / "tuned" / "model000001.pt"))
    state[ROWS] = state[ROWS][:1].expand(1001, -1).contiguous()
    torch.save(state, tmp_path / "bare.pt")
    assert main(["inspect", str(tmp_path / "bare.pt")]) == 2
    assert "1000 classes and a row for images without a class?" in capsys.readouterr().err
