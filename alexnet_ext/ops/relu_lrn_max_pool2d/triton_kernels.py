"""Bias, ReLU, LRN and max pooling in one Triton kernel each way: the paper's order.

Forward holds a tile of pooled pixels with all their channels and normalizes each of the window's input pixels in
turn; x comes from memory once and its overlaps from cache. Backward holds a tile of input pixels, gathers the
pooling's gradient and goes through LRN and ReLU; each program adds up its part of the bias gradient.
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
from ..local_response_norm.triton_kernels import constants, lrn, lrn_backward
from ..relu_max_pool2d.triton_kernels import pool, unpool, with_bias


@triton.jit
def relu(z):
    return tl.where(z <= 0, 0.0, z)  # written so that NaN stays


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
def _forward_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    winners_ptr,
    pixels,
    channels,
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
    HALO: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    pixel, channel, inside, own = tile_at(tl.program_id(0), pixels, channels, HALO, BLOCK_P, BLOCK_C, WIDE)
    at = place(pixel, out_height, out_width)
    value, winner = pool(
        x_ptr,
        (x_batch, x_channel, x_row, x_column),
        None,
        bias_ptr,
        at,
        channel,
        channels,
        inside,
        relu_lrn,
        (BEFORE, AFTER, MEAN, BETA, K),
        (KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, 0, 0, 1, 1),
        BIAS,
    )
    out = offset(at, channel, (out_batch, out_channel, out_row, out_column))
    tl.store(y_ptr + out, value.to(y_ptr.dtype.element_ty), own)
    tl.store(winners_ptr + out, winner.to(tl.uint8), own)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
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
    x_batch,
    x_channel,
    x_row,
    x_column,
    out_batch,
    out_channel,
    out_row,
    out_column,
    dx_batch,
    dx_channel,
    dx_row,
    dx_column,
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
    HALO: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    dy_strides = (dy_batch, dy_channel, dy_row, dy_column)
    out_strides = (out_batch, out_channel, out_row, out_column)
    WINDOW: tl.constexpr = (KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, 0, 0, 1, 1)
    sums = tl.zeros([1, BLOCK_C], tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(pixels, BLOCK_P), tl.num_programs(0)):
        pixel, channel, inside, own = tile_at(block, pixels, channels, HALO, BLOCK_P, BLOCK_C, WIDE)
        at = place(pixel, height, width)
        dnorm = unpool(dy_ptr, dy_strides, winners_ptr, out_strides, out_height, out_width, at, channel, inside, WINDOW)
        x = tl.load(x_ptr + offset(at, channel, (x_batch, x_channel, x_row, x_column)), inside, 0.0)
        z = with_bias(x, bias_ptr, channel, channels, BIAS)
        dx = relu_lrn_backward(dnorm, z, inside, own, (BEFORE, AFTER, MEAN, BETA, K))
        out = offset(at, channel, (dx_batch, dx_channel, dx_row, dx_column))
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), own)
        sums += tl.sum(dx, 0, keep_dims=True)
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
    pixels = batch * out_height * out_width
    wrap_triton(_forward_kernel)[(triton.cdiv(pixels, blocks["BLOCK_P"]), channel_blocks)](
        x,
        x if bias is None else bias.contiguous(),
        y,
        winners,
        pixels,
        channels,
        out_height,
        out_width,
        *x.stride(),
        *y.stride(),
        BIAS=bias is not None,
        **lrn_constants,
        **sides(KERNEL=kernel_size, STRIDE=stride),
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
    pixels = batch * height * width
    programs = min(triton.cdiv(pixels, blocks["BLOCK_P"]), PARTIAL_SUMS)
    partial = dx.new_empty((programs, channels), dtype=accumulator_dtype(x.dtype))
    wrap_triton(_backward_kernel)[(programs, channel_blocks)](
        dy,
        x,
        x if bias is None else bias.contiguous(),
        winners,
        dx,
        partial,
        pixels,
        channels,
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
        **blocks,
        WIDE=is_wide(dy, x, winners, dx),
    )
    return dx, total(partial, x.dtype)
