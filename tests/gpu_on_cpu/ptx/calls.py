"""Calls of the compiler's own functions: fp64's power, computed exactly here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import dtype_of
from .program import Instruction, PtxError

if TYPE_CHECKING:
    from .machine import Machine

Step = Callable[[Any], None]
FUNCTIONS = {"__internal_accurate_pow": np.power}  # for a positive base


def cell(machine: Machine, text: str) -> Any:
    """The storage of ``[param0+0]`` or ``param0``: a number for each thread."""
    name = re.fullmatch(r"\[?((?:param|retval)\d+)(?:\+0\])?", text)
    if name is None:
        raise PtxError(f"not a call's parameter: {text}")
    return machine.registers.setdefault(name[1], np.empty(machine.threads, np.uint64))


def is_of_call(i: Instruction) -> bool:
    """Whether an instruction passes a parameter, calls, or reads a returned value."""
    place = {"st": 0, "ld": 1}.get(i.op[0])
    passes = place is not None and i.op[1] == "param" and re.match(r"\[(param|retval)\d+\+", i.operands[place])
    return i.op[0] == "call" or bool(passes)


def step(machine: Machine, i: Instruction) -> Step:
    kind = dtype_of(i.op[-1]) if i.op[0] != "call" else np.dtype(np.float64)
    if kind != np.float64:
        raise PtxError(f"not known: {i.text}")
    if i.op[0] == "st":
        to, read = cell(machine, i.operands[0]).view(kind), machine.source(i.operands[1], "f64")

        def pass_on(some: Any) -> None:
            to[some] = read(some)

        return pass_on
    if i.op[0] == "ld":
        write, of = machine.target(i.operands[0]), cell(machine, i.operands[1]).view(kind)
        return lambda some: write(some, of[some])
    result, name, *given = (text.strip("()") for text in i.operands if text not in "()")
    function, returned = FUNCTIONS[name], cell(machine, result).view(kind)
    values = [cell(machine, text).view(kind) for text in given]

    def call(some: Any) -> None:
        returned[some] = function(*(value[some] for value in values))

    return call
