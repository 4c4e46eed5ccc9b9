"""Images to features, the same bits for any batch size, number of processes and order of work.

A convolution may add in another order when the batch has another size. So the network never sees the batches of the
reader: images are put, by their absolute index, into chunks of one fixed size (the last one filled up with grey), and
each chunk runs by itself. Batch size, shards and processes then decide only who computes a chunk and when. The chunk
size itself and the kind of device stay part of the result in its last bits.

With `shard_dir`, finished shards of chunks are written there. An interrupted run goes on where it stopped, and several
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
    """The device that is wanted, by default the GPU of this process if there is one, else the CPU."""
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
    here = world or place()
    rank = here.rank if here.local_rank is None else here.local_rank
    return torch.device("cuda", rank % torch.cuda.device_count())


def extract(source: Any, net: InceptionV3, settings: Settings | None = None, **how: Any) -> Features | None:
    """Features of all images; None in every process but the first. See `extract_blocks`."""
    blocks = list(extract_blocks(source, net, settings, **how))
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
    * settings: batch_size, dtype, compile, shard_dir and progress count here. Several processes must share the `shard_dir`; it
      defaults to a folder beside the image file, removed at the end.
    * world: which of how many processes this is; default from the environment.
    * chunk: images per run of the network, default 4 on a CPU and 64 on a GPU.
    * timeout_s: how long process 0 waits for others without a chunk or a shard of theirs before it raises TimeoutError.

    Only process 0 yields anything. An iterable source can be read by one process only, and is not resumed.
    """
    settings = settings or Settings()
    shard_dir = settings.shard_dir
    images = open_images(source)
    team = world or place()
    worker = _Worker(net, settings, chunk)
    if images.count is None and team.size > 1:
        raise ValueError(
            f"{images.name}: batches from an iterable can be scored by one process only, not by {team.size}"
        )
    if images.count == 0:
        raise ValueError(f"{images.name} holds statistics only, there are no images to compute features of")
    name = os.path.basename(images.name) or images.name
    with tqdm(total=images.count, unit="image", desc=name, disable=not settings.progress or team.rank > 0) as bar:
        if images.count is None or (team.size == 1 and shard_dir is None):
            yield from worker.run(images, [(0, images.count)], shard_images or MAX_SHARD_IMAGES, bar.update)
            return
        if shard_dir is None and not os.path.exists(images.name):
            raise ValueError(f"{images.name}: several processes need a folder that all of them see; give shard_dir")
        folder = Path(shard_dir or images.name.rstrip("/") + ".features")
        shards = Shards(folder, _key(images, worker), _ranges(images.count, worker.chunk, shard_images))
        folder.mkdir(parents=True, exist_ok=True)
        mine = shards.ranges[team.rank :: team.size]
        missing = [span for span in mine if shards.read(span) is None]
        bar.update(sum(stop - start for start, stop in mine) - sum(stop - start for start, stop in missing))
        whole_shard = shards.ranges[0][1]  # the first is the longest, so each shard comes as one block

        def done(count: int) -> None:
            bar.update(count)
            if team.size > 1:
                shards.show_life(team.rank)

        with contextlib.closing(worker.run(images, missing, whole_shard, done)) as blocks:
            for span, block in zip(missing, blocks):
                shards.write(span, block, images.notes)
        shards.end_life(team.rank)
        if team.rank != 0:
            return
        for index, span in enumerate(shards.ranges):
            block = shards.wait(span, index % team.size, team.size, timeout_s)
            for note in shards.notes:  # of images that this process has not seen
                images.note(note)
            yield block
            bar.update(span[1] - span[0] if index % team.size else 0)
        if shard_dir is None:
            shutil.rmtree(folder, ignore_errors=True)


class _Worker:
    """Runs the network on fixed chunks."""

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
            for part in self.features(_ahead(images, self.settings.batch_size, start, stop)):
                block.append(part)
                done(len(part.pool))
                if len(block) == chunks:
                    yield _joined(block)
                    block = []
            if block:
                yield _joined(block)

    def features(self, batches: Iterator[np.ndarray]) -> Iterator[Features]:
        """Features of chunk after chunk, in order.

        On a CPU several chunks run at a time, each in one thread. Elsewhere a chunk is started before the last one's features are
        awaited, so that the device always has work.
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
            waiting: deque[Callable[[], Features]] = deque()
            for pieces in self._chunks(batches):
                waiting.append(launch(pieces))
                if len(waiting) > ahead:
                    yield waiting.popleft()()
            while waiting:
                yield waiting.popleft()()

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
        """Send one chunk through the network; the function that is returned waits for its features in main memory."""
        kind = self.device.type
        on_cuda = kind == "cuda"
        count = sum(len(piece) for piece in pieces)
        with torch.inference_mode():
            parts = [to_inception_range(tf1_bilinear(self._sent(piece))) for piece in pieces]
            if count < self.chunk:
                # mid-grey is 0 for the network; these rows are computed and thrown away
                grey = parts[0].new_zeros(self.chunk - count, 3, INCEPTION_SIZE, INCEPTION_SIZE)
                parts.append(grey.contiguous(memory_format=torch.channels_last))
            chunk = torch.cat(parts).to(self.weight_dtype).contiguous(memory_format=torch.channels_last)
            with torch.autocast(kind, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
                outputs = self.compute(chunk)
            arriving = [value[:count].float().to("cpu", non_blocking=on_cuda) for value in outputs]
        arrived = torch.cuda.Event() if on_cuda else None
        if arrived is not None:
            arrived.record(torch.cuda.current_stream(self.device))  # which need not be the current device's

        def finish() -> Features:
            if arrived is not None:
                arrived.synchronize()
            if not all(value.isfinite().all() for value in arriving):
                raise ValueError("the network gave features that are not finite; are the weights damaged?")
            return Features(*(value.numpy() for value in arriving))

        return finish

    def _sent(self, piece: np.ndarray) -> torch.Tensor:
        # PyTorch knows no read-only tensors.
        pixels = torch.from_numpy(piece if piece.flags.writeable else piece.copy())
        if self.device.type == "cuda":  # from pinned memory the copy does not hold up this thread
            pixels = pixels.pin_memory()
        return pixels.to(self.device, non_blocking=True)


@contextlib.contextmanager
def _single_threaded(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads compute alone.

    The CPU kernels add in another order when they share a convolution among threads, so features would depend on the
    number of threads. One chunk per thread gives the same bits for any number of them, and loses no speed.
    """
    started = Barrier(workers + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        # Asking once makes the number this thread's own; until then the next call in any thread would change it.
        assert torch.get_num_threads() == 1
        started.wait(60)

    with ThreadPoolExecutor(workers) as pool:
        for _ in range(workers):
            pool.submit(begin)
        started.wait(60)
        # The count is kept per thread, but later threads copy the last one set: give them back what this thread has.
        torch.set_num_threads(workers)
        yield pool


def _ahead(images: ImageSource, batch_size: int, start: int, stop: int | None) -> Iterator[np.ndarray]:
    """Batches read one ahead in a thread, checked to be as many as announced."""
    if images.count is None:
        # a sampler's generator stays in this thread: gradient mode and current device are per thread
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
    """Cut [0, count) into shards of whole chunks; the cut depends on nothing but the count and the chunk size."""
    wanted = shard_images or min(MAX_SHARD_IMAGES, -(-count // 32))
    size = max(1, -(-wanted // chunk)) * chunk
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _key(images: ImageSource, worker: _Worker) -> str:
    """What features depend on: content, weights, settings. Shards of anything else are not used."""
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
