"""Power-function averages and their reconstruction: closed forms, quadrature, and weights that are a known function of the step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import guided_diffusion as gd
from guided_diffusion import build
from guided_diffusion.cli.main import main
from guided_diffusion.config import RunConfig
from guided_diffusion.training.ema import EMA
from guided_diffusion.weights.averaging import reconstruct
from guided_diffusion.weights.files import read_own_weights
from guided_diffusion.weights.power_ema import coefficients, decay_at, gamma_of, sigma_rel_of
from guided_diffusion.weights.runs import find_latest, remove_save, save_run, saves_in


def share(gamma: float, step: int) -> np.ndarray:
    """What the average at `step` holds of the weights after updates 1, 2 ... `step`."""
    edges = (np.arange(step + 1) / step) ** (gamma + 1)
    return np.diff(edges)


def test_length_and_exponent() -> None:
    for sigma_rel, gamma in ((0.05, 16.97), (0.10, 6.94), (0.25, 0.72)):  # the first two are the paper's
        assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.006)
        assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)
        # The standard deviation of the profile itself.
        weights, times = share(gamma_of(sigma_rel), 10**5), (np.arange(10**5) + 0.5) / 10**5
        deviation = np.sqrt(weights @ times**2 - (weights @ times) ** 2)
        assert deviation == pytest.approx(sigma_rel, rel=1e-6)
    for wrong in (0.0, -0.1, 0.29):
        with pytest.raises(ValueError, match="between 0 and 0.288"):
            gamma_of(wrong)


def test_the_running_average_holds_what_its_profile_says() -> None:
    net = nn.Linear(3, 1, bias=False).double()
    ema = EMA(net, (0.9,), (0.05, 0.2))
    values = np.cos(np.arange(50))
    for step, value in enumerate(values, 1):
        nn.init.constant_(net.weight, float(value))
        ema.update(step)
    assert ema.decays == ("0.9",) and ema.names == ("0.9", "rel0.05", "rel0.2")
    for sigma_rel in (0.05, 0.2):
        expected = share(gamma_of(sigma_rel), len(values)) @ values
        found = ema.state_dict_of(f"rel{sigma_rel}")["weight"]
        torch.testing.assert_close(found, torch.full((1, 3), float(expected), dtype=torch.float64), rtol=1e-12, atol=0)
    assert decay_at(3.0, 1) == 0.0


SNAPSHOTS = [(step, gamma_of(sigma)) for step in range(200, 4001, 200) for sigma in (0.05, 0.10)]


@pytest.mark.parametrize("sigma_rel", [0.05, 0.07, 0.10, 0.15, 0.2])
@pytest.mark.parametrize("step", [2000, 4000])
def test_least_squares_over_profiles(sigma_rel: float, step: int) -> None:
    """The same as a fit of the profiles at every update with sum 1, up to what the updates' finite width changes."""
    used = [snapshot for snapshot in SNAPSHOTS if snapshot[0] <= step]
    found, error = coefficients(used, step, gamma_of(sigma_rel))
    dense = np.stack([np.pad(share(gamma, at), (0, step - at)) for at, gamma in used])
    wanted = share(gamma_of(sigma_rel), step)
    heavy = 1e3  # the sum as one more equation, of such a weight that it holds
    fitted = np.linalg.lstsq(np.vstack([dense.T, heavy * np.ones(len(used))]), np.append(wanted, heavy), rcond=None)[0]
    np.testing.assert_allclose(found, fitted, atol=2e-3)
    assert error == pytest.approx(np.linalg.norm(found @ dense - wanted) / np.linalg.norm(wanted), abs=2e-3)
    assert error < 0.1 and found.sum() == pytest.approx(1, abs=1e-9)
    if (step, gamma_of(sigma_rel)) in used:  # a stored profile is itself
        expected = np.array([snapshot == (step, gamma_of(sigma_rel)) for snapshot in used], dtype=float)
        np.testing.assert_allclose(found, expected, atol=1e-10)
        assert error < 1e-7


STEPS, EVERY = 240, 12


def speed(step: int) -> float:
    """The factor of the weights after update `step`: it falls, and swings."""
    return 1 / step + 0.1 * np.cos(step / 20)


