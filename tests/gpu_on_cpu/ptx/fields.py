"""Instructions of PTX that extract bits and bytes from registers and products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .program import Instruction, PtxError

if TYPE_CHECKING:
    from .machine import Machine

Step = Callable[[Any], None]


def bfe(machine: Machine, i: Instruction) -> Step:
    """A field of bits, sign-extended by its own highest bit if the type is signed."""
    kind = i.op[-1]
    width, write = int(kind[1:]), machine.target(i.operands[0])
    value, begin, length = machine.source(i.operands[1], kind), *(machine.source(t, "u32") for t in i.operands[2:])

    def run(some: Any) -> None:
        bits = np.asarray(value(some)).astype(np.int64 if kind[0] == "s" else np.uint64)
        first, count = (np.asarray(read(some)).astype(np.int64) & 0xFF for read in (begin, length))
        if width == 64 or (first > width).any() or (count > width).any():
            raise PtxError("not known of such a field")
        mask = (np.int64(1) << count) - 1
        field = (bits >> first.astype(bits.dtype)) & mask.astype(bits.dtype)
        if kind[0] == "s":
            high = np.where(count > 0, np.int64(1) << np.maximum(count - 1, 0), 0)
            field = (field ^ high) - high
        write(some, field.astype(f"{'i' if kind[0] == 's' else 'u'}{width // 8}"))

    return run


def bfi(machine: Machine, i: Instruction) -> Step:
    """A register with a field of bits replaced by the lowest bits of another."""
    kind, write = i.op[-1].replace("b", "u"), machine.target(i.operands[0])
    value, into = (machine.source(text, kind) for text in i.operands[1:3])
    begin, length = (machine.source(text, "u32") for text in i.operands[3:])

    def run(some: Any) -> None:
        first, count = (np.asarray(read(some)).astype(np.uint64) for read in (begin, length))
        if (first + count > int(kind[1:])).any() or (count > 63).any():
            raise PtxError("not known of such a field")
        mask = ((np.uint64(1) << count) - np.uint64(1)) << first
        field = np.asarray(value(some)).astype(np.uint64) << first & mask
        write(some, (field | np.asarray(into(some)).astype(np.uint64) & ~mask).astype(f"u{int(kind[1:]) // 8}"))

    return run


def prmt(machine: Machine, i: Instruction) -> Step:
    """Four of the eight bytes of two registers; a selector's bit 3 selects the byte's sign instead of the byte."""
    write = machine.target(i.operands[0])
    low, high, select = (machine.source(text, "u32") for text in i.operands[1:])

    def run(some: Any) -> None:
        both = np.asarray(low(some)).astype(np.uint64) | np.asarray(high(some)).astype(np.uint64) << np.uint64(32)
        chosen, result = np.asarray(select(some)).astype(np.uint64), np.uint64(0)
        for n in range(4):
            nibble = chosen >> np.uint64(4 * n) & np.uint64(15)
            byte = both >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            byte = np.where(nibble >> np.uint64(3), (byte >> np.uint64(7)) * np.uint64(255), byte)
            result = result | byte << np.uint64(8 * n)
        write(some, np.asarray(result).astype(np.uint32))

    return run


def high(a: Any, b: Any, dtype: np.dtype[Any]) -> Any:
    """The upper 64 bits of a product of 128, by Python's integers."""
    whole = np.asarray(a).astype(object) * np.asarray(b).astype(object)
    return np.asarray(whole >> 64).astype(dtype)
