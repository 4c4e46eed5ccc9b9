"""The loop: equivalences that must hold, where it stops, what it logs, and what it does when things go wrong."""

import errno
import json
import os
import threading
import time

import pytest
import torch

from guided_diffusion.runtime import storage
from guided_diffusion.runtime.log import Log
from guided_diffusion.runtime.signals import Stop
from guided_diffusion.runtime.streams import TRAIN, Streams
from guided_diffusion.training import saver
from guided_diffusion.training.incident import TrainingDiverged
from guided_diffusion.training.saver import Checkpoints, SaveError
from guided_diffusion.weights import runs as checkpoint
from guided_diffusion.weights.runs import find_latest

from .toys import ToyBatch, batches, denoising, make, toy_net, weights_of


def test_steps_are_adamw_on_the_batch_mean():
    trainer = make(weight_decay=0.1, seed=5)
    net = toy_net()
    reference = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for step, batch in zip(range(3), batches()):
        loss = denoising(net, batch, Streams(5, TRAIN, step, ids=batch.positions)).loss.mean()
        reference.zero_grad()
        loss.backward()
        out = trainer.step(batch)
        torch.testing.assert_close(out["loss"], loss.detach())
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        torch.testing.assert_close(out["grad_norm"], norm)
        reference.step()
    for a, b in zip(weights_of(trainer), net.parameters()):
        torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("microbatch", [1, 3, 8, 100])
def test_microbatches_do_not_matter(microbatch):
    whole, parts = make(), make(microbatch=microbatch)
    whole.run(3)
    parts.run(3)
    for a, b in zip(weights_of(whole), weights_of(parts)):
        torch.testing.assert_close(a, b)


def test_batches_without_positions_are_dealt_out_in_turn():
    def plain(start):
        return ({"images": batch.images} for batch in batches(start))

    def loss(net, batch, streams):
        return denoising(net, ToyBatch(batch["images"], None, 0), streams)

    trainers = [make(), make(batches=plain), make(batches=plain, microbatch=3)]
    for trainer in trainers:
        trainer.loss_fn = loss if trainer is not trainers[0] else denoising
        trainer.run(2)
    for a, b, c in zip(*map(weights_of, trainers)):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights():
    trainer = make(precision="bf16")
    trainer.run(2)
    assert trainer.net.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in weights_of(trainer))
    full = make()
    full.run(2)
    for a, b in zip(weights_of(trainer), weights_of(full)):
        assert not torch.equal(a, b)
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.1)


def test_gradient_norm_is_clipped():
    steps = []
    for clip in (0.0, 1e-3):
        # Stochastic gradient descent shows the length of the gradient; AdamW would divide it out again.
        trainer = make(make_optimizer=lambda params: torch.optim.SGD(params, lr=1.0), max_grad_norm=clip, lr=1.0)
        before = torch.cat([w.flatten() for w in weights_of(trainer)])
        out = trainer.step(next(batches()))
        after = torch.cat([w.flatten() for w in weights_of(trainer)])
        steps.append((before - after).norm())
    torch.testing.assert_close(steps[0], out["grad_norm"], rtol=1e-4, atol=0)
    assert float(steps[1]) == pytest.approx(1e-3, rel=1e-3)


def test_the_caller_states_the_wrong_batch_size():
    with pytest.raises(ValueError, match="batch of 8 on each of 1 processes does not make the batch size 7"):
        make(batch_size=7).run(1)


def test_where_it_stops(caplog):
    caplog.set_level("INFO", "guided_diffusion")
    trainer = make(lr_anneal_steps=5)
    assert trainer.run() == "finished" and trainer.steps_done == 5
    trainer.run(5)
    assert "nothing to do" in caplog.text
    trainer = make(lr_anneal_steps=5)
    trainer.run(3)
    assert trainer.steps_done == 3
    three = [batch for batch, _ in zip(batches(), range(3))]
    trainer = make(batches=three)
    trainer.run()
    assert "without end" in caplog.text and "the data ended" in caplog.text and trainer.steps_done == 3


def test_log_has_the_columns_of_2021(tmp_path):
    log = Log(str(tmp_path), writers=("csv", "json"))
    trainer = make(log=log, log_every=2, precision="fp16")
    trainer.precision.lg_loss_scale.fill_(8.0)
    trainer.run(4)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert [(row["step"], row["samples"]) for row in rows] == [(2, 16), (4, 32)]
    columns = "loss mse grad_norm param_norm lg_loss_scale images_per_second data_wait_share seconds"
    assert set(columns.split()) <= set(rows[0])
    assert any(f"loss_q{q}" in rows[0] for q in range(4))
    net = trainer.net
    assert rows[1]["param_norm"] == pytest.approx(
        float(torch.cat([p.detach().flatten() for p in net.parameters()]).norm()), rel=1e-5
    )


def test_callbacks_and_progress_bar(capsys):
    seen = []
    trainer = make(
        callbacks=[(2, lambda t: seen.append(t.steps_done)), (3, lambda t: t.net.eval())], progress=True, log_every=1
    )
    trainer.run(5)
    assert seen == [2, 4]
    assert "5/5" in capsys.readouterr().err


