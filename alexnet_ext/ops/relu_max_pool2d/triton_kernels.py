"""ReLU and max pooling in Triton, forward and backward, for any strides; winners as in csrc/relu_max_pool2d.

A tile is [pixels, channels]. Bytes: forward reads x (the windows' overlaps from cache) and writes y and a byte a
value; backward gathers each dx from the at most ceil(window / stride)^2 windows that reach it: no atomics, one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import pooled_size
from .._layout import empty_images
from .._triton import (
    PARTIAL_SUMS,
    accumulator,
    accumulator_dtype,
    is_wide,
    offset,
    place,
    sides,
    store_sums,
    tile,
    tile_at,
    total,
    wrap_triton,
)


@triton.jit
def take(value, winner, v, tap):
    """The best of a window so far, after ``v``. Start with (0, 255) under ReLU, else with (-inf, 0).

    A NaN wins from any value and no value wins from a NaN: the last NaN stays, as in PyTorch.
    """
    up = (v > value) | (v != v)
    return tl.where(up, v, value), tl.where(up, tap, winner)


@triton.jit
def floored(value, winner, first):
    """Under ReLU a window with nothing above zero returns its first value's zero, with that one's sign."""
    return tl.where(winner == 255, tl.where(first == 0, first, 0.0), value)


@triton.jit
def with_bias(x, bias_ptr, channel, channels, BIAS: tl.constexpr):
    """x + bias in the accumulator's type."""
    x = accumulator(x)
    if BIAS:
        x += accumulator(tl.load(bias_ptr + channel, (channel >= 0) & (channel < channels), 0.0))
    return x


@triton.jit
def pool(
    x_ptr,
    strides,
    sides,
    bias_ptr,
    at,
    channel,
    channels,
    inside,
    normalize: tl.constexpr,
    LRN: tl.constexpr,
    WINDOW: tl.constexpr,
    BIAS: tl.constexpr,
):
    """(values, winners) of a tile of windows ``at`` their (image, row, column) of the output.

    The windows pool ``normalize(x + bias, LRN)``. With ``normalize`` None they pool x + bias, and the ReLU is theirs.
    ``sides`` are the input's (height, width), None where every window is within them.
    """
    KERNEL_H: tl.constexpr = WINDOW[0]
    KERNEL_W: tl.constexpr = WINDOW[1]
    DILATION_H: tl.constexpr = WINDOW[6]
    DILATION_W: tl.constexpr = WINDOW[7]
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    value = tl.full(inside.shape, 0.0 if normalize is None else float("-inf"), ACC)
    winner = tl.full(inside.shape, 255 if normalize is None else 0, tl.int32)
    image, row, column = at
    top, left = row * WINDOW[2] - WINDOW[4], column * WINDOW[3] - WINDOW[5]
    corner = x_ptr + offset((image, top, left), channel, strides)
    for r in tl.range(0, KERNEL_H, loop_unroll_factor=KERNEL_H if KERNEL_H <= 3 and normalize is None else 1):
        for s in tl.range(0, KERNEL_W, loop_unroll_factor=KERNEL_W if KERNEL_W <= 3 else 1):
            down, right = r * DILATION_H, s * DILATION_W
            here = inside
            if sides is not None:
                here &= (top + down >= 0) & (top + down < sides[0]) & (left + right >= 0) & (left + right < sides[1])
            x = tl.load(corner + down * strides[2] + right * strides[3], here, 0.0)
            v = with_bias(x, bias_ptr, channel, channels, BIAS)
            if normalize is not None:
                v = normalize(v, LRN)
            value, winner = take(value, winner, v, r * KERNEL_W + s)
    if normalize is None:
        first = corner
        if sides is not None:
            down = tl.maximum(tl.cdiv(-top, DILATION_H), 0) * DILATION_H
            right = tl.maximum(tl.cdiv(-left, DILATION_W), 0) * DILATION_W
            inside &= (top + down < sides[0]) & (left + right < sides[1])
            first += down * strides[2] + right * strides[3]
        x = tl.load(first, inside, 0.0)
        value = floored(value, winner, with_bias(x, bias_ptr, channel, channels, BIAS))
    return value, winner


