"""Files of a run: names, completeness, damage, 2021 triples, and files that are something else."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training.toys import assert_same_state, make, toy_net

from guided_diffusion.runtime import storage
from guided_diffusion.weights import writing
from guided_diffusion.weights.runs import (
    find_latest,
    load_run,
    load_weights,
    parse_name,
    read_run_json,
    remove_save,
    save_run,
)


def save(directory, step, **options):
    weights = {"a.weight": torch.full((2, 3), float(step)), "a.bias": torch.zeros(2)}
    return save_run(
        str(directory),
        step=step,
        model=weights,
        ema={"0.9": weights},
        optimizer={"state": {}, "param_groups": []},
        **options,
    )


def test_names_are_those_of_2021(tmp_path):
    save(tmp_path, 10_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ema_0.9_010000.pt",
        "model010000.pt",
        "opt010000.pt",
        "run010000.json",
    ]
    plain = torch.load(tmp_path / "model010000.pt", weights_only=True)
    assert list(plain) == ["a.weight", "a.bias"]


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("model000002.pt", ("model", 2)),
        ("/x/ema_0.9999_1234567.pt", ("ema_0.9999", 1234567)),
        ("opt010000.pt", ("opt", 10000)),
        ("run010000.json", ("run", 10000)),
        ("run010000.pt", None),
        ("256x256_diffusion.pt", None),
        ("model.pt", None),
    ],
)
def test_parse_name(name, meaning):
    assert parse_name(name) == meaning


def test_json_holds_config_state_and_receipts(tmp_path):
    state = {
        "third": 1 / 3,
        "table": torch.tensor([[0.1, float("inf")]], dtype=torch.float64),
        "array": np.arange(3, dtype=np.int64),
        "none": None,
    }
    path = save(
        tmp_path, 5, state=state, config={"model": {"num_channels": 32}}, kind="classifier", class_names=["cat", "dog"]
    )
    run = json.loads(storage.read_bytes(path))
    assert run["files"]["model000005.pt"] == {
        "bytes": (tmp_path / "model000005.pt").stat().st_size,
        "sha256": storage.sha256_of(tmp_path / "model000005.pt"),
    }
    for name in ("model000005.pt", "ema_0.9_000005.pt", "opt000005.pt", "run000005.json"):
        assert read_run_json(str(tmp_path / name))["config"] == {"model": {"num_channels": 32}}
    found = find_latest(str(tmp_path))
    assert (found.step, found.kind, found.class_names) == (5, "classifier", ("cat", "dog"))
    assert found.state["third"] == 1 / 3
    assert torch.equal(found.state["table"], state["table"]) and found.state["table"].dtype == torch.float64
    assert np.array_equal(found.state["array"], state["array"])


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut_short, flip_a_byte, remove])
@pytest.mark.parametrize("name", ["model000020.pt", "ema_0.9_000020.pt", "opt000020.pt", "run000020.json"])
def test_damaged_saves_are_passed_over(tmp_path, damage, name, caplog):
    save(tmp_path, 10)
    save(tmp_path, 20)
    damage(tmp_path / name)
    found = find_latest(str(tmp_path))
    if name == "run000020.json" and damage is flip_a_byte and found.step == 20:
        pytest.skip("the flipped byte left valid JSON")
    assert found.step == 10
    assert any("passing over" in line and "20" in line for line in caplog.messages)


def test_a_file_that_will_not_be_read_is_not_hashed(tmp_path, monkeypatch):
    """To sample, the optimizer is of no use. Its size is still checked."""
    save(tmp_path, 10)
    save(tmp_path, 20)
    hashed, plain = [], storage.sha256_of
    monkeypatch.setattr(storage, "sha256_of", lambda path: (hashed.append(Path(path).name), plain(path))[1])
    flip_a_byte(tmp_path / "opt000020.pt")
    assert find_latest(str(tmp_path), unread=("opt",)).step == 20
    assert sorted(hashed) == ["ema_0.9_000020.pt", "model000020.pt"]
    for name, damage in (("opt000020.pt", cut_short), ("model000010.pt", flip_a_byte)):
        damage(tmp_path / name)
        found = find_latest(str(tmp_path), unread=("opt",))
        assert (found and found.step) == (10 if name == "opt000020.pt" else None)


def test_no_whole_save_is_none(tmp_path):
    assert find_latest(str(tmp_path / "absent")) is None
    assert find_latest(str(tmp_path)) is None
    save(tmp_path, 10)
    remove(tmp_path / "opt000010.pt")
    assert find_latest(str(tmp_path)) is None


def test_triples_of_2021_resume_and_name_what_they_lack(tmp_path, caplog):
    trainer = make()
    trainer.run(3)
    torch.save(trainer.net.state_dict(), tmp_path / "model000500.pt")
    torch.save(trainer.ema.state_dict_of("0.9"), tmp_path / "ema_0.9_000500.pt")
    torch.save(trainer.optimizer.state_dict(), tmp_path / "opt000500.pt")
    (tmp_path / "model000600.pt").write_bytes(b"PK\x03\x04 half a file")
    again = make()
    lines = again.restore(find_latest(str(tmp_path)))
    assert "600" in caplog.text and again.steps_done == 500 and again.samples_seen == 4000
    assert any("counters, loss scale" in line for line in lines)
    assert_same_state(again.optimizer.state_dict()["state"], trainer.optimizer.state_dict()["state"])
    assert_same_state(again.ema.state_dict_of("0.9"), trainer.ema.state_dict_of("0.9"))
    for name in ("model000500.pt", "opt000500.pt"):
        assert load_run(str(tmp_path / name)).step == 500
    for name in ("mine", "1.0"):  # no decays: somebody's own files
        torch.save({}, tmp_path / f"ema_{name}_000500.pt")
    assert list(load_run(str(tmp_path / "model000500.pt")).ema) == ["0.9"]
    averages = load_run(str(tmp_path / "ema_0.9_000500.pt"))  # as 2021 took them: weights without a past
    assert (averages.step, averages.optimizer, averages.model) == (0, None, str(tmp_path / "ema_0.9_000500.pt"))


def test_float16_optimizer_files_of_2021_are_read(tmp_path):
    net = toy_net()
    params = list(net.parameters())
    flat = {}
    for k, members in enumerate(([p for p in params if p.dim() <= 1], [p for p in params if p.dim() > 1])):
        joined = torch.cat([p.detach().reshape(-1) for p in members])
        shape = (-1,) if k == 0 else (1, -1)
        flat[k] = {"step": 7, "exp_avg": (joined * 2).view(shape), "exp_avg_sq": (joined**2).view(shape)}
    torch.save(net.state_dict(), tmp_path / "model000007.pt")
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "params": [0, 1]}
    torch.save({"state": flat, "param_groups": [group]}, tmp_path / "opt000007.pt")
    trainer = make(net)
    lines = trainer.restore(load_run(str(tmp_path)))
    for p in params:
        assert torch.equal(trainer.optimizer.state[p]["exp_avg"], p * 2)
        assert trainer.optimizer.state[p]["step"] == 7
    assert any("EMA 0.9: not saved" in line for line in lines)
    trainer.run(9)


def test_a_lone_file_of_weights_starts_at_step_0(tmp_path, caplog):
    net = toy_net()
    torch.save({"module." + name: value for name, value in net.state_dict().items()}, tmp_path / "released.pt")
    trainer = make()
    trainer.restore(load_run(str(tmp_path / "released.pt")))
    assert trainer.steps_done == 0 and "belongs to no save" in caplog.text
    assert_same_state(trainer.net.state_dict(), net.state_dict())
    assert_same_state(trainer.ema.state_dict_of("0.9"), net.state_dict())


def test_another_network_is_a_short_error(tmp_path):
    torch.save({"first.weight": torch.zeros(3, 3), "other": torch.zeros(1)}, tmp_path / "model000001.pt")
    with pytest.raises(
        ValueError, match="of another network: 4 tensors missing .* 1 unknown tensors .* of another shape"
    ):
        make().restore(load_run(str(tmp_path)))


def test_old_and_foreign_formats_load(tmp_path):
    weights = {"w": torch.arange(4.0)}
    torch.save(weights, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {"_orig_mod.w": weights["w"]}}, tmp_path / "wrapped.pt")
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "w.safetensors")
    for name in ("legacy.pt", "wrapped.pt", "w.safetensors"):
        assert_same_state(load_weights(str(tmp_path / name)), weights)


def test_a_full_disk_is_an_oserror_and_leaves_no_save(tmp_path, monkeypatch):
    save(tmp_path, 10)
    real = writing._Hashing.write

    def full(self, data):
        if self.bytes > 500:
            self.error = OSError(errno.ENOSPC, "No space left on device")
            raise self.error
        return real(self, data)

    monkeypatch.setattr(writing._Hashing, "write", full)
    with pytest.raises(OSError, match="[Nn]o space left"):
        save(tmp_path, 20)
    monkeypatch.undo()
    assert find_latest(str(tmp_path)).step == 10
    assert not list(tmp_path.glob("*020*")) and not list(tmp_path.glob(".*.tmp"))


def test_channels_last_weights_are_saved_contiguous(tmp_path):
    from guided_diffusion.training.saver import Checkpoints

    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    with Checkpoints(str(tmp_path)) as saves:
        saves.save(1, model={"w": weight}, ema={}, optimizer=None, state={})
    loaded = load_weights(str(tmp_path / "model000001.pt"))["w"]
    assert loaded.is_contiguous() and torch.equal(loaded, weight)


def test_a_file_is_of_a_save_only_by_the_name_that_training_gives(tmp_path):
    """model2.pt may be anybody's: its weights are taken at step 0, and a folder of it has no save."""
    torch.save(make().net.state_dict(), tmp_path / "model2.pt")
    torch.save({}, tmp_path / "opt2.pt")
    assert find_latest(str(tmp_path)) is None
    taken = load_run(str(tmp_path / "model2.pt"))
    assert taken.step == 0 and taken.optimizer is None


def test_removing_a_save_leaves_what_is_not_its_own(tmp_path, caplog):
    own = save(tmp_path, 10), save(tmp_path, 20)
    kept = tmp_path / "ema_0.77_000010.pt"
    kept.write_bytes(b"of the user")
    remove_save(own[0])
    cut_short(tmp_path / "run000020.json")
    remove_save(own[1])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {kept.name, "run000020.json", "opt000020.pt", "ema_0.9_000020.pt", "model000020.pt"}
    assert "not removed" in caplog.text


@pytest.mark.parametrize("state", [{"x": {"__tensor__": "float3", "shape": [1], "data": [1.0]}},
                                   {"x": {"__tensor__": "float32", "shape": [2], "data": [1.0]}}])  # fmt: skip
def test_a_state_that_cannot_be_read_matters_to_training_only(tmp_path, state, caplog):
    path = Path(save(tmp_path, 10))
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": state}))
    assert read_run_json(str(tmp_path / "model000010.pt"))["step"] == 10
    assert find_latest(str(tmp_path)) is None and "the state in run000010.json cannot be read" in caplog.text
