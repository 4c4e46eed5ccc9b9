"""The command as users meet it first: help, mistakes, exit codes. Nothing here needs torch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from guided_diffusion.cli import main as cli
from guided_diffusion.cli import runs

ROOT = Path(__file__).resolve().parents[2]


def test_help_needs_no_torch() -> None:
    code = (
        "import contextlib, sys\nfrom guided_diffusion.cli.main import main\nmain(['--help'])\n"
        "for command in ('train', 'train-classifier', 'sample', 'upsample', 'cascade', 'nll', 'zoo', 'data'):\n"
        "    with contextlib.suppress(SystemExit):\n        main([command, '--help'])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("False"), done.stderr


def test_unknown_command_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--data_dri", "x"], "did you mean --data_dir?"),
        (["train", "--image_size", "66", "--data_dir", "x"], "cannot be halved"),
        (["sample"], "--model_path is empty"),
        (["sample", "--model_path", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


class RequestFailure(Exception):
    """As of the library for remote paths."""


RequestFailure.__module__ = "blobfile._common"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RequestFailure("cannot resolve the host"), 2, "error: cannot resolve the host\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 141, ""),
        (SystemExit(85), 85, ""),
        (AssertionError("ours"), None, ""),
        (RuntimeError("of torch"), None, ""),
    ],
)
def test_errors_of_users_are_a_line_and_a_code_and_our_own_keep_their_traceback(
    error: BaseException, code: int | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(_: object) -> int:
        raise error

    with pytest.raises(type(error)) if code is None else contextlib.nullcontext():
        assert runs.guarded(failing, []) == code
    assert capsys.readouterr().err == message


def test_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    assert runs.run_folder("x", "diffusion") == ("x", "--out")
    assert runs.run_folder("", "diffusion")[0].startswith("runs")
    assert "openai-" in runs.script_folder()
    monkeypatch.setenv("OPENAI_LOGDIR", "/logs")
    assert runs.run_folder(runs.script_folder(), "diffusion") == ("/logs", "OPENAI_LOGDIR")


@pytest.mark.parametrize(("given", "found"), [(None, "passive"), ("active", "active")])
def test_threads_sleep_while_they_wait_unless_told_otherwise(given: str | None, found: str) -> None:
    code = "import os, sys; from guided_diffusion.cli import runs; assert 'torch' not in sys.modules; "
    code += "runs.guarded(lambda words: print(os.environ['OMP_WAIT_POLICY']), [])"
    environ = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environ |= {} if given is None else {"OMP_WAIT_POLICY": given}
    told = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert told.stdout.split() == [found]


def mistake(run: object, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says of a flag that it does not have."""
    try:
        code = run(words)  # type: ignore[operator]
    except SystemExit as end:
        code = end.code
    assert code == 2, words
    return capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--local_rank=0", "--local-rank=1"])
def test_every_command_and_script_accepts_local_rank(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`torch.distributed.launch` puts it before the other words; the mistake behind it is the one that is told."""
    from evaluations import evaluator

    scripts = [partial(cli.script, name) for name in cli.SCRIPTS]
    for run in [*scripts, evaluator.main]:
        words = ["a.npz", "b.npz"] if run is evaluator.main else []
        plain = mistake(run, [*words, "--no_such_flag", "1"], capsys)
        assert mistake(run, [flag, *words, "--no_such_flag", "1"], capsys) == plain and "no_such_flag" in plain
    for command in cli.COMMANDS:
        plain = mistake(cli.main, [command, "--no_such_flag", "1"], capsys)
        assert mistake(cli.main, [flag, command, "--no_such_flag", "1"], capsys) == plain
        assert mistake(cli.main, [command, *flag.split("="), "--no_such_flag", "1"], capsys) == plain
