"""Bias, ReLU, LRN and max pooling in one Triton kernel each way: the paper's order.

Forward holds a tile of pooled pixels with all their channels and normalizes each of the window's input pixels in
turn; x comes from memory once and its overlaps from cache. It walks down a few rows, so that the row which two windows
share is normalized once. Backward holds a tile of input pixels, or of patches of them, gathers the pooling's gradient
and goes through LRN and ReLU; each program adds up its part of the bias gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import pooled_size
from .._layout import empty_images
from .._triton import (
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
from ..local_response_norm.triton_kernels import constants, lrn, lrn_backward
from ..relu_max_pool2d.triton_kernels import (
    bias_of,
    patches_of,
    pixel_of,
    pool,
    take,
    unpool,
    unpool_patch,
    window,
    windows_of,
    with_bias,
)


@triton.jit
def relu(z):
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_lrn(z, LRN: tl.constexpr):
    return lrn(relu(z), LRN[0], LRN[1], LRN[2], LRN[3], LRN[4])


@triton.jit
def relu_lrn_backward(dy, z, inside, own, LRN: tl.constexpr):
    """dz of a tile; 0 where z is another program's."""
    active = relu(z)
    dz = lrn_backward(dy, active, inside, LRN[0], LRN[1], LRN[2], LRN[3], LRN[4])
    return tl.where((active <= 0) | ~own, 0.0, dz)


@triton.jit
def pool_row(x_ptr, strides, bias, at, channel, inside, LRN: tl.constexpr, WINDOW: tl.constexpr):
    """(values, taps) of a tile of windows' rows that begin ``at`` these (image, row, column) of the input."""
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    value, tap = tl.full(inside.shape, float("-inf"), ACC), tl.full(inside.shape, 0, tl.int32)
    for s in tl.static_range(WINDOW[1]):
        x = tl.load(x_ptr + offset((at[0], at[1], at[2] + s), channel, strides), inside, 0.0)
        value, tap = take(value, tap, relu_lrn(with_bias(x, bias), LRN), s)
    return value, tap


@triton.jit
def store_pooled(y_ptr, winners_ptr, value, winner, out, own):
    tl.store(y_ptr + out, value.to(y_ptr.dtype.element_ty), own)
    tl.store(winners_ptr + out, winner.to(tl.uint8), own)


@triton.jit
def _forward_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    winners_ptr,
    runs,
    channels,
    run_rows,
    run_length,
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
    BIAS: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    MEAN: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    WALK: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    LRN: tl.constexpr = (BEFORE, AFTER, MEAN, BETA, K)
    WINDOW: tl.constexpr = (KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, 0, 0, 1, 1)
    x_strides = (x_batch, x_channel, x_row, x_column)
    out_strides = (out_batch, out_channel, out_row, out_column)
    run, channel, inside, own = tile_at(tl.program_id(0), runs, channels, HALO, BLOCK_P, BLOCK_C, WIDE)
    image, first, column = place(run, run_rows, out_width)
    bias = bias_of(bias_ptr, channel, channels) if BIAS else None
    if not WALK:
        at = (image, first, column)
        value, winner = pool(x_ptr, x_strides, None, bias, at, channel, inside, relu_lrn, LRN, WINDOW)
        store_pooled(y_ptr, winners_ptr, value, winner, offset(at, channel, out_strides), own)
    else:
        at = (image, first * run_length * STRIDE_H, column * STRIDE_W)
        last, last_tap = pool_row(x_ptr, x_strides, bias, at, channel, inside, LRN, WINDOW)
        for i in range(run_length):
            row = first * run_length + i
            here = row < out_height
            value, winner = last, last_tap
            for r in tl.static_range(1, KERNEL_H):
                at = (image, row * STRIDE_H + r, column * STRIDE_W)
                last, last_tap = pool_row(x_ptr, x_strides, bias, at, channel, inside & here, LRN, WINDOW)
                value, winner = take(value, winner, last, r * KERNEL_W + last_tap)
            out = offset((image, row, column), channel, out_strides)
            store_pooled(y_ptr, winners_ptr, value, winner, out, own & here)


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, bias_ptr, winners_ptr, dx_ptr, sums_ptr,
    patches, channels, patch_rows, patch_columns, height, width, out_height, out_width,
    dy_batch, dy_channel, dy_row, dy_column,
    x_batch, x_channel, x_row, x_column,
    out_batch, out_channel, out_row, out_column,
    dx_batch, dx_channel, dx_row, dx_column,
    BIAS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, MEAN: tl.constexpr, BETA: tl.constexpr,
    K: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    HALO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    WINDOW: tl.constexpr = (KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, 0, 0, 1, 1)
    PATCH: tl.constexpr = (PATCH_H, PATCH_W)
    dy = (dy_ptr, (dy_batch, dy_channel, dy_row, dy_column))
    winners = (winners_ptr, (out_batch, out_channel, out_row, out_column))
    out_sides = (out_height, out_width)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(patches, BLOCK_P), tl.num_programs(0)):
        patch, channel, inside, own = tile_at(block, patches, channels, HALO, BLOCK_P, BLOCK_C, WIDE)
        at = place(patch, patch_rows, patch_columns)
        windows = windows_of(dy, winners, out_sides, at, channel, inside, WINDOW) if PATCH_H * PATCH_W > 1 else None
        for i in tl.static_range(PATCH_H):
            for j in tl.static_range(PATCH_W):
                pixel, here = pixel_of(at, i, j, (height, width), inside, WINDOW, PATCH)
                if windows is None:
                    dnorm = unpool(dy, winners, out_sides, pixel, channel, here, WINDOW)
                else:
                    dnorm = unpool_patch(windows, i, j, WINDOW)
                x = tl.load(x_ptr + offset(pixel, channel, (x_batch, x_channel, x_row, x_column)), here, 0.0)
                # Loaded again for each pixel: kept, it takes registers that compute capability 10.0 does not have.
                bias = bias_of(bias_ptr, channel, channels) if BIAS else None
                dx = relu_lrn_backward(dnorm, with_bias(x, bias), here, here & own, (BEFORE, AFTER, MEAN, BETA, K))
                out = offset(pixel, channel, (dx_batch, dx_channel, dx_row, dx_column))
                tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), here & own)
                sums += dx
    store_sums(sums, sums_ptr, channels, HALO, BLOCK_C)


