"""LRN in Triton, forward and backward, for any layout whose pixels can be walked with one stride.

A tile is [pixels, channels]. x is read from memory once and its neighbouring channels are gathered from the tile;
each window is summed afresh, never kept as a running sum. Bytes: forward reads x and writes y, backward reads dy
and x and writes dx. Formulas: csrc/local_response_norm/local_response_norm.h.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import with_strides_of
from .._triton import accumulator, is_wide, tile, tile_at, wrap_triton


@triton.jit
def inverse_power(s, BETA: tl.constexpr):
    """s ** -BETA, PyTorch's values for negative s included; approximate roots (an ulp or two) except in fp64."""
    FP64: tl.constexpr = s.dtype == tl.float64
    if BETA == 0:
        power = tl.full(s.shape, 1.0, s.dtype)
    elif BETA == 1:
        power = 1.0 / s
    elif BETA == 0.5:
        power = 1.0 / tl.sqrt(s) if FP64 else tl.rsqrt(s)
    elif BETA == 0.75:
        root = tl.sqrt(s) if FP64 else tl.rsqrt(s)
        power = 1.0 / (root * tl.sqrt(root)) if FP64 else root * tl.sqrt(root)
    elif BETA % 1 != 0:
        power = tl.exp2(tl.log2(s) * (-BETA))
    else:
        power = tl.exp2(tl.log2(tl.abs(s)) * (-BETA))
        if BETA % 2 != 0:
            power = tl.where(s < 0, -power, power)
    return power


@triton.jit
def inverse(s, BETA: tl.constexpr):
    """1 / s; where ``inverse_power`` needs a root of it, that one's square, an ulp or two off."""
    if BETA == 0.75 and s.dtype != tl.float64:
        root = tl.rsqrt(s)
        return root * root
    return 1.0 / s


@triton.jit
def shifted(t, BY: tl.constexpr):
    """The tile's value BY lanes further on, 0 beyond its ends."""
    lane = tl.arange(0, t.shape[1])[None, :] + BY
    inside = (lane >= 0) & (lane < t.shape[1])
    index = tl.broadcast_to(tl.where(inside, lane, 0), t.shape)
    return tl.where(inside, tl.gather(t, index, 1), 0.0)


@triton.jit
def part(parts, i: tl.constexpr):
    """Part i; before the first and after the last one are those of the neighbouring lanes."""
    n: tl.constexpr = len(parts)
    return parts[i % n] if i // n == 0 else shifted(parts[i % n], i // n)


@triton.jit
def part_sum(parts, i: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    total = parts[i]
    for j in tl.static_range(1, BEFORE + 1):
        total += part(parts, i - j)
    for j in tl.static_range(1, AFTER + 1):
        total += part(parts, i + j)
    return total


@triton.jit
def halves(t):
    """The tile's even channels, and its odd ones."""
    return tl.split(t.reshape(t.shape[0], t.shape[1] // 2, 2))


@triton.jit
def window_sum(t, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """The sum of each channel's window, 0 beyond the tile's ends.

    Part i of eight has channels i, i + 8, i + 16, ...: a thread that loads 16 bytes of bf16 has one of each, so that
    most of a window is its own, and an edge of it one exchange with the next lane. Large windows would take too long
    to compile that way.
    """
    if t.shape[1] < 8 or BEFORE + AFTER > 16:
        total = part_sum((t,), 0, BEFORE, AFTER)
    else:
        even, odd = halves(t)
        (a, c), (b, d) = halves(even), halves(odd)
        (t0, t4), (t2, t6), (t1, t5), (t3, t7) = halves(a), halves(c), halves(b), halves(d)
        parts = (t0, t1, t2, t3, t4, t5, t6, t7)
        a = tl.interleave(part_sum(parts, 0, BEFORE, AFTER), part_sum(parts, 4, BEFORE, AFTER))
        b = tl.interleave(part_sum(parts, 1, BEFORE, AFTER), part_sum(parts, 5, BEFORE, AFTER))
        c = tl.interleave(part_sum(parts, 2, BEFORE, AFTER), part_sum(parts, 6, BEFORE, AFTER))
        d = tl.interleave(part_sum(parts, 3, BEFORE, AFTER), part_sum(parts, 7, BEFORE, AFTER))
        total = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return total


@triton.jit
def lrn(x, BEFORE: tl.constexpr, AFTER: tl.constexpr, MEAN: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr):
    """LRN of a tile whose channels outside the tensor are 0."""
    return x * inverse_power(K + MEAN * window_sum(x * x, BEFORE, AFTER), BETA)


@triton.jit
def lrn_backward(
    dy,
    x,
    inside,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    MEAN: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
):
    """dx of a tile; ``inside`` says which of its elements are the tensor's (the others have dy = x = 0)."""
    s = K + MEAN * window_sum(x * x, BEFORE, AFTER)
    # dy * s^-beta first: where s overflowed it is 0, and x * s^-(beta+1) alone would be inf * 0.
    scaled = dy * inverse_power(s, BETA)
    dx = scaled
    if BETA != 0:  # else a constant whatever s is, and nothing flows through it, not even 0 * inf
        terms = tl.where(inside, scaled * x * inverse(s, BETA), 0.0)
        dx -= (2 * MEAN * BETA) * x * window_sum(terms, AFTER, BEFORE)
    return dx


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    batch,
    channels,
    pixels,
    batch_stride,
    channel_stride,
    pixel_stride,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    MEAN: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    pixel, channel, inside, own = tile_at(tl.program_id(0), batch * pixels, channels, HALO, BLOCK_P, BLOCK_C, WIDE)
    at = pixel // pixels * batch_stride + pixel % pixels * pixel_stride + channel * channel_stride
    x = tl.load(x_ptr + at, inside, 0.0)
    y = lrn(accumulator(x), BEFORE, AFTER, MEAN, BETA, K)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), own)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    batch,
    channels,
    pixels,
    batch_stride,
    channel_stride,
    pixel_stride,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    MEAN: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    pixel, channel, inside, own = tile_at(tl.program_id(0), batch * pixels, channels, HALO, BLOCK_P, BLOCK_C, WIDE)
    at = pixel // pixels * batch_stride + pixel % pixels * pixel_stride + channel * channel_stride
    x = accumulator(tl.load(x_ptr + at, inside, 0.0))
    dy = accumulator(tl.load(dy_ptr + at, inside, 0.0))
    dx = lrn_backward(dy, x, inside, BEFORE, AFTER, MEAN, BETA, K)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), own)


