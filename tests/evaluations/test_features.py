"""Features are the same bits for any batch size, thread count, number of processes, order of work and interruption."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, clean_environment

from evaluations import features, shards
from evaluations.features import Features, extract, extract_blocks, pick_device
from evaluations.inception import POOL_FEATURES, SPATIAL_FEATURES, InceptionOutputs
from evaluations.inputs import open_images
from evaluations.selftest import synthetic_images
from evaluations.settings import Settings
from guided_diffusion.runtime.launchers import Place


class Toy(torch.nn.Module):
    """Stands in for the network where only the bookkeeping is tested. It refuses any batch but whole chunks."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 3), requires_grad=False)
        self.sha256, self.folded, self.chunk, self.calls = "toy", True, chunk, 0

    def forward(self, x: torch.Tensor) -> InceptionOutputs:
        assert x.shape == (self.chunk, 3, 299, 299)
        self.calls += 1
        value = (x.mean((2, 3)) * self.weight).sum(1, keepdim=True)
        place = torch.arange(self.chunk)[:, None]  # the place in the chunk shows, so a shifted chunk is noticed
        pool = value * torch.linspace(0, 1, POOL_FEATURES) + place
        return InceptionOutputs(pool, value.expand(-1, SPATIAL_FEATURES))


def same(one: Features | None, other: Features | None) -> bool:
    assert one is not None
    assert other is not None
    return all(np.array_equal(a, b) for a, b in zip(one, other))


def run(source, net, **settings) -> Features | None:
    names = ("batch_size", "dtype", "compile", "shard_dir")
    chosen = {name: settings.pop(name) for name in names if name in settings}
    return extract(source, net, Settings(progress=False, **chosen), **settings)


@pytest.fixture
def images() -> np.ndarray:
    return synthetic_images(3, 11, 20, 24)