@triton.jit
def unpool(
    dy_ptr, dy_strides, winners_ptr, winner_strides, out_height, out_width, at, channel, inside, WINDOW: tl.constexpr
):
    """The gradient of a tile of input pixels: dy of the windows that each of them won, in ascending order."""
    KERNEL_H: tl.constexpr = WINDOW[0]
    KERNEL_W: tl.constexpr = WINDOW[1]
    STRIDE_H: tl.constexpr = WINDOW[2]
    STRIDE_W: tl.constexpr = WINDOW[3]
    DILATION_H: tl.constexpr = WINDOW[6]
    DILATION_W: tl.constexpr = WINDOW[7]
    total = tl.zeros(inside.shape, tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32)
    REACH_H: tl.constexpr = (KERNEL_H - 1) * DILATION_H // STRIDE_H
    REACH_W: tl.constexpr = (KERNEL_W - 1) * DILATION_W // STRIDE_W
    image, row, column = at
    row += WINDOW[4]
    column += WINDOW[5]
    for i in tl.range(0, REACH_H + 1, loop_unroll_factor=REACH_H + 1 if REACH_H < 3 else 1):
        oh = row // STRIDE_H - REACH_H + i
        down = row - oh * STRIDE_H
        for j in tl.range(0, REACH_W + 1, loop_unroll_factor=REACH_W + 1 if REACH_W < 3 else 1):
            ow = column // STRIDE_W - REACH_W + j
            right = column - ow * STRIDE_W
            reaches = inside & (oh >= 0) & (oh < out_height) & (ow >= 0) & (ow < out_width)
            reaches &= (down <= (KERNEL_H - 1) * DILATION_H) & (right <= (KERNEL_W - 1) * DILATION_W)
            reaches &= (down % DILATION_H == 0) & (right % DILATION_W == 0)
            there = (image, oh, ow)
            winner = tl.load(winners_ptr + offset(there, channel, winner_strides), reaches, 255).to(tl.int32)
            # Loaded whether it won or not: a mask that depends on data would break up the 16-byte loads.
            dy = accumulator(tl.load(dy_ptr + offset(there, channel, dy_strides), reaches, 0.0))
            total += tl.where(winner == down // DILATION_H * KERNEL_W + right // DILATION_W, dy, 0.0)
    return total


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    winners_ptr,
    pixels,
    channels,
    height,
    width,
    out_height,
    out_width,
    x_batch,
    x_channel,
    x_row,
    x_column,
    out_batch,
    out_channel,
    out_row,
    out_column,
    WITHIN: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    pixel, channel, _, own = tile_at(tl.program_id(0), pixels, channels, HALO, BLOCK_P, BLOCK_C, WIDE)
    at = place(pixel, out_height, out_width)
    value, winner = pool(
        x_ptr,
        (x_batch, x_channel, x_row, x_column),
        None if WITHIN else (height, width),
        x_ptr,
        at,
        channel,
        channels,
        own,
        None,
        None,
        (KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, DILATION_H, DILATION_W),
        False,
    )
    out = offset(at, channel, (out_batch, out_channel, out_row, out_column))
    tl.store(y_ptr + out, value.to(y_ptr.dtype.element_ty), own)
    tl.store(winners_ptr + out, winner.to(tl.uint8), own)


@triton.jit
def _backward_kernel(
    dy_ptr,
    winners_ptr,
    dx_ptr,
    sums_ptr,
    pixels,
    channels,
    height,
    width,
    out_height,
    out_width,
    dy_batch,
    dy_channel,
    dy_row,
    dy_column,
    out_batch,
    out_channel,
    out_row,
    out_column,
    x_batch,
    x_channel,
    x_row,
    x_column,
    SUMS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    sums = tl.zeros([1, BLOCK_C], tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(pixels, BLOCK_P), tl.num_programs(0)):
        pixel, channel, _, own = tile_at(block, pixels, channels, HALO, BLOCK_P, BLOCK_C, WIDE)
        at = place(pixel, height, width)
        dx = unpool(
            dy_ptr,
            (dy_batch, dy_channel, dy_row, dy_column),
            winners_ptr,
            (out_batch, out_channel, out_row, out_column),
            out_height,
            out_width,
            at,
            channel,
            own,
            (KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, DILATION_H, DILATION_W),
        )
        out = offset(at, channel, (x_batch, x_channel, x_row, x_column))
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), own)
        if SUMS:
            sums += tl.sum(dx, 0, keep_dims=True)
    if SUMS:
        store_sums(sums, sums_ptr, channels, HALO, BLOCK_C)


