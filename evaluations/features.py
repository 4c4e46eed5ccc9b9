"""Inception features of images, bit for bit the same for any batch size and number of processes.

A convolution may sum in another order when the batch has another size. So the network never gets the batches of the reader:
images are grouped by their index into chunks of one fixed size (the last one padded with grey images), and the network runs on
one chunk at a time. Batch size, shards and number of processes then only decide which process computes a chunk and when. The last
bits still depend on the chunk size and the kind of device.

With `shard_dir`, finished shards (groups of chunks) are written there. An interrupted run continues where it stopped, and several
processes (torchrun, mpiexec) share the work through that folder alone: each writes its shards, process 0 collects them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from guided_diffusion.runtime.launchers import Place

from .arithmetic import full_float32
from .commands import place
from .inception import InceptionV3
from .inputs import open_images
from .resize import INCEPTION_SIZE, tf1_bilinear, to_inception_range
from .settings import Settings
from .shards import Features, Shards
from .sources import ImageSource

CHUNK_ON_CPU = 4
CHUNK_ON_GPU = 64
MAX_SHARD_IMAGES = 512
_FORMAT = 3
Spans = Sequence[tuple[int, int | None]]


def _joined(blocks: list[Features]) -> Features:
    return blocks[0] if len(blocks) == 1 else Features(*(np.concatenate(parts) for parts in zip(*blocks)))


def pick_device(world: Place | None = None, wanted: str | None = None) -> torch.device:
    """The device `wanted`; by default the GPU of this process if there is one, else the CPU."""
    if wanted:
        try:
            return torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"--device {wanted}: cannot be used here: {reason} (allowed: cpu, cuda, cuda:1, ...)"
            ) from error
    if not torch.cuda.is_available():
        return torch.device("cpu")
    world = world or place()
    rank = world.rank if world.local_rank is None else world.local_rank
    return torch.device("cuda", rank % torch.cuda.device_count())


def extract(source: Any, net: InceptionV3, settings: Settings | None = None, **options: Any) -> Features | None:
    """Features of all images; None in every process but the first. Arguments as of `extract_blocks`."""
    blocks = list(extract_blocks(source, net, settings, **options))
    return _joined(blocks) if blocks else None


def extract_blocks(
    source: Any,
    net: InceptionV3,
    settings: Settings | None = None,
    *,
    world: Place | None = None,
    chunk: int | None = None,
    shard_images: int | None = None,
    timeout_s: float = 300.0,
) -> Iterator[Features]:
    """Yield the features in order, block by block, so that statistics of any number of images need little memory.

    * source: anything `open_images` takes.
    * settings: batch_size, dtype, compile, shard_dir and progress are used. Several processes must share the `shard_dir`; it defaults
      to a folder beside the image file, removed at the end.
    * world: rank and number of processes; default from the environment.
    * chunk: images per forward pass, default 4 on a CPU and 64 on a GPU.
    * timeout_s: process 0 raises TimeoutError when the others finish neither a chunk nor a shard for so long.

    Only process 0 yields anything. An iterable source can be read by one process only, and is not resumed.
    """
    settings = settings or Settings()
    shard_dir = settings.shard_dir
    images = open_images(source)
    world = world or place()
    worker = _Worker(net, settings, chunk)
    if images.count is None and world.size > 1:
        raise ValueError(
            f"{images.name}: batches from an iterable can be scored by one process only, not by {world.size}"
        )
    if images.count == 0:
        raise ValueError(f"{images.name} holds statistics only, there are no images to compute features of")
    name = os.path.basename(images.name) or images.name
    with tqdm(total=images.count, unit="image", desc=name, disable=not settings.progress or world.rank > 0) as bar:
        # One process without a folder for shards needs none: it yields features as they are computed.
        if images.count is None or (world.size == 1 and shard_dir is None):
            yield from worker.run(images, [(0, images.count)], shard_images or MAX_SHARD_IMAGES, bar.update)
            return
        if shard_dir is None and not os.path.exists(images.name):
            raise ValueError(f"{images.name}: several processes need a folder that all of them see; give shard_dir")
        folder = Path(shard_dir or images.name.rstrip("/") + ".features")
        shards = Shards(folder, _key(images, worker), _ranges(images.count, worker.chunk, shard_images))
        folder.mkdir(parents=True, exist_ok=True)
        own = shards.ranges[world.rank :: world.size]
        missing = [span for span in own if shards.read(span) is None]
        bar.update(sum(stop - start for start, stop in own) - sum(stop - start for start, stop in missing))
        whole_shard = shards.ranges[0][1]  # length of the longest shard, the first, so that each comes as one block

        def done(count: int) -> None:
            bar.update(count)
            if world.size > 1:
                shards.show_life(world.rank)

        with contextlib.closing(worker.run(images, missing, whole_shard, done)) as blocks:
            for span, block in zip(missing, blocks):
                shards.write(span, block, images.notes)
        shards.end_life(world.rank)
        if world.rank != 0:
            return
        for index, span in enumerate(shards.ranges):
            block = shards.wait(span, index % world.size, world.size, timeout_s)
            for note in shards.notes:  # about images that other processes have read
                images.note(note)
            yield block
            bar.update(span[1] - span[0] if index % world.size else 0)
        if shard_dir is None:
            shutil.rmtree(folder, ignore_errors=True)


class _Worker:
    """Runs the network on chunks of a fixed size."""

    def __init__(self, net: InceptionV3, settings: Settings, chunk: int | None) -> None:
        self.net, self.settings = net, settings
        compiled = settings.compile
        self.compute: Callable[..., Any] = torch.compile(net, fullgraph=True, dynamic=False) if compiled else net
        parameter = next(net.parameters())
        self.device, self.weight_dtype = parameter.device, parameter.dtype
        self.chunk = chunk or (CHUNK_ON_CPU if self.device.type == "cpu" else CHUNK_ON_GPU)

    def run(
        self, images: ImageSource, spans: Spans, block_images: int, done: Callable[[int], Any]
    ) -> Generator[Features, None, None]:
        """Yield features of each span, cut into blocks of at most `block_images` (rounded up to whole chunks)."""
        chunks = -(-block_images // self.chunk)
        for start, stop in spans:
            assert start % self.chunk == 0
            block: list[Features] = []
            for part in self.features(_read_ahead(images, self.settings.batch_size, start, stop)):
                block.append(part)
                done(len(part.pool))
                if len(block) == chunks:
                    yield _joined(block)
                    block = []
            if block:
                yield _joined(block)

    def features(self, batches: Iterator[np.ndarray]) -> Iterator[Features]:
        """Features of chunk after chunk, in order.

        On a CPU several chunks run at a time, each in one thread. On a GPU the next chunk is launched before the features of the last
        one are waited for, so that the device is never idle.
        """
        with contextlib.ExitStack() as stack:
            if self.device.type == "cpu":
                ahead = torch.get_num_threads()
                stack.enter_context(full_float32())
                pool = stack.enter_context(_single_threaded(ahead))

                def launch(pieces: list[np.ndarray]) -> Callable[[], Features]:
                    return pool.submit(lambda: self.start(pieces)()).result

            else:
                ahead, launch = 1, full_float32()(self.start)
            launched: deque[Callable[[], Features]] = deque()
            for pieces in self._chunks(batches):
                launched.append(launch(pieces))
                if len(launched) > ahead:
                    yield launched.popleft()()
            while launched:
                yield launched.popleft()()

    def _chunks(self, batches: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """Cut batches into chunks: lists of uint8 arrays, together `chunk` images (fewer in the last)."""
        pieces: list[np.ndarray] = []
        filled = 0
        for batch in batches:
            while len(batch):
                piece, batch = np.split(batch, [self.chunk - filled])
                pieces.append(piece)
                filled += len(piece)
                if filled == self.chunk:
                    yield pieces
                    pieces, filled = [], 0
        if pieces:
            yield pieces

    def start(self, pieces: list[np.ndarray]) -> Callable[[], Features]:
        """Launch the network on one chunk; returns a function that waits for the features and gives them in main memory."""
        kind = self.device.type
        on_cuda = kind == "cuda"
        count = sum(len(piece) for piece in pieces)
        with torch.inference_mode():
            parts = [to_inception_range(tf1_bilinear(self._on_device(piece))) for piece in pieces]
            if count < self.chunk:
                # Pad to the chunk size with grey images (0 after scaling); their features are discarded.
                grey = parts[0].new_zeros(self.chunk - count, 3, INCEPTION_SIZE, INCEPTION_SIZE)
                parts.append(grey.contiguous(memory_format=torch.channels_last))
            chunk = torch.cat(parts).to(self.weight_dtype).contiguous(memory_format=torch.channels_last)
            with torch.autocast(kind, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
                outputs = self.compute(chunk)
            copies = [value[:count].float().to("cpu", non_blocking=on_cuda) for value in outputs]
        copied = torch.cuda.Event() if on_cuda else None
        if copied is not None:
            copied.record(torch.cuda.current_stream(self.device))  # self.device need not be the current device

        def finish() -> Features:
            if copied is not None:
                copied.synchronize()
            if not all(value.isfinite().all() for value in copies):
                raise ValueError("the network gave features that are not finite; are the weights damaged?")
            return Features(*(value.numpy() for value in copies))

        return finish

    def _on_device(self, piece: np.ndarray) -> torch.Tensor:
        # PyTorch has no read-only tensors and warns about read-only arrays.
        pixels = torch.from_numpy(piece if piece.flags.writeable else piece.copy())
        if self.device.type == "cuda":  # the copy from pinned memory does not block this thread
            pixels = pixels.pin_memory()
        return pixels.to(self.device, non_blocking=True)


@contextlib.contextmanager
def _single_threaded(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool in which each convolution uses one thread.

    CPU kernels sum in another order when several threads share a convolution, so features would depend on the number of threads.
    One chunk per thread gives the same bits for any number of threads, and is as fast.
    """
    started = Barrier(workers + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        # get_num_threads fixes the number for this thread; before it, set_num_threads in any thread would change it.
        assert torch.get_num_threads() == 1
        started.wait(60)

    with ThreadPoolExecutor(workers) as pool:
        for _ in range(workers):
            pool.submit(begin)
        started.wait(60)
        # New threads take the number that was last set anywhere, now 1: set it back to this thread's.
        torch.set_num_threads(workers)
        yield pool


def _read_ahead(images: ImageSource, batch_size: int, start: int, stop: int | None) -> Iterator[np.ndarray]:
    """Batches, of which a thread reads the next one ahead. ValueError if there are not stop - start images in all."""
    if images.count is None:
        # An iterable may sample as it goes, and gradient mode and current device are per thread: read it in this one.
        yield from images.batches(batch_size)
        return
    batches = images.batches(batch_size, start, stop)
    total = 0
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, batches, None)
        while (batch := future.result()) is not None:
            future = pool.submit(next, batches, None)
            total += len(batch)
            yield batch
    assert stop is not None
    if total != stop - start:
        raise ValueError(f"{images.name} gave {total} images where {stop - start} were announced")


def _ranges(count: int, chunk: int, shard_images: int | None) -> list[tuple[int, int]]:
    """Cut [0, count) into shards of whole chunks, which do not depend on the number of processes."""
    wanted = shard_images or min(MAX_SHARD_IMAGES, -(-count // 32))
    size = max(1, -(-wanted // chunk)) * chunk
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _key(images: ImageSource, worker: _Worker) -> str:
    """A hash of all that features depend on: images, weights, settings. Shards with another key are not used."""
    assert worker.net.sha256, "shards are kept for weights from a file"
    facts = {
        "format": _FORMAT,
        "images": images.sha256(),
        "conversion": images.conversion,
        "weights": worker.net.sha256,
        "folded": worker.net.folded,
        "weight_dtype": str(worker.weight_dtype),
        "dtype": worker.settings.dtype,
        "compiled": worker.settings.compile,
        "chunk": worker.chunk,
        "device": worker.device.type,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()