def test_real_network_batch_size_threads_and_shards(net, tmp_path):
    images = synthetic_images(3, 5, 20, 24)
    expected = run(images, net, chunk=2)
    assert expected is not None
    assert [value.shape for value in expected] == [(5, 2048), (5, 2023)]
    assert all(value.dtype == np.float32 for value in expected)
    assert same(expected, run(images, net, chunk=2, batch_size=1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        assert same(expected, run(images, net, chunk=2, batch_size=3))
    finally:
        torch.set_num_threads(before)
    assert torch.get_num_threads() == before
    for rank in (2, 1, 0):
        shared = run(images, net, chunk=2, shard_images=2, shard_dir=tmp_path, world=Place(rank, 3))
    assert same(expected, shared)


PROCESS = """
    import sys, warnings
    import numpy as np
    warnings.simplefilter("ignore")
    from evaluations.features import extract
    from evaluations.weights import load_inception
    net = load_inception(sys.argv[1], allow_unknown=True)
    found = extract(sys.argv[2], net, chunk=2, shard_images=2, timeout_s=120)
    if found is not None:
        np.savez(sys.argv[3], *found)
"""


def test_real_processes_agree(net, synthetic_pb, tmp_path):
    """Two processes started as torchrun and as mpiexec do, sharing the folder beside the file."""
    images = synthetic_images(3, 5, 20, 24)
    np.savez(tmp_path / "x.npz", images)
    expected = run(images, net, chunk=2)
    running = []
    for rank in range(2):
        names = {"RANK": str(rank), "WORLD_SIZE": "2"} if rank else {"PMI_RANK": "0", "PMI_SIZE": "2"}
        env = clean_environment(PYTHONPATH=str(ROOT), **names) | {"OMP_NUM_THREADS": str(rank + 1)}
        command = [sys.executable, "-c", textwrap.dedent(PROCESS), str(synthetic_pb), "x.npz", f"out{rank}.npz"]
        running.append(subprocess.Popen(command, cwd=tmp_path, env=env))
    assert [process.wait(200) for process in running] == [0, 0]
    with np.load(tmp_path / "out0.npz") as found:
        assert same(expected, Features(*(found[f"arr_{i}"] for i in range(2))))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out0.npz", "x.npz"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_batch_size_and_number_of_processes(batch_size, size, images, tmp_path):
    net = Toy(4)
    expected = run(images, net, chunk=4)
    for rank in reversed(range(size)):
        where = {"shard_dir": tmp_path, "world": Place(rank, size), "shard_images": 3}
        found = run(images, net, chunk=4, batch_size=batch_size, **where)
        assert (found is None) == (rank != 0)
    assert same(expected, found)
    assert same(expected, run(images, net, chunk=4, batch_size=batch_size))
    batches = [images[at : at + batch_size] for at in range(0, len(images), batch_size)]
    assert same(expected, run(iter(batches), net, chunk=4, batch_size=2))


def test_blocks_come_in_order_and_join_to_the_whole(images):
    net = Toy(2)
    blocks = list(extract_blocks(images, net, chunk=2, shard_images=4))
    assert [len(block.pool) for block in blocks] == [4, 4, 3]
    whole = run(images, net, chunk=2)
    assert same(whole, Features(*(np.concatenate(parts) for parts in zip(*blocks))))


def test_batches_in_one_reused_buffer_and_read_only_arrays(images, recwarn):
    expected = run(images, Toy(2), chunk=2)
    buffer = np.empty_like(images[:3])

    def batches():
        for at in range(0, len(images), 3):
            part = buffer[: len(images[at : at + 3])]
            part[:] = images[at : at + 3]
            yield part
            buffer[:] = 0

    assert same(expected, run(batches(), Toy(2), chunk=2))
    images.flags.writeable = False
    assert same(expected, run(images, Toy(2), chunk=2))
    assert not recwarn.list


def test_mixed_sizes_go_through_together(tmp_path):
    expected = []
    for i, (height, width) in enumerate([(20, 20), (20, 20), (31, 9), (299, 299), (20, 20)]):
        image = synthetic_images(i, 1, height, width)
        Image.fromarray(image[0]).save(tmp_path / f"{i}.png")
        expected.append(run(image, Toy(1), chunk=1).spatial)
    assert np.array_equal(run(tmp_path, Toy(2), chunk=2).spatial, np.concatenate(expected))


def test_an_interrupted_run_goes_on(images, tmp_path, monkeypatch):
    expected = run(images, Toy(2), chunk=2)
    net = Toy(2)
    write = features.Shards.write

    def third_write_is_cut_off(self, span, block, notes=()):
        if span[0] == 8:
            raise KeyboardInterrupt
        write(self, span, block, notes)

    where = {"chunk": 2, "shard_images": 4, "shard_dir": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(features.Shards, "write", third_write_is_cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(images, net, **where)
    assert len(list(tmp_path.iterdir())) == 2
    again = Toy(2)
    assert same(expected, run(images, again, **where))
    assert again.calls == 2  # the last shard: 3 images in 2 chunks
    third = Toy(2)
    assert same(expected, run(images, third, world=Place(), **where))
    assert third.calls == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "key", "shape"])
def test_a_damaged_shard_is_made_anew(damage, images, tmp_path):
    where = {"chunk": 2, "shard_images": 4, "shard_dir": tmp_path}
    expected = run(images, Toy(2), **where)
    shard, other = sorted(tmp_path.iterdir())[1:3]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "key":
        with np.load(shard) as content:
            np.savez(shard, **{**content, "key": np.zeros(32, np.uint8)})
    else:
        shard.write_bytes(
            {"cut": data[: len(data) // 2], "flip": data, "empty": b"", "shape": other.read_bytes()}[damage]
        )
    net = Toy(2)
    assert same(expected, run(images, net, **where))
    assert net.calls == 2


def test_shards_of_other_work_are_not_used(images, tmp_path):
    where = {"shard_images": 4, "shard_dir": tmp_path}
    run(images, Toy(2), chunk=2, **where)
    other = images.copy()
    other[5] ^= 255
    net = Toy(2)
    assert same(run(other, Toy(2), chunk=2), run(other, net, chunk=2, **where))
    assert net.calls >= 6
    weights = Toy(2)
    weights.sha256 = "another"
    run(images, weights, chunk=2, **where)
    assert weights.calls == 6
    chunk = Toy(4)
    run(images, chunk, chunk=4, **where)
    assert chunk.calls == 3


def test_a_declared_range_is_part_of_the_identity(tmp_path):
    floats = np.full((2, 8, 8, 3), 0.5, np.float32)
    floats[..., 0] = 0.25
    found = []
    for value_range in ((0, 1), (-1, 1)):
        source = open_images(floats, value_range=value_range)
        found.append(run(source, Toy(2), chunk=2, shard_images=2, shard_dir=tmp_path))
    assert not same(*found)


def test_missing_processes_are_named(images, tmp_path):
    with pytest.raises(TimeoutError, match=r"2 of 3 feature shards .*process 1: images 4\.\.7, process 2: images 8"):
        run(images, Toy(2), chunk=2, shard_images=4, shard_dir=tmp_path, world=Place(0, 3), timeout_s=0.1)


def test_a_process_that_gives_signs_is_waited_for(tmp_path, monkeypatch):
    work = shards.Shards(tmp_path, "ab" * 32, [(0, 2)])
    made = Features(*(np.zeros((2, width), np.float32) for width in (POOL_FEATURES, SPATIAL_FEATURES)))
    seconds = 0

    def sleep(pause: float) -> None:
        nonlocal seconds
        seconds += 60
        work.show_life(1)
        os.utime(work._life(1), (seconds, seconds))
        if seconds == 1200:
            work.write((0, 2), made)
            work.end_life(1)

    monkeypatch.setattr(shards, "time", SimpleNamespace(monotonic=lambda: seconds, sleep=sleep))
    assert len(work.wait((0, 2), 1, 2, timeout_s=300).pool) == 2 and seconds == 1200
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_errors_of_the_reader_arrive(tmp_path, images):
    np.savez(tmp_path / "x.npz", images)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[5000] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        run(tmp_path / "x.npz", Toy(2), chunk=2)


def test_what_cannot_be_done_is_refused(images, tmp_path):
    for settings, words in (
        ({"dtype": "float16"}, "allowed are float32, bfloat16"),
        ({"batch_size": 0}, "at least 1"),
        ({"world": Place(0, 2)}, "give shard_dir"),
    ):
        with pytest.raises(ValueError, match=words):
            run(images, Toy(2), **settings)
    with pytest.raises(ValueError, match="one process only, not by 2"):
        run([images], Toy(2), world=Place(0, 2), shard_dir=tmp_path)


def test_bfloat16_is_near(net):
    images = synthetic_images(3, 1, 20, 24)
    exact, quick = run(images, net, chunk=1), run(images, net, chunk=1, dtype="bfloat16")
    assert quick.pool.dtype == np.float32
    difference = np.abs(quick.pool - exact.pool).max() / exact.pool.max()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("chosen", ["legacy", "matmul"])
def test_fast_settings_of_the_process_do_not_leak_in(chosen):
    """In a process of its own, because some of these settings cannot be taken back."""
    code = f"""
        import torch
        from evaluations.arithmetic import full_float32
        if {chosen == "legacy"}:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.set_float32_matmul_precision("medium")
        elif hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        torch.backends.cudnn.benchmark = True
        def read():
            if {chosen == "legacy"}:
                return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
            return getattr(torch.backends.cuda.matmul, "fp32_precision", ""), torch.backends.cudnn.benchmark
        before = read()
        a, b = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0))
        exact = a.double() @ b.double()
        with full_float32():
            assert not torch.backends.cudnn.benchmark
            assert ((a @ b) - exact).abs().max() < 1e-4
        assert read() == before, (before, read())
    """
    environ = clean_environment(PYTHONPATH=str(ROOT))
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environ)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_device_without_a_gpu():
    assert pick_device(Place()).type == "cpu"


@pytest.mark.gpu
def test_graphics_card_agrees_with_the_processor(synthetic_pb):
    from evaluations.weights import load_inception

    images = synthetic_images(3, 5, 20, 24)
    with pytest.warns(UserWarning, match="unknown Inception weights"):
        net = load_inception(synthetic_pb, allow_unknown=True)
    expected = run(images, net)
    net.cuda()
    found = run(images, net)
    assert same(found, run(images, net, batch_size=2))
    for value, exact in zip(found, expected):
        assert np.abs(value - exact).max() / exact.max() < 5e-6
    images = synthetic_images(3, 70, 20, 24)  # more than one chunk
    found, expected = run(images, net), run(images, net.cpu())
    for value, exact in zip(found, expected):
        np.testing.assert_allclose(value, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_told_of_images_does_not_depend_on_who_read_them(size, tmp_path):
    """A report from stored shards, or from several processes, names the same conversions as a fresh one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(9, 9, 3), (9, 9, 3), (9, 9), (9, 9), (7, 9, 3), (7, 9, 3)]):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    fresh = open_images(folder)
    run(fresh, Toy(2), chunk=2)
    assert fresh.shape is None and len(fresh.notes) == 2
    for rank in [*reversed(range(size)), 0]:
        again, net = open_images(folder), Toy(2)
        run(again, net, chunk=2, shard_images=2, shard_dir=tmp_path / "shards", world=Place(rank, size))
    assert net.calls == 0  # all from shards
    assert again.shape is None and sorted(again.notes) == sorted(fresh.notes)
    run(fresh, net, chunk=2, shard_images=2, shard_dir=tmp_path / "shards", world=Place())
    assert net.calls == 0  # notes of a reading before are no part of the identity


class Elsewhere(features._Worker):
    """On the CPU by the way of other devices."""

    def __init__(self, net: torch.nn.Module, chunk: int) -> None:
        super().__init__(net, Settings(), chunk)
        self.device, self.order = SimpleNamespace(type="meta"), []

    def _on_device(self, piece):
        return torch.from_numpy(piece)

    def start(self, pieces):
        self.order.append("start")
        finish = super().start(pieces)
        return lambda: self.order.append("finish") or finish()


def test_a_gpus_turn_by_turn_gives_the_same_features(images, monkeypatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    worker = Elsewhere(Toy(4), 4)
    taken = list(worker.features(iter([images[:3], images[3:4], images[4:]])))
    assert [len(part.pool) for part in taken] == [4, 4, 3]
    assert same(features._joined(taken), run(images, Toy(4), chunk=4))
    # A chunk is started before the last one is awaited.
    assert worker.order == ["start", "start", "finish", "start", "finish", "finish"]


def test_a_compiled_network_gives_the_features_of_the_plain_one(net, tmp_path, monkeypatch) -> None:
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **options: compiler(net, backend=backend, **options))
    images = synthetic_images(3, 5, 20, 24)
    found = run(images, net, chunk=2, compile=True, shard_dir=tmp_path)
    assert len(graphs) == 1  # one graph for all chunks, the filled-up last one too
    assert same(found, run(images, net, chunk=2))
    before = len(list(tmp_path.iterdir()))
    run(images, net, chunk=2, shard_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) > before  # shards of a compiled network are not taken for a plain one's
    torch.compiler.reset()
