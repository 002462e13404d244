"""Runs the ops on the CPU by their CUDA kernels: loads emulator/, which replaces the CPU kernels."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from tests.support import cases

ORDERS = ("forward", "reverse", "random")
AROUND = tuple(f"conv2d_bias_relu_{name}" for name in ("mask", "to_depth", "from_depth"))
NAME = "libalexnet_ext_emulator.so"
BUILD = (
    "cmake -G Ninja -S . -B build/emulator -DALEXNET_EXT_EMULATOR=ON -DPython_EXECUTABLE=$(which python)"
    " && cmake --build build/emulator --target emulator"
)


@cache
def library(folder: Path) -> ctypes.CDLL:
    torch.ops.load_library(str(folder / NAME))
    return ctypes.CDLL(str(folder / NAME))


def operators(namespace: str) -> Iterator[str]:
    """The ops, and what is part of their backwards, that have a CUDA kernel."""
    for name in (*cases.SPECS, *(f"{op}_backward" for op in cases.OPS), *AROUND):
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", "CUDA"):
            yield name


@contextmanager
def in_place_of_the_cpu_kernels(namespace: str, run: Callable[..., Any]) -> Iterator[None]:
    """In the block ``torch.ops.alexnet_ext`` on CPU tensors is run(the CUDA kernel of that namespace, *arguments)."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def of_cuda(name: str) -> Any:
        overload = getattr(getattr(torch.ops, namespace), name).default
        return partial(run, partial(overload.redispatch, cuda))

    place = torch.library.Library("alexnet_ext", "IMPL", "CPU")
    try:
        with warnings.catch_warnings():  # some versions of PyTorch warn, but this is intended
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for name in operators(namespace):
                place.impl(name, of_cuda(name), allow_override=True)
        yield
    finally:
        place._destroy()


@contextmanager
def kernels_emulated(folder: Path, order: str = "forward") -> Iterator[ctypes.CDLL]:
    """In the block ``torch.ops.alexnet_ext`` runs the CUDA kernels on CPU tensors, lanes in the given order."""
    emulator = library(folder)
    emulator.alexnet_emulator_order(ORDERS.index(order))
    try:
        with in_place_of_the_cpu_kernels("alexnet_ext_emulator", lambda kernel, *arguments: kernel(*arguments)):
            yield emulator
    finally:
        emulator.alexnet_emulator_order(0)
