"""Bias, ReLU, max pooling and LRN in Triton: CaffeNet's order.

Forward is one kernel: x is read once, its pooled quarter is normalized in registers. Backward is LRN's kernel on that
quarter, whose gradient stays in the accumulator's precision, then the pooling's, which adds up the bias gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import pooled_size
from .._layout import empty_images
from .._triton import accumulator_dtype, is_wide, offset, place, sides, tile, tile_at, wrap_triton
from ..local_response_norm.triton_kernels import backward as normalization_backward
from ..local_response_norm.triton_kernels import constants, lrn
from ..relu_max_pool2d.triton_kernels import bias_of, pool, window
from ..relu_max_pool2d.triton_kernels import gradient as pooling_gradient


@triton.jit
def _forward_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    pooled_ptr,
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
        bias_of(bias_ptr, channel, channels) if BIAS else None,
        at,
        channel,
        inside,
        None,
        None,
        (KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, 0, 0, 1, 1),
    )
    y = lrn(value, BEFORE, AFTER, MEAN, BETA, K)
    out = offset(at, channel, (out_batch, out_channel, out_row, out_column))
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), own)
    tl.store(pooled_ptr + out, value.to(pooled_ptr.dtype.element_ty), own)
    tl.store(winners_ptr + out, winner.to(tl.uint8), own)


def forward(
    x: Tensor,
    bias: Tensor | None,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: list[int],
    stride: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    out_height, out_width = (pooled_size(x.shape[2 + i], kernel_size[i], stride[i], 0, 1, False) for i in (0, 1))
    y, pooled = (empty_images(x, out_height, out_width) for _ in range(2))
    winners = empty_images(x, out_height, out_width, torch.uint8)
    if y.numel() == 0:
        return y, pooled, winners
    lrn_constants = constants(lrn_size, alpha, beta, k, channels)
    blocks, channel_blocks = tile(channels, y.stride(1), lrn_constants["BEFORE"], x.dtype)
    pixels = batch * out_height * out_width
    wrap_triton(_forward_kernel)[(triton.cdiv(pixels, blocks["BLOCK_P"]), channel_blocks)](
        x,
        x if bias is None else bias.contiguous(),
        y,
        pooled,
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
    return y, pooled, winners


def backward(
    dy: Tensor,
    pooled: Tensor,
    winners: Tensor,
    height: int,
    width: int,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: list[int],
    stride: list[int],
) -> tuple[Tensor, Tensor]:
    wide = accumulator_dtype(pooled.dtype)
    dpooled = normalization_backward(dy, pooled, lrn_size, alpha, beta, k, wide)
    return pooling_gradient(dpooled, winners, height, width, window(kernel_size, stride), pooled.dtype, True)
