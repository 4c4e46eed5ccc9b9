"""`gd.sample` is the commands' way in one call: the same images; what it cannot do it refuses in words."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import BASE, CRITIC, filled

import guided_diffusion as gd
from guided_diffusion.cli.main import main
from guided_diffusion.diffusion.grids import GRIDS
from guided_diffusion.diffusion.guidance import GUIDANCES
from guided_diffusion.diffusion.samplers import ALIASES, SAMPLERS
from guided_diffusion.sampling import execution

LARGE = {**{name: value for name, value in BASE.items() if name != "image_size"}, "large_size": 8, "small_size": 4}
PLAIN = {**BASE, "class_cond": False, "num_classes": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    kinds = {"base": ("diffusion", BASE), "plain": ("diffusion", PLAIN), "large": ("super_resolution", LARGE)}
    for name, (kind, flags) in {**kinds, "classifier": ("classifier", CRITIC)}.items():
        gd.save(filled(kind, flags), str(root / name))
    return root


@pytest.fixture(scope="module")
def loaded(models: Path) -> dict[str, Any]:
    return {path.name: gd.load(str(path)) for path in models.iterdir()}


def commanded(words: str, out: Path) -> np.ndarray:
    assert main([*words.split(), "--seed", "7", "--batch_size", "2", "--device", "cpu", "--out", str(out)]) == 0
    with np.load(next(out.glob("samples_*.npz"))) as found:
        return np.asarray(found["arr_0"])


def test_the_command_s_images(models: Path, loaded: dict[str, Any], tmp_path: Path) -> None:
    words = (
        f"sample --model_path {models}/base --classifier_path {models}/classifier --classifier_scale 3 --sampler ddim "
    )
    words += "--eta 0.5 --timestep_respacing 4 --num_samples 5 --classes 1,3 --labels balanced"
    guidance = gd.classifier(loaded["classifier"], scale=3.0)
    options: dict[str, Any] = {"sampler": "ddim", "eta": 0.5, "steps": 4, "seed": 7, "batch_size": 2}
    images = gd.sample(loaded["base"], labels=[1, 3, 1, 3, 1], guidance=guidance, **options)
    assert images.dtype == np.uint8 and images.shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(images, commanded(words, tmp_path))
    assert not np.array_equal(images, gd.sample(loaded["base"], labels=[1, 3, 1, 3, 1], **options))


def test_the_command_s_large_images(models: Path, loaded: dict[str, Any], tmp_path: Path) -> None:
    small = np.random.RandomState(0).randint(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "small.npz", small, np.array([2, 0, 1]))
    words = f"upsample --model_path {models}/large --base_samples {tmp_path}/small.npz --timestep_respacing ddim5"
    images = gd.sample(loaded["large"], labels=[2, 0, 1], low_res=small, steps="ddim5", seed=7, batch_size=2)
    np.testing.assert_array_equal(images, commanded(words, tmp_path / "out"))


def test_models_without_classes(models: Path, loaded: dict[str, Any], tmp_path: Path) -> None:
    images = gd.sample(loaded["plain"], num_images=3, steps=3, seed=7, batch_size=2)
    np.testing.assert_array_equal(
        images, commanded(f"sample --model_path {models}/plain --timestep_respacing 3 --num_samples 3", tmp_path)
    )


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("base", {"num_images": 2}, "labels is missing"),
        ("plain", {"labels": [1]}, "labels is given, but this model takes no labels"),
        ("plain", {}, "num_images is missing"),
        ("large", {"labels": [1]}, "low_res is missing"),
        ("base", {"labels": [1, 4]}, r"there are the classes 0 to 3"),
        ("base", {"labels": [1], "sampler": "eular"}, "sampler is 'eular'; it must be one of ancestral, ddim"),
    ],
)
def test_mistakes_are_named(loaded: dict[str, Any], model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gd.sample(loaded[model], **options)


def test_a_classifier_of_other_images_is_refused(loaded: dict[str, Any]) -> None:
    other = filled("classifier", {**CRITIC, "num_classes": 9})
    with pytest.raises(ValueError, match="differ in number of classes"):
        gd.sample(loaded["base"], labels=[1], guidance=gd.classifier(other))
    with pytest.raises(ValueError, match="must be a finite number"):
        gd.classifier(other, scale=float("nan"))


def test_help_lists_every_entry_of_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    words = capsys.readouterr().out.replace(",", " ").replace("]", " ").replace("[", " ").split()
    assert {*SAMPLERS, *ALIASES, *GRIDS, *GUIDANCES} <= set(words)


@pytest.mark.parametrize(("graphs", "recorded", "calls"), [("auto", 0, 20), (True, 1, 1), (False, 0, 20)])
def test_a_hook_is_called_at_each_step(
    graphs: Any, recorded: int, calls: int, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph runs no Python, so that a hook in it would see the step that is recorded and no other."""
    made: list[Any] = []

    def record(run: Any) -> Any:
        made.append(run())
        return made[-1], lambda: None

    monkeypatch.setattr(execution, "Graphed", partial(execution.Graphed, record=record))
    seen: list[int] = []
    gd.sample(loaded["base"], labels=[0, 1], steps=20, cuda_graphs=graphs)
    assert len(made) == (graphs is not False)
    made.clear()
    hook = loaded["base"].net.input_blocks[0].register_forward_hook(lambda *args: seen.append(1))
    gd.sample(loaded["base"], labels=[0, 1], steps=20, cuda_graphs=graphs)
    hook.remove()
    assert (len(made), len(seen)) == (recorded, calls)


