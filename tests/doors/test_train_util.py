"""The training loop of 2021 as programs use and subclass it."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT, start_ranks
from torch import nn

from guided_diffusion import logger, train_util
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.train_util import TrainLoop

MADE = ["step", "resume_step", "global_batch", "sync_cuda", "mp_trainer", "opt", "ema_params", "use_ddp", "ddp_model"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def convert_to_fp16(self):
        """Computes in float32 all the same."""

    def forward(self, x):
        return self.layer(x)


class Diffusion:
    num_timesteps = 100

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        scale = 1 + t[:, None] / self.num_timesteps
        mse = ((model(x_start) * scale - x_start) ** 2).mean(1)
        return {"loss": mse, "mse": mse}


def data():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(6, 4, generator=generator), {"y": torch.zeros(6, dtype=torch.long)}


@pytest.fixture(autouse=True)
def folder(tmp_path):
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["csv"]):
        yield tmp_path


def loop(kind=TrainLoop, **options):
    torch.manual_seed(0)
    settings = {"model": Net(), "diffusion": Diffusion(), "data": data(), "batch_size": 6, "microbatch": -1, "lr": 0.01}
    settings |= {"ema_rate": "0.5,0.9999", "log_interval": 2, "save_interval": 3, "resume_checkpoint": ""}
    return kind(**(settings | {"lr_anneal_steps": 5} | options))


def test_a_run_writes_the_files_of_2021(folder):
    run = loop()
    assert run.ema_rate == [0.5, 0.9999]
    run.run_loop()
    # Updates 0..4. Saves in the loop carry the index of the last update, the one after it the number of updates.
    files = {p.name for p in folder.iterdir()} - {"progress.csv"}
    expected = {f"{kind}00000{s}.pt" for s in (0, 3, 5) for kind in ("model", "opt", "ema_0.5_", "ema_0.9999_")}
    assert files == expected
    state = torch.load(folder / "model000005.pt", weights_only=True)
    assert torch.equal(state["layer.weight"], run.model.layer.weight)
    assert (folder / "progress.csv").read_text().splitlines()[0].split(",")[:2] == ["grad_norm", "loss"]


def test_attributes_for_subclasses():
    run = loop()
    for name in (*inspect.signature(TrainLoop).parameters, *MADE):
        assert hasattr(run, name), name
    assert run.microbatch == 6 and run.global_batch == 6 and not run.use_ddp


def test_resume_loads_weights_averages_and_optimizer(folder):
    first = loop(lr_anneal_steps=4)
    first.run_loop()
    second = loop(resume_checkpoint=str(folder / "model000003.pt"), lr_anneal_steps=8)
    assert second.resume_step == 3
    for a, b in zip(first.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)
    for ours, theirs in zip(second.ema_params, first.ema_params):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    p, q = first.model.layer.weight, second.model.layer.weight
    assert torch.equal(first.opt.state[p]["exp_avg"], second.opt.state[q]["exp_avg"])
    second.run_loop()
    assert (folder / "model000008.pt").exists()


def test_float16_and_resume(folder):
    first = loop(use_fp16=True, lr_anneal_steps=4)
    first.run_loop()
    second = loop(use_fp16=True, resume_checkpoint=str(folder / "model000003.pt"))
    for a, b in zip(first.ema_params[0], second.ema_params[0]):
        assert torch.equal(a, b)
    assert len(second.mp_trainer.master_params) == 2


@pytest.mark.parametrize("lr", [1e-6, 5e-3])
@pytest.mark.parametrize(("anneal", "after"), [(4, 0), (4, 8), (0, 0), (0, 8)])
def test_a_resumed_loop_uses_the_settings_it_was_given(folder, lr, anneal, after):
    """Rate, decay and averages; the file gives moments and counts."""
    first = loop(lr=1e-3, weight_decay=0.3, ema_rate="0.9", lr_anneal_steps=anneal)
    for _ in range(4):
        first.run_step(*next(first.data))
        first.step += 1
    first.step = 3
    first.save()
    settings = {"lr": lr, "weight_decay": 0.1, "ema_rate": "0.5,0.9", "lr_anneal_steps": after}
    again = loop(**settings, resume_checkpoint=str(folder / "model000003.pt"))
    (group,) = again.opt.param_groups
    assert group["lr"] == pytest.approx(lr * (1 - 3 / after if after else 1)) and group["weight_decay"] == 0.1
    assert again.ema_rate == [0.5, 0.9] and len(again.ema_params) == 2
    p, q = first.model.layer.weight, again.model.layer.weight
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(first.opt.state[p][name], again.opt.state[q][name])
    again.run_step(*next(again.data))
    if not after:
        assert group["lr"] == lr


@pytest.mark.parametrize("before", [False, True])
def test_a_resumed_loop_computes_in_the_format_it_was_given(folder, before):
    """The moments of a float16 run lie in two flat tensors, those of another run beside each parameter; either reads both."""

    class Deep(Net):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(4, 4)

        def forward(self, x):
            return self.more(self.layer(x))

    first = loop(model=Deep(), use_fp16=before, lr_anneal_steps=4)
    first.run_loop()
    again = loop(model=Deep(), use_fp16=not before, resume_checkpoint=str(folder / "model000003.pt"))
    assert len(again.mp_trainer.master_params) == len(again.opt.state) == (4 if before else 2)

    def numbers(run):
        parts = [run.opt.state[p]["exp_avg"].flatten() for p in run.mp_trainer.master_params]
        return torch.cat(parts if run.use_fp16 else [parts[k] for k in (1, 3, 0, 2)])  # flat: biases, then matrices

    torch.testing.assert_close(numbers(first), numbers(again), rtol=0, atol=0)
    again.run_step(*next(again.data))


def test_the_optimizer_of_another_network_is_refused(folder):
    loop(lr_anneal_steps=4).run_loop()
    state = torch.load(folder / "opt000003.pt")
    state["state"][2] = state["state"][0]
    torch.save(state, folder / "opt000003.pt")
    for use_fp16 in (False, True):
        with pytest.raises(ValueError, match="optimizer file"):
            loop(use_fp16=use_fp16, resume_checkpoint=str(folder / "model000003.pt"))


def test_subclass_hooks_are_called():
    calls = []

    def noted(name):
        def hook(self, *args, **kwargs):
            calls.append(name)
            getattr(TrainLoop, name)(self, *args, **kwargs)

        return hook

    names = "_load_and_sync_parameters __init__ run_step forward_backward _update_ema _anneal_lr log_step save".split()
    Mine = type("Mine", (TrainLoop,), {name: noted(name) for name in names})
    loop(Mine, lr_anneal_steps=1).run_loop()
    assert calls == ["__init__", "_load_and_sync_parameters", *names[2:]]


def test_every_process_makes_the_weights_of_a_save_and_the_first_writes_them(folder, monkeypatch):
    """An override may gather there, which takes all, and may add words."""
    made = []

    class Gathering(train_util.MixedPrecisionTrainer):
        def master_params_to_state_dict(self, params):
            made.append(params)
            return {**super().master_params_to_state_dict(params), "note": "words"}

    monkeypatch.setattr(train_util, "MixedPrecisionTrainer", Gathering)
    run = loop()
    run.save()
    assert torch.load(folder / "ema_0.5_000000.pt", weights_only=True)["note"] == "words" and len(made) == 3
    for name, value in {"is_initialized": True, "get_rank": 1, "barrier": None}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    run.step = 1
    run.save()
    assert len(made) == 6 and not (folder / "model000001.pt").exists()


def test_the_wrapper_for_many_processes_can_be_replaced(monkeypatch):
    told = {}

    def wrapper(net, device_ids, output_device, broadcast_buffers, bucket_cap_mb, find_unused_parameters):
        told.update(locals())
        return nn.Sequential(net)

    monkeypatch.setattr(train_util, "_processes", lambda: 2)
    monkeypatch.setattr(train_util, "DDP", wrapper)
    run = loop()
    assert isinstance(run.ddp_model, nn.Sequential) and run.ddp_model[0] is run.model and told["bucket_cap_mb"] == 128


def test_another_optimizer_and_trainer_in_their_places_resume(folder, monkeypatch):
    """What the optimizer keeps may have any shape; of the trainer, that which 2021 asked of it is asked."""

    class Flat(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                self.state[p]["kept"] = p.detach().flatten()[:3].clone()

    class Trainer:
        def __init__(self, *, model, use_fp16, fp16_scale_growth):
            inner = MixedPrecisionTrainer(model=model)
            for name in "zero_grad backward optimize master_params_to_state_dict state_dict_to_master_params".split():
                setattr(self, name, getattr(inner, name))
            self.master_params = inner.master_params

    monkeypatch.setattr(train_util, "AdamW", lambda params, lr, weight_decay: Flat(params, lr=lr))
    monkeypatch.setattr(train_util, "MixedPrecisionTrainer", Trainer)
    first = loop(lr_anneal_steps=4)
    first.run_loop()
    again = loop(resume_checkpoint=str(folder / "model000003.pt"))
    kept = [run.opt.state[run.model.layer.weight]["kept"] for run in (first, again)]
    assert torch.equal(*kept)
    again.run_step(*next(again.data))


def test_learning_rate_after_each_step():
    """2021 sets the rate after a step, from that step's index: one later than a pure schedule."""
    rates = []

    class Mine(TrainLoop):
        def forward_backward(self, batch, cond):
            rates.append(self.opt.param_groups[0]["lr"])
            super().forward_backward(batch, cond)

    loop(Mine, lr_anneal_steps=4, lr=1.0).run_loop()
    assert rates == [1.0, 1.0, 0.75, 0.5]


