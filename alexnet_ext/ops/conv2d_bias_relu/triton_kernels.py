"""Convolution as an implicit matrix product in Triton: channels-last, groups as a grid axis.

Rows are output pixels, columns a group's output channels, and the sum runs over K = taps x channels in one flat range,
so that 48 channels a group waste nothing of a power-of-two block (48 x 25 = 1200 = 75 x 16). Three directions:

- forward: bias and ReLU in the epilogue, y written once;
- the input's gradient: the same kernel over the masked gradient, with flipped weights and, where the convolution has a
  stride, with the gradient spread out by it;
- the weight's gradient: rows are a group's output channels, columns taps x input channels, and the sum runs over the
  pixels. It is split into parts, which a second pass adds up in order: no atomics.

The ReLU mask is applied to dy in a pass of its own, which also brings any strides of dy to channels-last and adds up
the bias gradient. It moves three times the bytes of y; masking inside both products would read y and dy once a tap.

A first layer (few channels, a stride) is rewritten exactly by space-to-depth: stride x stride x 3 channels, stride 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import convolved_format, new_images
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
from . import configs, shared
from .shared import Convolution, Direction, channels_last, empty_result, precision, zero_gradients
from .space_to_depth import rewritten


@triton.jit
def moved(x_ptr, corner, strides, size, k, inside, TAPS: tl.constexpr):
    """x[pixel moved by tap, group, c] for a block of pixels and of k = (tap, c); 0 outside of the image.

    ``corner``: each pixel's (offset, top, left). The offset is that of its image and group or, where nothing is
    spread, of its window.
    """
    C_IN: tl.constexpr = TAPS[0]
    KERNEL_W: tl.constexpr = TAPS[1]
    SPREAD_H: tl.constexpr = TAPS[2]
    SPREAD_W: tl.constexpr = TAPS[3]
    begin, top, left = corner
    tap, c = k // C_IN, k % C_IN
    down, right = tap // KERNEL_W * TAPS[6], tap % KERNEL_W * TAPS[7]
    if SPREAD_H == 1 and SPREAD_W == 1:
        at = begin[:, None] + (down * strides[0] + right * strides[1] + c)[None, :]
        if TAPS[4] != 0:
            row = top[:, None] + down[None, :]
            inside &= (row >= 0) & (row < size[0])
        if TAPS[5] != 0:
            column = left[:, None] + right[None, :]
            inside &= (column >= 0) & (column < size[1])
    else:
        row, column = top[:, None] + down[None, :], left[:, None] + right[None, :]
        inside &= (row >= 0) & (row % SPREAD_H == 0) & (row // SPREAD_H < size[0])
        inside &= (column >= 0) & (column % SPREAD_W == 0) & (column // SPREAD_W < size[1])
        at = begin[:, None] + row // SPREAD_H * strides[0] + column // SPREAD_W * strides[1] + c[None, :]
    return tl.load(x_ptr + at, inside, 0.0)


@triton.jit
def products(
    x_ptr,
    corner,
    strides,
    size,
    weights,
    there,
    TAPS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[pixels, channels]: sum over k of x[pixel moved by tap, group, c] * weight[group, n, k].

    ``corner``: each pixel's (offset of its image and group, top, left); ``there``: which (pixels, channels) exist.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    begin, top, left = corner
    if TAPS[2] == 1 and TAPS[3] == 1:
        begin += top * strides[0] + left * strides[1]
    sums = tl.zeros([there[0].shape[0], there[1].shape[0]], ACC)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = moved(x_ptr, (begin, top, left), strides, size, k, there[0][:, None] & (k < K)[None, :], TAPS)
        b = tl.load(weights + k[:, None], (k < K)[:, None] & there[1][None, :], 0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=ACC)
    return sums


@triton.jit
def with_bias_and_relu(sums, bias_ptr, n, C_OUT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr):
    if BIAS:
        sums += accumulator(tl.load(bias_ptr + n, n < C_OUT, 0.0))[None, :]
    if RELU:
        sums = tl.where(sums <= 0, 0.0, sums)  # written so that NaN stays
    return sums


@triton.jit
def _product_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    pixels,
    height,
    width,
    out_height,
    out_width,
    x_batch,
    x_row,
    x_column,
    y_batch,
    y_channel,
    y_row,
    y_column,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    SPREAD_H: tl.constexpr,
    SPREAD_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[pixel, group, n] = sum over k = (tap, c) of x[pixel moved by tap, group, c] * weight[group, n, k].

    x: channels-last; weight: [groups * C_OUT, taps, C_IN]; y: any strides. With SPREAD above 1, x represents an
    image in which SPREAD - 1 zeros follow each of its rows (columns). A program has one block of y or,
    where PERSISTENT, every num_programs-th, so that the next one's loads are in flight while it stores.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    columns: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    K: tl.constexpr = KERNEL_H * KERNEL_W * C_IN
    TAPS: tl.constexpr = (C_IN, KERNEL_W, SPREAD_H, SPREAD_W, PADDING_H, PADDING_W, DILATION_H, DILATION_W)
    first, group = tl.program_id(0).to(index), tl.program_id(1)
    end = (pixels + BLOCK_M - 1) // BLOCK_M * columns if PERSISTENT else first + 1
    for block in tl.range(first, end, tl.num_programs(0) if PERSISTENT else 1, flatten=PERSISTENT):
        # Neighbouring programs share pixels: x is the larger operand.
        pixel = block // columns * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.cast(block % columns, tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
        image, out_row, out_column = place(pixel, out_height, out_width)
        corner = image * x_batch + group * C_IN, out_row * STRIDE_H - PADDING_H, out_column * STRIDE_W - PADDING_W
        weights = weight_ptr + (group * C_OUT + n).to(tl.int64)[None, :] * K
        there, size = (pixel < pixels, n < C_OUT), (height, width)
        sums = products(x_ptr, corner, (x_row, x_column), size, weights, there, TAPS, K, BLOCK_K, PRECISION)
        sums = with_bias_and_relu(sums, bias_ptr + group * C_OUT, n, C_OUT, BIAS, RELU)
        at = image * y_batch + out_row * y_row + out_column * y_column
        at = at[:, None] + ((group * C_OUT + n) * y_channel)[None, :]
        tl.store(y_ptr + at, sums.to(y_ptr.dtype.element_ty), there[0][:, None] & there[1][None, :])


@triton.jit
def _weight_kernel(
    dz_ptr,
    x_ptr,
    partial_ptr,
    pixels,
    height,
    width,
    out_height,
    out_width,
    x_batch,
    x_row,
    x_column,
    part_pixels,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[part, group, m, k = (tap, c)] = sum over the part's pixels of dz[pixel, group, m] * x[..., group, c]."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    K: tl.constexpr = KERNEL_H * KERNEL_W * C_IN
    columns: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    block, part, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = block // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    k = block % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    tap, c = k // C_IN, k % C_IN
    down, right = (tap // KERNEL_W * DILATION_H - PADDING_H), (tap % KERNEL_W * DILATION_W - PADDING_W)
    ACC: tl.constexpr = tl.float64 if partial_ptr.dtype.element_ty == tl.float64 else tl.float32
    sums = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    first = part.to(index) * part_pixels
    for start in range(0, part_pixels, BLOCK_K):
        pixel = first + start + tl.arange(0, BLOCK_K)
        there = (pixel < pixels) & (start + tl.arange(0, BLOCK_K) < part_pixels)
        at = pixel[:, None] * (GROUPS * C_OUT) + (group * C_OUT + m)[None, :]
        a = tl.load(dz_ptr + at, there[:, None] & (m < C_OUT)[None, :], 0.0)
        row = (pixel // out_width % out_height * STRIDE_H)[:, None] + down[None, :]
        column = (pixel % out_width * STRIDE_W)[:, None] + right[None, :]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & there[:, None] & (k < K)[None, :]
        at = (pixel // (out_height * out_width) * x_batch + group * C_IN)[:, None] + c[None, :]
        b = tl.load(x_ptr + (at + row * x_row + column * x_column), inside, 0.0)
        sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION, out_dtype=ACC)
    at = (part * GROUPS + group).to(tl.int64) * (C_OUT * K) + m[:, None] * K + k[None, :]
    tl.store(partial_ptr + at, sums, (m < C_OUT)[:, None] & (k < K)[None, :])


@triton.jit
def _mask_kernel(
    dy_ptr,
    y_ptr,
    dz_ptr,
    sums_ptr,
    pixels,
    channels,
    height,
    width,
    dy_batch,
    dy_channel,
    dy_row,
    dy_column,
    y_batch,
    y_channel,
    y_row,
    y_column,
    HALO: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dz = dy where y is positive or NaN, else 0, channels-last, and its sums by channel."""
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float64 if dy_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(pixels, BLOCK_P), tl.num_programs(0)):
        pixel, channel, inside, _ = tile_at(block, pixels, channels, HALO, BLOCK_P, BLOCK_C, WIDE)
        at = place(pixel, height, width)
        dz = accumulator(tl.load(dy_ptr + offset(at, channel, (dy_batch, dy_channel, dy_row, dy_column)), inside, 0.0))
        y = tl.load(y_ptr + offset(at, channel, (y_batch, y_channel, y_row, y_column)), inside, 0.0)
        dz = tl.where(accumulator(y) <= 0, 0.0, dz)
        tl.store(dz_ptr + pixel * channels + channel, dz.to(dz_ptr.dtype.element_ty), inside)
        sums += dz
    store_sums(sums, sums_ptr, channels, HALO, BLOCK_C)


