"""ReLU and max pooling in Triton, forward and backward, for any strides; winners as in csrc/relu_max_pool2d.

A tile is [pixels, channels]. Bytes: forward reads x (the windows' overlaps from cache) and writes y and a byte a
value; backward gathers each dx from the at most ceil(window / stride)^2 windows that reach it: no atomics, one order.
Where the stride is 2 or so, a tile is of patches, a stride's pixels each way, whose windows are read once for all.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import pooled_size
from .._layout import empty_images
from .._triton import (
    accumulator,
    accumulator_dtype,
    is_wide,
    offset,
    place,
    sharing,
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
def bias_of(bias_ptr, channel, channels):
    """The bias of a tile's channels in the accumulator's type."""
    return accumulator(tl.load(bias_ptr + channel, (channel >= 0) & (channel < channels), 0.0))


@triton.jit
def with_bias(x, bias):
    """x + bias in the accumulator's type; bias may be None."""
    x = accumulator(x)
    return x if bias is None else x + bias


@triton.jit
def pool(
    x_ptr,
    strides,
    sides,
    bias,
    at,
    channel,
    inside,
    normalize: tl.constexpr,
    LRN: tl.constexpr,
    WINDOW: tl.constexpr,
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
            v = with_bias(x, bias)
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
        value = floored(value, winner, with_bias(x, bias))
    return value, winner


@triton.jit
def window_at(dy, winners, there, sides, channel, inside):
    """(dy, winner) of a tile of windows ``there``, 0 and 255 outside. ``dy`` and ``winners``: (pointer, strides)."""
    inside &= (there[1] >= 0) & (there[1] < sides[0]) & (there[2] >= 0) & (there[2] < sides[1])
    winner = tl.load(winners[0] + offset(there, channel, winners[1]), inside, 255).to(tl.int32)
    # Loaded whether it won or not: a mask that depends on data would break up the 16-byte loads.
    return accumulator(tl.load(dy[0] + offset(there, channel, dy[1]), inside, 0.0)), winner


@triton.jit
def windows_of(dy, winners, sides, at, channel, inside, WINDOW: tl.constexpr):
    """``window_at`` of the windows that reach a tile of patches, in ascending order."""
    REACH_H: tl.constexpr = (WINDOW[0] - 1) * WINDOW[6] // WINDOW[2]
    REACH_W: tl.constexpr = (WINDOW[1] - 1) * WINDOW[7] // WINDOW[3]
    found = ()
    for i in tl.static_range(REACH_H + 1):
        for j in tl.static_range(REACH_W + 1):
            there = (at[0], at[1] - REACH_H + i, at[2] - REACH_W + j)
            found += (window_at(dy, winners, there, sides, channel, inside),)  # type: ignore[assignment]  # Triton's
    return found


@triton.jit
def unpool_patch(windows, DOWN: tl.constexpr, RIGHT: tl.constexpr, WINDOW: tl.constexpr):
    """The gradient of pixel (DOWN, RIGHT) of each patch: dy of the windows that it won, in ascending order."""
    REACH_H: tl.constexpr = (WINDOW[0] - 1) * WINDOW[6] // WINDOW[2]
    REACH_W: tl.constexpr = (WINDOW[1] - 1) * WINDOW[7] // WINDOW[3]
    total = tl.zeros(windows[0][0].shape, windows[0][0].dtype)
    for i in tl.static_range(REACH_H + 1):
        for j in tl.static_range(REACH_W + 1):
            down = DOWN + (REACH_H - i) * WINDOW[2]
            right = RIGHT + (REACH_W - j) * WINDOW[3]
            row = down // WINDOW[6]
            column = right // WINDOW[7]
            if row * WINDOW[6] == down and column * WINDOW[7] == right and row < WINDOW[0] and column < WINDOW[1]:
                dy, winner = windows[i * (REACH_W + 1) + j]
                total += tl.where(winner == row * WINDOW[1] + column, dy, 0.0)
    return total


@triton.jit
def unpool(dy, winners, sides, at, channel, inside, WINDOW: tl.constexpr):
    """The gradient of a tile of input pixels: dy of the windows that each of them won, in ascending order."""
    KERNEL_H: tl.constexpr = WINDOW[0]
    KERNEL_W: tl.constexpr = WINDOW[1]
    STRIDE_H: tl.constexpr = WINDOW[2]
    STRIDE_W: tl.constexpr = WINDOW[3]
    DILATION_H: tl.constexpr = WINDOW[6]
    DILATION_W: tl.constexpr = WINDOW[7]
    total = tl.zeros(inside.shape, tl.float64 if dy[0].dtype.element_ty == tl.float64 else tl.float32)
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
            reaches = inside & (down <= (KERNEL_H - 1) * DILATION_H) & (right <= (KERNEL_W - 1) * DILATION_W)
            reaches &= (down % DILATION_H == 0) & (right % DILATION_W == 0)
            value, winner = window_at(dy, winners, (image, oh, ow), sides, channel, reaches)
            total += tl.where(winner == down // DILATION_H * KERNEL_W + right // DILATION_W, value, 0.0)
    return total


@triton.jit
def pixel_of(at, DOWN: tl.constexpr, RIGHT: tl.constexpr, sides, inside, WINDOW: tl.constexpr, PATCH: tl.constexpr):
    """Pixel (DOWN, RIGHT) of a tile of patches ``at`` these (image, row, column), and which of them the input has."""
    row = at[1] * PATCH[0] - WINDOW[4] + DOWN
    column = at[2] * PATCH[1] - WINDOW[5] + RIGHT
    return (at[0], row, column), inside & (row >= 0) & (row < sides[0]) & (column >= 0) & (column < sides[1])


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
        None,
        at,
        channel,
        own,
        None,
        None,
        (KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, DILATION_H, DILATION_W),
    )
    out = offset(at, channel, (out_batch, out_channel, out_row, out_column))
    tl.store(y_ptr + out, value.to(y_ptr.dtype.element_ty), own)
    tl.store(winners_ptr + out, winner.to(tl.uint8), own)


@triton.jit
def _backward_kernel(
    dy_ptr, winners_ptr, dx_ptr, sums_ptr,
    patches, channels, patch_rows, patch_columns, height, width, out_height, out_width,
    dy_batch, dy_channel, dy_row, dy_column,
    out_batch, out_channel, out_row, out_column,
    x_batch, x_channel, x_row, x_column,
    SUMS: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    HALO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    WINDOW: tl.constexpr = (
        KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, DILATION_H, DILATION_W,
    )  # fmt: skip
    PATCH: tl.constexpr = (PATCH_H, PATCH_W)
    dy = (dy_ptr, (dy_batch, dy_channel, dy_row, dy_column))
    winners = (winners_ptr, (out_batch, out_channel, out_row, out_column))
    out_sides = (out_height, out_width)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(patches, BLOCK_P), tl.num_programs(0)):
        patch, channel, _, own = tile_at(block, patches, channels, HALO, BLOCK_P, BLOCK_C, WIDE)
        at = place(patch, patch_rows, patch_columns)
        at = (at[0], at[1] + PADDING_H // PATCH_H, at[2] + PADDING_W // PATCH_W)
        windows = windows_of(dy, winners, out_sides, at, channel, own, WINDOW) if PATCH_H * PATCH_W > 1 else None
        for i in tl.static_range(PATCH_H):
            for j in tl.static_range(PATCH_W):
                pixel, here = pixel_of(at, i, j, (height, width), own, WINDOW, PATCH)
                if windows is None:
                    dx = unpool(dy, winners, out_sides, pixel, channel, here, WINDOW)
                else:
                    dx = unpool_patch(windows, i, j, WINDOW)
                out = offset(pixel, channel, (x_batch, x_channel, x_row, x_column))
                tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), here)
                if SUMS:
                    sums += tl.where(here, dx, 0.0)
    if SUMS:
        store_sums(sums, sums_ptr, channels, HALO, BLOCK_C)


