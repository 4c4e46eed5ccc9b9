"""Group norm, scale, shift and SiLU of channels-last images by Triton, for NVIDIA GPUs. Imported only where Triton is.

Memory is [N, R, C]: images, rows (one per pixel, R = H * W), channels innermost. A program works on tiles of rows x channels.
Small images take one program per image and group (WHOLE), in a single kernel, because launches cost most there. The R rows of a
large image are cut into chunks, which many programs reduce; a second kernel adds the chunks' sums. So a single image keeps the
whole GPU busy. There are no atomic additions, and sums have a fixed order that depends on R and C alone: results repeat bit for
bit, and those of an image do not depend on the batch it is in.

Everything is computed in float32, whatever the dtype of x. With xhat = (x - mean) * rstd, statistics per group:

    v = xhat * a + b,   y = silu(v)
    dv = dy * silu'(v),   db = sum over rows of dv,   da = sum over rows of dv * xhat        per image and channel
    m1 = mean over the group of a * dv,   m2 = mean over the group of a * dv * xhat
    dx = rstd * (a * dv - m1 - xhat * m2)

`stride` is the stride of a and b between images: 0 where all images share them.
"""

# Triton interprets annotations of its kernels, so they have no ordinary types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # numbers in a tile
_CHUNKS = 64  # most chunks of a large image
_WHOLE = (
    1024  # most rows of a small image, with one program per group; at 64 x 64 chunks are faster, measured on an H100
)


