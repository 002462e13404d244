"""Products of warp groups (four warps) by wgmma: matrices in shared memory, the first perhaps in registers.

They complete when they are waited for. Until then the sums read as NaN, and the matrices must not change. A register
that a thread touches may enter a product only after a wgmma.fence.
(PTX ISA, 9.7.15; layouts as CUTLASS writes them in cute/atom/mma_traits_sm90_gmma.hpp.)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arithmetic import from_bf16
from .program import Instruction, Kernel, PtxError
from .tensor_maps import swizzled

if TYPE_CHECKING:
    from .hopper import HopperMachine

Array = np.ndarray[Any, Any]
Step = Callable[[Any], None]
GROUP, WIDTH = 128, 32  # threads, and bytes of a row along a product's depth
SIZES = {"bf16": 2, "f16": 2, "tf32": 4}
# By a descriptor's number for it; 128 bytes come first.
SWIZZLE = {0: 0, 1: 7, 2: 3, 3: 1}
NOT_YET = np.uint32(0xFFFFFFFF).view(np.float32)  # a NaN: the sums of products in flight
# Its fields: begin, leading, stride, base offset, swizzle.
FIELDS = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62


def layout(descriptor: int, count: int, size: int, across: bool) -> Array:
    """The addresses of a matrix's elements of ``size`` bytes, [count, depth], within a block's shared memory.

    Its lines run along the products' depth, or across it.
    """
    begin, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    if descriptor >> 49 & 7 or descriptor & ~FIELDS:
        raise PtxError("a matrix's base offset, or a descriptor's field, is not known")
    mask = SWIZZLE[descriptor >> 62]
    line = 16 * (mask + 1) if mask else 16  # bytes of one of the pattern's 8 rows
    n, k = np.arange(count)[:, None], np.arange(WIDTH // size)[None, :]
    if across:
        wide, low, high = line // size, leading, stride
        if not mask:
            low, high = stride, leading
        offsets = size * (n % wide) + n // wide * low + k % 8 * line + k // 8 * high
    else:
        inner = 16 // size
        offsets = n % 8 * line + n // 8 * stride + size * (k % inner) + k // inner * (16 if mask else leading)
    return swizzled((begin + offsets).astype(np.uint64), mask)


def numbers(bits: Array, kind: str) -> Array:
    """Elements, bytes last, as fp64; TF32 without its lower 13 bits."""
    if kind == "tf32":
        return (bits.view(np.uint32)[..., 0] & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    halves = bits.view(np.uint16)[..., 0]
    return np.asarray(from_bf16(halves) if kind == "bf16" else halves.view(np.float16)).astype(np.float64)


def named(kernel: Kernel) -> dict[str, int]:
    """The registers of products, and the number of each."""
    products = (i for i in kernel.code if i.op[:2] == ["wgmma", "mma_async"])
    vectors = (text for i in products for text in i.operands[:2] if text.startswith("{"))
    return {name: n for n, name in enumerate(dict.fromkeys(re.findall(r"[^{},\s]+", " ".join(vectors))))}


def touching(machine: HopperMachine, i: Instruction, step: Step) -> Step:
    """The step; afterwards its operands may enter a product only after a fence.

    A copy of one such register to another has the state of its source: if compilers put the copy after the fence, ptxas
    adds a fence (its note C7519).
    """
    names = set(re.findall(r"%\w+", " ".join(i.operands))) & machine.in_products.keys()
    rows = [machine.in_products[name] for name in sorted(names)]
    if not rows:
        return step
    if i.op == ["mov", "b32"] and i.operands[1] in names:
        of, to = machine.in_products[i.operands[1]], machine.in_products.get(i.operands[0])

        def copy(some: Any) -> None:
            step(some)
            if to is None:
                machine.touched[of, some] = True
            else:
                machine.touched[to, some] = machine.touched[of, some]

        return copy

    def run(some: Any) -> None:
        step(some)
        for row in rows:
            machine.touched[row, some] = True

    return run


@dataclass
class Sums:
    """A matrix of sums that products in flight add to."""

    values: Array
    products: int = 0


@dataclass
class WarpGroup:
    groups: list[list[Callable[[], None]]] = field(default_factory=lambda: [[]])  # committed ones, and the open one
    sums: dict[tuple[str, ...], Sums] = field(default_factory=dict)
    uses: dict[str, str] = field(
        default_factory=dict
    )  # by register, since a fence: the product's shape, "" for operands


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

        def fence(some: Any) -> None:
            for thread in whole_groups(machine, some):
                machine.touched[:, thread : thread + GROUP] = False
                machine.groups[thread].uses.clear()

        return fence
    if i.op[1] == "commit_group":

        def commit(some: Any) -> None:
            for thread in whole_groups(machine, some):
                machine.groups[thread].groups.append([])

        return commit
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


class Form(NamedTuple):
    """A product of (64, depth) and (depth, columns); across: whether a matrix is transposed in shared memory."""

    columns: int
    depth: int
    kind: str
    across_a: bool
    across_b: bool


def form_of(i: Instruction, sums: int, fragments: int) -> Form:
    """What an instruction of this many registers of sums and of A multiplies. PtxError for a form that is not known."""
    shape, kind = re.fullmatch(r"m64n(\d+)k(\d+)", i.op[4]), i.op[-1]
    if shape is None or i.op[5] != "f32" or i.op[6:] != [kind, kind] or int(shape[2]) * SIZES[kind] != WIDTH:
        raise PtxError(f"not known: {i.text}")
    columns = int(shape[1])
    signs, across = [int(text) for text in i.operands[4:6]], [bool(int(text)) for text in i.operands[6:]]
    # Only a matrix of 16-bit values may be transposed in shared memory.
    if sums != columns // 2 or signs != [1, 1] or len(across) != (kind != "tf32") * (1 if fragments else 2):
        raise PtxError(f"not known: {i.text}")
    if columns % 8 or not 8 <= columns <= 256 or fragments not in (0, 4):
        raise PtxError(f"not known: {i.text}")
    across_a, across_b = [False, False, *across][-2:]
    return Form(columns, int(shape[2]), kind, across_a, across_b)


def from_fragments(values: Array, depth: int, kind: str) -> Array:
    """A from four registers' bytes, [4, 128 threads, 4]; a warp has 16 of its rows."""
    lane = np.arange(GROUP)
    found, wide = np.empty((64, depth)), 4 // SIZES[kind]  # values in a register
    for r, register in enumerate(numbers(values.reshape(4, GROUP, wide, -1), kind)):
        for h in range(wide):
            at = 16 * (lane // 32) + lane % 32 // 4 + 8 * (r % 2), wide * (lane % 4) + h + depth // 2 * (r // 2)
            found[at] = register[:, h]
    return found


def places_in_sums(count: int) -> tuple[Array, Array]:
    """(row, column) of the values of this many registers, [registers, 128 threads]."""
    lane, n = np.arange(GROUP), np.arange(count)[:, None]
    return 16 * (lane // 32) + lane % 32 // 4 + 8 * (n // 2 % 2), 8 * (n // 4) + 2 * (lane % 4) + n % 2


def matrix(machine: HopperMachine, first: int, addresses: Array, size: int) -> Callable[[], Array]:
    """Reads elements of ``size`` bytes at these addresses of the shared memory that the block of a thread has."""
    indices = machine.bytes_at("shared", addresses.reshape(-1) + machine.own(first), size)[0][2]
    return lambda: machine.fetch_fenced(indices)


def mma_async(machine: HopperMachine, i: Instruction) -> Step:
    """D = A B + D, or A B: fp32 sums of bf16, fp16 or TF32."""
    names = tuple(machine.vector(i.operands[0]))
    fragments = machine.vector(i.operands[1]) if i.operands[1].startswith("{") else []
    columns, depth, kind, across_a, across_b = form_of(i, len(names), len(fragments))
    b, adds = machine.source(i.operands[2], "u64"), machine.source(i.operands[3], "pred")
    a = machine.source("0" if fragments else i.operands[1], "u64")
    registers, words = ([machine.registers[name] for name in each] for each in (names, fragments))
    uses = {**dict.fromkeys(fragments, ""), **dict.fromkeys(names, i.op[4])}
    if len(uses) != len(names) + len(fragments):  # a register in two places
        raise PtxError(f"not known: {i.text}")
    rows = [machine.in_products[name] for name in uses]
    places, size = places_in_sums(len(names)), SIZES[kind]

    def registers_of(threads: slice) -> Callable[[], Array]:
        return lambda: np.stack([word[threads].view(np.uint8).reshape(GROUP, 4) for word in words])

    def issue(first: int, at_a: int, at_b: int, add: bool) -> None:
        group, threads = machine.groups[first], slice(first, first + GROUP)
        if machine.touched[rows, threads].any() or any(group.uses.get(name, use) != use for name, use in uses.items()):
            raise PtxError("no wgmma.fence stands between a register's use and its product")
        group.uses |= uses
        if names not in group.sums:
            if any(set(names) & set(others) for others in group.sums):
                raise PtxError("sums overlap with those of a product in flight")
            sums = group.sums[names] = Sums(np.empty((64, columns), np.float32))
            sums.values[places] = [register[threads].view(np.float32) for register in registers]
            for register in registers:
                register[threads].view(np.float32)[:] = NOT_YET
        sums = group.sums[names]
        sums.products += 1
        machine.multiplied(64 * columns * depth)

        in_memory = [(at_b, columns, across_b)] if words else [(at_a, 64, across_a), (at_b, columns, across_b)]
        reads = [registers_of(threads)] if words else []
        reads += [matrix(machine, first, layout(at, count, size, across), size) for at, count, across in in_memory]
        given = [read() for read in reads]

        def product() -> None:
            if not all(np.array_equal(read(), before) for read, before in zip(reads, given, strict=True)):
                raise PtxError("a matrix changes while it is multiplied")
            left = from_fragments(given[0], depth, kind) if words else numbers(given[0], kind).reshape(64, depth)
            exact = left @ numbers(given[1], kind).reshape(columns, depth).T
            sums.values = (exact + sums.values if add else exact).astype(np.float32)
            sums.products -= 1
            if sums.products == 0:
                for register, values in zip(registers, sums.values[places], strict=True):
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