def test_microbatches_sum_their_means():
    whole, halves = loop(), loop(microbatch=3)
    batch, cond = next(data())
    torch.manual_seed(0)
    sampler = LossSecondMomentResampler(Diffusion())
    for run in (whole, halves):
        run.schedule_sampler = type(
            "Fixed", (), {"sample": lambda self, n, device: (torch.zeros(n).long(), torch.ones(n))}
        )()
        run.forward_backward(batch, cond)
    torch.testing.assert_close(halves.model.layer.weight.grad, 2 * whole.model.layer.weight.grad)
    loop(schedule_sampler=sampler).run_loop()
    assert sampler._loss_counts.sum() == 30


def test_integration_variable_ends_the_run(folder, monkeypatch):
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    loop(lr_anneal_steps=0).run_loop()
    assert (folder / "model000003.pt").exists() and not (folder / "model000006.pt").exists()


def test_names_and_places(folder):
    assert train_util.INITIAL_LOG_LOSS_SCALE == 20.0
    for name, step in {
        "model000002.pt": 2,
        "/runs/model/model123456.pt": 123456,
        "ema_0.9999_010000.pt": 0,
        "checkpoint010000.pt": 0,
        "modelx.pt": 0,
    }.items():
        assert train_util.parse_resume_step_from_filename(name) == step
    assert train_util.find_resume_checkpoint() is None
    assert train_util.get_blob_logdir() == str(folder)
    assert train_util.find_ema_checkpoint(None, 1, 0.9) is None
    assert train_util.find_ema_checkpoint(str(folder / "model000001.pt"), 1, 0.9) is None
    (folder / "ema_0.9_000001.pt").touch()
    assert train_util.find_ema_checkpoint(str(folder / "model000001.pt"), 1, 0.9).endswith("ema_0.9_000001.pt")


