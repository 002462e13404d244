"""What the Triton kernels of two or more ops share: tiles, offsets, widening, strides."""

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
    """Where the channels of these places stand, by PyTorch's strides: (batch, channel, row, column)."""
    return at[0] * strides[0] + channel * strides[1] + at[1] * strides[2] + at[2] * strides[3]


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


CHANNELS = 256
"""Up to so many channels stand in one tile where they meet: a lane has at most 8, so its neighbours are in its warp."""


def tile(channels: int, channel_stride: int, reach: int | None, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Block sizes for tiles of pixels by channels, and how many channel blocks there are.

    Where channels meet (``reach``: over how many of them), all stand in one tile if that is possible, else blocks
    overlap by ``reach`` on each side. A tile is longest along what lies side by side in memory. So that its values stay
    in registers a thread has 16 where they come 16 bytes at a time and do not meet, else 8, and 4 of fp64.
    """
    dense = channel_stride == 1
    block_c, halo = power_of_two(channels), 0
    if reach is None:
        block_c = min(block_c, max(128 if dense else 8, power_of_two(channels // 2**15)))
    elif channels > CHANNELS:
        halo = 8 * triton.cdiv(reach, 8) if dense else reach  # 8: blocks begin where 16 bytes of bf16 do
        block_c = max(CHANNELS // 2 if dense else CHANNELS // 4, power_of_two(4 * halo))
    values = 4 if dtype == torch.float64 else 16 if dense and reach is None and channels % 16 == 0 else 8
    block_p = min(max((128 if dense else 256) * values // block_c, 1 if dense else values), 128 if dense else 256)
    warps = max(1, block_p * block_c // (32 * values))
    # Where channels meet a warp for each pixel at most: two would exchange its neighbours by way of shared memory.
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
