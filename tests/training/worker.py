"""One process of a small job, started by test_processes.py: `worker.py FOLDER JOB`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from guided_diffusion.runtime import world as worlds  # noqa: E402
from guided_diffusion.training.saver import Checkpoints, find_save  # noqa: E402
from training.toys import Counter, assert_same_state, batches, denoising, make, toy_net, weights_of  # noqa: E402

STEPS = 12


def trainer_of(folder, world, *, dropout=0.0, **options):
    def data(start):
        return batches(start, rank=world.rank, world=world.size)

    checkpoints = None if folder is None else Checkpoints(str(folder), world=world)
    options = {"batches": data, "world": world, "checkpoints": checkpoints, "schedule_sampler": Counter(), **options}
    return make(toy_net(dropout), **options)


def endless(folder, world):
    """Saves every 3 steps, slowly, until somebody kills us."""
    trainer = trainer_of(
        folder / "killed", world, dropout=0.5, save_every=3, callbacks=[(1, lambda _: time.sleep(0.1))]
    )
    trainer.run(10_000)


def proofs(folder, world):
    # The killed run, continued, against a run that nobody disturbed.
    whole = trainer_of(folder / "whole", world, dropout=0.5)
    whole.run(STEPS)
    continued = trainer_of(folder / "killed", world, dropout=0.5)
    saved = continued.checkpoints.find("auto")
    assert saved is not None and 3 <= saved.step < STEPS, saved
    continued.restore(saved)
    continued.run(STEPS)
    assert_same_state(whole.state_dict(), continued.state_dict())

    # Plain runs, for comparison with one process.
    for name, options in (("plain", {}), ("micro", {"microbatch": 3})):
        trainer = trainer_of(None, world, **options)
        trainer.run(4)
        if world.is_main:
            torch.save([weights_of(trainer), trainer.schedule_sampler.seen], folder / f"{name}.pt")
    plain = weights_of(trainer_of_steps(world, 4))

    # A divided optimizer computes and saves the same.
    sharded = trainer_of(folder / "sharded", world, shard_optimizer=True)
    sharded.run(4)
    for a, b in zip(plain, weights_of(sharded)):
        torch.testing.assert_close(a, b)
    again = trainer_of(folder / "sharded2", world, shard_optimizer=True)
    again.restore(again.checkpoints.find(str(folder / "sharded")))
    again.run(6)
    sharded.run(6)
    for a, b in zip(weights_of(sharded), weights_of(again)):
        assert torch.equal(a, b)

    # Divided averages are those of undivided ones, bit for bit, also after a resume.
    owners = [
        trainer_of(folder / name, world, shard_ema=shard, ema_sigma_rels=(0.1,))
        for name, shard in (("undivided", False), ("divided", True))
    ]
    for trainer in owners:
        trainer.run(4)
    resumed = trainer_of(folder / "divided2", world, shard_ema=True, ema_sigma_rels=(0.1,))
    resumed.restore(resumed.checkpoints.find(str(folder / "divided")))
    held = 0
    for rate in owners[0].ema.names:
        undivided, divided, loaded = (trainer.ema.state_dict_of(rate) for trainer in (*owners, resumed))
        if world.is_main:
            assert all(torch.equal(undivided[k], divided[k]) and torch.equal(divided[k], loaded[k]) for k in undivided)
            held += 1
    assert not world.is_main or held

    # One process sees a bad loss: all skip.
    def poisoned(net, batch, streams):
        losses = denoising(net, batch, streams)
        return losses._replace(loss=losses.loss + (float("inf") if world.rank == 1 else 0.0))

    trainer = trainer_of(None, world)
    trainer.loss_fn = poisoned
    before = weights_of(trainer)
    out = trainer.step(next(batches(0, rank=world.rank, world=world.size)))
    assert bool(out["skipped"])
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(trainer)))

    # A second job on a folder in use is refused on every process.
    try:
        Checkpoints(str(folder / "sharded"), world=world)
    except ValueError as error:
        assert "another job" in str(error)
    else:
        raise AssertionError("not refused")


def fitting(folder, world):
    """Only the second process is short of memory; both choose alike, and train as without."""
    from guided_diffusion.training import memory
    from training.test_memory import batch_of, recomputed_by, trainer_of, unet

    whole = batch_of(8)
    mine = whole._replace(images=whole.images[world.rank :: 2], positions=whole.positions[world.rank :: 2])
    options = {"world": world, "ddp_options": {"static_graph": True}}
    trainer, other = trainer_of(unet(), 8, **options), trainer_of(unet(), 8, **options)
    (fixed, each), passing = (memory._kept(trainer, mine, way) for way in ("norms", "none"))
    need = fixed + 4 * (each + memory._TEMPORARY * passing[1])
    free = [2**50, int(2 * 1.02 * (need + memory._state_bytes(trainer)) / memory._USABLE)]
    memory.available_memory = lambda device: free[world.rank]
    assert need < memory._usable_bytes(trainer, 0.0) < 1.1 * need  # the first learns of it before it tries
    memory.fit(trainer, mine, recompute=True, shrink=True)
    (folder / f"chosen{world.rank}.json").write_text(json.dumps([recomputed_by(trainer.net), trainer.microbatch]))
    for _ in range(3):
        for each in (trainer, other):
            each.step(mine)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(trainer), weights_of(other)))


def laid_out(folder, world):
    """Weights stored channels_last train, are divided among processes, saved and resumed as contiguous ones are."""
    from training.test_memory import batch_of, trainer_of, unet

    whole = batch_of(8)
    mine = whole._replace(images=whole.images[world.rank :: 2], positions=whole.positions[world.rank :: 2])

    def made(stored, **options):
        net = unet()
        if stored:
            net.store_channels_last()
            assert not net.input_blocks[0][0].weight.is_contiguous()
        return trainer_of(net, 8, world=world, precision="bf16", microbatch=3, **options)

    parts = {"shard_optimizer": True, "shard_ema": True}
    trainers = [
        made(False),
        made(True),
        made(True, checkpoints=Checkpoints(str(folder / "divided"), world=world), **parts),
    ]
    for trainer in trainers:
        trainer.step(mine)
    trainers[-1].save()
    trainers[-1].checkpoints.wait()
    world.barrier()
    saved = find_save(str(folder / "divided"), "auto", kind="diffusion", world=world)
    for stored, options in ((False, {}), (True, {}), (True, parts)):
        trainers.append(made(stored, **options))
        trainers[-1].restore(saved)
    for trainer in trainers:
        for _ in range(2):
            trainer.step(mine)
    weights = [weights_of(trainer) for trainer in trainers]
    averages = [trainer.ema.state_dict_of("0.9") for trainer in trainers]
    for k in range(1, len(trainers)):
        assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[k])), k
        assert all(torch.equal(averages[0][key], value) for key, value in averages[k].items()), k


def trainer_of_steps(world, steps):
    trainer = trainer_of(None, world)
    trainer.run(steps)
    return trainer


if __name__ == "__main__":
    with worlds.session("cpu", timeout_s=60) as here:
        jobs = {"endless": endless, "proofs": proofs, "fitting": fitting, "laid_out": laid_out}
        jobs[sys.argv[2]](Path(sys.argv[1]), here)
