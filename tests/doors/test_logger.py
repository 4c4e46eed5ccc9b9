"""The old logger: 37 names, three environment variables, and what its files hold."""

from __future__ import annotations

import csv
import io
import json
import os

import pytest
import torch

from guided_diffusion import logger


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in [
        name for name in os.environ if name.startswith(("OPENAI_", "RANK", "WORLD_SIZE", "PMI", "OMPI", "SLURM"))
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(logger.Logger, "CURRENT", None)
    monkeypatch.setattr(logger.Logger, "DEFAULT", None)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_default_formats_and_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "run"))
    logger.log("first words")  # configures by itself
    assert logger.get_dir() == str(tmp_path / "run")
    logger.logkv("step", 3)
    logger.logkv_mean("loss", 1.0)
    logger.logkv_mean("loss", 2.0)
    logger.logkvs({"lr": 0.5, "norm": torch.tensor(2.0)})
    assert dict(logger.getkvs()) == {"step": 3, "loss": 1.5, "lr": 0.5, "norm": 2.0}
    assert logger.dumpkvs()["loss"] == 1.5
    assert dict(logger.getkvs()) == {}
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["log.txt", "progress.csv"]
    assert rows_of(tmp_path / "run" / "progress.csv") == [{"loss": "1.5", "lr": "0.5", "norm": "2.0", "step": "3"}]
    said = capsys.readouterr().out
    assert said.startswith(f"Logging to {tmp_path}") and "first words" in said and "| loss | 1.5 |" in said
    assert said == (tmp_path / "run" / "log.txt").read_text()


def test_folder_without_environment_is_dated(capsys):
    logger.configure(format_strs=["stdout"])
    assert "openai-2" in logger.get_dir() and os.path.isdir(logger.get_dir())
    os.rmdir(logger.get_dir())


def test_formats_by_environment_and_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json,csv")
    logger.configure(dir=str(tmp_path))
    assert {type(f) for f in logger.get_current().output_formats} == {logger.JSONOutputFormat, logger.CSVOutputFormat}
    monkeypatch.setenv("PMI_RANK", "2")
    monkeypatch.setenv("PMI_SIZE", "4")
    assert logger.get_rank_without_mpi_import() == 2
    logger.configure(dir=str(tmp_path))
    assert (tmp_path / "log-rank002.txt").exists()
    monkeypatch.setenv("OPENAI_LOG_FORMAT_MPI", "json")
    logger.configure(dir=str(tmp_path), log_suffix="-x")
    assert (tmp_path / "progress-x-rank002.json").exists()


def test_reset_keeps_what_was_written(tmp_path, monkeypatch, capsys):
    """In 2021 `reset` opened the folder of OPENAI_LOGDIR anew and emptied progress.csv."""
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path))
    logger.configure()
    logger.logkv("step", 1)
    logger.dumpkvs()
    logger.reset()
    assert "Reset logger" in capsys.readouterr().out
    logger.logkv("step", 2)
    logger.dumpkvs()
    assert [row["step"] for row in rows_of(tmp_path / "progress.csv")] == ["1", "2"]


def test_scoped_configure_and_levels(tmp_path, capsys):
    logger.configure(dir=str(tmp_path / "a"), format_strs=["log"])
    outer = logger.get_current()
    with logger.scoped_configure(dir=str(tmp_path / "b"), format_strs=["log"]):
        logger.set_level(logger.WARN)
        logger.info("quiet")
        logger.debug("quieter")
        logger.warn("loud", 1)
        logger.error("louder")
    assert logger.get_current() is outer
    assert (tmp_path / "b" / "log.txt").read_text() == f"Logging to {tmp_path / 'b'}\nloud 1\nlouder\n"
    logger.set_level(logger.DISABLED)
    logger.error("nothing")
    assert "nothing" not in (tmp_path / "a" / "log.txt").read_text()


