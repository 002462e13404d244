"""The reports of ``accelerate`` and ``restore``."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line of a report."""

    name: str
    """The first of the layers, as ``named_modules`` calls it."""
    pattern: str
    """The pattern, as in ``"Conv2d -> ReLU"``."""
    action: str
    """``"fused"``, ``"already fused"`` or ``"left alone"``."""
    reason: str
    """Why it was left alone, else empty."""


class Report(tuple[Row, ...]):
    """What ``accelerate`` did: the rows, one for each pattern fused and each Conv2d, LocalResponseNorm and MaxPool2d
    left alone. Prints as a table; ``as_dicts()`` is for JSON."""

    __slots__ = ()

    def as_dicts(self) -> list[dict[str, str]]:
        """The rows as dictionaries of strings."""
        return [row._asdict() for row in self]

    def __str__(self) -> str:
        lines = [Row._fields, *self]
        widths = [max(len(line[i]) for line in lines) for i in range(len(Row._fields))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )
