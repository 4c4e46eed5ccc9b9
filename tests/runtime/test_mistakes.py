"""A user's mistake in a job of several processes: one line, exit code 2, soon. torchrun ends all others as soon as one is gone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
