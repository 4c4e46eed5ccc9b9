"""Reading flags."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from guided_diffusion.cli import arguments
from guided_diffusion.cli.main import main
from guided_diffusion.config import NETWORKS, DiffusionConfig, ModelConfig, RunConfig, SampleConfig

CONFIGS = list(RunConfig.sections("diffusion").values())
SAMPLING = (SampleConfig, ModelConfig, DiffusionConfig)


def parse(*words: str, **options: Any) -> arguments.Parsed:
    return arguments.parse(list(words), CONFIGS, program="p", description="d", **options)


@pytest.mark.parametrize("word", "yes true t y 1 True YES no false f n 0 False".split())
def test_words_for_true_and_false(word: str) -> None:
    value = word.lower()[0] in "yt1"
    assert arguments.str2bool(word) is value
    assert parse("--learn_sigma", word).typed == {"learn_sigma": value}


def test_a_bare_boolean_says_true_and_dashes_are_underscores() -> None:
    typed = parse("--learn-sigma", "--image-size=32", "--lr", "-0").typed
    assert typed == {"learn_sigma": True, "image_size": 32, "lr": 0.0}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("", "auto"),
        ("--compile", "on"),  # as when it was True or False
        ("--compile True", "on"),
        ("--compile=no", "off"),
        ("--compile False --learn_sigma True", "off"),
        ("--compile OFF", "off"),
        ("--compile auto", "auto"),
    ],
)
def test_words_of_a_switch(words: str, value: str, tmp_path: Path) -> None:
    parsed = parse(*words.split())
    assert parsed.flags["compile"] == value == RunConfig.from_flags("diffusion", parsed.flags).train.compile


def test_a_switch_in_files_of_earlier_versions(tmp_path: Path) -> None:
    """As truth values: in the configuration of a run, and in the receipt of samples."""
    path = tmp_path / "c.json"
    for stored, value in ((True, "on"), (False, "off"), ("auto", "auto")):
        path.write_text(json.dumps({"model": {"image_size": 32}, "train": {"compile": stored}}))
        assert parse("--config", str(path)).typed == {"image_size": 32, "compile": value}
        assert RunConfig.from_dict("diffusion", json.loads(path.read_text())).train.compile == value
        path.write_text(json.dumps({"config": {"compile": stored, "cuda_graphs": stored}}))
        found = arguments.parse(["--config", str(path)], SAMPLING, program="p", description="d")
        assert found.typed == {"compile": value, "cuda_graphs": value}
        assert SampleConfig.from_flags(found.flags).cuda_graphs == value
        assert SampleConfig.from_dict({"compile": stored}).compile == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compile", "always"], "--compile: it is 'always'; it must be one of auto, on, off"),
        (["--learn_sigm", "True"], "there is no flag --learn_sigm (did you mean --learn_sigma?)"),
        (["--learn_sigma", "maybe"], "--learn_sigma: boolean value expected, not 'maybe'"),
        (["--image_size", "large"], "--image_size: invalid int value: 'large'"),
        (["--schedule_sampler", "uniformly"], "(did you mean uniform?)"),
        (["--lr"], "--lr: expected one argument"),
        (["stray"], "'stray' is neither a flag nor the value of one"),
        (["--config", "/nowhere.json"], "--config /nowhere.json: there is no such file"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as told:
        parse(*words)
    assert message in str(told.value)


def test_typed_beats_file_beats_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"model": {"image_size": 32}, "lr": 0.5}))
    parsed = parse("--config", str(path), "--lr", "0.25", defaults={"lr": 0.1, "batch_size": 7})
    assert parsed.typed == {"image_size": 32, "lr": 0.25}
    assert parsed.flags["batch_size"] == 7 and parsed.flags["num_channels"] == 128


def test_the_written_configuration_reads_back(tmp_path: Path) -> None:
    run = RunConfig.from_flags("diffusion", {"image_size": 32, "ema_rate": "0.9,0.99"})
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"format": 1, "config": run.to_dict()}))
    assert RunConfig.from_flags("diffusion", parse("--config", str(path)).flags) == run


@pytest.mark.parametrize("text", ["[]", "{", '{"imagesize": 3}'])
def test_bad_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="c.json"):
        parse("--config", str(path))


def test_a_training_run_s_file_gives_sample_its_network_and_nothing_else(tmp_path: Path) -> None:
    flags = {"image_size": 32, "batch_size": 7, "labels": "folders", "data_dir": "d"}
    config = RunConfig.from_flags("diffusion", flags)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    parsed = arguments.parse(["--config", str(file)], SAMPLING, program="p", description="d")
    assert parsed.flags["image_size"] == 32
    assert parsed.flags["batch_size"] == SampleConfig().batch_size
    assert parsed.flags["labels"] == "random"


@pytest.mark.parametrize("word", ["auto", "AUTO", "0"])
def test_auto_is_a_word_for_what_is_found_by_trying(word: str, tmp_path: Path) -> None:
    parsed = arguments.parse(["--batch_size", word], SAMPLING, program="p", description="d")
    assert parsed.typed == {"batch_size": 0} and SampleConfig.from_flags(parsed.flags).batch_size == 0
    assert parse("--microbatch", word).typed == {"microbatch": 0}

    path = tmp_path / "c.json"
    path.write_text(json.dumps({"microbatch": word if word != "0" else 0, "lr": 0.5}))
    run = RunConfig.from_flags("diffusion", parse("--config", str(path)).flags)
    assert run.train.microbatch == 0
    path.write_text(json.dumps(run.to_dict()))  # written as a number, and reads back
    assert RunConfig.from_flags("diffusion", parse("--config", str(path)).flags) == run


@pytest.mark.parametrize("kind", ["diffusion", "super_resolution", "classifier"])
def test_training_wants_its_batch_size_as_a_number(kind: str, tmp_path: Path) -> None:
    configs = list(RunConfig.sections(kind).values())
    path = tmp_path / "c.json"
    path.write_text('{"batch_size": "auto"}')
    for words in (["--batch_size", "auto"], ["--config", str(path)]):
        with pytest.raises(
            ValueError, match="--batch_size is 'auto', but the batch size changes what is learned.*--microbatch auto"
        ):
            arguments.parse(words, configs, program="p", description="d")
    assert arguments.parse(["--batch_size", "7"], configs, program="p", description="d").typed == {"batch_size": 7}


def test_other_words_and_other_flags_are_no_auto() -> None:
    for words in (["--batch_size", "all"], ["--log_interval", "auto"], ["--microbatch", "1.5"]):
        with pytest.raises(ValueError, match=f"{words[0]}: invalid int value: '{words[1]}'"):
            parse(*words)


def test_help_shows_where_auto_may_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    for configs in (SAMPLING, CONFIGS):
        with pytest.raises(SystemExit):
            arguments.parse(["--help"], configs, program="p", description="d")
    sampling, training = capsys.readouterr().out.split("usage: ")[1:]
    assert "--batch_size int|auto" in sampling and "auto (or 0) = as many as fit" in sampling
    assert "--microbatch int|auto" in training and "--batch_size int " in training


@pytest.mark.parametrize(
    "command", ["sample", "upsample", "cascade", "nll", "train", "train-classifier", "train-upsampler"]
)
def test_help_is_in_groups_and_ends_with_the_network(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a command's last group has are flags of networks and of the noise process, and nothing else."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    groups = re.split(r"^([a-z].*):$", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    groups = dict(zip(groups[::2], groups[1::2]))
    groups.pop("options")
    title, text = list(groups.items())[-1]
    network = {name for config in (*NETWORKS.values(), DiffusionConfig) for name in config.names()}
    last = set(re.findall(r"^  --(\w+)", text, flags=re.MULTILINE))
    assert "image_size" in last or "large_size" in last
    assert last <= network and len(groups) > 4
    wanted = arguments.TRAINING if command.startswith("train") else arguments.SAMPLING
    assert title == list(wanted)[-1]