_product_tuned = triton.autotune(configs.CANDIDATES, key=["pixels", "C_IN", "C_OUT"])(_product_kernel)
_weight_tuned = triton.autotune(configs.CANDIDATES, key=["pixels", "C_IN", "C_OUT"])(_weight_kernel)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    p: Convolution,
    spread: list[int],
    relu: bool,
    persistent: bool = False,
) -> None:
    """Write ``y`` = convolution of x, spread out, with weight, plus bias, through ReLU."""
    x, weight = channels_last(x), channels_last(weight)
    c_in, c_out = int(weight.shape[1]), int(weight.shape[0]) // p.groups
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    given = (
        x,
        weight,
        x if bias is None else bias.contiguous(),
        y,
        pixels,
        *x.shape[2:],
        *y.shape[2:],
        x.stride(0),
        x.stride(2),
        x.stride(3),
        *y.stride(),
    )
    constants: dict[str, Any] = {
        "C_IN": c_in,
        "C_OUT": c_out,
        **sides(KERNEL=list(weight.shape[2:]), STRIDE=p.stride, SPREAD=spread, PADDING=p.padding, DILATION=p.dilation),
        "BIAS": bias is not None,
        "RELU": relu,
        "PRECISION": precision(x.dtype),
        "WIDE": is_wide(x, y),
        "PERSISTENT": persistent,
    }

    def grid(blocks: dict[str, int]) -> tuple[int, int]:
        tiles = triton.cdiv(pixels, blocks["BLOCK_M"]) * triton.cdiv(c_out, blocks["BLOCK_N"])
        return min(tiles, triton.cdiv(configs.resident(x), p.groups)) if persistent else tiles, p.groups

    blocks = configs.known("persistent" if persistent else "product", x, constants["PRECISION"], c_out)
    if blocks is None:
        wrap_triton(_product_tuned)[grid](*given, **constants)
    else:
        wrap_triton(_product_kernel)[grid(blocks)](*given, **constants, **blocks)