# ---------------------------------------------------------------------------------------------------------------------
# The same to the bit


@pytest.mark.parametrize("sampler", ["ancestral", "dpm_solver"])
def test_networks_see_the_same_whatever_the_batch_size(loaded: dict[str, Any], sampler: str) -> None:
    """With `deterministic`: every call of a network has the same inputs, so its device has no reason to answer otherwise."""
    seen: list[torch.Tensor] = []
    nets = [loaded[name].net for name in ("base", "classifier")]
    hooks = [net.register_forward_pre_hook(lambda net, args: seen.append(args[0].detach().clone())) for net in nets]
    options: dict[str, Any] = {"guidance": gd.classifier(loaded["classifier"], scale=2.0), "sampler": sampler}
    calls, images = [], []
    for size in (8, 16, 24, 5):
        images.append(
            gd.sample(loaded["base"], labels=[0, 1, 2] * 4, steps=3, batch_size=size, deterministic=True, **options)
        )
        calls.append(list(seen))
        seen.clear()
    for hook in hooks:
        hook.remove()
    assert {len(x) for x in calls[0]} == {8} and len(calls[0]) >= 12  # two batches of three steps by two networks
    for others, made in zip(calls[1:], images[1:]):
        assert len(others) == len(calls[0]) and all(map(torch.equal, others, calls[0]))
        np.testing.assert_array_equal(made, images[0])
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_command_s_images_do_not_depend_on_batch_size_or_company(models: Path, tmp_path: Path) -> None:
    words = f"sample --model_path {models}/base --timestep_respacing 3 --num_samples 11 --seed 7 --deterministic True"
    made = []
    for size in ("8", "24", "auto", "3"):
        assert main(f"{words} --batch_size {size} --out {tmp_path}/{size}".split()) == 0
        with np.load(next((tmp_path / size).glob("*.npz"))) as found:
            made.append(found["arr_0"])
    requests = [{"name": "one", "seed": 3, "num_samples": 3}, {"name": "same", "seed": 7, "num_samples": 11}]
    (tmp_path / "r.json").write_text(json.dumps(requests))
    assert main(f"{words} --requests {tmp_path}/r.json --out {tmp_path}/r".split()) == 0
    with np.load(next((tmp_path / "r" / "same").glob("*.npz"))) as found:
        made.append(found["arr_0"])
    for images in made[1:]:
        np.testing.assert_array_equal(images, made[0])
    receipt = json.loads((tmp_path / "24" / "sampling.json").read_text())
    assert receipt["settings"]["deterministic"] is True and receipt["about"]["float32 products"] == "in float32"


def test_deterministic_leaves_out_the_compiler(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"sample --model_path {models}/base --deterministic True --compile True".split()) == 2
    assert "--deterministic True computes without a compiler" in capsys.readouterr().err


def test_receipts_are_those_of_earlier_versions(models: Path, tmp_path: Path) -> None:
    """Jobs that were begun before there were these flags go on."""
    words = f"sample --model_path {models}/base --timestep_respacing 2 --num_samples 1 --grid 0"
    assert main(f"{words} --out {tmp_path}".split()) == 0
    receipt = json.loads((tmp_path / "sampling.json").read_text())
    assert not {"tf32", "deterministic", "compile", "cuda_graphs"} & set(receipt["settings"])
    assert receipt["config"]["compile"] == receipt["config"]["cuda_graphs"] == "auto"
