"""Instructions on 16-bit types that NumPy lacks: bf16, and pairs in one register."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import BINARY, COMPARE, from_bf16, to_bf16, to_f16
from .program import Instruction, PtxError

if TYPE_CHECKING:
    from .machine import Machine

Array = np.ndarray[Any, Any]
Step = Callable[[Any], None]
KINDS = ("bf16", "bf16x2", "f16x2", "s16x2", "u16x2")


def halves(machine: Machine, text: str) -> Callable[[Any], Array]:
    """[..., lower and upper half]"""
    read = machine.source(text, "u32")
    return lambda some: np.asarray(read(some), np.uint32)[..., None].view(np.uint16)


def numbers(machine: Machine, text: str, kind: str) -> Callable[[Any], Array]:
    """The same as floating-point numbers."""
    read = halves(machine, text)
    return lambda some: from_bf16(read(some)) if kind == "bf16x2" else read(some).view(np.float16)


def joined(pairs: Array) -> Array:
    """32 bits of each lower and upper half."""
    return np.ascontiguousarray(pairs.astype(np.uint16)).view(np.uint32)[..., 0]


def setp(machine: Machine, i: Instruction) -> Step:
    """One predicate for bf16; two for a pair, that of the lower half first."""
    compare, kind, names = COMPARE[i.op[1]], i.op[-1], i.operands[0].split("|")
    if kind[0] not in "bf" or len(i.op) != 3 or len(i.operands) != 3 or len(names) != 1 + kind.endswith("x2"):
        raise PtxError(f"not known: {i.text}")
    writes = [machine.target(name) for name in names]
    if kind == "bf16":
        bits = [machine.source(text, "u16") for text in i.operands[1:]]
        return lambda some: writes[0](some, compare(*(from_bf16(read(some)) for read in bits)))
    a, b = (numbers(machine, text, kind) for text in i.operands[1:])

    def run(some: Any) -> None:
        both = compare(a(some), b(some))
        for n, write in enumerate(writes):
            write(some, both[..., n])

    return run


def set_(machine: Machine, i: Instruction) -> Step:
    """All bits of each half for which a comparison of pairs holds; 1.0 for one of fp32 that does, else 0.0."""
    compare, write = COMPARE[i.op[1]], machine.target(i.operands[0])
    if i.op[2:] == ["f32", "f32"]:
        one, other = (machine.source(text, "f32") for text in i.operands[1:])
        return lambda some: write(some, compare(one(some), other(some)).astype(np.float32))
    if i.op[2:] not in (["u32", "bf16x2"], ["u32", "f16x2"]):
        raise PtxError(f"not known: {i.text}")
    a, b = (numbers(machine, text, i.op[-1]) for text in i.operands[1:])
    return lambda some: write(some, joined(np.where(compare(a(some), b(some)), 0xFFFF, 0)))


def floating(machine: Machine, i: Instruction, given: list[str], operation: Callable[[Any, Any], Any]) -> Step:
    """Writes the results of an operation on two numbers, each rounded once: of bf16, or of both halves of pairs."""
    kind, write = i.op[-1], machine.target(i.operands[0])
    if kind == "bf16":
        one, other = (machine.source(text, "u16") for text in given)
        return lambda some: write(some, to_bf16(operation(from_bf16(one(some)), from_bf16(other(some)))))
    a, b = (numbers(machine, text, kind) for text in given)
    narrow = to_bf16 if kind == "bf16x2" else to_f16
    return lambda some: write(some, joined(narrow(operation(a(some), b(some)))))


def least(machine: Machine, i: Instruction) -> Step:
    """The smaller numbers of two pairs; of a NaN and a number, the number."""
    if i.op[1:] not in (["bf16x2"], ["f16x2"]):
        raise PtxError(f"not known: {i.text}")
    return floating(machine, i, i.operands[1:], BINARY["min"])


def add(machine: Machine, i: Instruction) -> Step:
    """Sums of floating-point numbers; or two of 16 bits, without a carry from one into the other."""
    if i.op[1:] in (["bf16"], ["bf16x2"]):
        return floating(machine, i, i.operands[1:], BINARY["add"])
    if i.op[1:] not in (["s16x2"], ["u16x2"]):
        raise PtxError(f"not known: {i.text}")
    write, (a, b) = machine.target(i.operands[0]), (halves(machine, text) for text in i.operands[1:])
    return lambda some: write(some, joined(a(some) + b(some)))


def fma(machine: Machine, i: Instruction) -> Step:
    """a + b, written as a * 1 + b for compute capability 8.0, which adds no bf16. No other product is known."""
    if i.op[1:] not in (["rn", "bf16"], ["rn", "bf16x2"]):
        raise PtxError(f"not known: {i.text}")
    a, factor, b = i.operands[1:]
    one, bits = (0x3F80, "u16") if i.op[-1] == "bf16" else (0x3F803F80, "u32")
    step, read = floating(machine, i, [a, b], BINARY["add"]), machine.source(factor, bits)

    def run(some: Any) -> None:
        if (np.asarray(read(some)) != one).any():
            raise PtxError("a factor of bf16 is not 1")
        step(some)

    return run


STEPS = {"setp": setp, "set": set_, "add": add, "min": least, "fma": fma}