class _Plan(NamedTuple):
    """How images are cut into tiles and chunks. Nothing here depends on the batch."""

    whole: bool  # small image: one program per group, and tiles are one group wide
    size: tuple[int, int]  # rows and channels of an image
    rows_each: int  # rows per program of `_forward` and `_backward`
    chunk_rows: int  # rows per chunk
    tile: dict[str, int]  # constants of the kernels that work on tiles; CHANNELS: WIDTH rounded up to a power of two
    group: dict[str, int]  # constants of the kernels that work on groups

    def grid(self, rows_each: int, images: int) -> tuple[int, int, int]:
        """The grid of programs: along the rows (`rows_each` per program), along the channels (WIDTH each), along the images."""
        return -(-self.size[0] // rows_each), -(-self.size[1] // self.tile["WIDTH"]), images


def _plan(x: Tensor, groups: int) -> _Plan:
    rows, channels = x.shape[2] * x.shape[3], x.shape[1]
    whole = rows <= _WHOLE
    width = channels // groups if whole else min(128, triton.next_power_of_2(channels))
    tile_rows = min(max(1, _TILE // triton.next_power_of_2(width)), triton.next_power_of_2(rows))
    tile = {"GROUPS": groups, "WIDTH": width, "ROWS": tile_rows, "CHANNELS": triton.next_power_of_2(width)}
    group = {"GROUPS": groups, "CHUNKS": _CHUNKS, "CHANNELS": triton.next_power_of_2(channels // groups)}
    chunk_rows = tile_rows * -(-rows // (_CHUNKS * tile_rows))
    return _Plan(whole, (rows, channels), rows if whole else tile_rows, chunk_rows, tile, group)


def forward(x: Tensor, a: Tensor, b: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """silu(a * (x - mean) * rstd + b), and mean and rstd of every group, float32 [N * G] both.

    x: [N, C, H, W] in channels-last memory, C a multiple of `groups`. a, b: float32 [N, C] with equal strides.
    """
    plan, n, y = _plan(x, groups), len(x), torch.empty_like(x)
    mean, rstd = x.new_empty(2, n * groups, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if not plan.whole:
            grid = plan.grid(plan.chunk_rows, n)
            means, squares = x.new_empty(2, n, grid[0], plan.size[1], dtype=torch.float32)
            _chunk_moments[grid](x, means, squares, *plan.size, plan.chunk_rows, **plan.tile)
            _group_moments[(n * groups,)](
                means, squares, mean, rstd, *plan.size, plan.chunk_rows, grid[0], eps, **plan.group
            )
        _forward[plan.grid(plan.rows_each, n)](
            x, y, mean, rstd, a, b, *plan.size, plan.rows_each, a.stride(0), eps, WHOLE=plan.whole, **plan.tile
        )
    return y, mean, rstd


def backward(
    g: Tensor, x: Tensor, a: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, a and b. g: the gradient of `forward`'s y; the other arguments are `forward`'s inputs and statistics."""
    plan, n, dx, saved = _plan(x, groups), len(x), torch.empty_like(x), (mean, rstd, a, b)
    da, db = x.new_empty(2, n, plan.size[1], dtype=torch.float32)
    m1, m2 = torch.empty_like(mean), torch.empty_like(mean)
    with torch.cuda.device_of(x):
        if not plan.whole:
            grid = plan.grid(plan.chunk_rows, n)
            das, dbs = x.new_empty(2, n, grid[0], plan.size[1], dtype=torch.float32)
            _chunk_gradients[grid](g, x, *saved, das, dbs, *plan.size, plan.chunk_rows, a.stride(0), **plan.tile)
            _group_gradients[(n * groups,)](das, dbs, a, da, db, m1, m2, *plan.size, grid[0], a.stride(0), **plan.group)
        _backward[plan.grid(plan.rows_each, n)](
            g, x, dx, *saved, da, db, m1, m2, *plan.size, plan.rows_each, a.stride(0), WHOLE=plan.whole, **plan.tile
        )
    return dx, da, db


@triton.jit
def _moments(x, begin, end, c, inside, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and sum of squared distances from it over rows begin..end of the image at x, per channel: [CHANNELS] each."""
    mean = tl.zeros([CHANNELS], dtype=tl.float32)
    square = tl.zeros([CHANNELS], dtype=tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        values = tl.load(x + r[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
        before = (start - begin) * 1.0
        count = tl.minimum(end - start, ROWS) * 1.0
        tile_mean = tl.sum(values, axis=0) / count
        centred = tl.where(mask, values - tile_mean[None, :], 0.0)
        # Merge the moments of two sets of numbers: Chan, Golub & LeVeque 1983, equation 2.1.
        delta = tile_mean - mean
        square += tl.sum(centred * centred, axis=0) + delta * delta * (before * count / (before + count))
        mean += delta * (count / (before + count))
    return mean, square


@triton.jit
def _slopes(g, x, at, mask, mean, rstd, a, b):
    """dv and xhat at the offsets `at`; dv is 0 where the mask is False."""
    xhat = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    v = xhat * a[None, :] + b[None, :]
    sigmoid = tl.sigmoid(v)
    dv = tl.load(g + at, mask=mask, other=0.0).to(tl.float32) * (sigmoid * (1.0 + v * (1.0 - sigmoid)))
    return dv, xhat


@triton.jit
def _sums(g, x, begin, end, c, inside, channels, mean, rstd, a, b, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """da and db over rows begin..end of the image at g and x."""
    da = tl.zeros([CHANNELS], dtype=tl.float32)
    db = tl.zeros([CHANNELS], dtype=tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        dv, xhat = _slopes(g, x, r[:, None] * channels + c[None, :], mask, mean, rstd, a, b)
        da += tl.sum(dv * xhat, axis=0)
        db += tl.sum(dv, axis=0)
    return da, db


@triton.jit
def _tile(rows, channels, each, GROUPS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """The part of a program in a grid (row pieces, channel tiles, N): image, its offset, rows begin..end, channels, mask, groups."""
    n, begin, lane = tl.program_id(2).to(tl.int64), tl.program_id(0) * each, tl.arange(0, CHANNELS)
    end, c = tl.minimum(begin + each, rows), tl.program_id(1) * WIDTH + lane
    group = n * GROUPS + c // (channels // GROUPS)
    return n, n * rows * channels, begin, end, c, (lane < WIDTH) & (c < channels), group


@triton.jit
def _group(channels, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The part of a program in a grid (N * groups): its number, the image, channels per group, the group's channels, their mask."""
    index, lane, width = tl.program_id(0).to(tl.int64), tl.arange(0, CHANNELS), channels // GROUPS
    return index, index // GROUPS, width, index % GROUPS * width + lane, lane < width


@triton.jit
def _forward(
    x, y, mean, rstd, a, b, rows, channels, each, stride, eps,
    GROUPS: tl.constexpr, WHOLE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y of a piece of rows; if that is a whole group (WHOLE), its statistics too. Grid: pieces, tiles, N."""
    n, image, begin, end, c, inside, group = _tile(rows, channels, each, GROUPS, WIDTH, CHANNELS)
    if WHOLE:
        means, squares = _moments(x + image, begin, end, c, inside, channels, ROWS, CHANNELS)
        mean_ = tl.sum(means, axis=0) / WIDTH  # 0 outside
        delta = tl.where(inside, means - mean_, 0.0)
        rstd_ = 1.0 / tl.sqrt(tl.sum(squares / rows + delta * delta, axis=0) / WIDTH + eps)
        tl.store(mean + n * GROUPS + tl.program_id(1), mean_)
        tl.store(rstd + n * GROUPS + tl.program_id(1), rstd_)
        mean_, rstd_ = tl.where(inside, mean_, 0.0), tl.where(inside, rstd_, 0.0)
    else:
        mean_, rstd_ = tl.load(mean + group, mask=inside, other=0.0), tl.load(rstd + group, mask=inside, other=0.0)
    a_, b_ = tl.load(a + n * stride + c, mask=inside, other=0.0), tl.load(b + n * stride + c, mask=inside, other=0.0)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        at = image + r[:, None] * channels + c[None, :]
        xhat = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean_[None, :]) * rstd_[None, :]
        v = xhat * a_[None, :] + b_[None, :]
        tl.store(y + at, (v * tl.sigmoid(v)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    g, x, dx, mean, rstd, a, b, da, db, m1, m2, rows, channels, each, stride,
    GROUPS: tl.constexpr, WHOLE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx of a piece of rows; if that is a whole group (WHOLE), da and db too, else m1 and m2 are inputs. Grid: pieces, tiles, N."""
    n, image, begin, end, c, inside, group = _tile(rows, channels, each, GROUPS, WIDTH, CHANNELS)
    mean_, rstd_ = tl.load(mean + group, mask=inside, other=0.0), tl.load(rstd + group, mask=inside, other=0.0)
    a_, b_ = tl.load(a + n * stride + c, mask=inside, other=0.0), tl.load(b + n * stride + c, mask=inside, other=0.0)
    if WHOLE:
        da_, db_ = _sums(
            g + image, x + image, begin, end, c, inside, channels, mean_, rstd_, a_, b_, ROWS, CHANNELS
        )  # fmt: skip
        tl.store(da + n * channels + c, da_, mask=inside)
        tl.store(db + n * channels + c, db_, mask=inside)
        total = rows * WIDTH * 1.0
        mean_1 = tl.where(inside, tl.sum(a_ * db_, axis=0) / total, 0.0)
        mean_2 = tl.where(inside, tl.sum(a_ * da_, axis=0) / total, 0.0)
    else:
        mean_1, mean_2 = tl.load(m1 + group, mask=inside, other=0.0), tl.load(m2 + group, mask=inside, other=0.0)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        at = image + r[:, None] * channels + c[None, :]
        dv, xhat = _slopes(g, x, at, mask, mean_, rstd_, a_, b_)
        dx_ = rstd_[None, :] * (a_[None, :] * dv - mean_1[None, :] - xhat * mean_2[None, :])
        tl.store(dx + at, dx_.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _chunk_moments(
    x, means, squares, rows, channels, each,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared distances from it, per channel of a chunk: [N, chunks, C] each. Grid: chunks, tiles, N."""
    n, image, begin, end, c, inside, _ = _tile(rows, channels, each, GROUPS, WIDTH, CHANNELS)
    mean, square = _moments(x + image, begin, end, c, inside, channels, ROWS, CHANNELS)
    index = (n * tl.num_programs(0) + tl.program_id(0)) * channels + c
    tl.store(means + index, mean, mask=inside)
    tl.store(squares + index, square, mask=inside)


@triton.jit
def _group_moments(
    means, squares, mean, rstd, rows, channels, each, chunks, eps,
    GROUPS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation per group, [N, groups] each, from the results of _chunk_moments. Grid: N * groups."""
    index, n, width, c, inside = _group(channels, GROUPS, CHANNELS)
    k = tl.arange(0, CHUNKS)
    mask = (k < chunks)[:, None] & inside[None, :]
    at = (n * chunks + k[:, None]) * channels + c[None, :]
    chunk_means = tl.load(means + at, mask=mask, other=0.0)
    counts = tl.maximum(tl.minimum(rows - k * each, each), 0).to(tl.float32)
    total = (rows * width).to(tl.float32)
    mean_ = tl.sum(tl.sum(tl.where(mask, chunk_means * counts[:, None], 0.0), axis=1), axis=0) / total
    delta = tl.where(mask, chunk_means - mean_, 0.0)
    squared = tl.load(squares + at, mask=mask, other=0.0) + delta * delta * counts[:, None]
    tl.store(mean + index, mean_)
    tl.store(rstd + index, 1.0 / tl.sqrt(tl.sum(tl.sum(squared, axis=1), axis=0) / total + eps))


@triton.jit
def _chunk_gradients(
    g, x, mean, rstd, a, b, das, dbs, rows, channels, each, stride,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """da and db over the rows of a chunk: [N, chunks, C] each. Grid: chunks, tiles, N."""
    n, image, begin, end, c, inside, group = _tile(rows, channels, each, GROUPS, WIDTH, CHANNELS)
    mean_, rstd_ = tl.load(mean + group, mask=inside, other=0.0), tl.load(rstd + group, mask=inside, other=0.0)
    a_, b_ = tl.load(a + n * stride + c, mask=inside, other=0.0), tl.load(b + n * stride + c, mask=inside, other=0.0)
    da, db = _sums(g + image, x + image, begin, end, c, inside, channels, mean_, rstd_, a_, b_, ROWS, CHANNELS)
    index = (n * tl.num_programs(0) + tl.program_id(0)) * channels + c
    tl.store(das + index, da, mask=inside)
    tl.store(dbs + index, db, mask=inside)


@triton.jit
def _group_gradients(
    das, dbs, a, da, db, m1, m2, rows, channels, chunks, stride,
    GROUPS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """da and db over all rows, [N, C] each, and m1 and m2, [N, groups] each. Grid: N * groups."""
    index, n, width, c, inside = _group(channels, GROUPS, CHANNELS)
    k = tl.arange(0, CHUNKS)
    mask = (k < chunks)[:, None] & inside[None, :]
    at = (n * chunks + k[:, None]) * channels + c[None, :]
    da_ = tl.sum(tl.load(das + at, mask=mask, other=0.0), axis=0)
    db_ = tl.sum(tl.load(dbs + at, mask=mask, other=0.0), axis=0)
    a_ = tl.load(a + n * stride + c, mask=inside, other=0.0)
    total = (rows * width).to(tl.float32)
    tl.store(da + n * channels + c, da_, mask=inside)
    tl.store(db + n * channels + c, db_, mask=inside)
    tl.store(m1 + index, tl.sum(a_ * db_, axis=0) / total)
    tl.store(m2 + index, tl.sum(a_ * da_, axis=0) / total)
