"""The compiled ops on the CPU, run by their CUDA kernels: tests/emulator loaded, and put in the CPU kernels' place."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import cases

ORDERS = ("forward", "reverse", "random")
NAME = "libalexnet_ext_emulator.so"
BUILD = (
    "cmake -G Ninja -S . -B build/emulator -DALEXNET_EXT_EMULATOR=ON -DPython_EXECUTABLE=$(which python)"
    " && cmake --build build/emulator --target emulator"
)


@cache
def library(folder: Path) -> ctypes.CDLL:
    torch.ops.load_library(str(folder / NAME))
    return ctypes.CDLL(str(folder / NAME))


def operators() -> Iterator[str]:
    """The ops and backwards that have a CUDA kernel."""
    for name in (*cases.OPS, *(f"{op}_backward" for op in cases.OPS), *cases.WITHOUT_GRADIENT):
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"alexnet_ext_emulator::{name}", "CUDA"):
            yield name


@contextmanager
def kernels_emulated(folder: Path, order: str = "forward") -> Iterator[ctypes.CDLL]:
    """Within, ``torch.ops.alexnet_ext`` runs the CUDA kernels on CPU tensors, lanes in the given order."""
    emulator = library(folder)
    emulator.alexnet_emulator_order(ORDERS.index(order))
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def emulated(name: str) -> Any:
        overload = getattr(torch.ops.alexnet_ext_emulator, name).default
        return lambda *arguments: overload.redispatch(cuda, *arguments)

    place = torch.library.Library("alexnet_ext", "IMPL", "CPU")
    try:
        with warnings.catch_warnings():  # some versions of PyTorch warn of what is meant here
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for name in operators():
                place.impl(name, emulated(name), allow_override=True)
        yield emulator
    finally:
        place._destroy()
        emulator.alexnet_emulator_order(0)
