"""Triton kernels of group norm, scale and shift, and SiLU over channels_last images. Imported only where triton is.

Memory is [N, R, C]: images, rows (places, H * W of them), channels innermost. A program sees a tile of rows x channels.
The R rows of an image are cut into chunks whose length depends on R and C alone, and sums over chunks are formed in one
fixed order by a second kernel. So there are no atomic additions, results repeat bit for bit, and an image's do not depend
on the batch it is in; and a single image still keeps a whole GPU busy.

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
    mean = tl.zeros([CHANNELS], dtype=tl.float32)
    square = tl.zeros([CHANNELS], dtype=tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        values = tl.load(x + n * rows * channels + r[:, None] * channels + c[None, :], mask=mask, other=0.0)
        values = values.to(tl.float32)
        before = (start - begin).to(tl.float32)
        count = tl.minimum(end - start, ROWS).to(tl.float32)
        tile_mean = tl.sum(values, axis=0) / count
        away = tl.where(mask, values - tile_mean[None, :], 0.0)
        # Two sets of numbers joined: Chan, Golub & LeVeque 1983, equation 2.1.
        apart = tile_mean - mean
        square += tl.sum(away * away, axis=0) + apart * apart * (before * count / (before + count))
        mean += apart * (count / (before + count))
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
    x, y, mean, rstd, weight, bias, scale, shift, rows, channels,
    stride, GROUPS: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """y of a tile. Grid: row tiles, channel tiles, N. `stride`: between the images of scale and of shift."""
    n = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    mask = (r < rows)[:, None] & inside[None, :]
    at = n * rows * channels + r[:, None] * channels + c[None, :]
    group = n * GROUPS + c // (channels // GROUPS)
    middle = tl.load(mean + group, mask=inside, other=0.0)
    sharp = tl.load(rstd + group, mask=inside, other=0.0)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    v = (values - middle[None, :]) * sharp[None, :] * w[None, :] + b[None, :]
    if SCALED:
        s = 1.0 + tl.load(scale + n * stride + c, mask=inside, other=0.0).to(tl.float32)
        v = v * s[None, :] + tl.load(shift + n * stride + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SILU:
        v = v * tl.sigmoid(v)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def chunk_gradients(
    g, x, mean, rstd, weight, bias, scale, shift, sums, products,
    rows, channels, per_chunk, chunks, stride, GROUPS: tl.constexpr, SCALED: tl.constexpr,
    SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """S1 and S2 over the rows of a chunk: [N, chunks, C] each. Grid: chunks, channel tiles, N."""
    chunk, tile = tl.program_id(0), tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    c = tile * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    group = n * GROUPS + c // (channels // GROUPS)
    middle = tl.load(mean + group, mask=inside, other=0.0)
    sharp = tl.load(rstd + group, mask=inside, other=0.0)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        s = 1.0 + tl.load(scale + n * stride + c, mask=inside, other=0.0).to(tl.float32)
        b = b * s + tl.load(shift + n * stride + c, mask=inside, other=0.0).to(tl.float32)
        w = w * s
    begin = chunk * per_chunk
    end = tl.minimum(begin + per_chunk, rows)
    first = tl.zeros([CHANNELS], dtype=tl.float32)
    second = tl.zeros([CHANNELS], dtype=tl.float32)
    for start in range(begin, end, ROWS):
        r = start + tl.arange(0, ROWS)
        mask = (r < end)[:, None] & inside[None, :]
        at = n * rows * channels + r[:, None] * channels + c[None, :]
        dv = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
        xhat = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - middle[None, :]) * sharp[None, :]
        if SILU:
            v = xhat * w[None, :] + b[None, :]
            half = tl.sigmoid(v)
            dv = dv * (half * (1.0 + v * (1.0 - half)))
        first += tl.sum(dv, axis=0)  # where masked, dy is 0
        second += tl.sum(dv * xhat, axis=0)
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
    g, x, dx, mean, rstd, weight, bias, scale, shift, m1, m2,
    rows, channels, stride, GROUPS: tl.constexpr, SCALED: tl.constexpr, SILU: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
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
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        s = 1.0 + tl.load(scale + n * stride + c, mask=inside, other=0.0).to(tl.float32)
        b = b * s + tl.load(shift + n * stride + c, mask=inside, other=0.0).to(tl.float32)
        w = w * s
    dv = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
    xhat = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - middle[None, :]) * sharp[None, :]
    if SILU:
        v = xhat * w[None, :] + b[None, :]
        half = tl.sigmoid(v)
        dv = dv * (half * (1.0 + v * (1.0 - half)))
    found = sharp[None, :] * (w[None, :] * dv - of_one[None, :] - xhat * of_xhat[None, :])
    tl.store(dx + at, found.to(dx.dtype.element_ty), mask=mask)
