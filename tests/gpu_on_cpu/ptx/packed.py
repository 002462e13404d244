"""Instructions on 16-bit types that NumPy lacks: bf16, and pairs in one register."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import COMPARE, from_bf16
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


def setp(machine: Machine, i: Instruction) -> Step:
    """One predicate for bf16; two for a pair, that of the lower half first."""
    compare, kind, names = COMPARE[i.op[1]], i.op[-1], i.operands[0].split("|")
    if kind[0] not in "bf" or len(i.op) != 3 or len(i.operands) != 3 or len(names) != 1 + kind.endswith("x2"):
        raise PtxError(f"not known: {i.text}")
    writes = [machine.target(name) for name in names]
    if kind == "bf16":
        bits = [machine.source(text, "u16") for text in i.operands[1:]]
        return lambda some: writes[0](some, compare(*(from_bf16(read(some)) for read in bits)))
    pairs = [halves(machine, text) for text in i.operands[1:]]

    def run(some: Any) -> None:
        found = [read(some) for read in pairs]
        a, b = (from_bf16(value) if kind == "bf16x2" else value.view(np.float16) for value in found)
        both = compare(a, b)
        for n, write in enumerate(writes):
            write(some, both[..., n])

    return run


def add(machine: Machine, i: Instruction) -> Step:
    """Two sums of 16 bits, without a carry from one into the other."""
    if i.op[1:] not in (["s16x2"], ["u16x2"]):
        raise PtxError(f"not known: {i.text}")
    write, (a, b) = machine.target(i.operands[0]), (halves(machine, text) for text in i.operands[1:])
    return lambda some: write(some, np.ascontiguousarray(a(some) + b(some)).view(np.uint32)[..., 0])