def test_a_request_to_stop_saves_and_leaves(tmp_path):
    stop = Stop()
    trainer = make(checkpoints=Checkpoints(str(tmp_path)), stop=stop, callbacks=[(3, lambda _: stop.request("test"))])
    assert trainer.run(10) == "stopped"
    assert find_latest(str(tmp_path)).step == 3


# ---------------------------------------------------------------------------------------------------------------------
# Trouble


def poison(trainer, from_step, until_step=10**9):
    good = trainer.loss_fn

    def bad(net, batch, streams):
        losses = good(net, batch, streams)
        wrong = float("nan") if from_step <= batch.step < until_step else 1.0
        return losses._replace(loss=losses.loss * wrong)

    trainer.loss_fn = bad


def test_a_bad_step_changes_nothing_but_the_count():
    trainer = make(max_bad_steps=3)
    poison(trainer, 2, 4)
    trainer.run(2)
    before, moments = weights_of(trainer), trainer.optimizer.state[trainer.params[0]]["exp_avg"].clone()
    trainer.run(4)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer)))
    assert torch.equal(trainer.optimizer.state[trainer.params[0]]["exp_avg"], moments)
    trainer.run(5)
    assert trainer.state_dict()["skipped"] == 2 and trainer.state_dict()["bad_in_a_row"] == 0
    assert all(torch.isfinite(w).all() for w in weights_of(trainer))


@pytest.mark.parametrize("writing", [0.0, 0.3])
@pytest.mark.parametrize("keep_last", [0, 1])
def test_many_bad_steps_stop_the_run_with_evidence(tmp_path, monkeypatch, writing, keep_last):
    """The save named is the one before the bad steps, however long saves take, and it is still there."""
    real = checkpoint.save_run

    def save_run(*args, **options):
        time.sleep(writing)
        return real(*args, **options)

    monkeypatch.setattr(checkpoint, "save_run", save_run)
    trainer = make(max_bad_steps=3, checkpoints=Checkpoints(str(tmp_path), keep_last=keep_last), save_every=2)
    poison(trainer, 4)
    with pytest.raises(TrainingDiverged, match="3 steps in a row, up to step 7.*incident_000006.*run000004.json"):
        trainer.run(20)
    assert (tmp_path / "run000004.json").exists() and (tmp_path / "run000006.json").exists()
    report = json.loads((tmp_path / "incident_000006" / "report_rank0.json").read_text())
    assert report["last_good"].endswith("run000004.json")
    assert {layer["layer"] for layer in report["layers"]} == {"drop", "last"}
    assert all(layer["largest"] > 0 for layer in report["layers"])
    kept = torch.load(tmp_path / "incident_000006" / "batch_rank0.pt")
    assert kept["step"] == 6 and torch.equal(kept["images"], next(batches(6)).images)


def test_the_good_save_is_named_and_kept_over_restarts(tmp_path, monkeypatch):
    """A run that starts again in the middle of bad steps still knows the save from before; the folder's spelling is free."""
    monkeypatch.chdir(tmp_path)
    for spelling in ("run", "./run", str(tmp_path / "run" / ".." / "run")):
        checkpoints = Checkpoints(spelling, keep_last=1)
        trainer = make(max_bad_steps=3, checkpoints=checkpoints, save_every=2)
        poison(trainer, 4)
        found = checkpoints.find(os.path.join(".", "run") if (tmp_path / "run" / "run000004.json").exists() else "auto")
        if found is not None:
            assert found.step == 6 and found.state["bad_in_a_row"] == 2
            trainer.restore(found)
        with pytest.raises(TrainingDiverged, match="The last good save is .*run000004.json"):
            trainer.run(20)
        assert (tmp_path / "run" / "run000004.json").exists()
        checkpoints.close()
        trainer.max_bad_steps = 0
    checkpoints = Checkpoints("run", keep_last=1)
    trainer = make(checkpoints=checkpoints, save_every=2)
    trainer.restore(checkpoints.find("auto"))
    trainer.run(10)  # good again: the old one is not needed any longer
    assert sorted(p.name for p in (tmp_path / "run").glob("run*.json")) == ["run000010.json"]


def test_float16_overflow_halves_the_scale_without_alarm():
    trainer = make(precision="fp16", max_bad_steps=2)
    trainer.precision.lg_loss_scale.fill_(40.0)
    start = weights_of(trainer)
    trainer.run(4)
    assert float(trainer.precision.lg_loss_scale) == 36.0
    assert all(torch.equal(a, b) for a, b in zip(start, weights_of(trainer)))
    for _ in range(40):
        trainer.step(next(batches(trainer.steps_done)))
    assert not torch.equal(start[0], weights_of(trainer)[0])
    assert float(trainer.precision.lg_loss_scale) > 0


