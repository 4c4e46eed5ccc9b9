"""Triton kernels of group norm, scale and shift, and SiLU over channels_last images. Imported only where triton is.

Memory is [N, R, C]: images, rows (places, H * W of them), channels innermost. A program sees a tile of rows x channels.
A small image is the work of one program per group (forward_whole, backward_whole): what counts there is how often the
host starts a kernel. The R rows of a large one are cut into chunks whose length depends on R and C alone, and sums over
chunks are formed in one fixed order by a second kernel; so a single image keeps a whole GPU busy. Either way there are no
atomic additions, results repeat bit for bit, and an image's do not depend on the batch it is in.

Everything is computed in float32, whatever the format of x. With xhat = (x - mean) * rstd, statistics per group:

    u = xhat * weight + bias,   v = u * (1 + scale) + shift,   y = silu(v) or v
    dv = dy * silu'(v),   S1 = sum over rows of dv,   S2 = sum over rows of dv * xhat        per image and channel
    a = weight * (1 + scale),   m1 = mean over the group of a * dv,   m2 = mean over the group of a * dv * xhat
    dx = rstd * (a * dv - m1 - xhat * m2)
"""

# Triton reads annotations as its own, so there are none but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


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
def _line(weight, bias, scale, shift, c, inside, SCALED: tl.constexpr):
    """The a and b of v = xhat * a + b, per channel; scale and shift point to those of the image."""
    a = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        s = 1.0 + tl.load(scale + c, mask=inside, other=0.0).to(tl.float32)
        b = b * s + tl.load(shift + c, mask=inside, other=0.0).to(tl.float32)
        a = a * s
    return a, b


@triton.jit
def _answer(x, y, at, mask, mean, rstd, a, b, SILU: tl.constexpr):
    """Write y at these places."""
    v = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :] * a[None, :] + b[None, :]
    if SILU:
        v = v * tl.sigmoid(v)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _slopes(g, x, at, mask, mean, rstd, a, b, SILU: tl.constexpr):
    """dv and xhat at these places; dv is 0 where masked."""
    dv = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
    xhat = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    if SILU:
        v = xhat * a[None, :] + b[None, :]
        half = tl.sigmoid(v)
        dv = dv * (half * (1.0 + v * (1.0 - half)))
    return dv, xhat


