"""Fences around the memory that an op allocates, for the process that proves kernels.

While fences are up, each new tensor of a device lies between two bands, and all of it holds the byte 255: NaN in every
floating-point dtype. A result that a kernel left unwritten is then NaN, and a write outside of it shows in a band.
PyTorch's own kernels run on such memory too. It is PyTorch's allocation that is replaced, for the whole process, so
nothing but a proof may run meanwhile.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

BAND = 4096
"""Bytes before and behind a tensor. It starts as aligned as PyTorch's allocations: 512 divides it."""
FILL = 255
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


class Fences:
    """Context manager; ``broken()`` then says what was written outside of a tensor, or ""."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Made before allocation is replaced: tensors without memory, to be given some.
        self.empty = {dtype: torch.empty(0, dtype=dtype, device=device) for dtype in _DTYPES}
        self.held: list[tuple[Tensor, int]] = []  # all bytes of an allocation, and how many of them are the tensor's

    def __enter__(self) -> Fences:
        self.library = torch.library.Library("aten", "IMPL")
        key = _KEYS[self.device.type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a kernel is replaced, as is wanted
            self.library.impl("empty.memory_format", self._empty, key)
            self.library.impl("empty_strided", self._empty_strided, key)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.library._destroy()

    def broken(self) -> str:
        """How a band was written to; the memory is let go."""
        held, self.held = self.held, []
        for memory, size in held:
            before, behind = memory[:BAND], memory[BAND + size :]
            for band, where in ((before, "before"), (behind, "behind")):
                if not bool((band == FILL).all()):
                    return f"it wrote {where} a tensor of {size} bytes"
        return ""

    def _empty(
        self,
        size: Sequence[int],
        dtype: torch.dtype | None = None,
        layout: Any = None,
        device: Any = None,
        pin_memory: bool | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> Tensor:
        if memory_format == torch.channels_last:
            strides = torch._prims_common.make_channels_last_strides_for(tuple(size))
        else:
            strides = torch._prims_common.make_contiguous_strides_for(tuple(size))
        return self._empty_strided(size, strides, dtype)

    def _empty_strided(
        self,
        size: Sequence[int],
        stride: Sequence[int],
        dtype: torch.dtype | None = None,
        layout: Any = None,
        device: Any = None,
        pin_memory: bool | None = None,
    ) -> Tensor:
        dtype = dtype or torch.get_default_dtype()
        last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if not math.prod(size):  # may be given memory later, by resize_
            return self.empty[dtype].detach().set_(torch.UntypedStorage(0, device=self.device), 0, size, stride)
        used = (last + 1) * dtype.itemsize
        storage = torch.UntypedStorage(2 * BAND + used, device=self.device)
        memory = self.empty[torch.uint8].detach().set_(storage, 0, (storage.nbytes(),), (1,))
        memory.fill_(FILL)
        self.held.append((memory, used))
        return self.empty[dtype].detach().set_(storage, BAND // dtype.itemsize, tuple(size), tuple(stride))
