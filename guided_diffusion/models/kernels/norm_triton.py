"""Group norm, scale, shift and SiLU of channels-last images by Triton, for NVIDIA GPUs. Imported only where Triton is.

Memory is [N, R, C]: images, rows (places, H * W of them), channels innermost. A program sees a tile of rows x channels.
A small image is the work of one program per group (WHOLE): what counts there is how often the
host starts a kernel. The R rows of a large one are cut into chunks whose length depends on R and C alone, and sums over
chunks are formed in one fixed order by a second kernel; so a single image keeps a whole GPU busy. Either way there are no
atomic additions, results repeat bit for bit, and an image's do not depend on the batch it is in.

Everything is computed in float32, whatever the format of x. With xhat = (x - mean) * rstd, statistics per group:

    v = xhat * a + b,   y = silu(v)
    dv = dy * silu'(v),   db = sum over rows of dv,   da = sum over rows of dv * xhat        per image and channel
    m1 = mean over the group of a * dv,   m2 = mean over the group of a * dv * xhat
    dx = rstd * (a * dv - m1 - xhat * m2)

`stride` is the distance between the images of a and of b: 0 where all images share them.
"""

# Triton reads annotations as its own, so kernels have none but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # numbers that a program holds at a time
_CHUNKS = 64  # into how many pieces a large image is cut for its sums, at most
_WHOLE = 1024  # rows of the largest image whose groups are one program each: at 64 x 64 chunks are faster, measured on an H100


