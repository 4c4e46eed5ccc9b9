"""Rows: what is written, where, in which columns, and how often the device is asked."""

from __future__ import annotations

import csv
import json
import logging

import pytest
import torch

from guided_diffusion.runtime.log import CsvWriter, JsonWriter, Log, TextWriter, setup_messages, table
from guided_diffusion.runtime.world import World


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add(log, name, *values):
    log.mean(name, torch.tensor(values), torch.ones(len(values), dtype=torch.bool))


def test_one_row_per_dump_in_all_places(tmp_path, capsys):
    log = Log(tmp_path)
    for value in (1.0, 2.0, 6.0):
        add(log, "loss", value)
    log.dump({"step": 10, "samples": 64, "phase": "warm-up"})
    log.close()
    row = {"step": 10, "samples": 64, "loss": 3.0, "phase": "warm-up"}
    assert rows_of(tmp_path / "progress.csv") == [{name: str(value) for name, value in row.items()}]
    assert json.loads((tmp_path / "progress.json").read_text()) == row
    said = capsys.readouterr().out
    assert "| loss    | 3       |" in said and said.index("step") < said.index("samples") < said.index("loss")


def test_means_are_over_all_values_and_empty_ones_left_out(tmp_path):
    log = Log(tmp_path, writers=("json",))
    add(log, "a", 1.0, 1.0, 1.0)
    add(log, "a", 5.0)
    log.mean("loss_q0", torch.tensor([8.0, 0.5, 100.0]), torch.tensor([True, True, False]))
    log.mean("loss_q3", torch.tensor([8.0]), torch.tensor([False]))
    log.dump({"step": 1})
    log.dump({"step": 2})  # values are forgotten
    lines = (tmp_path / "progress.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "a": 2.0, "loss_q0": 4.25}, {"step": 2}]


def test_many_small_float32_values_keep_their_digits(tmp_path):
    log = Log(tmp_path, writers=("json",))
    for _ in range(10000):
        add(log, "x", 0.1)
    log.dump({"step": 1})
    mean = json.loads((tmp_path / "progress.json").read_text())["x"]
    assert mean == pytest.approx(torch.tensor(0.1).double().item(), rel=1e-12)


def test_means_wait_on_the_device_and_are_read_once(monkeypatch):
    log = Log(None, writers=())
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, f=original, n=name: (reads.append(n), f(t))[1])
    parameter = torch.ones(1, requires_grad=True)
    for name in ["loss", "q"] * 50:
        log.mean(name, parameter * 2, torch.tensor([True]))
    assert reads == []
    log.dump({"step": 1})
    assert reads == ["tolist"]


