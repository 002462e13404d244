"""What the Triton kernels of two or more ops share: tiles, offsets, widening, strides, sums by channel.

Kernels take each stride as a parameter of its own and make tuples of them inside: torch.compile does not handle kernel
arguments that are tuples (https://github.com/pytorch/pytorch/issues/193257; we have not tried it ourselves).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton as _wrap_triton

from .. import _library


def wrap_triton(kernel: Any) -> Any:
    """``torch.library.wrap_triton``, whose older versions refuse interpreted kernels.

    It has that name because PyTorch finds the kernels of an op by it, for the key of its compilation cache.
    """
    return kernel if _library.INTERPRETED else _wrap_triton(kernel)


@triton.jit
def accumulator(x):
    """x as the arithmetic has it: fp64 as it is, everything else as fp32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def tile_at(
    block, pixels, channels, HALO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr
):
    """(pixel [BLOCK_P, 1], channel [1, BLOCK_C], inside, own) of a block of pixels and this program's channels.

    Channel blocks overlap by HALO on each side: ``inside`` elements are the tensor's, ``own`` ones this program's.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    pixel = (tl.cast(block, index) * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    lane = tl.arange(0, BLOCK_C)[None, :]
    channel = tl.program_id(1).to(index) * (BLOCK_C - 2 * HALO) - HALO + lane
    inside = (pixel < pixels) & (channel >= 0) & (channel < channels)
    own = inside
    if HALO != 0:
        own = inside & (lane >= HALO) & (lane < BLOCK_C - HALO)
    return pixel, channel, inside, own


@triton.jit
def place(pixel, height, width):
    """(image, row, column) of pixels counted through a batch."""
    return pixel // (height * width), pixel // width % height, pixel % width


@triton.jit
def offset(at, channel, strides):
    """Offsets of the channels at these places, by PyTorch's strides: (batch, channel, row, column)."""
    return at[0] * strides[0] + channel * strides[1] + at[1] * strides[2] + at[2] * strides[3]


PARTIAL_SUMS = 1056
"""The most programs of a grid that adds up channels: 8 for each multiprocessor of an H100, whole waves of 1, 2 or 4."""


def sharing(blocks: int, channel_blocks: int) -> int:
    """How many programs share the sums of a block of channels. Their order depends on the shape alone, as it does."""
    return min(blocks, max(1, PARTIAL_SUMS // channel_blocks))


@triton.jit
def store_sums(sums, sums_ptr, channels, HALO: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store this program's row of the partial sums [programs, channels]: what its tiles' pixels added up to."""
    lane = tl.arange(0, BLOCK_C)[None, :]
    channel = tl.program_id(1) * (BLOCK_C - 2 * HALO) - HALO + lane
    own = (lane >= HALO) & (lane < BLOCK_C - HALO) & (channel < channels)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * channels + channel, tl.sum(sums, 0, keep_dims=True), own)


def total(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The partial sums [programs, channels] added up to [channels], in fp64 and in one order."""
    return partial.sum(0, dtype=torch.float64).to(dtype)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


CHANNELS = 256
"""The most channels of a tile where channels meet: a lane has at most 8 of them, so its neighbours are in its warp."""


def tile(channels: int, channel_stride: int, reach: int | None, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Block sizes for tiles of pixels by channels, and how many blocks the channels are divided into.

    ``reach`` says over how many channels they meet, as in LRN's window; None: they do not. Blocks of channels, each
    rounded up to a power of two:

    ====================== ======================================== ==================================
    channels               side by side in memory (stride 1)        apart (pixels are side by side)
    ====================== ======================================== ==================================
    do not meet            all, at most 128                         all, at most 8
    meet, at most 256      all                                      all
    meet, more than 256    128, overlapping by a multiple of 8      64, overlapping by ``reach``
    values a thread, fp64  4                                        4
    values a thread        16, if loaded 16 bytes at a time, else 8 8
    ====================== ======================================== ==================================

    Blocks that overlap do so on each side; a multiple of 8 begins where 16 bytes of bf16 do. Blocks hold as many pixels
    as the threads' values allow, so that all of them stay in registers. Where channels are very many, their
    blocks are larger: a grid has at most 2^16 - 1 programs in its second dimension.
    """
    dense = channel_stride == 1
    threads = 128 if dense else 256
    block_c, halo = power_of_two(channels), 0
    if reach is None:
        block_c = min(block_c, max(128 if dense else 8, power_of_two(channels // 2**15)))
    elif channels > CHANNELS:
        halo = 8 * triton.cdiv(reach, 8) if dense else reach
        block_c = max(CHANNELS // 2 if dense else CHANNELS // 4, power_of_two(4 * halo))
    values = 8
    if dtype == torch.float64:
        values = 4
    elif dense and reach is None and channels % 16 == 0:
        values = 16
    block_p = min(max(threads * values // block_c, 1 if dense else values), threads)
    warps = max(1, block_p * block_c // (32 * values))
    # Where channels meet, at most one warp a pixel: two would exchange its neighbours by way of shared memory.
    num_warps = min(warps, 32 if reach is None else block_p)
    blocks = {"HALO": halo, "BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": num_warps}
    return blocks, triton.cdiv(channels, block_c - 2 * halo)


def sides(**values: list[int]) -> dict[str, int]:
    """KERNEL=[h, w] as KERNEL_H=h, KERNEL_W=w, and so on."""
    return {f"{name}_{side}": int(value[i]) for name, value in values.items() for i, side in enumerate("HW")}


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_wide(*tensors: Tensor) -> bool:
    """Whether an offset into one of the tensors may pass 2^31 - 1, tiles that reach over the end included."""
    return any(
        sum(abs(stride) * size for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31 - 2**22
        for x in tensors
    )
