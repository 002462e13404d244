"""Approximate instructions of PTX: as wrong here as the ISA allows, up or down depending on the result's bits.

A test that passes with these passes with any GPU's. The bounds are those of the PTX ISA, 9.7.3; half an ulp of each is
left for rounding the result. ``.ftz`` replaces subnormal operands and results by zeros of their sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .program import Instruction

if TYPE_CHECKING:
    from .machine import Machine

Array = np.ndarray[Any, Any]
HALF_ULP = 2.0**-24


def _exp2(a: Array) -> Array:
    # NumPy's own raises for exponents far out of fp64's range, which fp32 does not need.
    return np.exp2(np.clip(a, -400.0, 400.0))


# By instruction: the function in fp64, and its largest relative error.
FUNCTIONS: dict[str, tuple[Callable[..., Array], float]] = {
    "sqrt": (np.sqrt, 2.0**-23),
    "rsqrt": (lambda a: 1 / np.sqrt(a), 2.0**-22.9),
    "rcp": (lambda a: 1 / a, 2.0**-23),
    "ex2": (_exp2, 2.0**-22),
    "lg2": (np.log2, 2.0**-22),
    "div": (lambda a, b: a / b, 2.0**-22),
}


def flushed(value: Any) -> Array:
    """Subnormal fp32 numbers as zeros of their sign."""
    value = np.asarray(value, np.float32)
    return np.where(np.abs(value) < np.finfo(np.float32).smallest_normal, np.copysign(np.float32(0), value), value)


def is_approximate(i: Instruction) -> bool:
    return i.op[0] in FUNCTIONS and i.op[-1] == "f32" and ("approx" in i.op or "full" in i.op)


def step(machine: Machine, i: Instruction) -> Callable[[Any], None]:
    function, bound = FUNCTIONS[i.op[0]]
    write = machine.target(i.operands[0])
    sources = [machine.source(text, "f32") for text in i.operands[1:]]
    ftz = "ftz" in i.op

    def run(some: Any) -> None:
        given = [flushed(read(some)) if ftz else np.asarray(read(some)) for read in sources]
        exact = function(*(value.astype(np.float64) for value in given))
        scale = np.abs(exact)
        if i.op[0] == "lg2":  # its error is absolute near 1, where the logarithm is 0
            scale = np.where((given[0] > 0.5) & (given[0] < 2), 1.0, scale)
        # A multiplicative hash of the bits: neighbouring results err in different directions.
        hashed = exact.astype(np.float32).view(np.uint32) * np.uint32(2654435761)
        off = np.where(hashed >> np.uint32(31), 1.0, -1.0) * (bound - HALF_ULP) * scale
        result = np.where(np.isfinite(exact), exact + off, exact).astype(np.float32)
        write(some, flushed(result) if ftz else result)

    return run