class _Plan(NamedTuple):
    """How images are cut into tiles and chunks. Nothing here depends on the batch."""

    whole: bool  # one program works through a whole group, and tiles are as wide as that
    size: tuple[int, int]  # rows and channels of an image
    rows_each: int  # of a program of `_forward` or `_backward`
    chunk_rows: int
    tile: dict[str, int]  # constants of kernels that work on tiles; WIDTH: from one tile's first channel to the next's
    group: dict[str, int]  # constants of kernels that work on groups

    def grid(self, rows_each: int, images: int) -> tuple[int, int, int]:
        """Programs of so many rows each beneath each other, tiles beside each other, and images."""
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

    x: [N, C, H, W] in channels-last memory, C a multiple of `groups`. a, b: float32 [N, C] of the same strides.
    """
    plan, n, y = _plan(x, groups), len(x), torch.empty_like(x)
    mean, rstd = x.new_empty(2, n * groups, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton starts its programs on the current device
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
    """Gradients of x, a and b, from the gradient `g` of `forward`'s answer and from what it was given and found."""
    plan, n, dx, known = _plan(x, groups), len(x), torch.empty_like(x), (mean, rstd, a, b)
    da, db = x.new_empty(2, n, plan.size[1], dtype=torch.float32)
    m1, m2 = torch.empty_like(mean), torch.empty_like(mean)
    with torch.cuda.device_of(x):
        if not plan.whole:
            grid = plan.grid(plan.chunk_rows, n)
            das, dbs = x.new_empty(2, n, grid[0], plan.size[1], dtype=torch.float32)
            _chunk_gradients[grid](g, x, *known, das, dbs, *plan.size, plan.chunk_rows, a.stride(0), **plan.tile)
            _group_gradients[(n * groups,)](das, dbs, a, da, db, m1, m2, *plan.size, grid[0], a.stride(0), **plan.group)
        _backward[plan.grid(plan.rows_each, n)](
            g, x, dx, *known, da, db, m1, m2, *plan.size, plan.rows_each, a.stride(0), WHOLE=plan.whole, **plan.tile
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
        away = tl.where(mask, values - tile_mean[None, :], 0.0)
        # Two sets of numbers joined: Chan, Golub & LeVeque 1983, equation 2.1.
        apart = tile_mean - mean
        square += tl.sum(away * away, axis=0) + apart * apart * (before * count / (before + count))
        mean += apart * (count / (before + count))
    return mean, square


@triton.jit
def _slopes(g, x, at, mask, mean, rstd, a, b):
    """dv and xhat at these places; dv is 0 where masked."""
    xhat = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    v = xhat * a[None, :] + b[None, :]
    half = tl.sigmoid(v)
    dv = tl.load(g + at, mask=mask, other=0.0).to(tl.float32) * (half * (1.0 + v * (1.0 - half)))
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
    """What a program of a grid of (pieces, tiles, N) works on: image, where it begins, rows begin..end, channels, their groups."""
    n, begin, lane = tl.program_id(2).to(tl.int64), tl.program_id(0) * each, tl.arange(0, CHANNELS)
    end, c = tl.minimum(begin + each, rows), tl.program_id(1) * WIDTH + lane
    group = n * GROUPS + c // (channels // GROUPS)
    return n, n * rows * channels, begin, end, c, (lane < WIDTH) & (c < channels), group


@triton.jit
def _group(channels, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """What a program of a grid of N * groups works on: its number, the image, the group's width and its channels."""
    place, lane, width = tl.program_id(0).to(tl.int64), tl.arange(0, CHANNELS), channels // GROUPS
    return place, place // GROUPS, width, place % GROUPS * width + lane, lane < width


@triton.jit
def _forward(
    x, y, mean, rstd, a, b, rows, channels, each, stride, eps,
    GROUPS: tl.constexpr, WHOLE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y of a piece; if that is a whole group, its statistics too. Grid: pieces, tiles, N."""
    n, image, begin, end, c, inside, group = _tile(rows, channels, each, GROUPS, WIDTH, CHANNELS)
    if WHOLE:
        means, squares = _moments(x + image, begin, end, c, inside, channels, ROWS, CHANNELS)
        middle = tl.sum(means, axis=0) / WIDTH  # 0 outside
        apart = tl.where(inside, means - middle, 0.0)
        sharp = 1.0 / tl.sqrt(tl.sum(squares / rows + apart * apart, axis=0) / WIDTH + eps)
        tl.store(mean + n * GROUPS + tl.program_id(1), middle)
        tl.store(rstd + n * GROUPS + tl.program_id(1), sharp)
        middle, sharp = tl.where(inside, middle, 0.0), tl.where(inside, sharp, 0.0)
    else:
        middle, sharp = tl.load(mean + group, mask=inside, other=0.0), tl.load(rstd + group, mask=inside, other=0.0)
    a_, b_ = tl.load(a + n * stride + c, mask=inside, other=0.0), tl.load(b + n * stride + c, mask=inside, other=0.0)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        at = image + r[:, None] * channels + c[None, :]
        xhat = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - middle[None, :]) * sharp[None, :]
        v = xhat * a_[None, :] + b_[None, :]
        tl.store(y + at, (v * tl.sigmoid(v)).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    g, x, dx, mean, rstd, a, b, da, db, m1, m2, rows, channels, each, stride,
    GROUPS: tl.constexpr, WHOLE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx of a piece; if that is a whole group, da and db too, else m1 and m2 are known. Grid: pieces, tiles, N."""
    n, image, begin, end, c, inside, group = _tile(rows, channels, each, GROUPS, WIDTH, CHANNELS)
    middle, sharp = tl.load(mean + group, mask=inside, other=0.0), tl.load(rstd + group, mask=inside, other=0.0)
    a_, b_ = tl.load(a + n * stride + c, mask=inside, other=0.0), tl.load(b + n * stride + c, mask=inside, other=0.0)
    if WHOLE:
        of_a, of_b = _sums(
            g + image, x + image, begin, end, c, inside, channels, middle, sharp, a_, b_, ROWS, CHANNELS
        )  # fmt: skip
        tl.store(da + n * channels + c, of_a, mask=inside)
        tl.store(db + n * channels + c, of_b, mask=inside)
        total = rows * WIDTH * 1.0
        mean_1 = tl.where(inside, tl.sum(a_ * of_b, axis=0) / total, 0.0)
        mean_2 = tl.where(inside, tl.sum(a_ * of_a, axis=0) / total, 0.0)
    else:
        mean_1, mean_2 = tl.load(m1 + group, mask=inside, other=0.0), tl.load(m2 + group, mask=inside, other=0.0)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        at = image + r[:, None] * channels + c[None, :]
        dv, xhat = _slopes(g, x, at, mask, middle, sharp, a_, b_)
        found = sharp[None, :] * (a_[None, :] * dv - mean_1[None, :] - xhat * mean_2[None, :])
        tl.store(dx + at, found.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _chunk_moments(
    x, means, squares, rows, channels, each,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared distances from it, per channel of a chunk: [N, chunks, C] each. Grid: chunks, tiles, N."""
    n, image, begin, end, c, inside, _ = _tile(rows, channels, each, GROUPS, WIDTH, CHANNELS)
    mean, square = _moments(x + image, begin, end, c, inside, channels, ROWS, CHANNELS)
    place = (n * tl.num_programs(0) + tl.program_id(0)) * channels + c
    tl.store(means + place, mean, mask=inside)
    tl.store(squares + place, square, mask=inside)


@triton.jit
def _group_moments(
    means, squares, mean, rstd, rows, channels, each, chunks, eps,
    GROUPS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation per group, [N, groups] each, of what _chunk_moments found. Grid: N * groups."""
    place, n, width, c, inside = _group(channels, GROUPS, CHANNELS)
    k = tl.arange(0, CHUNKS)
    mask = (k < chunks)[:, None] & inside[None, :]
    at = (n * chunks + k[:, None]) * channels + c[None, :]
    chunk_means = tl.load(means + at, mask=mask, other=0.0)
    counts = tl.maximum(tl.minimum(rows - k * each, each), 0).to(tl.float32)
    total = (rows * width).to(tl.float32)
    middle = tl.sum(tl.sum(tl.where(mask, chunk_means * counts[:, None], 0.0), axis=1), axis=0) / total
    apart = tl.where(mask, chunk_means - middle, 0.0)
    around = tl.load(squares + at, mask=mask, other=0.0) + apart * apart * counts[:, None]
    tl.store(mean + place, middle)
    tl.store(rstd + place, 1.0 / tl.sqrt(tl.sum(tl.sum(around, axis=1), axis=0) / total + eps))


@triton.jit
def _chunk_gradients(
    g, x, mean, rstd, a, b, das, dbs, rows, channels, each, stride,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """da and db over the rows of a chunk: [N, chunks, C] each. Grid: chunks, tiles, N."""
    n, image, begin, end, c, inside, group = _tile(rows, channels, each, GROUPS, WIDTH, CHANNELS)
    middle, sharp = tl.load(mean + group, mask=inside, other=0.0), tl.load(rstd + group, mask=inside, other=0.0)
    a_, b_ = tl.load(a + n * stride + c, mask=inside, other=0.0), tl.load(b + n * stride + c, mask=inside, other=0.0)
    da, db = _sums(g + image, x + image, begin, end, c, inside, channels, middle, sharp, a_, b_, ROWS, CHANNELS)
    place = (n * tl.num_programs(0) + tl.program_id(0)) * channels + c
    tl.store(das + place, da, mask=inside)
    tl.store(dbs + place, db, mask=inside)


@triton.jit
def _group_gradients(
    das, dbs, a, da, db, m1, m2, rows, channels, chunks, stride,
    GROUPS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """da and db over all rows, [N, C] each, and m1 and m2, [N, groups] each. Grid: N * groups."""
    place, n, width, c, inside = _group(channels, GROUPS, CHANNELS)
    k = tl.arange(0, CHUNKS)
    mask = (k < chunks)[:, None] & inside[None, :]
    at = (n * chunks + k[:, None]) * channels + c[None, :]
    of_a = tl.sum(tl.load(das + at, mask=mask, other=0.0), axis=0)
    of_b = tl.sum(tl.load(dbs + at, mask=mask, other=0.0), axis=0)
    a_ = tl.load(a + n * stride + c, mask=inside, other=0.0)
    total = (rows * width).to(tl.float32)
    tl.store(da + n * channels + c, of_a, mask=inside)
    tl.store(db + n * channels + c, of_b, mask=inside)
    tl.store(m1 + place, tl.sum(a_ * of_b, axis=0) / total)
    tl.store(m2 + place, tl.sum(a_ * of_a, axis=0) / total)
