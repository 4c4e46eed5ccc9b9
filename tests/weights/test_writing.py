"""Files of tensors: what is written, and what happens when the disk fails behind the writer."""

import errno
import hashlib
import os
import subprocess
import sys
import threading

import pytest
import torch

from guided_diffusion.runtime import storage
from guided_diffusion.weights import writing
from guided_diffusion.weights.runs import load_run
from guided_diffusion.weights.writing import begun, copied_to_host, map_tensors, on_host, write_tensors


def content():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, 1, 1, generator=generator)
    return {
        "plain": torch.randn(300, 300, generator=generator),
        "parameter": torch.nn.Parameter(torch.randn(5, generator=generator)),
        "channels last": torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last),
        "channels last, 1x1": weight.to(memory_format=torch.channels_last),  # contiguous by any stride
        "a part": torch.randn(10, 4, generator=generator)[2:5],
        "bfloat16": torch.randn(7, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 3),
        "state": {0: {"step": torch.tensor(3.0), "lr": 0.1}, "groups": [{"betas": (0.9, 0.999), "params": [0, 1]}]},
    }


def test_a_file_is_the_same_from_a_copy_and_from_the_tensors_themselves(tmp_path, monkeypatch):
    """And whatever its pieces: each is counted, hashed, and sent to the disk."""
    copied = write_tensors(str(tmp_path / "copied.pt"), map_tensors(content(), copied_to_host))
    monkeypatch.setattr(writing, "_SMALL", 8)
    monkeypatch.setattr(writing, "_SENT_AT_ONCE", 1)
    direct = write_tensors(str(tmp_path / "direct.pt"), map_tensors(content(), on_host))
    bytes_of = (tmp_path / "direct.pt").read_bytes()
    assert direct == copied == (len(bytes_of), hashlib.sha256(bytes_of).hexdigest())
    assert bytes_of == (tmp_path / "copied.pt").read_bytes()
    loaded = torch.load(tmp_path / "direct.pt", weights_only=True)
    assert loaded["state"]["groups"] == content()["state"]["groups"]
    for name, value in content().items():
        if name != "state":
            assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
            assert loaded[name].untyped_storage().nbytes() == value.nbytes


def test_only_what_a_file_could_not_hold_as_it_lies_is_copied():
    kept = {
        name for name, value in content().items() if name != "state" and on_host(value).data_ptr() == value.data_ptr()
    }
    assert kept - {"empty"} == {"plain", "parameter", "bfloat16"}


@pytest.mark.parametrize("later", [0, 1])
def test_an_error_on_the_way_to_the_disk_is_raised_although_the_next_fsync_succeeds(tmp_path, monkeypatch, later):
    """The system reports it once. `later`: pieces sent without an error before it."""
    calls, plain = [], os.fsync

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == later + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(descriptor)

    monkeypatch.setattr(writing, "_SENT_AT_ONCE", 1)
    monkeypatch.setattr(os, "fsync", fsync)
    tensors = {str(k): torch.ones(100_000) for k in range(20)}
    with pytest.raises(OSError, match="cannot write: No space left on device"):
        write_tensors(str(tmp_path / "w.pt"), tensors)
    assert not list(tmp_path.iterdir()) and len(calls) > later


def test_an_error_of_torch_is_told_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="pickle"):
        write_tensors(str(tmp_path / "w.pt"), {"w": torch.zeros(3), "lock": storage.lock_folder(str(tmp_path / "x"))})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_written_as_those_of_main_memory(tmp_path):
    on_gpu = map_tensors(content(), lambda value: value.detach().cuda())
    found = [map_tensors(tensors, on_host) for tensors in (on_gpu, content())]
    assert write_tensors(str(tmp_path / "a.pt"), found[0]) == write_tensors(str(tmp_path / "b.pt"), found[1])


def test_a_save_is_whole_although_the_main_thread_has_ended(tmp_path):
    """A script that saves and ends. The interpreter then begins no thread any more."""
    script = """
import sys, threading, torch
from guided_diffusion.weights.runs import save_run
content = {f"weight {k}": torch.zeros(1 << 18) for k in range(60)}
save = lambda: threading.main_thread().join() or save_run(sys.argv[1], kind="diffusion", step=1, model=content, state={})
threading.Thread(target=save).start()
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
    assert load_run(str(tmp_path)).step == 1


@pytest.mark.parametrize("threads", [True, False])
def test_a_call_that_was_begun_answers_or_raises(threads, monkeypatch):
    if not threads:
        monkeypatch.setattr(threading.Thread, "start", lambda thread: _refuse())
    assert begun(divmod, 7, 2).result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        begun(divmod, 7, 0).result()


def _refuse():
    raise RuntimeError("can't create new thread at interpreter shutdown")
