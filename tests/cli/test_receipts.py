"""The receipt holds all that images depend on; folders that hold something else keep it."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import BASE, CRITIC, filled

import guided_diffusion as gd
from guided_diffusion.cli.main import main, script
from guided_diffusion.config import (
    NETWORKS,
    ClassifierConfig,
    DiffusionConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    SuperResConfig,
)
from guided_diffusion.config.sampling import CHAIN_OPTIONS
from guided_diffusion.diffusion.schedules import named_betas
from guided_diffusion.sampling import jobs as g
from guided_diffusion.sampling import receipts
from guided_diffusion.sampling.chains import make_chain
from guided_diffusion.sampling.guiding import Guided
from guided_diffusion.weights.load import Loaded

LARGE = {**{name: value for name, value in BASE.items() if name != "image_size"}, "large_size": 16, "small_size": 8}


# ---------------------------------------------------------------------------------------------------------------------
# Every field of the configurations


def loaded(tmp_path: Path, model: Any, diffusion: Any = None, content: bytes = b"w", **more: Any) -> Loaded:
    path = tmp_path / f"{model.kind}-{content.hex()}.pt"
    path.write_bytes(content)
    net: Any = SimpleNamespace(dtype=more.pop("dtype", torch.float32))
    config = RunConfig(model=model, diffusion=diffusion or DiffusionConfig())
    return Loaded(net, gd.make_process(named_betas("linear", 100)), config, str(path), **more)


def receipt_of(config: SampleConfig, model: Loaded, classifier: Loaded | None) -> dict[str, Any]:
    guide = gd.classifier(classifier, scale=config.classifier_scale) if classifier else None
    options = config.chain_options
    if config.method == "ancestral":  # which has no options; that they are refused is tested with the samplers
        options = {}
    chain = make_chain(model.process, config.method, options=options)
    return receipts.receipt_of(config.to_dict(), chain, Guided(model, (guide.for_size(8),) if guide else ()))


def other(field: Any, value: Any) -> Any:
    """A value that the field does not have; without a list of choices, whether it is a possible one is nobody's business here."""
    if choices := field.metadata.get("choices"):
        return next(choice for choice in choices[::-1] if choice != value)
    return not value if isinstance(value, bool) else value + "1" if isinstance(value, str) else value + 1


SECTIONS = [SampleConfig(), SampleConfig(use_ddim=True), DiffusionConfig(), *(config() for config in NETWORKS.values())]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: type(s).__name__)
def test_every_field_reaches_the_receipt_or_says_why_not(section: Any, tmp_path: Path) -> None:
    def receipt(changed: Any) -> Any:
        parts: dict[type, Any] = {type(changed): changed}
        denoiser = parts.get(SuperResConfig) or parts.get(ModelConfig, ModelConfig())
        model = loaded(tmp_path, denoiser, parts.get(DiffusionConfig))
        classifier = loaded(tmp_path, parts.get(ClassifierConfig, ClassifierConfig()))
        return receipt_of(parts.get(SampleConfig, SampleConfig()), model, classifier)

    for field in fields(section):
        base = section
        if field.name.endswith("arch_options"):  # which a U-Net does not have
            base = replace(section, **{field.name.replace("arch_options", "architecture"): "mine"})
        if type(section) is SampleConfig and field.name in (
            "use_ddim",
            "sampler",
            "steps",
            "classifier_scale",
            *CHAIN_OPTIONS,
        ):
            continue  # seen through the chain and the guidances, below
        same = receipt(replace(base, **{field.name: other(field, getattr(base, field.name))})) == receipt(base)
        assert same == (field.name in receipts.NOT_IN_RECEIPT), field.name


def test_receipts_of_a_unet_are_those_from_before_there_were_other_architectures(tmp_path: Path) -> None:
    found = receipt_of(SampleConfig(), loaded(tmp_path, ModelConfig()), loaded(tmp_path, ClassifierConfig()))
    assert not [name for part in (found["model"], found["guidance"][0]["network"]) for name in part if "arch" in name]


def test_what_stands_there_in_another_form(tmp_path: Path) -> None:
    model, classifier = loaded(tmp_path, ModelConfig()), loaded(tmp_path, ClassifierConfig())
    config = SampleConfig(use_ddim=True)
    seen = [
        receipt_of(config, model, classifier),
        receipt_of(replace(config, use_ddim=False), model, classifier),
        receipt_of(replace(config, eta=0.5), model, classifier),
        receipt_of(config, model, None),
        receipt_of(config, loaded(tmp_path, ModelConfig(), content=b"v"), classifier),
        receipt_of(config, loaded(tmp_path, ModelConfig(), weights="ema"), classifier),
        receipt_of(config, loaded(tmp_path, ModelConfig(), dtype=torch.bfloat16), classifier),
        receipt_of(config, model, loaded(tmp_path, ClassifierConfig(), content=b"v")),
        receipt_of(config, model, loaded(tmp_path, ClassifierConfig(), dtype=torch.float16)),
    ]
    assert len({json.dumps(receipt, sort_keys=True) for receipt in seen}) == len(seen)
    # Spellings of one thing, and values that do nothing, do not part what belongs together.
    assert seen[0] == receipt_of(SampleConfig(sampler="ddim"), model, classifier)
    assert seen[3] == receipt_of(replace(config, classifier_scale=3.0), model, None)