def test_profiling(tmp_path):
    logger.configure(dir=str(tmp_path), format_strs=[])

    @logger.profile("work")
    def work(x):
        """Doc."""
        return x + 1

    assert work(1) == 2 and work.__doc__ == "Doc."
    with logger.profile_kv("more"):
        pass
    assert {"wait_work", "wait_more"} == set(logger.getkvs())


def test_formats_by_hand(tmp_path):
    text = io.StringIO()
    human = logger.HumanOutputFormat(text)
    human.writekvs({"b": 1, "a": 2.5})
    human.writeseq(["x", "y"])
    assert text.getvalue().index("| a") < text.getvalue().index("| b") and text.getvalue().endswith("x y\n")
    table = logger.CSVOutputFormat(str(tmp_path / "p.csv"))
    table.writekvs({"a": 1})
    table.writekvs({"a": 2, "b": 3})
    table.close()
    assert (tmp_path / "p.csv").read_text() == "a,b\n1,\n2,3\n"
    lines = logger.JSONOutputFormat(str(tmp_path / "p.json"))
    lines.writekvs({"a": torch.tensor(1.5)})
    lines.close()
    assert json.loads((tmp_path / "p.json").read_text()) == {"a": 1.5}
    with pytest.raises(ValueError, match="'xml'"):
        logger.make_output_format("xml", str(tmp_path))
    with pytest.raises(ValueError, match="expected a file"):
        logger.HumanOutputFormat(3)
    for kind in (
        logger.HumanOutputFormat,
        logger.JSONOutputFormat,
        logger.CSVOutputFormat,
        logger.TensorBoardOutputFormat,
    ):
        assert issubclass(kind, logger.KVWriter)
    assert issubclass(logger.HumanOutputFormat, logger.SeqWriter)
    for base, call in ((logger.KVWriter, lambda w: w.writekvs({})), (logger.SeqWriter, lambda w: w.writeseq([]))):
        with pytest.raises(NotImplementedError):
            call(base())


def test_writers_of_others_are_served():
    class Mine(logger.KVWriter, logger.SeqWriter):
        def __init__(self):
            self.seen = []

        def writekvs(self, kvs):
            self.seen.append(dict(kvs))

        def writeseq(self, seq):
            self.seen.append(list(seq))

        def close(self):
            self.seen.append("closed")

    mine = Mine()
    log = logger.Logger(dir=None, output_formats=[mine])
    log.logkv("a", 1)
    log.dumpkvs()
    log.log("x", 2)
    log.close()
    assert mine.seen == [{"a": 1}, ["x", "2"], "closed"]


def test_a_format_can_be_replaced(tmp_path, monkeypatch):
    """Many did so with the one for TensorBoard, which needed a package of its own in 2021."""
    made = []

    class Mine(logger.KVWriter):
        def __init__(self, dir):
            made.append(dir)

        def writekvs(self, kvs):
            made.append(dict(kvs))

        def close(self):
            """Nothing to close."""

    monkeypatch.setattr(logger, "TensorBoardOutputFormat", Mine)
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["tensorboard"]):
        logger.logkv("a", 1)
        logger.dumpkvs()
    assert made == [str(tmp_path / "tb"), {"a": 1}]


class Comm:
    """Two ranks' worth of `gather`."""

    def __init__(self, rank, other):
        self.rank, self.other = rank, other

    def gather(self, value):
        return [value, self.other] if self.rank == 0 else None


def test_means_over_a_communicator(capsys):
    other = {"loss": (4.0, 3), "word": ("x", 1), "only": (torch.tensor(7.0), 2)}
    assert logger.mpi_weighted_mean(Comm(0, other), {"loss": (0.0, 1)}) == {"loss": 3.0, "only": 7.0}
    assert "word='x'" in capsys.readouterr().out
    assert logger.mpi_weighted_mean(Comm(1, other), {"loss": (0.0, 1)}) == {}
    for rank, row in ((0, {"loss": 2.0}), (1, {"dummy": 1})):
        log = logger.Logger(dir=None, output_formats=[], comm=Comm(rank, {"loss": (3.0, 1)}))
        log.logkv_mean("loss", 1.0)
        assert log.dumpkvs() == row
