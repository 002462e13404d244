"""Products of warp groups, four warps each, of matrices in shared memory: wgmma.

They are done when they are waited for: until then the sums read as NaN, and what is overwritten in shared memory is
multiplied as it stands. (PTX ISA, 9.7.15; layouts as CUTLASS writes them in cute/atom/mma_traits_sm90_gmma.hpp.)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import from_bf16
from .program import Instruction, PtxError
from .tensor_maps import swizzled

if TYPE_CHECKING:
    from .hopper import HopperMachine

Array = np.ndarray[Any, Any]
Step = Callable[[Any], None]
GROUP, DEPTH = 128, 16
# By a descriptor's number for it; 128 bytes come first.
SWIZZLE = {0: 0, 1: 7, 2: 3, 3: 1}


def layout(descriptor: int, count: int, across: bool) -> Array:
    """The addresses of a matrix's elements, [count, 16], within a block's shared memory.

    Its lines lie along the products' depth, or across it.
    """
    begin, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise PtxError("a matrix's base offset is not known")
    mask = SWIZZLE[descriptor >> 62]
    line = 16 * (mask + 1) if mask else 16  # bytes of a row of the pattern, of which there are 8
    n, k = np.arange(count)[:, None], np.arange(DEPTH)[None, :]
    if across:
        wide, low, high = line // 2, leading, stride
        if not mask:
            low, high = stride, leading
        offsets = 2 * (n % wide) + n // wide * low + k % 8 * line + k // 8 * high
    else:
        offsets = n % 8 * line + n // 8 * stride + 2 * (k % 8) + k // 8 * (16 if mask else leading)
    return swizzled((begin + offsets).astype(np.uint64), mask)


@dataclass
class Sums:
    """A matrix of sums that products in flight add to."""

    values: Array
    products: int = 0


@dataclass
class WarpGroup:
    groups: list[list[Callable[[], None]]] = field(default_factory=lambda: [[]])  # committed ones, and the open one
    sums: dict[tuple[str, ...], Sums] = field(default_factory=dict)


def whole_groups(machine: HopperMachine, some: Any) -> list[int]:
    """Each warp group's first thread."""
    threads = np.arange(machine.threads)[some]
    first = threads[::GROUP]
    expected = first[:, None] + np.arange(GROUP)
    if len(threads) % GROUP or (threads.reshape(-1, GROUP) != expected).any() or (first % GROUP).any():
        raise PtxError("not all threads of a warp group are here")
    return [int(thread) for thread in first]


def wgmma(machine: HopperMachine, i: Instruction) -> Step:
    if i.op[1] == "fence":
        return lambda some: None
    if i.op[1] == "commit_group":
        return lambda some: [machine.groups[t].groups.append([]) for t in whole_groups(machine, some)] and None
    if i.op[1] == "wait_group":
        left = int(i.operands[0])

        def wait(some: Any) -> None:
            for thread in whole_groups(machine, some):
                waiting = machine.groups[thread].groups
                while len(waiting) - 1 > left:
                    for product in waiting.pop(0):
                        product()

        return wait
    return mma_async(machine, i)


def mma_async(machine: HopperMachine, i: Instruction) -> Step:
    """D = A B + D, or A B: fp32 sums of bf16 or fp16."""
    shape, kind = re.fullmatch(r"m64n(\d+)k16", i.op[4]), i.op[-1]
    if shape is None or i.op[5] != "f32" or i.op[6] != kind or kind not in ("bf16", "f16"):
        raise PtxError(f"not known: {i.text}")
    columns, names = int(shape[1]), tuple(machine.vector(i.operands[0]))
    scale_a, scale_b, across_a, across_b = (int(text) for text in i.operands[4:])
    if len(names) != columns // 2 or (scale_a, scale_b) != (1, 1):
        raise PtxError(f"not known: {i.text}")
    a, b = (machine.source(text, "u64") for text in i.operands[1:3])
    adds = machine.source(i.operands[3], "pred")
    registers = [machine.registers[name] for name in names]
    lane, n = np.arange(GROUP), np.arange(len(names))[:, None]
    row = 16 * (lane // 32) + lane % 32 // 4 + 8 * (n // 2 % 2)  # where a register's values stand in the sums
    column = 8 * (n // 4) + 2 * (lane % 4) + n % 2
    none = np.uint32(0xFFFFFFFF).view(np.float32)

    def matrix(first: int, descriptor: int, count: int, across: bool) -> Array:
        addresses = layout(descriptor, count, across).reshape(-1) + machine.own(first)
        bits = machine.fetch_fenced(addresses, 2).view(np.uint16).reshape(count, DEPTH)
        return np.asarray(from_bf16(bits) if kind == "bf16" else bits.view(np.float16)).astype(np.float64)

    def issue(first: int, at_a: int, at_b: int, add: bool) -> None:
        group, threads = machine.groups[first], slice(first, first + GROUP)
        if names not in group.sums:
            if any(set(names) & set(others) for others in group.sums):
                raise PtxError("sums overlap with those of a product in flight")
            sums = group.sums[names] = Sums(np.empty((64, columns), np.float32))
            sums.values[row, column] = [register[threads].view(np.float32) for register in registers]
            for register in registers:
                register[threads].view(np.float32)[:] = none
        sums = group.sums[names]
        sums.products += 1

        def product() -> None:
            exact = matrix(first, at_a, 64, bool(across_a)) @ matrix(first, at_b, columns, bool(across_b)).T
            sums.values = (exact + sums.values if add else exact).astype(np.float32)
            sums.products -= 1
            if sums.products == 0:
                for register, values in zip(registers, sums.values[row, column], strict=True):
                    register[threads].view(np.float32)[:] = values
                del group.sums[names]

        group.groups[-1].append(product)

    def run(some: Any) -> None:
        firsts = whole_groups(machine, some)
        operands = [np.broadcast_to(read(some), (GROUP * len(firsts),)).reshape(-1, GROUP) for read in (a, b, adds)]
        if any((values != values[:, :1]).any() for values in operands):
            raise PtxError("threads of a warp group name different matrices")
        for first, (at_a, at_b, add) in zip(firsts, zip(*(v[:, 0] for v in operands), strict=True), strict=True):
            issue(first, int(at_a), int(at_b), bool(add))

    return run