def test_the_job_adds_seed_and_classes(tmp_path: Path) -> None:
    one = g.Request("", 4)
    plain = g.Job(one, "x", (3, 8, 8), 2)
    plans = [g.LabelPlan((1,)), g.LabelPlan((1, 2)), g.LabelPlan((1, 2), balanced=True)]
    requests = [replace(one, seed=1), *(replace(one, labels=plan) for plan in plans)]
    jobs = [plain, replace(plain, shape=(3, 8, 16)), *(replace(plain, request=request) for request in requests)]
    assert len({json.dumps(g._settings(job), sort_keys=True) for job in jobs}) == len(jobs)
    other = replace(plain, request=replace(one, num_samples=9), batch_size=3, grid=0)
    assert g._settings(other) == g._settings(plain)


# ---------------------------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    gd.save(filled("diffusion", BASE), str(root / "base"))
    gd.save(filled("super_resolution", {**LARGE, "attention_resolutions": "8"}), str(root / "large"))
    gd.save(filled("classifier", CRITIC), str(root / "classifier"))
    shutil.copy(next((root / "base").glob("model*.pt")), root / "bare.pt")  # a file that says nothing of itself
    return root


def made(out: Path) -> np.ndarray:
    with np.load(g.finished_npz(str(out))) as found:
        return np.asarray(found["arr_0"])


FLAGS = " ".join(f"--{name} {value}" for name, value in BASE.items())
TOO = "--num_samples 2 --batch_size 2 --timestep_respacing 3 --picture 0 --classifier_scale 0"


CHANGES = "noise_schedule cosine, predict_xstart True, num_heads 4, use_new_attention_order True, predict v"