def window(
    kernel_size: list[int], stride: list[int], padding: list[int] | None = None, dilation: list[int] | None = None
) -> dict[str, int]:
    return sides(KERNEL=kernel_size, STRIDE=stride, PADDING=padding or [0, 0], DILATION=dilation or [1, 1])


def forward(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    out_height, out_width = (
        pooled_size(x.shape[2 + i], kernel_size[i], stride[i], padding[i], dilation[i], ceil_mode) for i in (0, 1)
    )
    y = empty_images(x, out_height, out_width)
    winners = empty_images(x, out_height, out_width, torch.uint8)
    if y.numel() == 0:
        return y, winners
    blocks, channel_blocks = tile(channels, y.stride(1), None, x.dtype)
    pixels = batch * out_height * out_width
    within = all(
        padding[i] == 0 and (y.shape[2 + i] - 1) * stride[i] + (kernel_size[i] - 1) * dilation[i] < x.shape[2 + i]
        for i in (0, 1)
    )
    wrap_triton(_forward_kernel)[(triton.cdiv(pixels, blocks["BLOCK_P"]), channel_blocks)](
        x,
        y,
        winners,
        pixels,
        channels,
        height,
        width,
        out_height,
        out_width,
        *x.stride(),
        *y.stride(),
        WITHIN=within,
        **window(kernel_size, stride, padding, dilation),
        **blocks,
        WIDE=is_wide(x, y),
    )
    return y, winners


def gradient(
    dy: Tensor, winners: Tensor, height: int, width: int, taps: dict[str, int], dtype: torch.dtype, sums: bool
) -> tuple[Tensor, Tensor]:
    """(dx in ``dtype``, its sums by channel), the second empty unless ``sums``."""
    batch, channels, out_height, out_width = winners.shape
    dx = empty_images(winners, height, width, dtype)
    if dx.numel() == 0:
        return dx, dx.new_zeros(channels if sums else 0)
    blocks, channel_blocks = tile(channels, dx.stride(1), None, dtype)
    pixels = batch * height * width
    programs = triton.cdiv(pixels, blocks["BLOCK_P"])
    if sums:
        programs = min(programs, PARTIAL_SUMS)
    partial = dx.new_empty((programs, channels) if sums else 0, dtype=accumulator_dtype(dtype))
    wrap_triton(_backward_kernel)[(programs, channel_blocks)](
        dy,
        winners,
        dx,
        partial,
        pixels,
        channels,
        height,
        width,
        out_height,
        out_width,
        *dy.stride(),
        *winners.stride(),
        *dx.stride(),
        SUMS=sums,
        **taps,
        **blocks,
        WIDE=is_wide(dy, winners, dx),
    )
    return dx, total(partial, dtype) if sums else partial


def backward(
    dy: Tensor,
    winners: Tensor,
    height: int,
    width: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    dx, _ = gradient(dy, winners, height, width, window(kernel_size, stride, padding, dilation), dy.dtype, False)
    return dx