def weight_gradient(dz: Tensor, x: Tensor, shape: list[int], p: Convolution) -> Tensor:
    """dweight (C_out, C_in / groups, height, width), in the accumulator's dtype; dz is channels-last."""
    x = channels_last(x)
    c_out, c_in, pixels = int(shape[0]) // p.groups, int(shape[1]), dz.shape[0] * dz.shape[2] * dz.shape[3]
    k = c_in * int(shape[2]) * int(shape[3])
    parts, part_pixels = split(pixels, c_out, k, p.groups)
    partial = dz.new_empty((parts, p.groups * c_out, shape[2], shape[3], c_in), dtype=accumulator_dtype(dz.dtype))
    given = (
        dz,
        x,
        partial,
        pixels,
        *x.shape[2:],
        *dz.shape[2:],
        x.stride(0),
        x.stride(2),
        x.stride(3),
        part_pixels,
    )
    constants: dict[str, Any] = {
        "C_IN": c_in,
        "C_OUT": c_out,
        "GROUPS": p.groups,
        **sides(KERNEL=shape[2:], STRIDE=p.stride, PADDING=p.padding, DILATION=p.dilation),
        "PRECISION": precision(x.dtype),
        "WIDE": is_wide(x, dz),
    }

    def grid(blocks: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(c_out, blocks["BLOCK_M"]) * triton.cdiv(k, blocks["BLOCK_N"]), parts, p.groups

    blocks = configs.known("weight", x, constants["PRECISION"], k)
    if blocks is None:
        wrap_triton(_weight_tuned)[grid](*given, **constants)
    else:
        wrap_triton(_weight_kernel)[grid(blocks)](*given, **constants, **blocks)
    return partial.sum(0).permute(0, 3, 1, 2)


def split(pixels: int, c_out: int, k: int, groups: int) -> tuple[int, int]:
    """(parts, pixels of each): about 512 programs of 128 x 128 in all, a part of 1024 pixels at least.

    It depends on the shape alone, so that the order of the sum depends neither on the device nor on its configuration.
    """
    tiles = triton.cdiv(c_out, 128) * triton.cdiv(k, 128) * groups
    parts = max(1, min(triton.cdiv(512, tiles), triton.cdiv(pixels, 1024)))
    part_pixels = triton.cdiv(pixels, parts)
    return triton.cdiv(pixels, part_pixels), part_pixels


def before_relu(dy: Tensor, y: Tensor, for_bias: bool, relu: bool) -> tuple[Tensor, Tensor]:
    """``shared.before_relu`` in one pass; where there is nothing to mask, the same."""
    if not relu:
        return shared.before_relu(dy, y, for_bias, relu)
    batch, channels, height, width = y.shape
    dz = new_images(dy, y.shape, torch.channels_last)
    blocks, channel_blocks = tile(channels, 1, None, dy.dtype)
    pixels = batch * height * width
    programs = sharing(triton.cdiv(pixels, blocks["BLOCK_P"]), channel_blocks)
    partial = dz.new_empty((programs, channels), dtype=accumulator_dtype(dy.dtype))
    wrap_triton(_mask_kernel)[(programs, channel_blocks)](
        dy,
        y,
        dz,
        partial,
        pixels,
        channels,
        height,
        width,
        *dy.stride(),
        *y.stride(),
        **blocks,
        WIDE=is_wide(dy, y, dz),
    )
    return dz, total(partial, dy.dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool = True,
    persistent: bool = False,
) -> Tensor:
    p = Convolution(stride, padding, dilation, groups)
    y = empty_result(x, weight, p)
    if y.numel() == 0:
        return y
    _, x, weight, p = rewritten(x, weight, p)
    product(x, weight, bias, y, p, [1, 1], relu, persistent)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_mask: list[bool],
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    for_x, for_weight, for_bias = output_mask
    if y.numel() == 0:
        return zero_gradients(x, weight, output_mask)
    p = Convolution(stride, padding, dilation, groups)
    dz, dbias = before_relu(dy, y, for_bias, relu)
    return (
        gradient(dz, x, weight, p, Direction.INPUT) if for_x else x.new_empty(0),
        gradient(dz, x, weight, p, Direction.WEIGHT) if for_weight else x.new_empty(0),
        dbias if for_bias else x.new_empty(0),
    )


def gradient(dz: Tensor, x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> Tensor:
    """The gradient of x or weight; ``dz`` is the gradient before the ReLU."""
    result = new_images(x, (x.shape, weight.shape)[direction], convolved_format(x, weight))
    rewrite, x, weight, p = rewritten(x, weight, p)
    if direction == Direction.WEIGHT:
        found = weight_gradient(dz, x, list(weight.shape), p)
        return result.copy_(found if rewrite is None else rewrite.back(found, direction))
    found = result if rewrite is None else new_images(x, x.shape, torch.channels_last)
    input_gradient(dz, weight, found, p)
    return result if rewrite is None else result.copy_(rewrite.back(found, direction))


def input_gradient(dz: Tensor, weight: Tensor, dx: Tensor, p: Convolution) -> None:
    """Write ``dx``: dz, spread out by the stride, convolved with the flipped weights of each group."""
    flipped = weight.unflatten(0, (p.groups, -1)).transpose(1, 2).flip(3, 4).flatten(0, 1)
    around = [p.dilation[i] * (weight.shape[2 + i] - 1) - p.padding[i] for i in (0, 1)]
    product(dz, flipped, None, dx, Convolution([1, 1], around, p.dilation, p.groups), p.stride, False)
