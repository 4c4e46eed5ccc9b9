"""Learning rate, averages, number formats, optimizer and log means against closed forms and independent code."""

import math

import pytest
import torch
from torch import nn

from guided_diffusion.runtime.world import World
from guided_diffusion.training import optimizer
from guided_diffusion.training.ema import EMA, update_ema
from guided_diffusion.training.losses import Interval, Losses
from guided_diffusion.training.optimizer import learning_rate
from guided_diffusion.training.precision import Precision

from .toys import make, toy_net


def test_learning_rate():
    assert learning_rate(0, 3e-4) == learning_rate(10**7, 3e-4) == 3e-4
    assert [learning_rate(s, 1.0, anneal_steps=4) for s in (0, 1, 2, 3, 4, 9)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [learning_rate(s, 1.0, warmup_steps=4) for s in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert learning_rate(1, 1.0, anneal_steps=4, warmup_steps=4) == 0.75 * 0.5


def test_update_ema_closed_form():
    source, target = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -2.0])]
    start = target[0].clone()
    for _ in range(50):
        update_ema(target, source, rate=0.9)
    torch.testing.assert_close(target[0], 0.9**50 * start + (1 - 0.9**50) * source[0])
    update_ema([], [])


def test_averages_of_moving_weights():
    """After weights w_1..w_n the average is rate^n w_0 + (1 - rate) sum rate^(n-k) w_k."""
    net = nn.Linear(1, 1, bias=False)
    values = [0.25, 2.0, -1.0, 5.0]  # their averages are far from 0, so that digits count
    nn.init.constant_(net.weight, values[0])
    rates = (0.5, 0.9)
    ema = EMA(net, rates)
    for value in values[1:]:
        nn.init.constant_(net.weight, value)
        ema.update()
    for rate in rates:
        n = len(values) - 1
        expected = rate**n * values[0] + (1 - rate) * sum(rate ** (n - k) * values[k] for k in range(1, n + 1))
        assert float(ema.state_dict_of(str(rate))["weight"]) == pytest.approx(expected, rel=1e-6)


def test_averages_copy_buffers_keep_order_and_swap():
    net = toy_net()
    ema = EMA(net, (0.99,))
    net.calls += 7
    with torch.no_grad():
        net.first.weight += 1
    state = ema.state_dict_of("0.99")
    assert list(state) == list(net.state_dict())
    assert torch.equal(state["calls"], torch.full((3,), 7.0))
    now = net.first.weight.detach().clone()
    with pytest.raises(KeyError), ema.swapped_in("0.99") as inside:
        torch.testing.assert_close(inside.first.weight, now - 1)
        raise KeyError
    assert torch.equal(net.first.weight, now)
    with pytest.raises(ValueError, match="0.5"), ema.swapped_in("0.5"):
        pass


@pytest.mark.parametrize("rates", [(1.0,), (-0.1,), (0.9, 0.9)])
def test_averages_refuse_bad_rates(rates):
    with pytest.raises(ValueError, match="EMA"):
        EMA(nn.Linear(1, 1), rates)


def test_loss_scale_grows_halves_and_has_a_floor():
    precision = Precision("fp16", growth=1e-3)
    assert float(precision.lg_loss_scale) == 20.0
    precision.lg_loss_scale.fill_(2.0)
    bad, good = torch.tensor(True), torch.tensor(False)
    assert float(precision.scale(torch.tensor(3.0))) == 12.0
    precision.update(good)
    assert float(precision.lg_loss_scale) == pytest.approx(2.001)
    for _ in range(5):
        assert not precision.at_floor() or float(precision.lg_loss_scale) == 0.0
        precision.update(bad)
    assert float(precision.lg_loss_scale) == 0.0 and bool(precision.at_floor())
    other = Precision("fp16")
    other.load_state_dict(precision.state_dict())
    assert torch.equal(other.lg_loss_scale, precision.lg_loss_scale)


def test_other_formats_do_not_scale():
    for name in ("fp32", "bf16"):
        precision = Precision(name)
        precision.update(torch.tensor(True))
        assert precision.divisor() is None
        precision.load_state_dict({"name": "fp16", "lg_loss_scale": 20.0})
        assert precision.divisor() is None
    with pytest.raises(ValueError, match="fp64.*fp32, bf16, fp16"):
        Precision("fp64")
    with pytest.raises(ValueError, match="set_compute_dtype"):
        make(nn.Linear(1, 1), precision="bf16")


@pytest.mark.parametrize("divisor", [8, None])
@pytest.mark.parametrize("fused", [True, False])
def test_guarded_step_is_adamw_on_divided_gradients(fused, divisor):
    ours = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.3)
    options = {"lr": 0.1, "weight_decay": 0.3}
    opt = optimizer.make_adamw(ours, **options) if fused else torch.optim.AdamW(ours, **options)
    assert bool(opt.defaults.get("fused")) == fused
    for step in range(4):
        for p, q in zip(ours, theirs):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * (divisor or 1)
        skip = step == 2
        if skip:
            ours[0].grad[0, 0] = float("nan")
        else:
            reference.step()
        by = None if divisor is None else torch.tensor(float(divisor))
        optimizer.guarded_step(opt, [p.grad for p in ours], by, torch.tensor(skip))
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q)
    assert all(float(opt.state[p]["step"]) == 3 for p in ours)


def test_optimizer_state_of_another_network_is_refused():
    params = [nn.Parameter(torch.zeros(2, 2))]
    opt = optimizer.make_adamw(params, lr=0.1)
    entry = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 3), "exp_avg_sq": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match="another network"):
        optimizer.load_state(opt, {"state": {0: entry}, "param_groups": []}, params)
    with pytest.raises(ValueError, match="5 parameters, the network 1"):
        optimizer.load_state(opt, {"state": dict.fromkeys(range(5), {})}, params)


def test_optimizer_settings_stay_as_configured():
    params = [nn.Parameter(torch.ones(2))]
    old = torch.optim.AdamW(params, lr=0.5, weight_decay=0.9)
    params[0].grad = torch.ones(2)
    old.step()
    new = optimizer.make_adamw(params, lr=0.1, weight_decay=0.2)
    optimizer.load_state(new, old.state_dict(), params)
    assert (new.param_groups[0]["lr"], new.param_groups[0]["weight_decay"]) == (0.1, 0.2)
    assert torch.equal(new.state[params[0]]["exp_avg"], old.state[params[0]]["exp_avg"])


def test_an_interval_has_means_by_quartile_and_of_the_steps_that_counted():
    interval, world = Interval(), World()
    i = torch.tensor([0, 24, 25, 99, 60])
    values = torch.tensor([1.0, 3.0, 5.0, 7.0, math.nan])
    interval.add(Losses(values, {"loss": values}, i, 100))
    interval.add(Losses(values[:1], {"loss": values[:1] * 8}, i[:1], 100))
    for norm in (1.0, 3.0, math.inf):
        interval.count_step(torch.tensor(norm), torch.tensor(norm == math.inf))
    assert interval.read(world, unreadable=2) == {
        "loss": pytest.approx(24 / 5),
        "loss_q0": pytest.approx(4.0),
        "loss_q1": 5.0,
        "loss_q3": 7.0,
        "grad_norm": 2.0,
        "skipped_steps": 1.0,
        "unreadable_images": 2.0,
    }
    assert interval.read(world) == {}
    interval.add(Losses(values, {"acc": values}))
    assert interval.read(world) == {"acc": 4.0}