def test_new_columns_rewrite_the_header_and_keep_the_rows(tmp_path):
    writer = CsvWriter(tmp_path / "p.csv")
    writer.write({"step": 1, "loss": 0.5, "word": 'a, "b"'})
    writer.write({"step": 2, "vb": 0.1})
    writer.write({"loss": 0.25, "step": 3})
    writer.close()
    assert rows_of(tmp_path / "p.csv") == [
        {"step": "1", "loss": "0.5", "word": 'a, "b"', "vb": ""},
        {"step": "2", "loss": "", "word": "", "vb": "0.1"},
        {"step": "3", "loss": "0.25", "word": "", "vb": ""},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["p.csv"]


def test_continuing_appends_and_merges_the_header(tmp_path):
    for step, name in ((1, "loss"), (2, "mse")):
        log = Log(tmp_path, writers=("csv", "json"), continuing=step > 1)
        log.dump({"step": step, name: step * 1.0})
        log.close()
    assert [(r["step"], r["loss"], r["mse"]) for r in rows_of(tmp_path / "progress.csv")] == [
        ("1", "1.0", ""),
        ("2", "", "2.0"),
    ]
    lines = (tmp_path / "progress.json").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_half_written_line_is_completed(tmp_path):
    (tmp_path / "p.csv").write_text("step,loss\n1,0.5\n2,")
    (tmp_path / "p.json").write_text('{"step": 1}\n{"st')
    CsvWriter(tmp_path / "p.csv").write({"step": 3, "loss": 1})
    JsonWriter(tmp_path / "p.json").write({"step": 3})
    assert [r["step"] for r in rows_of(tmp_path / "p.csv")] == ["1", "2", "3"]
    assert (tmp_path / "p.json").read_text().splitlines()[-1] == '{"step": 3}'


def test_a_fresh_run_in_a_used_folder_is_told(tmp_path, capsys):
    first = Log(tmp_path)
    first.dump({"step": 1})
    first.close()
    assert "earlier run" not in capsys.readouterr().out
    Log(tmp_path).close()
    assert "already holds 1 rows of an earlier run" in capsys.readouterr().out
    Log(tmp_path, continuing=True).close()
    assert "earlier run" not in capsys.readouterr().out


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = Log(tmp_path / "run", world=World(rank=1, size=2))
    log.info("hello")
    log.dump({"step": 1})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_words_go_to_the_screen_and_the_text_file(tmp_path, capsys):
    log = Log(tmp_path, writers=("stdout", "log"))
    log.info("hello")
    log.close()
    assert capsys.readouterr().out == "hello\n" == (tmp_path / "log.txt").read_text()


def test_errors_name_value_and_remedy(tmp_path):
    with pytest.raises(ValueError, match="'cvs'.*stdout, log, csv, json, tensorboard"):
        Log(tmp_path, writers=("cvs",))
    with pytest.raises(ValueError, match="gs://bucket/run.*must be local"):
        Log("gs://bucket/run")


def test_tensorboard_is_optional(tmp_path):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install tensorboard"):
            Log(tmp_path, writers=("tensorboard",))
    else:
        log = Log(tmp_path, writers=("tensorboard",))
        log.dump({"step": 1, "loss": 1.0})
        log.close()
        assert list((tmp_path / "tb").iterdir())


def test_table_and_text_file(tmp_path):
    long = "x" * 40
    text = table({long: 1.23456789, "n": 12345678, "t": torch.tensor(0.5)})
    assert "x" * 27 + "... | 1.23" in text and "12345678" in text and "| 0.5" in text
    writer = TextWriter(tmp_path / "t.txt")
    writer.write({})
    writer.close()
    assert (tmp_path / "t.txt").read_text() == ""


RANKS = """
import torch
from guided_diffusion.runtime.log import Log
from guided_diffusion.runtime.world import session
with session("cpu", timeout_s=90) as world:
    log = Log("run", world=world)
    log.mean("loss", torch.tensor([1.0, 2.0])[world.rank].expand(3), torch.tensor([True, world.rank == 1, world.rank == 1]))
    log.mean("only", torch.tensor([4.0]), torch.tensor([world.rank == 1]))
    log.dump({"step": 5, "lr": 0.1 * (world.rank + 1)})
    log.close()
print(f"fine {world.rank}\\n", end="")  # one write: the ranks share the pipe
"""


def test_means_over_ranks(launch, tmp_path):
    done = launch("mpiexec", RANKS)
    assert done.code == 0, done.text
    assert "fine 0" in done.text and "fine 1" in done.text
    assert rows_of(tmp_path / "run" / "progress.csv") == [{"step": "5", "loss": "1.75", "lr": "0.1", "only": "4.0"}]
    assert done.text.count("| loss") == 1


def test_messages_are_shown_as_they_are_by_the_main_process_alone(tmp_path, capsys):
    messages = logging.getLogger("guided_diffusion.somewhere")
    setup_messages()
    messages.info("%d images", 8)
    messages.warning("the disk is full")
    messages.debug("a detail")
    assert capsys.readouterr().out == "8 images\nwarning: the disk is full\n"
    setup_messages(World(rank=1, size=2))
    messages.info("8 images")
    log = Log(tmp_path, writers=("stdout", "log"))
    setup_messages(World(), log)
    messages.info("into the file too")
    log.close()
    messages.info("on the screen alone")
    assert capsys.readouterr() == ("into the file too\non the screen alone\n", "")
    assert (tmp_path / "log.txt").read_text() == "into the file too\n"
    logging.getLogger("guided_diffusion").handlers.clear()