def test_float16_at_the_floor_of_its_scale_stops():
    trainer = make(precision="fp16", max_bad_steps=4)
    trainer.precision.lg_loss_scale.fill_(3.0)
    good = trainer.loss_fn

    def huge(net, batch, streams):
        losses = good(net, batch, streams)
        return losses._replace(loss=losses.loss * 1e30)

    trainer.loss_fn = huge
    with pytest.raises(TrainingDiverged):
        trainer.run(30)
    assert float(trainer.precision.lg_loss_scale) == 0.0


def failing_after(monkeypatch, allowed, error):
    real, saves = checkpoint.save_run, []

    def save_run(*args, **options):
        saves.append(options["step"])
        if len(saves) > allowed:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(checkpoint, "save_run", save_run)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), PermissionError(13, "denied"), FileNotFoundError(2, "gone")]
)
def test_failed_saves_warn_and_the_last_one_stops(tmp_path, monkeypatch, caplog, error):
    failing_after(monkeypatch, 1, error)
    trainer = make(checkpoints=Checkpoints(str(tmp_path / "w")), save_every=2)
    with pytest.raises(SaveError, match="step 6 could not be written.*run000002.json"):  # no other one would follow
        trainer.run(6)
    assert trainer.steps_done == 6
    assert "step 4 could not be written" in caplog.text
    monkeypatch.undo()
    trainer.run(6)  # there is room again
    assert trainer.checkpoints.last_good.endswith("run000006.json")


def test_the_last_state_is_written_from_where_it_lies(tmp_path, monkeypatch):
    """Others are copied first, as training goes on. Both make the same file."""
    copied, plain = set(), saver.copied_to_host

    def copy(tensor):
        copied.add(trainer.steps_done)
        return plain(tensor)

    monkeypatch.setattr(saver, "copied_to_host", copy)
    for folder, last in (("a", 4), ("b", 6)):
        copied.clear()
        trainer = make(checkpoints=Checkpoints(str(tmp_path / folder)), save_every=2)
        trainer.run(last)
        trainer.checkpoints.close()
        assert copied == set(range(2, last, 2))
    for name in ("model000004.pt", "opt000004.pt", "ema_0.9_000004.pt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_save_that_is_still_written_from_the_weights_is_waited_for_before_they_change(tmp_path, monkeypatch):
    """A notebook's user interrupted the last save twice, and trains on."""
    trainer = make(checkpoints=Checkpoints(str(tmp_path)))
    writing = trainer.checkpoints._thread = threading.Thread(target=time.sleep, args=(0.3,))
    writing.start()
    trainer.callbacks.append((1, lambda trainer: alive.append(writing.is_alive())))
    alive: list[bool] = []
    trainer.run(1)
    assert alive == [False]


def test_keep_last_and_keep_every(tmp_path):
    trainer = make(checkpoints=Checkpoints(str(tmp_path), keep_last=2, keep_every=4), save_every=1)
    (tmp_path / "model000001.pt.mine").write_text("not ours")
    trainer.run(7)
    assert sorted(p.name for p in tmp_path.glob("run*.json")) == ["run000004.json", "run000006.json", "run000007.json"]
    assert len(list(tmp_path.glob("*.pt"))) == 9 and (tmp_path / "model000001.pt.mine").exists()


def test_one_job_per_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_LOCK_WAIT_S", 0.1)
    first = Checkpoints(str(tmp_path))
    with pytest.raises(ValueError, match=f"another job writes to {tmp_path}: process [0-9]+ on"):
        Checkpoints(str(tmp_path))
    first.close()
    Checkpoints(str(tmp_path)).close()


def test_resume_from_nothing(tmp_path):
    saves = Checkpoints(str(tmp_path))
    assert saves.find("") is None and saves.find("auto") is None
    (tmp_path / "empty").mkdir()
    for where in ("absent", "empty"):
        with pytest.raises(ValueError, match=where):
            saves.find(str(tmp_path / where))


def test_halves_of_a_killed_writer_are_removed(tmp_path):
    half, other = tmp_path / ".model000010.pt.0123abcd.tmp", tmp_path / ".notes.0123abcd.tmp"
    half.touch()
    other.touch()
    with Checkpoints(str(tmp_path)):
        assert not half.exists() and other.exists()


def test_a_run_of_another_kind_is_refused(tmp_path):
    with Checkpoints(str(tmp_path), kind="classifier") as saves:
        saves.save(1, model={"w": torch.zeros(1)}, ema={}, optimizer=None, state={})
    with Checkpoints(str(tmp_path)) as saves, pytest.raises(ValueError, match="'classifier', this one is 'diffusion'"):
        saves.find("auto")


def test_evidence_that_cannot_be_written_does_not_hide_the_reason(tmp_path, monkeypatch):
    from guided_diffusion.training import incident

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(incident, "write_incident", full)
    trainer = make(max_bad_steps=1, checkpoints=Checkpoints(str(tmp_path)))
    poison(trainer, 0)
    with pytest.raises(TrainingDiverged, match="not finite. The evidence could not be written: .*No space left"):
        trainer.run(2)


def test_a_schedule_sampler_without_a_state_is_left_alone():
    class Uniform:
        def update(self, i, losses):
            raise AssertionError("there is nothing to learn")

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    make(schedule_sampler=Uniform()).run(2)
