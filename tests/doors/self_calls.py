"""Ways through the 2021 diffusion classes, with what is called on each and what overriding it changes.

`python tests/doors/self_calls.py self_calls.json.gz`, with the 2021 package on PYTHONPATH, writes the facts of `test_calls.py`.
"""

from __future__ import annotations

import itertools
import sys
from contextlib import contextmanager

import numpy as np
import torch
from loop_calls import counted, figures, other, write

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion import respace

METHODS = """q_mean_variance q_sample q_posterior_mean_variance p_mean_variance _predict_xstart_from_eps _predict_xstart_from_xprev
_predict_eps_from_xstart _scale_timesteps condition_mean condition_score p_sample p_sample_loop_progressive ddim_sample
ddim_sample_loop_progressive _vb_terms_bpd _prior_bpd _wrap_model""".split()
FUNCTIONS = ["_extract_into_tensor", "mean_flat", "normal_kl", "discretized_gaussian_log_likelihood"]
MEANS, VARIANCES, LOSSES = ([*kind.__members__] for kind in (gd.ModelMeanType, gd.ModelVarType, gd.LossType))
KINDS = {"plain": gd.GaussianDiffusion, "spaced": respace.SpacedDiffusion}


def scenarios():
    """name -> (kind, mean, variance, loss, what to call on the diffusion)."""
    found = {}

    def add(call, name, mean="EPSILON", variance="LEARNED_RANGE", loss="MSE"):
        for kind in KINDS:
            found[f"{kind} {name} {mean} {variance} {loss}"] = (kind, mean, variance, loss, call)

    for mean, variance, loss in itertools.product(MEANS, VARIANCES, LOSSES):
        add(lambda d, net, x, t: d.training_losses(net, x, t), "training", mean, variance, loss)
    for mean, variance in itertools.product(MEANS, VARIANCES):
        add(lambda d, net, x, t: d.p_sample(net, x, t, model_kwargs={}), "p_sample", mean, variance)
        add(lambda d, net, x, t: d.calc_bpd_loop(net, x, model_kwargs={}), "calc_bpd_loop", mean, variance)
    for mean, (cond, denoised) in itertools.product(MEANS, itertools.product((False, True), repeat=2)):
        named = {"model_kwargs": {}, "cond_fn": gradient if cond else None, "denoised_fn": bent if denoised else None}
        told = " guided" * cond + " denoised_fn" * denoised
        add(lambda d, net, x, t, k=named: d.p_sample(net, x, t, **k), f"p_sample{told}", mean)
        add(lambda d, net, x, t, k=named: d.ddim_sample(net, x, t, eta=0.5, **k), f"ddim_sample{told}", mean)
        for loop in ("p_sample_loop", "ddim_sample_loop"):

            def whole(d, net, x, t, k=named, loop=loop):
                return getattr(d, loop)(net, x.shape, noise=x, device="cpu", **k)

            def steps(d, net, x, t, k=named, loop=loop):
                return [*getattr(d, f"{loop}_progressive")(net, x.shape, noise=x, device="cpu", **k)]

            add(whole, f"{loop}{told}", mean)
            add(steps, f"{loop}_progressive{told}", mean)
    for mean in MEANS:
        add(lambda d, net, x, t: d.ddim_reverse_sample(net, x, t, model_kwargs={}), "ddim_reverse_sample", mean)
    return found


def column(t, x):
    return t.float().view(-1, *([1] * (x.ndim - 1)))


def one(x, t, **kwargs):
    return 0.3 * x + 0.2 * torch.sin(0.01 * column(t, x))


def two(x, t, **kwargs):
    return torch.cat([one(x, t), 0.2 * torch.cos(x)], 1)


def gradient(x, t, **kwargs):
    return -0.1 * x - 1e-4 * column(t, x)


def bent(x0):
    return 0.9 * x0


def play(scenario, change=None):
    """The outcome of a scenario; `change(name, function)` may replace every method and function."""
    kind, mean, variance, loss, call = scenarios()[scenario] if isinstance(scenario, str) else scenario
    base = KINDS[kind]
    changed = {} if change is None else {n: change(n, getattr(base, n)) for n in METHODS if hasattr(base, n)}
    settings = {
        "betas": np.linspace(0.02, 0.4, 4) if kind == "plain" else gd.get_named_beta_schedule("linear", 1000),
        "model_mean_type": gd.ModelMeanType[mean],
        "model_var_type": gd.ModelVarType[variance],
        "loss_type": gd.LossType[loss],
        "rescale_timesteps": kind == "spaced",
    }
    if kind == "spaced":
        settings["use_timesteps"] = {0, 400, 999}
    diffusion = type("Changed", (base,), changed)(**settings)
    x = torch.from_numpy(np.random.RandomState(7).uniform(-1, 1, (2, 3, 4, 4)).astype(np.float32))
    torch.manual_seed(0)
    with functions(change):
        return call(diffusion, two if "LEARNED" in variance else one, x, torch.tensor([0, 2]))


@contextmanager
def functions(change):
    before = {name: getattr(gd, name) for name in FUNCTIONS}
    try:
        for name, function in before.items():
            setattr(gd, name, function if change is None else change(name, function))
        yield
    finally:
        for name, function in before.items():
            setattr(gd, name, function)


def calls(scenario):
    return counted(play, scenario, lambda name: name in METHODS)


def overridden(scenario, target):
    """Two figures of the outcome when `target` returns something else than it should."""

    def change(name, function):
        if name != target:
            return function
        if name == "_wrap_model":
            return lambda self, model: (
                model
                if isinstance(model, respace._WrappedModel)
                else function(self, lambda *args, **kwargs: other(model(*args, **kwargs)))
            )
        return lambda *args, **kwargs: other(function(*args, **kwargs))

    return outcome(play(scenario, change))


def outcome(result):
    """Mean and root mean square of all numbers in it."""
    parts = result if isinstance(result, list) else [result]
    tensors = [v for part in parts for v in (part.values() if isinstance(part, dict) else [part])]
    return figures(torch.cat([v.flatten().double() for v in tensors]))


# Overrides are tried on those of the scenarios that differ in what they call.
TRIED = [
    name
    for name in scenarios()
    if "FIXED_SMALL" not in name
    and ("LEARNED " not in name if "training" in name else "_progressive" not in name and "denoised_fn" not in name)
]


def main(path):
    facts, styles = {"counts": {}, "overridden": {}}, {}
    for name, scenario in scenarios().items():
        count, seen = calls(scenario)
        facts["counts"][name] = count
        for called, ways in seen.items():
            styles.setdefault(called, set()).update(ways)
        if name in TRIED:
            facts["overridden"][name] = {"": outcome(play(scenario))}
            facts["overridden"][name].update({called: overridden(scenario, called) for called in sorted(count)})
    write(path, facts, styles)


if __name__ == "__main__":
    main(sys.argv[1])