@pytest.mark.parametrize("change", [f"--{words}" for words in CHANGES.split(", ")])
def test_other_settings_make_other_images_and_end_a_half_made_job(
    change: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"sample --model_path {models}/bare.pt {FLAGS} {TOO} --out"
    assert main([*words.split(), f"{tmp_path}/a"]) == 0
    first, told = made(tmp_path / "a"), capsys.readouterr().out
    assert main([*words.split(), f"{tmp_path}/a"]) == 0 and "is there already" in capsys.readouterr().out
    assert main([*words.split(), f"{tmp_path}/a", *change.split()]) == 0
    assert "is there already" not in capsys.readouterr().out and "wrote" in told
    assert main([*words.split(), f"{tmp_path}/b", *change.split()]) == 0
    np.testing.assert_array_equal(made(tmp_path / "a"), made(tmp_path / "b"))
    assert not np.array_equal(first, made(tmp_path / "a"))
    # A part of a job with the other settings is not taken over.
    (tmp_path / "a" / g.PARTS).mkdir(exist_ok=True)
    np.save(tmp_path / "a" / g.PARTS / "images_00000000_00000000.npy", first[:1])
    capsys.readouterr()
    assert main([*words.split(), f"{tmp_path}/a"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and change.split()[0][2:] in error and "Give another folder" in error


def test_weights_that_were_overwritten_are_other_weights(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "base", tmp_path / "run")
    path = next((tmp_path / "run").glob("model*.pt"))  # the JSON beside it tells the hash it had
    words = f"sample --model_path {path} {TOO} --out {tmp_path}/out".split()
    assert main(words) == 0
    before = made(tmp_path / "out")
    state = torch.load(path)
    torch.save({name: 0.5 * value for name, value in state.items()}, path)
    assert main(words) == 0
    assert not np.array_equal(before, made(tmp_path / "out"))


def test_small_pictures_of_the_same_names_and_sizes_are_enlarged_anew(models: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "small").mkdir()
    words = f"upsample --model_path {models}/large --base_samples {tmp_path}/small {TOO} --classes 1 --out {tmp_path}/out".split()
    results = []
    for grey in (60, 200):
        Image.new("RGB", (8, 8), (grey, 0, grey)).save(tmp_path / "small" / "a.bmp")  # as many bytes each time
        assert main(words) == 0
        results.append(made(tmp_path / "out"))
    assert not np.array_equal(*results)


@pytest.mark.parametrize("receipt", ["earlier", "gone", "broken"])
def test_images_of_which_too_little_is_known_are_neither_kept_nor_lost(
    receipt: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"sample --model_path {models}/base {TOO} --out {tmp_path}/a".split()
    assert main(words) == 0
    path = tmp_path / "a" / g.RECEIPT
    told = json.loads(path.read_text())
    (tmp_path / "a" / g.PARTS).mkdir(exist_ok=True)
    part = tmp_path / "a" / g.PARTS / "images_00000000_00000001.npy"
    np.save(part, made(tmp_path / "a"))
    kinds = {"earlier": json.dumps({**told, "format": 1, "settings": {"seed": 0}}), "broken": "{"}
    path.write_text(kinds[receipt]) if receipt in kinds else path.unlink()
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error and "Give another folder" in error and part.exists()


def test_the_npz_of_the_receipt_is_the_one_that_is_scored(models: Path, tmp_path: Path) -> None:
    words = f"sample --model_path {models}/base --out {tmp_path} {TOO}".split()
    assert main([*words, "--num_samples", "3"]) == 0 and main(words) == 0
    assert len(list(tmp_path.glob("samples_*.npz"))) == 2 and len(made(tmp_path)) == 2


def test_the_flags_read_back(models: Path, tmp_path: Path) -> None:
    words = f"sample --model_path {models}/base {TOO} --seed 5 --classes 2".split()
    assert main([*words, "--out", f"{tmp_path}/a"]) == 0
    assert main(["sample", "--config", f"{tmp_path}/a/sampling.json", "--out", f"{tmp_path}/b"]) == 0
    settings = [json.loads((tmp_path / name / g.RECEIPT).read_text())["settings"] for name in "ab"]
    assert settings[0] == settings[1] and settings[0]["seed"] == 5 and settings[0]["classes"] == [2]


@pytest.mark.parametrize(
    ("flags", "formats"),
    [
        ("", (torch.float32, torch.float32)),
        ("--precision bf16", (torch.bfloat16, torch.bfloat16)),
        ("--classifier_precision bf16", (torch.float32, torch.bfloat16)),
        ("--precision bf16 --classifier_precision fp32", (torch.bfloat16, torch.float32)),
    ],
)
def test_each_network_has_its_own_number_format(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, formats: Any
) -> None:
    from guided_diffusion.weights import load as loading

    used: dict[str, torch.dtype] = {}
    load = loading.load

    def spy(path: str, **options: Any) -> Any:
        found = load(path, **options)
        used[found.kind] = found.net.dtype
        return found

    monkeypatch.setattr(loading, "load", spy)
    words = f"sample --model_path {models}/base --classifier_path {models}/classifier {TOO} --classifier_scale 1"
    assert main(f"{words} --device cpu --out {tmp_path}/out {flags}".split()) == 0
    assert (used["diffusion"], used["classifier"]) == formats
    settings = json.loads((tmp_path / "out" / "sampling.json").read_text())["settings"]
    told = [getattr(torch, each["precision"]) for each in (settings["model"], settings["guidance"][0]["network"])]
    assert told == list(formats)


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a run


def test_sampling_into_a_run_folder_leaves_the_run_as_it_is(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one of its files is written, whatever command it is, and nothing that training writes at the moment is taken away."""
    run = tmp_path / "run"
    shutil.copytree(models / "base", run)
    own = {
        "config.json": "{}",
        "progress.csv": "step\n",
        "log.txt": "x",
        ".model000009.pt.0123abcd.tmp": "half",
        "samples_000001.png": "p",
    }
    for name, text in own.items():
        (run / name).write_text(text)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    (tmp_path / "r.json").write_text('{"num_samples": 1, "name": "one"}')
    np.savez(tmp_path / "small.npz", np.zeros((2, 8, 8, 3), np.uint8), np.array([1, 2]))
    from PIL import Image

    (tmp_path / "data" / "c").mkdir(parents=True)
    Image.new("RGB", (8, 8), (9, 99, 199)).save(tmp_path / "data" / "c" / "a.png")
    unlabelled = f"{TOO} --out {run}"
    monkeypatch.setenv("OPENAI_LOGDIR", str(run))
    assert main(f"sample --model_path {run} {unlabelled}".split()) == 0
    assert main(f"sample --model_path {run} --requests {tmp_path}/r.json {unlabelled}".split()) == 0
    assert main(f"upsample --model_path {models}/large --base_samples {tmp_path}/small.npz {unlabelled}".split()) == 0
    assert main(f"cascade --model_path {run} --upsampler_path {models}/large {unlabelled}".split()) == 0
    assert script("image_sample", f"--model_path {run} {TOO} --seed 1".split()) == 0
    guided = f"--model_path {run} --classifier_path {models}/classifier {TOO} --classifier_scale 1 --seed 2"
    assert script("classifier_sample", guided.split()) == 0
    gd.save(filled("diffusion", {**BASE, "class_cond": False, "num_classes": 0}), str(tmp_path / "free"))
    nll = f"nll --model_path {tmp_path}/free --data_dir {tmp_path}/data --num_samples 1 --timestep_respacing 2 --out {run}"
    assert main(nll.split()) == 0
    assert {name: (run / name).read_bytes() for name in before} == before
    assert json.loads((run / "likelihood.json").read_text())["config"]["num_samples"] == 1
