"""Runs Triton kernels, compiled for compute capability 8.0 or 9.0, in its machine: on CPU tensors, with no GPU.

The host code is unchanged; each kernel that it launches is compiled for its arguments and run at once.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from triton.runtime.jit import JITFunction

from alexnet_ext import _library
from alexnet_ext.ops import _backend
from alexnet_ext.ops.conv2d_bias_relu import configs
from tests.gpu_on_cpu.ptx.hopper import HopperMachine
from tests.gpu_on_cpu.ptx.machine import Launch, Machine
from tests.gpu_on_cpu.ptx.program import Kernel, PtxError, parse
from tests.gpu_on_cpu.triton_ahead import compiled

MACHINES = {80: Machine, 90: HopperMachine}


class Launched(NamedTuple):
    """A launch: the op's name and the kernel's in one, its PTX and its machine code."""

    name: str
    program: Kernel
    cubin: bytes


@functools.lru_cache(maxsize=64)
def parsed(ptx: str) -> Kernel:
    (kernel,) = parse(ptx).values()
    return kernel


def memory(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The bytes that a kernel may touch: from the tensor's first to its last, gaps included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    span = tensor.detach().as_strided((last + 1,), (1,))
    return span.view(torch.uint8).numpy()


def argument(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return struct.pack("<Q", value.data_ptr())
    if isinstance(value, int) and not isinstance(value, bool):
        return struct.pack("<i" if -(2**31) <= value < 2**31 else "<q", value)
    raise PtxError(f"an argument of type {type(value)}")


def without(program: Kernel, instruction: str) -> Kernel:
    """The kernel without an instruction, or for ``"A B"`` without the first B after each A."""
    *after, name = (words.split(".") for words in instruction.split())
    code, leaves = [], not after
    for i in program.code:
        leaves |= i.op[: len(after[0])] == after[0] if after else False
        found = leaves and i.op[: len(name)] == name
        code.append(replace(i, op=["pragma"]) if found else i)
        leaves &= not (found and after)
    return replace(program, code=code)


def run(
    kernel: JITFunction,
    grid: Any,
    given: dict[str, Any],
    capability: int,
    order: str,
    missing: str,
    machine: Callable[[Launch], Machine],
) -> Launched:
    binary = compiled((kernel, given), capability)
    values = [given[name] for name in kernel.arg_names]
    passed = [
        value
        for parameter, value in zip(kernel.params, values, strict=True)
        if not (parameter.is_constexpr or (isinstance(value, int) and value == 1))
    ]
    program = parsed(binary.asm["ptx"])
    program = without(program, missing) if missing else program
    arguments = [argument(value) for value in passed]
    # Scratch memory: none is requested.
    hidden = len(program.parameters) - len(arguments)
    if binary.metadata.global_scratch_size or getattr(binary.metadata, "profile_scratch_size", 0):
        raise PtxError("a kernel asks for scratch memory")
    arguments += [bytes(8)] * hidden
    if hidden > 2 or [len(value) for value in arguments] != [size for _, size in program.parameters]:
        raise PtxError(f"{program.name} has other parameters: {program.parameters}")
    buffers = [memory(value) for value in passed if isinstance(value, torch.Tensor) and value.numel()]
    grid = grid(given) if callable(grid) else grid
    threads, shared = 32 * binary.metadata.num_warps, binary.metadata.shared
    machine(Launch(program, buffers, arguments, threads, shared, order)).run((*grid, 1, 1)[:3])
    return Launched(f"{kernel.fn.__module__.split('.')[-2]}{kernel.__name__}", program, binary.asm["cubin"])


@contextmanager
def compiled_kernels(
    capability: int, order: str = "together", missing: str = "", machine: Callable[[Launch], Machine] | None = None
) -> Iterator[list[Launched]]:
    """In the block ``backend="triton"`` runs CPU tensors in the machine; yields the launches.

    ``missing``: the instructions to leave out of the kernels.
    """
    launched: list[Launched] = []
    made = machine or MACHINES[capability]

    def execute(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | options
        launched.append(run(self, grid, given, capability, order, missing, made))

    on_cpu = {op: {**devices, "cpu": devices["cuda"]} for op, devices in _backend.KERNELS.items()}
    with (
        mock.patch.object(JITFunction, "run", execute),
        mock.patch.object(_library, "INTERPRETED", True),  # wrap_triton would look for a GPU
        mock.patch.object(_backend, "KERNELS", on_cpu),
        mock.patch.object(configs, "architecture", return_value=capability // 10),
    ):
        yield launched
