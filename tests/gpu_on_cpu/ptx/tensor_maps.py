"""Copies of boxes between global and shared memory (TMA) by their descriptors: tiled, and im2col.

A box of im2col mode is a list of pixels that begins at its coordinates and goes on, along rows and images, between the
corners; taps move the pixels read, not the corners. (PTX ISA, 5.5.3 to 5.5.7; ptx/cudart_sm90.cpp fills the
descriptors in.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .program import PtxError

if TYPE_CHECKING:
    from .hopper import HopperMachine

Array = np.ndarray[Any, Any]
MARK = b"ptx map"
MAP = np.dtype(
    [
        *(("mark", "S8"), ("data", "u8"), ("size", "u4", 4), ("stride", "u8", 4), ("lower", "i2", 2)),
        *(("upper", "i2", 2), ("box", "u2", 4), ("im2col", "u1"), ("swizzle", "u1"), ("fill", "u1"), ("rank", "u1")),
        *(("tf32", "u1"), ("bytes", "u1")),
    ],
    align=True,
)
# By a descriptor's number: the count of address bits from 7 on that are added to those from 4 on, without carries.
SWIZZLE = {0: 0, 1: 1, 2: 3, 3: 7}


def swizzled(addresses: Array, mask: int) -> Array:
    return addresses ^ ((addresses >> np.uint64(7) & np.uint64(mask)) << np.uint64(4))


class Box:
    """The places of a box's elements, [rows, elements of a row], in global and in shared memory."""

    def __init__(self, description: Array, where: Sequence[int], taps: Sequence[int], im2col: bool) -> None:
        m = description.view(MAP)[0]
        if m["mark"] != MARK or m["fill"] != 0 or int(m["swizzle"]) not in SWIZZLE:
            raise PtxError("not a descriptor that is known")
        if bool(m["im2col"]) != im2col or int(m["rank"]) != len(where):
            raise PtxError("a descriptor of the other mode or of another rank")
        self.mask, self.size, self.tf32 = SWIZZLE[int(m["swizzle"])], int(m["bytes"]), bool(m["tf32"])
        box, size, stride = (m[name].astype(np.int64)[: len(where)] for name in ("box", "size", "stride"))
        first = where[0] + np.arange(box[0])
        if im2col:
            others = self.pixels(m, where, taps, int(box[1]))
        else:
            ends = [w + np.arange(n) for w, n in zip(where[1:], box[1:], strict=True)]
            others = np.stack(np.meshgrid(*ends[::-1], indexing="ij")[::-1], -1).reshape(-1, len(ends))
        inside = ((others >= 0) & (others < size[1:])).all(1)
        self.inside = inside[:, None] & ((first >= 0) & (first < size[0]))
        offsets = others @ stride[1:]
        self.addresses = (int(m["data"]) + offsets[:, None] + self.size * first).astype(np.uint64)
        row = self.size * int(box[0])
        if self.mask and row != 16 * (self.mask + 1):
            raise PtxError("a row of a box is not as wide as its swizzle")
        if row % 16:
            raise PtxError("a row of a box is no multiple of 16 bytes")

    @staticmethod
    def pixels(m: Any, where: Sequence[int], taps: Sequence[int], count: int) -> Array:
        """Column, row and image of each, taps added."""
        low, wide = m["lower"].astype(np.int64), m["size"][1:3].astype(np.int64)
        extent = wide + m["upper"] - low
        column, row, image = where[1] - low[0], where[2] - low[1], where[3]
        if not (0 <= column < extent[0] and 0 <= row < extent[1]):
            raise PtxError("a box begins beyond its corners")
        if any(not 0 <= tap < 256 for tap in taps):
            raise PtxError("a tap is further than 255 pixels away")
        at = (image * extent[1] + row) * extent[0] + column + np.arange(count)
        columns, rows, images = at % extent[0], at // extent[0] % extent[1], at // (extent[0] * extent[1])
        return np.stack([columns + low[0] + taps[0], rows + low[1] + taps[1], images], -1)

    def shared(self, begin: int) -> Array:
        """Addresses of the elements of a box that begins there."""
        if begin % 128:
            raise PtxError("a box in shared memory does not begin on 128 bytes")
        return swizzled(
            np.uint64(begin) + np.arange(0, self.size * self.addresses.size, self.size, dtype=np.uint64), self.mask
        )

    def read(self, machine: HopperMachine) -> Array:
        """The elements' bytes, [elements, bytes]; 0 outside the tensor."""
        values = np.zeros((self.addresses.size, self.size), np.uint8)
        inside = self.inside.reshape(-1)
        values[inside] = machine.fetch("global", self.addresses.reshape(-1)[inside], self.size)
        if self.tf32 and (values.view(np.uint32) & np.uint32(0x1FFF)).any():
            raise PtxError("how a copy rounds to TF32 is not known")
        return values

    def write(self, machine: HopperMachine, values: Array) -> None:
        inside = self.inside.reshape(-1)
        machine.put("global", self.addresses.reshape(-1)[inside], values[inside])