def forward(
    x: Tensor,
    bias: Tensor | None,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: list[int],
    stride: list[int],
) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[:2]
    out_height, out_width = (pooled_size(x.shape[2 + i], kernel_size[i], stride[i], 0, 1, False) for i in (0, 1))
    y = empty_images(x, out_height, out_width)
    winners = empty_images(x, out_height, out_width, torch.uint8)
    if y.numel() == 0:
        return y, winners
    lrn_constants = constants(lrn_size, alpha, beta, k, channels)
    blocks, channel_blocks = tile(channels, y.stride(1), lrn_constants["BEFORE"], x.dtype)
    # Small windows that share a row with the next one below are walked down, seven at most: it is normalized once.
    # Where a thread's values have an address each, no registers are left for that.
    dense = y.stride(1) == 1 and channels % 8 == 0
    walk = dense and kernel_size[0] == stride[0] + 1 and max(kernel_size) <= 3
    run_rows = triton.cdiv(out_height, 7 if walk else 1)
    runs = batch * run_rows * out_width
    wrap_triton(_forward_kernel)[(triton.cdiv(runs, blocks["BLOCK_P"]), channel_blocks)](
        x,
        x if bias is None else bias.contiguous(),
        y,
        winners,
        runs,
        channels,
        run_rows,
        triton.cdiv(out_height, run_rows),
        out_height,
        out_width,
        *x.stride(),
        *y.stride(),
        BIAS=bias is not None,
        **lrn_constants,
        **sides(KERNEL=kernel_size, STRIDE=stride),
        WALK=walk,
        **blocks,
        WIDE=is_wide(x, y),
    )
    return y, winners


def backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    winners: Tensor,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: list[int],
    stride: list[int],
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    dx = empty_images(x, height, width)
    if dx.numel() == 0:
        return dx, dx.new_zeros(channels)
    lrn_constants = constants(lrn_size, alpha, beta, k, channels)
    blocks, channel_blocks = tile(channels, dx.stride(1), lrn_constants["BEFORE"] + lrn_constants["AFTER"], x.dtype)
    roomy = x.dtype != torch.float64 and blocks["HALO"] == 0
    patch, (patch_rows, patch_columns) = patches_of(window(kernel_size, stride), height, width, roomy)
    patches = batch * patch_rows * patch_columns
    programs = sharing(triton.cdiv(patches, blocks["BLOCK_P"]), channel_blocks)
    partial = dx.new_empty((programs, channels), dtype=accumulator_dtype(x.dtype))
    wrap_triton(_backward_kernel)[(programs, channel_blocks)](
        dy,
        x,
        x if bias is None else bias.contiguous(),
        winners,
        dx,
        partial,
        patches,
        channels,
        patch_rows,
        patch_columns,
        height,
        width,
        *winners.shape[2:],
        *dy.stride(),
        *x.stride(),
        *winners.stride(),
        *dx.stride(),
        BIAS=bias is not None,
        **lrn_constants,
        **sides(KERNEL=kernel_size, STRIDE=stride),
        **patch,
        **blocks,
        WIDE=is_wide(dy, x, winners, dx),
    )
    return dx, total(partial, x.dtype)