def test_log_loss_dict():
    ts, losses = torch.tensor([0, 24, 99]), torch.tensor([1.0, 3.0, 8.0])
    train_util.log_loss_dict(Diffusion(), ts, {"loss": losses})
    assert dict(logger.getkvs()) == {"loss": 4.0, "loss_q0": 2.0, "loss_q3": 8.0}


TWO_PROCESSES = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
from guided_diffusion import dist_util, logger
dist_util.setup_dist()
from test_train_util import loop
rank = torch.distributed.get_rank()
logger.configure(dir=sys.argv[1], format_strs=[])
first = loop(lr_anneal_steps=4, microbatch=3)
assert first.use_ddp and first.global_batch == 12
first.run_loop()
second = loop(lr_anneal_steps=6, resume_checkpoint=sys.argv[1] + "/model000003.pt")
assert second.resume_step == 3
assert torch.equal(first.model.layer.weight, second.model.layer.weight)
assert torch.equal(first.ema_params[0][0], second.ema_params[0][0])
second.run_loop()
everyone = dist_util._world().all_gather_cat(second.model.layer.weight.detach()[None])
assert torch.equal(everyone[0], everyone[1])
"""


def test_two_processes_train_and_resume(tmp_path):
    """In 2021 resuming on several processes hung."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), str(ROOT), str(here.parent), str(here)]
    processes = start_ranks(command, stderr=subprocess.PIPE, text=True)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    assert (tmp_path / "model000006.pt").exists()
