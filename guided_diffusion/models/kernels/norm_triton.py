"""Group norm, scale, shift and SiLU of channels-last images by Triton, for NVIDIA GPUs. Imported only where Triton is.

Memory is [N, R, C]: images, rows (one per pixel, R = H * W), channels innermost. A program works on tiles of rows x channels.
Small images take one program per image and group (WHOLE), in a single kernel, because launches cost most there. The R rows of a
large image are cut into chunks, which many programs reduce; a second kernel adds the chunks' sums. So a single image keeps the
whole GPU busy. There are no atomic additions, and sums have a fixed order that depends on R and C alone: results repeat bit for
bit, and those of an image do not depend on the batch it is in.

Everything is computed in float32, whatever the dtype of x. With mean and rstd per group of x + offset:

    xhat = (x + offset - mean) * rstd,   a = weight * (1 + scale),   b = bias * (1 + scale) + shift
    v = a * xhat + b,   y = silu(v), or v without SILU
    dv = dy * silu'(v),   db = sum over rows of dv,   da = sum over rows of dv * xhat        per image and channel
    m1 = mean over the group of a * dv,   m2 = mean over the group of a * dv * xhat
    dx = rstd * (a * dv - m1 - xhat * m2),   doffset = sum over rows of dx = rstd * (a * db - R * m1 - m2 * sum of xhat)
    dweight = (1 + scale) * da,   dbias = (1 + scale) * db,   dscale = weight * da + bias * db,   dshift = db

`lines` are `Lines.arguments()`; `of_lines` are the gradients of offset, weight, bias, scale and shift (the last two perhaps None) in
each image. The offset of a channel only shifts its mean, so x itself is summed.
"""

# Triton interprets annotations of its kernels, so they have no ordinary types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lines import Lines

_TILE = 4096  # numbers in a tile
_CHUNKS = 64  # most chunks of a large image
# Most rows of a small image, with one program per group; at 64 x 64 chunks are faster, measured on an H100.
_WHOLE = 1024