@triton.jit
def _store_dx(dx, at, mask, dv, xhat, rstd, a, m1, m2):
    """Write dx at these places."""
    found = rstd[None, :] * (a[None, :] * dv - m1[None, :] - xhat * m2[None, :])
    tl.store(dx + at, found.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _sums(
    g, x, begin, end, c, inside, channels, mean, rstd, a, b, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """S1 and S2 over rows begin..end of the image at g and x."""
    s1 = tl.zeros([CHANNELS], dtype=tl.float32)
    s2 = tl.zeros([CHANNELS], dtype=tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        dv, xhat = _slopes(g, x, r[:, None] * channels + c[None, :], mask, mean, rstd, a, b, SILU)
        s1 += tl.sum(dv, axis=0)
        s2 += tl.sum(dv * xhat, axis=0)
    return s1, s2


@triton.jit
def _group(rows, channels, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """What a program of a grid of N * groups works on: its number, the image's and where that begins, the group's channels."""
    place = tl.program_id(0).to(tl.int64)
    n, group = place // GROUPS, place % GROUPS
    width = channels // GROUPS
    lane = tl.arange(0, CHANNELS)
    return place, n, n * rows * channels, width, group * width + lane, lane < width


@triton.jit
def forward_whole(
    x, y, mean, rstd, weight, bias, scale, shift, rows, channels, stride, eps,
    GROUPS: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Statistics and y of a group of an image. Grid: N * groups. `stride`: between the images of scale and of shift."""
    place, n, image, width, c, inside = _group(rows, channels, GROUPS, CHANNELS)
    means, squares = _moments(x + image, 0, rows, c, inside, channels, ROWS, CHANNELS)
    middle = tl.sum(means, axis=0) / width  # 0 outside
    apart = tl.where(inside, means - middle, 0.0)
    variance = tl.sum(squares / rows + apart * apart, axis=0) / width
    sharp = 1.0 / tl.sqrt(variance + eps)
    tl.store(mean + place, middle)
    tl.store(rstd + place, sharp)
    a, b = _line(weight, bias, scale + n * stride, shift + n * stride, c, inside, SCALED)
    every = tl.zeros([CHANNELS], dtype=tl.float32)  # makes one number that of every channel
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < rows)[:, None] & inside[None, :]
        _answer(x, y, image + r[:, None] * channels + c[None, :], mask, every + middle, every + sharp, a, b, SILU)


@triton.jit
def backward_whole(
    g, x, dx, mean, rstd, weight, bias, scale, shift, s1, s2, rows, channels, stride,
    GROUPS: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx, S1 and S2 of a group of an image. Grid: N * groups."""
    place, n, image, width, c, inside = _group(rows, channels, GROUPS, CHANNELS)
    every = tl.zeros([CHANNELS], dtype=tl.float32)  # makes one number that of every channel
    middle, sharp = every + tl.load(mean + place), every + tl.load(rstd + place)
    a, b = _line(weight, bias, scale + n * stride, shift + n * stride, c, inside, SCALED)
    first, second = _sums(
        g + image, x + image, 0, rows, c, inside, channels, middle, sharp, a, b, SILU, ROWS, CHANNELS
    )  # fmt: skip
    tl.store(s1 + n * channels + c, first, mask=inside)
    tl.store(s2 + n * channels + c, second, mask=inside)
    total = (rows * width).to(tl.float32)
    m1, m2 = tl.sum(a * first, axis=0) / total, tl.sum(a * second, axis=0) / total
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < rows)[:, None] & inside[None, :]
        at = image + r[:, None] * channels + c[None, :]
        dv, xhat = _slopes(g, x, at, mask, middle, sharp, a, b, SILU)
        _store_dx(dx, at, mask, dv, xhat, sharp, a, every + m1, every + m2)


@triton.jit
def chunk_moments(
    x, means, squares, rows, channels, per_chunk, chunks,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared distances from it, per channel of a chunk: [N, chunks, C] each. Grid: chunks, channel tiles, N."""
    chunk, tile = tl.program_id(0), tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    c = tile * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    begin = chunk * per_chunk
    end = tl.minimum(begin + per_chunk, rows)
    mean, square = _moments(x + n * rows * channels, begin, end, c, inside, channels, ROWS, CHANNELS)
    place = (n * chunks + chunk) * channels + c
    tl.store(means + place, mean, mask=inside)
    tl.store(squares + place, square, mask=inside)


@triton.jit
def group_moments(
    means, squares, mean, rstd, rows, channels, per_chunk, chunks, eps,
    GROUPS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation per group, [N, groups] each, of what chunk_moments found. Grid: N * groups."""
    place = tl.program_id(0).to(tl.int64)
    n, group = place // GROUPS, place % GROUPS
    width = channels // GROUPS
    k, c = tl.arange(0, CHUNKS), tl.arange(0, CHANNELS)
    mask = (k < chunks)[:, None] & (c < width)[None, :]
    at = (n * chunks + k[:, None]) * channels + group * width + c[None, :]
    chunk_means = tl.load(means + at, mask=mask, other=0.0)
    counts = tl.maximum(tl.minimum(rows - k * per_chunk, per_chunk), 0).to(tl.float32)
    total = (rows * width).to(tl.float32)
    weighted = tl.where(mask, chunk_means * counts[:, None], 0.0)
    found = tl.sum(tl.sum(weighted, axis=1), axis=0) / total
    apart = tl.where(mask, chunk_means - found, 0.0)
    around = tl.load(squares + at, mask=mask, other=0.0) + apart * apart * counts[:, None]
    variance = tl.sum(tl.sum(around, axis=1), axis=0) / total
    tl.store(mean + place, found)
    tl.store(rstd + place, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def forward(
    x, y, mean, rstd, weight, bias, scale, shift, rows, channels, stride,
    GROUPS: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y of a tile. Grid: row tiles, channel tiles, N."""
    n = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    group = n * GROUPS + c // (channels // GROUPS)
    middle = tl.load(mean + group, mask=inside, other=0.0)
    sharp = tl.load(rstd + group, mask=inside, other=0.0)
    a, b = _line(weight, bias, scale + n * stride, shift + n * stride, c, inside, SCALED)
    at = n * rows * channels + r[:, None] * channels + c[None, :]
    _answer(x, y, at, (r < rows)[:, None] & inside[None, :], middle, sharp, a, b, SILU)


@triton.jit
def chunk_gradients(
    g, x, mean, rstd, weight, bias, scale, shift, sums, products, rows, channels, per_chunk, chunks, stride,
    GROUPS: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """S1 and S2 over the rows of a chunk: [N, chunks, C] each. Grid: chunks, channel tiles, N."""
    chunk, tile = tl.program_id(0), tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    c = tile * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    group = n * GROUPS + c // (channels // GROUPS)
    middle = tl.load(mean + group, mask=inside, other=0.0)
    sharp = tl.load(rstd + group, mask=inside, other=0.0)
    a, b = _line(weight, bias, scale + n * stride, shift + n * stride, c, inside, SCALED)
    begin = chunk * per_chunk
    end = tl.minimum(begin + per_chunk, rows)
    image = n * rows * channels
    first, second = _sums(
        g + image, x + image, begin, end, c, inside, channels, middle, sharp, a, b, SILU, ROWS, CHANNELS
    )  # fmt: skip
    place = (n * chunks + chunk) * channels + c
    tl.store(sums + place, first, mask=inside)
    tl.store(products + place, second, mask=inside)


@triton.jit
def group_gradients(
    sums, products, weight, scale, s1, s2, m1, m2, rows, channels,
    chunks, stride, GROUPS: tl.constexpr, SCALED: tl.constexpr, CHUNKS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """S1 and S2 over all rows, [N, C] each, and m1 and m2, [N, groups] each. Grid: N * groups."""
    place = tl.program_id(0).to(tl.int64)
    n, group = place // GROUPS, place % GROUPS
    width = channels // GROUPS
    k, lane = tl.arange(0, CHUNKS), tl.arange(0, CHANNELS)
    inside = lane < width
    c = group * width + lane
    mask = (k < chunks)[:, None] & inside[None, :]
    at = (n * chunks + k[:, None]) * channels + c[None, :]
    first = tl.sum(tl.load(sums + at, mask=mask, other=0.0), axis=0)
    second = tl.sum(tl.load(products + at, mask=mask, other=0.0), axis=0)
    a = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        a = a * (1.0 + tl.load(scale + n * stride + c, mask=inside, other=0.0).to(tl.float32))
    total = (rows * width).to(tl.float32)
    tl.store(s1 + n * channels + c, first, mask=inside)
    tl.store(s2 + n * channels + c, second, mask=inside)
    tl.store(m1 + place, tl.sum(a * first, axis=0) / total)
    tl.store(m2 + place, tl.sum(a * second, axis=0) / total)


@triton.jit
def backward(
    g, x, dx, mean, rstd, weight, bias, scale, shift, m1, m2, rows, channels, stride,
    GROUPS: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx of a tile. Grid: row tiles, channel tiles, N."""
    n = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    mask = (r < rows)[:, None] & inside[None, :]
    at = n * rows * channels + r[:, None] * channels + c[None, :]
    group = n * GROUPS + c // (channels // GROUPS)
    middle = tl.load(mean + group, mask=inside, other=0.0)
    sharp = tl.load(rstd + group, mask=inside, other=0.0)
    of_one = tl.load(m1 + group, mask=inside, other=0.0)
    of_xhat = tl.load(m2 + group, mask=inside, other=0.0)
    a, b = _line(weight, bias, scale + n * stride, shift + n * stride, c, inside, SCALED)
    dv, xhat = _slopes(g, x, at, mask, middle, sharp, a, b, SILU)
    _store_dx(dx, at, mask, dv, xhat, sharp, a, of_one, of_xhat)