class Mixing(nn.Module):
    """A small network, with a buffer that counts and is not averaged."""

    def __init__(self, image_size: int, in_channels: int, out_channels: int, num_classes: int) -> None:
        super().__init__()
        self.mix, self.label_emb = nn.Conv2d(in_channels, out_channels, 1), nn.Embedding(num_classes, out_channels)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, time: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.mix(x) + self.label_emb(y)[:, :, None, None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, torch.Tensor], dict[float, float]]]:
    """(a run whose weights are a known function of the step, the weights times 1, {length: the average kept all along})."""
    folder = tmp_path_factory.mktemp("power") / "run"
    gd.ARCHITECTURES["mixing"] = Mixing
    config = RunConfig.from_flags(
        "diffusion", {"architecture": "mixing", "class_cond": True, "num_classes": 2, "image_size": 8}
    )
    net = build.build_network(config.model, config.diffusion, seed=0)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    kept, longer = EMA(net, (0.9,), (0.05, 0.10)), {0.15: 0.0, 0.07: 0.0}
    about: dict[str, Any] = {"config": config.to_dict(), "kind": "diffusion", "class_names": ("a", "b")}
    for step in range(1, STEPS + 1):
        for name, p in net.named_parameters():
            p.data = start[name] * speed(step)
        net.count.fill_(step)  # type: ignore[operator, union-attr]
        kept.update(step)
        for sigma_rel, value in longer.items():
            decay = decay_at(gamma_of(sigma_rel), step)
            longer[sigma_rel] = decay * value + (1 - decay) * speed(step)
        if step % EVERY == 0:
            ema = {name: kept.state_dict_of(name) for name in kept.names}
            save_run(str(folder), step=step, model=net.state_dict(), ema=ema, **about)
        if step % EVERY == 0 and step > 2 * EVERY:
            remove_save(str(folder / f"run{step - 2 * EVERY:06d}.json"))
    yield folder, start, longer
    del gd.ARCHITECTURES["mixing"]


def test_removed_saves_leave_their_snapshots_and_nothing_else(run: tuple) -> None:
    saves = saves_in(str(run[0]))
    assert list(saves) == list(range(EVERY, STEPS + 1, EVERY))
    *old, before, last = saves.values()
    assert all(set(files) == {"ema_rel0.05", "ema_rel0.1"} for files in old)
    assert set(before) == set(last) == {"model", "run", "ema_0.9", "ema_rel0.05", "ema_rel0.1"}
    saved = find_latest(str(run[0]))
    assert (
        saved is not None
        and saved.step == STEPS
        and set(saved.ema) == {"0.9"}
        and set(saved.power_ema) == {"rel0.05", "rel0.1"}
    )
    assert gd.load(str(run[0])).path.endswith("ema_0.9_000240.pt")  # the ordinary EMA by default


def test_any_length_after_training(run: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, start, expected = run
    out = tmp_path / "averages"
    assert main(["ema", "--run", str(folder), "--sigma_rel", "0.05,0.07,0.15", "--out", str(out)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "profile within" in line]
    paths = {sigma_rel: out / f"ema_rel{sigma_rel}_000240.pt" for sigma_rel in (0.05, 0.07, 0.15)}
    assert [line.split(":")[0] for line in told] == [str(path) for path in paths.values()]
    for sigma_rel, value in expected.items():
        state = read_own_weights(str(paths[sigma_rel]))
        for name, first in start.items():
            torch.testing.assert_close(state[name], first * value, rtol=0, atol=2e-3 * float(first.abs().max()))
        assert int(state["count"]) == STEPS
    stored = read_own_weights(str(folder / "ema_rel0.05_000240.pt"))
    for name, value in read_own_weights(str(paths[0.05])).items():
        torch.testing.assert_close(value, stored[name], rtol=1e-6, atol=1e-7)
    loaded = gd.load(str(paths[0.15]))
    assert (loaded.step, loaded.class_names, loaded.num_classes) == (STEPS, ("a", "b"), 2)
    assert gd.sample(loaded, labels=[1], steps=2, sampler="ddim").shape == (1, 8, 8, 3)


def test_an_earlier_step(run: tuple, tmp_path: Path) -> None:
    folder, start, _ = run
    ((path, error),) = reconstruct(str(folder), [0.1], str(tmp_path / "out"), step=120)
    assert path.endswith("ema_rel0.1_000120.pt") and error < 1e-6
    value = share(gamma_of(0.1), 120) @ np.array([speed(step) for step in range(1, 121)])
    torch.testing.assert_close(read_own_weights(path)["mix.weight"], start["mix.weight"] * value, rtol=1e-5, atol=1e-6)


def test_what_is_refused(run: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(run[0])
    assert main(["ema", "--run", folder, "--sigma_rel", ""]) == 2
    assert "--sigma_rel is ''; give at least one length" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--step is 7; .* has snapshots at 12, 24"):
        reconstruct(folder, [0.1], str(tmp_path / "a"), step=7)
    with pytest.raises(ValueError, match="the run folder itself"):
        reconstruct(folder, [0.1], folder)
    with pytest.raises(ValueError, match="train with --ema_sigma_rel 0.05,0.1"):
        reconstruct(str(tmp_path), [0.1], str(tmp_path / "a"))
    for wrong in ("0.3", "0", "0.1,0.1", "x"):
        with pytest.raises(ValueError, match="--ema_sigma_rel is"):
            RunConfig.from_flags("diffusion", {"ema_sigma_rel": wrong})