class _Plan(NamedTuple):
    """How images are cut into tiles and chunks. Nothing here depends on the batch."""

    whole: bool  # small image: one program per group, and tiles are one group wide
    size: tuple[int, int]  # rows and channels of an image
    rows_each: int  # rows per program of `_forward` and `_backward`
    chunk_rows: int  # rows per chunk
    tile: dict[str, Any]  # constants of the kernels that work on tiles; CHANNELS: WIDTH rounded up to a power of two
    group: dict[str, Any]  # constants of the kernels that work on groups

    def grid(self, rows_each: int, images: int) -> tuple[int, int, int]:
        """The grid of programs: along the rows (`rows_each` per program), along the channels (WIDTH each), along the images."""
        return -(-self.size[0] // rows_each), -(-self.size[1] // self.tile["WIDTH"]), images


@cache
def _plan(size: torch.Size, groups: int, largest: int) -> _Plan:
    """For images of `size` [C, H, W]; those of at most `largest` rows are small."""
    channels, rows = size[0], size[1] * size[2]
    whole = rows <= largest
    width = channels // groups if whole else min(128, triton.next_power_of_2(channels))
    tile_rows = min(max(1, _TILE // triton.next_power_of_2(width)), triton.next_power_of_2(rows))
    tile = {"GROUPS": groups, "WIDTH": width, "ROWS": tile_rows, "CHANNELS": triton.next_power_of_2(width)}
    group = {"GROUPS": groups, "CHUNKS": _CHUNKS, "CHANNELS": triton.next_power_of_2(channels // groups)}
    chunk_rows = tile_rows * -(-rows // (_CHUNKS * tile_rows))
    return _Plan(whole, (rows, channels), rows if whole else tile_rows, chunk_rows, tile, group)


def forward(
    x: Tensor, lines: Lines, groups: int, eps: float, silu: bool, known: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd of every group, float32 [N * G] both; `known`: mean and rstd of an earlier call.

    x: [N, C, H, W] in channels-last memory, C a multiple of `groups`.
    """
    plan, n, y, arguments = _plan(x.shape[1:], groups, _WHOLE), len(x), torch.empty_like(x), lines.arguments()
    mean, rstd = known or x.new_empty(2, n * groups, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if not plan.whole and not known:
            grid = plan.grid(plan.chunk_rows, n)
            chunks = tuple(x.new_empty(2, n, grid[0], plan.size[1], dtype=torch.float32))
            _chunk_moments[grid](x, *chunks, arguments, *plan.size, plan.chunk_rows, **plan.tile)
            _group_moments[(n * groups,)](
                *chunks, mean, rstd, arguments, *plan.size, plan.chunk_rows, grid[0], eps, **plan.group
            )
        _forward[plan.grid(plan.rows_each, n)](
            x, y, mean, rstd, arguments, *plan.size, plan.rows_each, eps, SILU=silu, WHOLE=plan.whole, **plan.tile
        )
    return y, mean, rstd


def backward(
    g: Tensor, x: Tensor, lines: Lines, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """dx, and gradients of the `lines` in each image, float32 [N, C]. g: the gradient of `forward`'s y."""
    plan, n, dx = _plan(x.shape[1:], groups, _WHOLE), len(x), torch.empty_like(x)
    saved = mean, rstd, lines.arguments()
    of_lines = (*x.new_empty(3 if lines.scale is None else 5, n, plan.size[1], dtype=torch.float32), None, None)[:5]
    means = torch.empty_like(mean), torch.empty_like(mean)
    with torch.cuda.device_of(x):
        if not plan.whole:
            grid = plan.grid(plan.chunk_rows, n)
            chunks = tuple(x.new_empty(3, n, grid[0], plan.size[1], dtype=torch.float32))
            _chunk_gradients[grid](g, x, *saved, chunks, *plan.size, plan.chunk_rows, SILU=silu, **plan.tile)
            _group_gradients[(n * groups,)](chunks, *saved, of_lines, *means, *plan.size, grid[0], **plan.group)
        _backward[plan.grid(plan.rows_each, n)](
            g, x, dx, *saved, of_lines, *means, *plan.size, plan.rows_each, SILU=silu, WHOLE=plan.whole, **plan.tile
        )
    return dx, of_lines


def add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """x + y + bias of two [N, C, H, W] of one dtype in channels-last memory; bias: [C]."""
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _add[(-(-x.numel() // _TILE),)](x, y, bias, out, x.numel(), x.shape[1], TILE=_TILE)
    return out


@triton.jit
def _add(x, y, bias, out, size, channels, TILE: tl.constexpr):
    """Grid: tiles of memory."""
    begin, lane = tl.program_id(0).to(tl.int64) * TILE, tl.arange(0, TILE)
    at, c = begin + lane, ((begin % channels).to(tl.int32) + lane) % channels
    total = _load(x, at, at < size) + _load(y, at, at < size) + _load(bias, c, at < size)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _load(pointer, at, mask):
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _tile(lines, rows, channels, each, GROUPS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """The part of a program in a grid (row pieces, channel tiles, N): where its image begins, rows begin..end, the image's number;
    of its channels the numbers, mask, indices of their groups in [N, G], and `_of_channels`."""
    n, begin, lane = tl.program_id(2).to(tl.int64), tl.program_id(0) * each, tl.arange(0, CHANNELS)
    c = tl.program_id(1) * WIDTH + lane
    inside, group = (lane < WIDTH) & (c < channels), n * GROUPS + c // (channels // GROUPS)
    end = tl.minimum(begin + each, rows)
    return n * rows * channels, begin, end, n, c, inside, group, _of_channels(lines, n, c, inside)


@triton.jit
def _of_channels(lines, n, c, inside):
    """Offset, a and b of the channels c of image n."""
    offset, weight, bias, scale, shift, offset_stride, stride = lines
    o, a, b = tl.zeros(c.shape, dtype=tl.float32), _load(weight, c, inside), _load(bias, c, inside)
    if offset is not None:
        o = _load(offset, n * offset_stride + c, inside)
    if scale is not None:
        factor = 1.0 + _load(scale, n * stride + c, inside)
        a, b = a * factor, b * factor + _load(shift, n * stride + c, inside)
    return o, a, b


@triton.jit
def _group(channels, chunks, GROUPS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr):
    """The part of a program in a grid (N * groups): its number, the image; of its channels the numbers and mask; of all chunks the
    numbers, indices in [N, chunks, C] and mask."""
    index, lane, width = tl.program_id(0).to(tl.int64), tl.arange(0, CHANNELS), channels // GROUPS
    n, c, k = index // GROUPS, index % GROUPS * width + lane, tl.arange(0, CHUNKS)[:, None]
    inside, at = lane < width, (n * chunks + k) * channels + c[None, :]
    return index, n, c, inside, k, at, (k < chunks) & inside[None, :]


@triton.jit
def _moments(x, begin, end, c, inside, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and sum of squared distances from it over rows begin..end of the image at x, per channel: [CHANNELS] each."""
    mean = tl.zeros([CHANNELS], dtype=tl.float32)
    square = tl.zeros([CHANNELS], dtype=tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        values = _load(x, r[:, None] * channels + c[None, :], mask)
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
def _slopes(g, x, at, mask, mean, rstd, a, b, SILU: tl.constexpr):
    """dv and xhat at the offsets `at`; both are 0 where the mask is False."""
    xhat = tl.where(mask, (_load(x, at, mask) - mean[None, :]) * rstd[None, :], 0.0)
    dv = _load(g, at, mask)
    if SILU:
        v = xhat * a[None, :] + b[None, :]
        sigmoid = tl.sigmoid(v)
        dv = dv * (sigmoid * (1.0 + v * (1.0 - sigmoid)))
    return dv, xhat


@triton.jit
def _sums(
    g, x, begin, end, c, inside, channels, mean, rstd, a, b,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """da, db and sum of xhat over rows begin..end of the image at g and x."""
    da = tl.zeros([CHANNELS], dtype=tl.float32)
    db = tl.zeros([CHANNELS], dtype=tl.float32)
    total = tl.zeros([CHANNELS], dtype=tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        dv, xhat = _slopes(g, x, r[:, None] * channels + c[None, :], mask, mean, rstd, a, b, SILU)
        da += tl.sum(dv * xhat, axis=0)
        db += tl.sum(dv, axis=0)
        total += tl.sum(xhat, axis=0)
    return da, db, total


@triton.jit
def _store_gradients(lines, of_lines, n, c, inside, da, db, xhats, rstd, rows, channels, width):
    """Store the gradients of the lines in a group from its sums over all rows. Returns m1 and m2."""
    _, a, _ = _of_channels(lines, n, c, inside)
    m1, m2 = tl.sum(a * db, axis=0) / (rows * width), tl.sum(a * da, axis=0) / (rows * width)
    at = n * channels + c
    tl.store(of_lines[0] + at, rstd * (a * db - rows * m1 - xhats * m2), mask=inside)
    factor = 1.0
    if of_lines[3] is not None:
        _, weight, bias, scale, _, _, stride = lines
        factor += _load(scale, n * stride + c, inside)
        tl.store(of_lines[3] + at, _load(weight, c, inside) * da + _load(bias, c, inside) * db, mask=inside)
        tl.store(of_lines[4] + at, db, mask=inside)
    tl.store(of_lines[1] + at, factor * da, mask=inside)
    tl.store(of_lines[2] + at, factor * db, mask=inside)
    return m1, m2


@triton.jit
def _forward(
    x, y, mean, rstd, lines, rows, channels, each, eps, GROUPS: tl.constexpr,
    SILU: tl.constexpr, WHOLE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y of a piece of rows; if that is a whole group (WHOLE), its statistics too. Grid: pieces, tiles, N."""
    image, begin, end, _, c, inside, group, of_channels = _tile(lines, rows, channels, each, GROUPS, WIDTH, CHANNELS)
    offset, a, b = of_channels
    if WHOLE:
        means, squares = _moments(x + image, begin, end, c, inside, channels, ROWS, CHANNELS)
        mean_ = tl.sum(means + offset, axis=0) / WIDTH  # 0 outside
        delta = tl.where(inside, means + offset - mean_, 0.0)
        rstd_ = 1.0 / tl.sqrt(tl.sum(squares / rows + delta * delta, axis=0) / WIDTH + eps)
        mean_, rstd_ = tl.where(inside, mean_, 0.0), tl.where(inside, rstd_, 0.0)
        first = tl.arange(0, CHANNELS) == 0  # of the group, which stores for all
        tl.store(mean + group, mean_, mask=first)
        tl.store(rstd + group, rstd_, mask=first)
    else:
        mean_, rstd_ = _load(mean, group, inside), _load(rstd, group, inside)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        at = image + r[:, None] * channels + c[None, :]
        v = (_load(x, at, mask) - (mean_ - offset)[None, :]) * rstd_[None, :] * a[None, :] + b[None, :]
        if SILU:
            v = v * tl.sigmoid(v)
        tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    g, x, dx, mean, rstd, lines, of_lines, m1, m2, rows, channels, each, GROUPS: tl.constexpr,
    SILU: tl.constexpr, WHOLE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx of a piece of rows; if that is a whole group (WHOLE), the sums too, else m1 and m2 are inputs. Grid: pieces, tiles, N."""
    image, begin, end, n, c, inside, group, of_channels = _tile(lines, rows, channels, each, GROUPS, WIDTH, CHANNELS)
    offset, a, b = of_channels
    mean_, rstd_ = _load(mean, group, inside) - offset, _load(rstd, group, inside)
    if WHOLE:
        da, db, xhats = _sums(
            g + image, x + image, begin, end, c, inside, channels, mean_, rstd_, a, b, SILU, ROWS, CHANNELS
        )
        mean_1, mean_2 = _store_gradients(lines, of_lines, n, c, inside, da, db, xhats, rstd_, rows, channels, WIDTH)
        mean_1, mean_2 = tl.where(inside, mean_1, 0.0), tl.where(inside, mean_2, 0.0)
    else:
        mean_1, mean_2 = _load(m1, group, inside), _load(m2, group, inside)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        at = image + r[:, None] * channels + c[None, :]
        dv, xhat = _slopes(g, x, at, mask, mean_, rstd_, a, b, SILU)
        dx_ = rstd_[None, :] * (a[None, :] * dv - mean_1[None, :] - xhat * mean_2[None, :])
        tl.store(dx + at, dx_.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _chunk_moments(
    x, means, squares, lines, rows, channels, each,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared distances from it, per channel of a chunk: [N, chunks, C] each. Grid: chunks, tiles, N."""
    image, begin, end, _, c, inside, _, _ = _tile(lines, rows, channels, each, GROUPS, WIDTH, CHANNELS)
    mean, square = _moments(x + image, begin, end, c, inside, channels, ROWS, CHANNELS)
    at = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * channels + c
    tl.store(means + at, mean, mask=inside)
    tl.store(squares + at, square, mask=inside)


@triton.jit
def _group_moments(
    means, squares, mean, rstd, lines, rows, channels, each, chunks, eps,
    GROUPS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation per group, [N, groups] each, from the results of _chunk_moments. Grid: N * groups."""
    index, n, c, inside, k, at, mask = _group(channels, chunks, GROUPS, CHUNKS, CHANNELS)
    offset, _, _ = _of_channels(lines, n, c, inside)
    counts = tl.maximum(tl.minimum(rows - k * each, each), 0).to(tl.float32)
    total = (rows * (channels // GROUPS)).to(tl.float32)
    chunk_means = _load(means, at, mask) + offset[None, :]
    mean_ = tl.sum(tl.sum(chunk_means * counts, axis=1), axis=0) / total
    delta = tl.where(mask, chunk_means - mean_, 0.0)
    squared = _load(squares, at, mask) + delta * delta * counts
    tl.store(mean + index, mean_)
    tl.store(rstd + index, 1.0 / tl.sqrt(tl.sum(tl.sum(squared, axis=1), axis=0) / total + eps))


@triton.jit
def _chunk_gradients(
    g, x, mean, rstd, lines, sums, rows, channels, each, GROUPS: tl.constexpr,
    SILU: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """da, db and sum of xhat over the rows of a chunk: [N, chunks, C] each. Grid: chunks, tiles, N."""
    image, begin, end, _, c, inside, group, of_channels = _tile(lines, rows, channels, each, GROUPS, WIDTH, CHANNELS)
    offset, a, b = of_channels
    mean_, rstd_ = _load(mean, group, inside) - offset, _load(rstd, group, inside)
    da, db, xhats = _sums(
        g + image, x + image, begin, end, c, inside, channels, mean_, rstd_, a, b, SILU, ROWS, CHANNELS
    )
    at = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * channels + c
    tl.store(sums[0] + at, da, mask=inside)
    tl.store(sums[1] + at, db, mask=inside)
    tl.store(sums[2] + at, xhats, mask=inside)


@triton.jit
def _group_gradients(
    sums, mean, rstd, lines, of_lines, m1, m2, rows, channels, chunks,
    GROUPS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the lines, [N, C] each, and m1 and m2, [N, groups] each, from the sums of _chunk_gradients. Grid: N * groups."""
    index, n, c, inside, _, at, mask = _group(channels, chunks, GROUPS, CHUNKS, CHANNELS)
    da, db = tl.sum(_load(sums[0], at, mask), axis=0), tl.sum(_load(sums[1], at, mask), axis=0)
    xhats, rstd_ = tl.sum(_load(sums[2], at, mask), axis=0), tl.load(rstd + index)
    mean_1, mean_2 = _store_gradients(
        lines, of_lines, n, c, inside, da, db, xhats, rstd_, rows, channels, channels // GROUPS
    )
    tl.store(m1 + index, mean_1)
    tl.store(m2 + index, mean_2)