def window(
    kernel_size: list[int], stride: list[int], padding: list[int] | None = None, dilation: list[int] | None = None
) -> dict[str, int]:
    return sides(KERNEL=kernel_size, STRIDE=stride, PADDING=padding or [0, 0], DILATION=dilation or [1, 1])


def patches_of(taps: dict[str, int], height: int, width: int, roomy: bool) -> tuple[dict[str, int], tuple[int, int]]:
    """The sides of a patch in pixels, a stride each way, and how many patches an input has down and across.

    One pixel where patches would be large, where more than four windows reach one, and where the kernel has no room for
    them in registers.
    """
    strides = taps["STRIDE_H"], taps["STRIDE_W"]
    reach = max((taps[f"KERNEL_{side}"] - 1) * taps[f"DILATION_{side}"] // taps[f"STRIDE_{side}"] for side in "HW")
    down, right = (1, 1) if reach > 1 or math.prod(strides) > 4 or not roomy else strides

    def count(size: int, padding: int, patch: int) -> int:
        return (size - 1 + padding) // patch + 1 - padding // patch

    counts = count(height, taps["PADDING_H"], down), count(width, taps["PADDING_W"], right)
    return {"PATCH_H": down, "PATCH_W": right}, counts


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
    patch, (patch_rows, patch_columns) = patches_of(taps, height, width, dtype != torch.float64)
    # Of patches, each thread holds several pixels: as few values of each as where channels meet.
    blocks, channel_blocks = tile(channels, dx.stride(1), None if max(patch.values()) == 1 else 0, dtype)
    patches = batch * patch_rows * patch_columns
    programs = triton.cdiv(patches, blocks["BLOCK_P"])
    if sums:
        programs = sharing(programs, channel_blocks)
    partial = dx.new_empty((programs, channels) if sums else 0, dtype=accumulator_dtype(dtype))
    wrap_triton(_backward_kernel)[(programs, channel_blocks)](
        dy,
        winners,
        dx,
        partial,
        patches,
        channels,
        patch_rows,
        patch_columns,
        height,
        width,
        out_height,
        out_width,
        *dy.stride(),
        *winners.stride(),
        *dx.stride(),
        SUMS=sums,
        **taps,
        **patch,
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
