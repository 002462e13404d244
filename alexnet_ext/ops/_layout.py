"""Memory formats of results, and strides: what fakes and Triton kernels share; constants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def format_of(x: Tensor) -> torch.memory_format:
    return torch._prims_common.suggest_memory_format(x)


def convolved_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Of a convolution's result and gradients, as ``F.conv2d`` has it: channels-last where x or weight is."""
    return format_of(weight) if format_of(x) == torch.contiguous_format else format_of(x)


def new_images(
    like: Tensor, shape: Sequence[int], layout: torch.memory_format, dtype: torch.dtype | None = None
) -> Tensor:
    """A new dense (N, C, H, W) on the device of ``like``, in its dtype unless another is given."""
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def filled(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers (len(values),) on a device. Filled, as a copy from the host could be no part of a CUDA graph."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def outline(x: Tensor) -> tuple[torch.Size, torch.memory_format]:
    """All that a gradient has to know of a tensor whose values it does not need: ``new_images(dy, ...)`` stands in."""
    return x.shape, format_of(x)


def empty_images(like: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """A new (N, C, height, width) in the memory format of ``like``."""
    return new_images(like, (like.shape[0], like.shape[1], height, width), format_of(like), dtype)


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Same strides wherever a dimension has more than one index."""
    return all(size <= 1 or left == right for size, left, right in zip(a.shape, a.stride(), b.stride(), strict=True))


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill a block of memory, in whatever order."""
    return x.is_contiguous() or x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()


def with_strides_of(like: Tensor, x: Tensor) -> Tensor:
    """x itself, or a copy of it, with the strides of ``like``."""
    return x if same_strides(like, x) else torch.empty_like(like, dtype=x.dtype).copy_(x)
