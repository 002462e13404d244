"""Augmentation in Triton: a program writes a run of y in memory order, 16 bytes a thread, and gathers its bytes.

Bytes: each image's crop once, y once. A run ends in the image that it begins in, or in the next: what is drawn for an
image is read once a program, not once a value. At a depth of 4 eight values in a row are of one colour: what they share
is computed once for them. Of an image with subsampled chroma a value gathers a Y, a U and a V.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import sides
from .._triton import is_wide, power_of_two, wrap_triton
from . import reference
from .reference import empty_result

BLOCK = 4096
VECTOR = 8  # values of 16 bytes in bf16
OF_U, OF_V = tl.constexpr(reference.OF_U), tl.constexpr(reference.OF_V)


@triton.jit
def _crop(
    offsets_ptr,
    flips_ptr,
    shifts_ptr,
    image,
    height,
    width,
    image_step,
    row_step,
    column_step,
    SIZE: tl.constexpr,
    ACC: tl.constexpr,
    index: tl.constexpr,
):
    """(where an image's crop begins, from column to column, shift of each colour, top, first column, its direction)."""
    # A crop that reaches out of its image is moved inside: nobody has looked at the offsets.
    top = tl.minimum(tl.maximum(tl.load(offsets_ptr + image * 2), 0), height - SIZE).to(index)
    left = tl.minimum(tl.maximum(tl.load(offsets_ptr + image * 2 + 1), 0), width - SIZE).to(index)
    flip = tl.load(flips_ptr + image) != 0
    left += tl.where(flip, SIZE - 1, 0)
    begin = image.to(index) * image_step + top * row_step + left * column_step
    red, green, blue = (
        tl.load(shifts_ptr + image * 3).to(ACC),
        tl.load(shifts_ptr + image * 3 + 1).to(ACC),
        tl.load(shifts_ptr + image * 3 + 2).to(ACC),
    )
    return begin, tl.where(flip, -column_step, column_step), red, green, blue, top, left, tl.where(flip, -1, 1)


@triton.jit
def _forward_kernel(
    images_ptr, offsets_ptr, flips_ptr, shifts_ptr, y_ptr,
    n, batch, height, width,
    image_step, row_step, column_step, colour_step,
    SIZE: tl.constexpr, B: tl.constexpr, SUBSAMPLED: tl.constexpr,
    MEAN_R: tl.constexpr, MEAN_G: tl.constexpr, MEAN_B: tl.constexpr,
    SCALE_R: tl.constexpr, SCALE_G: tl.constexpr, SCALE_B: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    ACC: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    SIDE: tl.constexpr = (SIZE + B - 1) // B
    LENGTH: tl.constexpr = 3 * B * B * SIDE * SIDE
    start = tl.program_id(0).to(index) * BLOCK
    image = (start // LENGTH).to(tl.int32)
    begin, step, red, green, blue, top, left, way = _crop(
        offsets_ptr, flips_ptr, shifts_ptr, image, height, width, image_step, row_step, column_step, SIZE, ACC, index
    )
    other = tl.minimum(image + 1, batch - 1)
    other_begin, other_step, other_red, other_green, other_blue, other_top, other_left, other_way = _crop(
        offsets_ptr, flips_ptr, shifts_ptr, other, height, width, image_step, row_step, column_step, SIZE, ACC, index
    )
    within: tl.constexpr = tl.int64 if LENGTH >= 2**30 else tl.int32
    # Vectors of values. At a depth of 4 one is two rows of a cell in one colour: its first value's place in memory,
    # (SIDE, SIDE, 3 * B * B), is found, and the others' rows and columns are from there.
    first, rest = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR, tl.arange(0, VECTOR)[None, :]
    if B == 1:
        first, rest = first + rest, tl.zeros([1, 1], tl.int32)
    at = (start - image.to(index) * LENGTH).to(within) + first
    later = at >= LENGTH
    at -= tl.where(later, LENGTH, 0)
    inner, cell = at % (3 * B * B), at // (3 * B * B)
    colour, tap = inner // (B * B), inner % (B * B)
    row, column = cell // SIDE * B + tap // B, cell % SIDE * B + tap % B
    inside = (row + rest // B < SIZE) & (column + rest % B < SIZE)
    # Not said by the image, whose end may fall anywhere: stores stay whole where 16 bytes divide y.
    own = start + first < n
    step = tl.where(later, other_step, step)
    source = tl.where(later, other_begin, begin) + colour.to(index) * colour_step
    source += row.to(index) * row_step + column.to(index) * step
    source += (rest // B).to(index) * row_step + (rest % B).to(index) * step
    value = tl.load(images_ptr + source, own & inside, 0)
    is_red, is_green = colour == 0, colour == 1
    if SUBSAMPLED:
        down = tl.where(later, other_top, top) + row + rest // B
        across = tl.where(later, other_left, left) + (column + rest % B) * tl.where(later, other_way, way)
        chroma_ptr = images_ptr + (image.to(index) + tl.where(later, 1, 0)) * image_step
        add = _chroma(chroma_ptr, down, across, own & inside, is_red, is_green, height, width, row_step, column_step)
        value = tl.minimum(tl.maximum(value.to(tl.int32) + add, 0), 255)
    value = value.to(ACC)
    shift = tl.where(
        is_red,
        tl.where(later, other_red, red),
        tl.where(is_green, tl.where(later, other_green, green), tl.where(later, other_blue, blue)),
    )
    value += shift - _of_colour(is_red, is_green, MEAN_R, MEAN_G, MEAN_B, ACC)
    value *= _of_colour(is_red, is_green, SCALE_R, SCALE_G, SCALE_B, ACC)
    if B != 1:
        value = tl.where(inside, value, 0.0)
    tl.store(y_ptr + start + first + rest, value.to(y_ptr.dtype.element_ty), own)


@triton.jit
def _chroma(image_ptr, row, column, own, is_red, is_green, height, width, row_step, column_step):
    """What U and V of pixels add to their Y (csrc/augment/augment.h has the layout and the formula)."""
    line, place = row // 2, column // 2
    other = line + height // 2
    u = (height + line // 2) * row_step + (line % 2 * (width // 2) + place) * column_step
    v = (height + other // 2) * row_step + (other % 2 * (width // 2) + place) * column_step
    of_u = _of_colour(is_red, is_green, OF_U[0], OF_U[1], OF_U[2], tl.int32)
    of_v = _of_colour(is_red, is_green, OF_V[0], OF_V[1], OF_V[2], tl.int32)
    add = (tl.load(image_ptr + u, own, 0).to(tl.int32) - 128) * of_u
    add += (tl.load(image_ptr + v, own, 0).to(tl.int32) - 128) * of_v
    return (add + 32768) >> 16


@triton.jit
def _of_colour(
    is_red,
    is_green,
    RED: tl.constexpr,
    GREEN: tl.constexpr,
    BLUE: tl.constexpr,
    ACC: tl.constexpr,
):
    # tl.full: anything else makes a constant fp32 first.
    rest = tl.where(is_green, tl.full(is_green.shape, GREEN, ACC), tl.full(is_green.shape, BLUE, ACC))
    return tl.where(is_red, tl.full(is_red.shape, RED, ACC), rest)


def forward(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    shifts: Tensor,
    size: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    space_to_depth: int,
) -> Tensor:
    y = empty_result(images, size, dtype, space_to_depth)
    if y.numel() == 0:
        return y
    batch, (height, width) = images.shape[0], sides(images)
    subsampled = images.dim() == 3
    length = y[0].numel()
    # U and V take registers: with 4,096 values a block the kernel for bf16 and depth spills (compute capability 9.0).
    block = min(BLOCK // 2 if subsampled else BLOCK, power_of_two(length + 1) // 2)
    wrap_triton(_forward_kernel)[(triton.cdiv(y.numel(), block),)](
        images,
        offsets.contiguous(),
        flips.contiguous().view(torch.uint8),
        shifts.contiguous(),
        y,
        y.numel(),
        batch,
        height,
        width,
        *images.stride(),
        *([0] if subsampled else []),  # no step from colour to colour
        SIZE=size,
        B=space_to_depth,
        SUBSAMPLED=subsampled,
        **{f"MEAN_{colour}": 255 * mean[i] for i, colour in enumerate("RGB")},
        **{f"SCALE_{colour}": 1 / (255 * std[i]) for i, colour in enumerate("RGB")},
        BLOCK=block,
        VECTOR=min(block, VECTOR),
        WIDE=is_wide(images, y),
    )
    return y
