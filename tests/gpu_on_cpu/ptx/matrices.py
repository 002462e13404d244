"""Instructions of a whole warp: products of tensor cores, loads of their fragments, shuffles.

A fragment maps each lane's values to places in a matrix (PTX ISA, 9.7.14.5.8 and 9.7.14.5.15).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import from_bf16
from .program import Instruction, PtxError

if TYPE_CHECKING:
    from .machine import Machine

Array = np.ndarray[Any, Any]
Step = Callable[[Any], None]
LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4


def whole_warps(machine: Machine, some: Any) -> Array:
    """The threads, [warps, 32]: all lanes of a warp must take part."""
    threads = np.arange(machine.threads)[some]
    if len(threads) % 32 or (threads.reshape(-1, 32) != threads[::32, None] + LANE).any() or (threads[::32] % 32).any():
        raise PtxError("not all lanes of a warp are here")
    return threads.reshape(-1, 32)


def mma(machine: Machine, i: Instruction) -> Step:
    """D = A B + C: m16n8k16 of bf16 or fp16, m16n8k8 of TF32, without its lower 13 bits; sums in fp32."""
    kind, depth = i.op[-2], int(i.op[3].split("k")[1])
    if kind == "f64":
        return mma_f64(machine, i)
    names = [machine.vector(text) for text in i.operands]
    targets = [machine.target(name) for name in names[0]]
    a, b = ([machine.source(name, "u32") for name in group] for group in names[1:3])
    c = [machine.source(name, "f32") for name in names[3]]

    def values(registers: list[Any], some: Any) -> Array:
        """[registers, halves, warps, 32] as numbers."""
        words = np.stack([np.broadcast_to(read(some), (count(machine, some),)) for read in registers])
        words = words.reshape(len(registers), -1, 32)
        if kind == "tf32":
            return (words & np.uint32(0xFFFFE000)).view(np.float32)[:, None].astype(np.float64)
        halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], 1).astype(np.uint16)
        return (from_bf16(halves) if kind == "bf16" else halves.view(np.float16)).astype(np.float64)

    def run(some: Any) -> None:
        warps = len(whole_warps(machine, some))
        left, right = np.empty((warps, 16, depth)), np.empty((warps, depth, 8))
        wide = 1 if kind == "tf32" else 2  # values in a register
        for r, halves in enumerate(values(a, some)):
            for h, numbers in enumerate(halves):
                left[:, GROUP + 8 * (r % 2), wide * MEMBER + h + depth // 2 * (r // 2)] = numbers
        for r, halves in enumerate(values(b, some)):
            for h, numbers in enumerate(halves):
                right[:, wide * MEMBER + h + depth // 2 * r, GROUP] = numbers
        machine.multiplied(warps * 16 * 8 * depth)
        product = left @ right
        for n, (read, write) in enumerate(zip(c, targets, strict=True)):
            sums = product[:, GROUP + 8 * (n // 2), 2 * MEMBER + n % 2].reshape(-1)
            write(some, (sums + read(some)).astype(np.float32))

    return run


def mma_f64(machine: Machine, i: Instruction) -> Step:
    """m8n8k4 of fp64: each lane has one value of A, one of B and two of C."""
    names = [machine.vector(text) for text in i.operands]
    targets = [machine.target(name) for name in names[0]]
    (a,), (b,), c = ([machine.source(name, "f64") for name in group] for group in names[1:])

    def run(some: Any) -> None:
        warps = len(whole_warps(machine, some))
        left, right = np.empty((warps, 8, 4)), np.empty((warps, 4, 8))
        left[:, GROUP, MEMBER] = np.broadcast_to(a(some), (32 * warps,)).reshape(warps, 32)
        right[:, MEMBER, GROUP] = np.broadcast_to(b(some), (32 * warps,)).reshape(warps, 32)
        product = left @ right
        for n, (read, write) in enumerate(zip(c, targets, strict=True)):
            write(some, product[:, GROUP, 2 * MEMBER + n].reshape(-1) + read(some))

    return run


def ldmatrix(machine: Machine, i: Instruction) -> Step:
    """Load matrices of 8 x 8 values of 16 bits as fragments; each lane has the address of one row."""
    number, transposed = next(int(part[1:]) for part in i.op if part in ("x1", "x2", "x4")), "trans" in i.op
    targets, address = [machine.target(name) for name in machine.vector(i.operands[0])], machine.address(i.operands[1])

    def run(some: Any) -> None:
        warps = len(whole_warps(machine, some))
        addresses = address(some).reshape(warps, 32)[:, : 8 * number]
        threads = whole_warps(machine, some)[:, : 8 * number]
        machine.accessed("load", "shared", threads.reshape(-1), addresses.reshape(-1), 16)
        rows = machine.fetch("shared", addresses.reshape(-1), 16).view(np.uint16).reshape(warps, number, 8, 8)
        if transposed:
            rows = rows.swapaxes(2, 3)
        for n, write in enumerate(targets):
            low, high = (rows[:, n, GROUP, 2 * MEMBER + h].astype(np.uint32) for h in (0, 1))
            write(some, (low | high << np.uint32(16)).reshape(-1))

    return run


def barrier(machine: Machine, i: Instruction) -> Step:
    """``bar.warp.sync`` of all lanes: they must be here together already, else it is an error."""
    if i.operands != ["-1"]:
        raise PtxError(f"not known: {i.text}")

    def run(some: Any) -> None:
        whole_warps(machine, some)

    return run


def shfl(machine: Machine, i: Instruction) -> Step:
    """``shfl.sync`` over whole warps: from a lane by its number, by a xor of the number, or by a distance.

    A lane whose source would be outside the warp keeps its own value.
    """
    ways = {
        "idx": lambda n: n % 32,
        "bfly": lambda n: n % 32 ^ LANE,
        "up": lambda n: LANE - n,
        "down": lambda n: LANE + n,
    }
    if i.op[2] not in ways:
        raise PtxError(f"not known: {i.text}")
    source, last = ways[i.op[2]], 0 if i.op[2] == "up" else 31
    clamp, members = (machine.source(text, "u32") for text in i.operands[3:])
    write = machine.target(i.operands[0].split("|")[0])
    value, lane = machine.source(i.operands[1], "u32"), machine.source(i.operands[2], "u32")

    def run(some: Any) -> None:
        warps = len(whole_warps(machine, some))
        if (np.asarray(clamp(some)) != last).any() or (~np.asarray(members(some))).any():
            raise PtxError("not known of a part of a warp")
        values = np.broadcast_to(value(some), (32 * warps,)).reshape(warps, 32)
        lanes = np.broadcast_to(lane(some), (32 * warps,)).reshape(warps, 32).astype(np.int64)
        lanes = source(lanes)
        lanes = np.where((lanes < 0) | (lanes > 31), LANE, lanes)
        write(some, np.take_along_axis(values, lanes, 1).reshape(-1))

    return run


def count(machine: Machine, some: Any) -> int:
    return machine.threads if isinstance(some, slice) else len(some)
