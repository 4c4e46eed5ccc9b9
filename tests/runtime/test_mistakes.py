"""A user's mistake in a job of several processes: one line, exit code 2, soon. torchrun ends all others as soon as one is gone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guided_diffusion.cli.main import main
from guided_diffusion.runtime import launchers

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "import sys\nfrom guided_diffusion.cli.main import main\nsys.exit(main())"
EVALUATOR = COMMAND.replace("guided_diffusion.cli.main", "evaluations.evaluator")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("nll --model_path gone.pt --data_dir .", "'gone.pt': no such file of weights or run folder"),
        ("inspect gone.pt --probe_images 0", "--probe_images is 0; it must be at least 1"),
        ("features . --classifier_path gone.pt --out a.npz", "'gone.pt': no such file of weights or run folder"),
        ("train --data_dir gone --image_size 64 --out run", "'gone': no such folder or file"),
        ("train-classifier --data_dir . --image_size 64x", "--image_size: invalid int value: '64x'"),
        ("sample --model_pth gone.pt", "there is no flag --model_pth (did you mean --model_path?)"),
        ("upsample --model_path gone.pt", "--base_samples is empty; give the images to enlarge"),
        ("doctor --kind x", "--kind is 'x'; it must be one of diffusion, super_resolution, classifier"),
        ("demo --quik", "unrecognized arguments: --quik"),
        ("evaluate gone.npz gone.npz --k x", "--k: invalid int value: 'x'"),
    ],
)
def test_a_mistake_on_two_ranks_is_one_line_and_code_2(launch, words, line):
    command, *rest = words.split()
    done = launch("torchrun", *((EVALUATOR, *rest) if command == "evaluate" else (COMMAND, command, *rest)))
    assert done.code and done.seconds < 60, done.text
    assert len(re.findall(f"(?m)(^|\\] )error: {re.escape(line)}$", done.text)) == 1, done.text
    assert "usage:" not in done.text and not re.search(rf'File "{ROOT}/(guided_diffusion|evaluations)/', done.text)
    codes = re.findall(r"exitcode +: (-?\d+)", done.text)  # in torchrun's report; -15: it ended that one itself
    assert set(codes) - {"-15"} == {"2"}, done.text


STALE = {
    "torchrun": {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    "slurm": {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "2"},
    "openmpi": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
}


@pytest.mark.parametrize("launcher", STALE)
def test_a_later_process_speaks_where_there_may_be_no_first(launcher, monkeypatch, capsys):
    """Variables of torchrun are easily left over in a shell, and then nobody else is there to say what is wrong."""
    for name, value in STALE[launcher].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launchers, "_FIRST_REPORTS_S", 0.0)
    assert launchers.discover(STALE[launcher]).rank == 1
    assert main(["sample", "--model_pth", "gone.pt"]) == 2
    assert ("--model_pth" in capsys.readouterr().err) == (launcher == "torchrun")