def constants(size: int, alpha: float, beta: float, k: float, channels: int) -> dict[str, Any]:
    """What the tile functions take: the window, cut to the channels there are, and the formula's constants."""
    return {
        "BEFORE": min(size // 2, channels - 1),
        "AFTER": min((size - 1) // 2, channels - 1),
        "MEAN": float(alpha) / size,
        "BETA": float(beta),
        "K": float(k),
    }


def plan_pixels(x: Tensor) -> tuple[int, int] | None:
    """(pixels, their stride) of a dense (N, C, *), or None where its pixels cannot be walked with one stride."""
    sides = [(x.stride(d), x.shape[d]) for d in range(2, x.dim()) if x.shape[d] != 1]
    pixels, pixel_stride = 1, 1
    for stride, size in sorted(sides, key=lambda side: side[0]):  # from the smallest up: H or W may be the inner one
        if pixels == 1:
            pixel_stride = stride
        elif stride != pixel_stride * pixels:
            return None
        pixels *= size
    return pixels, pixel_stride


def forward(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    plan = plan_pixels(y)
    if plan is None:
        return y.copy_(forward(x.contiguous(), size, alpha, beta, k))
    x, (pixels, pixel_stride), channels = with_strides_of(y, x), plan, int(x.shape[1])
    lrn_constants = constants(size, alpha, beta, k, channels)
    blocks, channel_blocks = tile(channels, y.stride(1), lrn_constants["BEFORE"], x.dtype)
    grid = (triton.cdiv(x.shape[0] * pixels, blocks["BLOCK_P"]), channel_blocks)
    wrap_triton(_forward_kernel)[grid](
        x,
        y,
        x.shape[0],
        channels,
        pixels,
        y.stride(0),
        y.stride(1),
        pixel_stride,
        **lrn_constants,
        **blocks,
        WIDE=is_wide(y),
    )
    return y


def backward(
    dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, dtype: torch.dtype | None = None
) -> Tensor:
    """dx in ``dtype`` (default x's)."""
    dx = torch.empty_like(x, dtype=dtype)
    if x.numel() == 0:
        return dx
    plan = plan_pixels(dx)
    if plan is None:
        return dx.copy_(backward(dy, x.contiguous(), size, alpha, beta, k))
    dy, x = with_strides_of(dx, dy), with_strides_of(dx, x)
    (pixels, pixel_stride), channels = plan, int(x.shape[1])
    lrn_constants = constants(size, alpha, beta, k, channels)
    blocks, channel_blocks = tile(channels, dx.stride(1), lrn_constants["BEFORE"] + lrn_constants["AFTER"], x.dtype)
    grid = (triton.cdiv(x.shape[0] * pixels, blocks["BLOCK_P"]), channel_blocks)
    wrap_triton(_backward_kernel)[grid](
        dy,
        x,
        dx,
        x.shape[0],
        channels,
        pixels,
        dx.stride(0),
        dx.stride(1),
        pixel_stride,
        **lrn_constants,
        **blocks,
        WIDE=is_wide(dx),
    )
    return dx
