"""The process that proves kernels: it runs small cases of each unit, and may crash or hang.

    python -m alexnet_ext.selfcheck.child < task        # selfcheck/prover.py starts it

The task is a line of JSON: the device, the settings, the units. The answers are lines of JSON: one when it is ready,
then for each unit, in order, one before each case and one with the outcome.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._difference import relative_difference
from ..ops import _backend, _known, _race
from ..ops._register import RECORDS
from ..ops.conv2d_bias_relu.candidates import taken
from .cases import SMALL, Case, SgdCase
from .guards import Fences

RUNS = 3
TF32_EPS = 2.0**-10


def judge(
    unit: _known.Unit, device: torch.device, tell: Callable[[str], None] = lambda case: None
) -> tuple[_known.State, str]:
    """The state of a unit after its small cases, and the reason unless it is proven; ``tell(case)`` before each."""
    cases = [case for case in SMALL if case.op == unit.op and unit.layout in case.layouts]
    backend, _, candidate = unit.backend.partition(" ")
    if not cases:
        return "unknown", f"no small case is {unit.layout}"
    if backend not in _backend.kernels(unit.op, device.type):
        return "unknown", "no such kernel is loaded in the process that proves it"
    taken.clear()
    try:
        with _backend.preferring((unit.backend,), device.type):
            for case in cases:
                # What is known of sgd_step depends on no layout: all are of one unit.
                for layout in case.layouts if isinstance(case, SgdCase) else (unit.layout,):
                    for grad in case.grads:
                        tell(case.name)
                        wrong = _wrong(case, unit, device, layout, grad)
                        if wrong:
                            return "refused", f"{case.name}, {layout}, gradient {grad}: {wrong}"
    except Exception as error:  # whatever it is, it is this kernel's verdict and not the end of the others'
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return ("unknown" if _race.is_trouble(error) else "refused"), said
    if candidate and not taken[candidate]:
        return "refused", _known.NOT_APPLICABLE
    return "proven", ""


def _wrong(case: Case, unit: _known.Unit, device: torch.device, layout: str, grad: str) -> str:
    """What is wrong with some runs of a case; "" for nothing."""
    dtype = getattr(torch, unit.dtype)
    expected, caps = case.reference(grad), [cap for _, cap in case.limits(dtype)]
    if dtype == torch.float32 and RECORDS[unit.op].product and "tf32" in _known.settings():
        caps = [max(cap, 4 * TF32_EPS) for cap in caps]
    first: list[Tensor] = []
    for run in range(1, RUNS + 1):
        fences = Fences(device)
        with fences:
            results = case.ours(device, dtype, layout, grad)
        broken = fences.broken()
        if broken:
            return broken
        for name, result, exact, cap in zip(case.results, results, expected, caps, strict=True):
            error = relative_difference(result, exact)
            if not error <= cap:
                return f"{name} is off by {error:.2g} in run {run}, {cap:.2g} is allowed"
        first = first or results
        if not all(_same_bits(a, b) for a, b in zip(first, results, strict=True)):
            return f"run {run} differs from run 1"
    return ""


def _same_bits(a: Tensor, b: Tensor) -> bool:
    bits = getattr(torch, f"int{8 * a.itemsize}")
    return torch.equal(a.view(bits), b.view(bits))


def _is_usable(device: torch.device) -> bool:
    """Whether the device still computes: an illegal access spoils a GPU's context."""
    try:
        return float(torch.ones(8, device=device).sum()) == 8
    except Exception:
        return False


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers and kernels print is no answer
    task: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _race.allowed = False
    device = torch.device(task["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _known.Settings(*task["settings"]).apply()

    def answer(**said: Any) -> None:
        print(json.dumps(said), file=answers, flush=True)

    answer(ready=_is_usable(device))
    for unit in task["units"]:
        begun = time.monotonic()
        state, reason = judge(_known.Unit(*unit), device, lambda case: answer(case=case))
        usable = _is_usable(device)
        if state == "proven" and not usable:
            state, reason = "refused", "the device does not compute any more after it"
        answer(state=state, reason=reason, seconds=round(time.monotonic() - begun, 3), usable=usable)
        if not usable:
            break
    os._exit(0)  # a broken context may hang while it is taken down


if __name__ == "__main__":
    main()
