"""Where a start of training begins, by what is in its folder and by what was typed; which stored settings still hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from guided_diffusion.cli.main import main, script
from guided_diffusion.config import laid_over
from guided_diffusion.data import loader
from guided_diffusion.runtime import devices

NETWORK = (
    "--image_size 4 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 4 --num_heads 2 "
)
CRITIC = (
    "--image_size 4 --classifier_width 32 --classifier_depth 1 --classifier_channel_mult 1 "
    "--classifier_attention_resolutions 4 --classifier_num_head_channels 32 --ema_rate 0.9 --random_crop False "
)
LARGE = NETWORK.replace("--image_size 4", "--large_size 8 --small_size 4")
MORE = "--diffusion_steps 40 --batch_size 4 --save_interval 2 --log_interval 5 --progress False "
COMMANDS = {
    "train": NETWORK + "--class_cond True --sample_interval -1 ",
    "train-classifier": CRITIC,
    "train-upsampler": LARGE + "--sample_interval -1 ",
}


def train(words: str, photos: Path, out: Path, command: str = "train") -> int:
    line = f"{COMMANDS[command]} {MORE} --data_dir {photos} --out {out} {words}"
    return main([command, *line.split()])


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem[3:]) for path in folder.glob("run*.json"))


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("model*.pt")}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_newest_save_comes_before_the_file_a_run_was_started_from(command, photos, tmp_path, capsys):
    assert train("--max_steps 2", photos, tmp_path / "base", command) == 0
    (tmp_path / "pretrained.pt").write_bytes((tmp_path / "base" / "model000002.pt").read_bytes())
    again = f"--resume_checkpoint {tmp_path}/pretrained.pt"
    assert train(f"{again} --max_steps 4", photos, tmp_path / "run", command) == 0
    told = json.loads((tmp_path / "run" / "run000004.json").read_text())
    assert told["started_from"] == f"{tmp_path}/pretrained.pt" and told["config"]["train"]["resume_checkpoint"] == ""
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["resume_checkpoint"] == ""
    before = times(tmp_path / "run")
    capsys.readouterr()
    starts = [(again, 6), (f"--config {tmp_path}/run/config.json" if command == "train" else "", 8)]
    for words, last in starts:
        assert train(f"{words} --max_steps {last}", photos, tmp_path / "run", command) == 0
        said = capsys.readouterr().out
        assert f"at step {last - 2}" in said and ("has saves of its own" in said) == bool(words == again), said
        assert max(steps(tmp_path / "run")) == last and before.items() <= times(tmp_path / "run").items()
    assert json.loads((tmp_path / "run" / "run000008.json").read_text())["started_from"] == f"{tmp_path}/pretrained.pt"


@pytest.mark.parametrize("command", list(COMMANDS))
def test_weights_that_are_read_are_not_drawn_first(command, photos, tmp_path, monkeypatch):
    """A start from a file, and a run that continues. New classes keep their drawn rows."""
    drawn = []
    plain = torch.Tensor.uniform_

    def uniform_(self, *args, **kwargs):  # with which layers begin; time steps are drawn with it too, in one dimension
        drawn.extend([self.shape] * (self.dim() > 1))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
    from_file = f"--resume_checkpoint {tmp_path}/run/model000002.pt --resume_from model --max_steps 2"
    starts = [("run", "--max_steps 2", True), ("run", "--max_steps 4", False), ("other", from_file, False)]
    if command != "train-upsampler":  # COMMANDS trains it without classes
        starts.append(("classes", f"{from_file} --new_classes True", True))
    for out, words, expected in starts:
        drawn.clear()
        assert train(words, photos, tmp_path / out, command) == 0
        assert bool(drawn) == expected, (out, words)


def test_trials_of_memory_start_no_workers_and_change_nothing(photos, tmp_path, monkeypatch):
    read, plain = [], loader.Batches.__next__

    def following(self):
        read.append(self._workers)
        return plain(self)

    monkeypatch.setattr(loader.Batches, "__next__", following)
    weights = []
    for name, words in (("kept", ""), ("auto", "--recompute auto")):
        assert train(f"--max_steps 2 --workers 1 {words}", photos, tmp_path / name) == 0
        weights.append((tmp_path / name / "model000002.pt").read_bytes())
    assert read == [1, 1, 0, 1, 1] and weights[0] == weights[1]


def test_a_file_of_the_run_itself_is_left_for_newer_saves_and_a_stored_one_is_forgotten(
    photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
    line = f"{COMMANDS['train']} {MORE} --data_dir {photos}"

    def rerun(words: str) -> str:
        assert script("image_train", f"{line} {words}".split()) == 0
        return capsys.readouterr().out

    rerun("--max_steps 4")
    # As earlier versions wrote it: the file of the first start stands in every save.
    path = tmp_path / "run" / "run000004.json"
    told = json.loads(path.read_text())
    told["config"]["train"]["resume_checkpoint"] = str(tmp_path / "run" / "model000002.pt")
    del told["started_from"]
    path.write_text(json.dumps(told))
    assert "at step 4" in rerun("--max_steps 6")
    assert "at step 6" in rerun(f"--max_steps 8 --resume_checkpoint {tmp_path}/run/model000006.pt")
    said = rerun(f"--max_steps 10 --resume_checkpoint {tmp_path}/run/model000002.pt")
    assert "at step 8" in said and "up to step 8: going on from there and not from" in said
    assert "has saves of its own" not in rerun(f"--max_steps 10 --resume_checkpoint {tmp_path}/run")


def test_none_begins_once_and_keeps_what_was_there(photos, tmp_path, capsys):
    run = tmp_path / "run"
    assert train("--max_steps 4", photos, run) == 0
    old = {name: (run / name).read_bytes() for name in times(run)}
    assert train("--max_steps 2 --resume_checkpoint none", photos, run) == 0
    (aside,) = run.glob("before_*")
    assert f"are in {aside} now" in capsys.readouterr().out
    assert steps(run) == [2] and steps(aside) == [2, 4]
    assert {name: (aside / name).read_bytes() for name in old} == old
    # The same command once more, as a scheduler gives it, then the plain one.
    first = times(run)
    assert train("--max_steps 4 --resume_checkpoint none", photos, run) == 0
    assert train("--max_steps 6", photos, run) == 0
    assert steps(run) == [2, 4, 6] and first.items() <= times(run).items() and len(list(run.glob("before_*"))) == 1
    # With another setting it is another run.
    assert train("--max_steps 2 --lr 1e-2 --resume_checkpoint none", photos, run) == 0
    assert steps(run) == [2] and not first.items() <= times(run).items()


def test_none_is_not_taken_for_begun_where_a_run_came_from_a_file(photos, tmp_path):
    assert train("--max_steps 2", photos, tmp_path / "base") == 0
    (tmp_path / "base" / "model000002.pt").rename(tmp_path / "pretrained.pt")
    assert train(f"--max_steps 2 --resume_checkpoint {tmp_path}/pretrained.pt", photos, tmp_path / "run") == 0
    assert train("--max_steps 2 --resume_checkpoint none", photos, tmp_path / "run") == 0
    assert len(list((tmp_path / "run").glob("before_*"))) == 1


def test_a_run_of_an_earlier_version_goes_on(photos, tmp_path):
    """Its configuration has truth values where words are now, and lacks flags that are new."""
    run = tmp_path / "run"
    assert train("--max_steps 2 --resume_checkpoint none", photos, run) == 0
    for path in (run / "config.json", run / "run000002.json"):
        stored = json.loads(path.read_text())
        settings = stored.get("config", stored)["train"]
        settings["compile"] = False
        del settings["tf32"]
        path.write_text(json.dumps(stored))
    assert train("--max_steps 4 --resume_checkpoint none", photos, run) == 0  # the same command, from a scheduler
    assert not list(run.glob("before_*")) and train("--max_steps 6", photos, run) == 0 and steps(run) == [2, 4, 6]
    settings = json.loads((run / "config.json").read_text())["train"]
    assert (settings["compile"], settings["tf32"]) == ("auto", True)


def test_a_run_goes_on_multiplying_as_it_was_begun(photos, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(devices, "set_float32_products", lambda *, tf32: chosen.append(tf32))
    assert train("--max_steps 2 --tf32 False", photos, tmp_path / "run") == 0
    assert train("--max_steps 4", photos, tmp_path / "run") == 0
    assert chosen == [False, False, True, False]  # by the flags, then by the configuration
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["tf32"] is False


def test_damaged_saves(photos, tmp_path, capsys):
    run = tmp_path / "run"
    assert train("--max_steps 6", photos, run) == 0
    (run / "run000006.json").write_text('{"format": 1')
    assert train("--max_steps 6", photos, run) == 0
    said = capsys.readouterr().out
    assert "passing over the save at step 6" in said and "at step 4" in said
    for step in (2, 4, 6):
        (run / f"opt{step:06d}.pt").write_bytes(b"x")
    for words in ("", f"--resume_checkpoint {tmp_path}/other.pt"):
        assert train(f"--max_steps 8 {words}", photos, run) == 2
        assert "none of them is whole" in capsys.readouterr().err
    assert train("--max_steps 2 --resume_checkpoint none", photos, run) == 0 and steps(run) == [2]


@pytest.mark.parametrize(
    ("command", "first", "second", "last"),
    [
        ("train", "--max_steps 2", "--lr_anneal_steps 4", 4),
        ("train", "--lr_anneal_steps 2", "--max_steps 4", 4),
        ("train-classifier", "--max_steps 2", "--iterations 4", 4),
        ("train-classifier", "--iterations 2 --anneal_lr True", "--max_steps 4", 4),
        ("train-upsampler", "--lr_anneal_steps 2", "--max_steps 4", 4),
    ],
)
def test_a_limit_given_now_wins_over_a_stored_one(command, first, second, last, photos, tmp_path):
    assert train(first, photos, tmp_path, command) == 0 and max(steps(tmp_path)) == 2
    config = f"--config {tmp_path}/config.json " if command == "train-upsampler" else ""
    assert train(config + second, photos, tmp_path, command) == 0 and max(steps(tmp_path)) == last


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("--precision bf16", "--use_fp16 True", "computing in fp32, because float16"),
        ("--use_fp16 True", "--precision bf16", "computing in bf16 on cpu"),
        ("--use_checkpoint True", "--recompute norms", "recompute = 'norms'"),
        ("--ema_rate 0.9", "--ema_rate 0.99", "EMA 0.9: saved, but not kept by this run"),
        ("--batch_size 4", "--batch_size 8", "global batch size 8"),
    ],
)
def test_a_flag_given_now_wins_over_a_stored_one_that_decides_in_its_place(
    first, second, said, photos, tmp_path, capsys
):
    assert train(f"--max_steps 1 {first}", photos, tmp_path) == 0
    capsys.readouterr()
    assert train(f"--max_steps 2 {second}", photos, tmp_path) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("--lr_anneal_steps 1", "--max_steps 2", "--lr_anneal_steps was 1 before and is 2 now"),
        ("--max_steps 1", "--lr_anneal_steps 2", "--max_steps was 1 before and is 0 now"),
        ("--max_steps 1 --checkpoint norms", "--use_checkpoint True", "--recompute was 'norms' before and is '' now"),
        ("--max_steps 1 --batch_size 4", "--max_steps 2 --batch_size 8", ""),
    ],
)
def test_what_a_given_flag_decides_of_a_file_is_told(first, second, said, photos, tmp_path, capsys):
    assert train(first, photos, tmp_path / "a") == 0
    capsys.readouterr()
    assert train(f"--config {tmp_path}/a/config.json {second}", photos, tmp_path / "b") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: --config")]
    assert len(notes) == bool(said) and said in "".join(notes)


@pytest.mark.parametrize(
    ("stored", "given", "merged"),
    [
        ({"max_steps": 5}, {"lr_anneal_steps": 0}, {"max_steps": 5, "lr_anneal_steps": 0}),
        ({"lr_anneal_steps": 9}, {"max_steps": 5}, {"lr_anneal_steps": 9, "max_steps": 5}),
        ({"lr_anneal_steps": 9}, {"max_steps": 10}, {"lr_anneal_steps": 10, "max_steps": 10}),
        ({"lr_anneal_steps": 2, "max_steps": 2}, {"lr_anneal_steps": 4}, {"lr_anneal_steps": 4}),
        ({"precision": "bf16"}, {"use_fp16": False}, {"use_fp16": False}),
        ({"recompute": "auto", "memory_limit_gb": 4.0}, {"use_checkpoint": True}, {"use_checkpoint": True}),
        ({"sampler": "heun"}, {"use_ddim": True}, {"use_ddim": True}),
        ({"num_head_channels": 64}, {"num_heads": 4}, {"num_heads": 4}),
        ({"predict": "v"}, {"predict_xstart": False}, {"predict_xstart": False}),
        ({"val_data_dir": "x"}, {"val_fraction": 0.1}, {"val_fraction": 0.1}),
        ({"batch_size": 8, "global_batch_size": 16}, {"batch_size": 8}, {"batch_size": 8, "global_batch_size": 16}),
        ({"batch_size": 8, "global_batch_size": 16}, {"batch_size": 4}, {"batch_size": 4}),
    ],
)
def test_what_is_laid_over_stored_flags(stored, given, merged):
    assert laid_over(stored, given) == merged
