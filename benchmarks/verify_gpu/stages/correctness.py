"""Compares values and all gradients of the tests' own cases with float64, on the device, for each of our backends.

Each candidate of the convolution (``candidates.py``), backend or not, is compared with it on AlexNet's five layers. A
part that finds too little time for all cases takes a fair sample of them, and says so.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from alexnet_ext import _library
from alexnet_ext.ops import _backend
from alexnet_ext.ops._race import Candidate
from tests.support import cases, oracle
from tests.support.cases import Case

from .. import common
from ..common import attempt, backends, choosing, each_way
from ..report import Finding
from . import Task

LAYOUTS = {"native": ("channels_last", "contiguous", "sliced", "offset"), "triton": ("channels_last", "contiguous")}
"""Triton compiles a second for each new set of constants: layouts that it treats alike are left out."""
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
EXAMPLES = cases.EXAMPLES + cases.OTHER_EXAMPLES
SHOWN = 5
SIDES = {227: 35, 27: 9, 13: 7}
"""Smaller sides of AlexNet's images, as float64 is slow. A product's blocks depend on channels, groups and taps."""


def run(task: Task) -> Iterator[Finding]:
    """A finding for each op, backend and dtype, and one for each of its first failures."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = task.device
    asked = [way for way in each_way(device) if way in LAYOUTS]
    for backend, op, dtype in itertools.product(asked, _backend.OPS, DTYPES):
        if backend in backends(op, device) and task.wants(f"{backend} {op} {cases.dtype_id(dtype)}"):
            chosen = cases.CASES[op] if device == "cuda" else [case for case in EXAMPLES if case.op == op]
            chosen = [case for case in chosen if cases.is_covered(case)]
            checks = {
                f"{case.id} {layout} {cases.dtype_id(dtype)} {backend}": partial(
                    compare, case, dtype, layout, backend, device
                )
                for case, layout in itertools.product(chosen, LAYOUTS[backend])
            }
            yield from held(f"{op} {backend} {cases.dtype_id(dtype)}", checks, backend, task.end)
    if "auto" not in _backend.kernels("conv2d_bias_relu", device):
        return
    for dtype in DTYPES:
        if task.wants(f"auto candidates {cases.dtype_id(dtype)}"):
            checks = dict(candidate_checks(dtype, device))
            yield from held(f"conv2d_bias_relu, candidates, {cases.dtype_id(dtype)}", checks, "auto", task.end)
        if task.wants(f"auto cutlass {cases.dtype_id(dtype)}") and device == "cuda":
            yield from cutlass_findings(dtype)


def held(name: str, checks: dict[str, Callable[[], object]], way: str, end: float) -> Iterator[Finding]:
    order = list(checks)
    random.Random(0).shuffle(order)
    failed, reached = [], 0
    for check in order:
        if time.monotonic() > end:
            break
        reached += 1
        found = attempt(check, checks[check], backend=way)
        if not found.ok:
            failed.append(found)
    yield from failed[:SHOWN]
    detail = f"{reached - len(failed)} of {reached} as float64"
    detail += f"; time for {reached} of {len(order)}" if reached < len(order) else ""
    yield Finding(name, not failed and reached > 0, detail, about={"backend": way})


def compare(case: Case, dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    tensors = cases.make(case, dtype, layout, device=device)
    oracle.assert_matches_float64(cases.in_dtype(case, dtype), tensors, backend)


def layers() -> list[Case]:
    """AlexNet's convolutions, on two small images."""

    def small(case: Case) -> Case:
        _, channels, *sides = case.shapes["x"]
        return replace(case, shapes=case.shapes | {"x": (2, channels, *(SIDES[side] for side in sides))})

    return [small(case) for case in cases.ALEXNET["conv2d_bias_relu"]]


def named(name: str) -> Callable[[str, Sequence[Candidate]], Candidate]:
    """The candidate of this name if there is one, else the first: some are for one direction only."""
    return lambda what, given: next((found for found in given if found.name == name), given[0])


def candidate_names(case: Case, dtype: torch.dtype, layout: str, device: str) -> list[str]:
    """The names of all candidates of such a call and its gradients, in the order of their lists."""
    names: dict[str, None] = {}

    def note(what: str, given: Sequence[Candidate]) -> Candidate:
        names.update(dict.fromkeys(found.name for found in given))
        return given[0]

    with choosing(note, device):
        common.gradients(case, cases.make(case, dtype, layout, device=device), "auto")
    return list(names)


def candidate_checks(dtype: torch.dtype, device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for case, layout in itertools.product(layers(), ("channels_last", "contiguous")):
        for name in candidate_names(case, dtype, layout, device):
            yield f"{case.id} {layout} {name}", partial(compare_candidate, name, case, dtype, layout, device)


def compare_candidate(name: str, case: Case, dtype: torch.dtype, layout: str, device: str) -> None:
    with choosing(named(name), device):
        compare(case, dtype, layout, "auto", device)


def cutlass_findings(dtype: torch.dtype) -> Iterator[Finding]:
    torch.backends.cudnn.allow_tf32 = True
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for library, sm90 in ((_library.CUTLASS, False), (_library.SM90, True)):
        reason = library.reason
        if sm90 and not hopper:
            reason = "the device is not of compute capability 9.0"
        if not sm90 and hopper and _library.SM90.loaded and dtype.itemsize == 2:
            reason = "on 9.0 sm90 takes its place"
        if reason:
            yield Finding(f"conv2d_bias_relu {library.name} {cases.dtype_id(dtype)}", None, f"skipped: {reason}")
            continue
        for case in cases.alexnet_cases("conv2d_bias_relu", 4):
            name = f"{case.id} channels_last {cases.dtype_id(dtype)} {library.name}"
            yield attempt(name, partial(compare_cutlass, case, dtype, "cuda", sm90), backend="auto")


def compare_cutlass(case: Case, dtype: torch.dtype, device: str, sm90: bool = False) -> None:
    """All values are exact in bf16, fp16 and TF32: nothing is rounded except sums. One value of x is NaN."""
    from alexnet_ext.ops.conv2d_bias_relu import cutlass
    from alexnet_ext.ops.conv2d_bias_relu.shared import Convolution, Direction

    summands = cases.SPECS[case.op].summands
    tensors = cases.make(case, torch.bfloat16, "channels_last", requires_grad=False, device=device)
    x, weight, bias, *constants = cases.raw_forward(
        case, {n: t if t is None else t.to(dtype) for n, t in tensors.items()}
    )
    p = Convolution(*constants)
    gradients = {} if sm90 and dtype == torch.float32 else {Direction.INPUT: "x", Direction.WEIGHT: "weight"}
    directions = (Direction.FORWARD, *gradients)
    assert all(cutlass.applies(x, weight, p, direction, sm90) for direction in directions), "it does not apply"
    holed = x.clone()
    holed[0, 0, 5, 5] = torch.nan
    exact = [t.double() for t in (holed, weight, bias)]
    size = F.conv2d(*(t.abs() for t in exact), *constants).nan_to_num(0).max().item()
    for relu in (False, True):
        y = F.conv2d(*exact, *constants)
        y = F.relu(y) if relu else y
        ours = cutlass.forward(holed, weight, bias, p, relu, sm90)
        oracle.assert_accurate("y", ours, y.cpu(), None, summands(case, "y"), size)
    dz = torch.randn_like(y).bfloat16()
    mask = [True, True, False]
    given = [t.double() for t in (dz, x, weight)]
    exact_gradients, of_parts = (
        torch.ops.aten.convolution_backward(*each, None, *constants[:3], False, [0, 0], constants[3], mask)
        for each in (given, [t.abs() for t in given])
    )
    for direction, name in gradients.items():
        ours = cutlass.gradient(dz.to(dtype), x, weight, p, direction, sm90)
        largest = of_parts[direction].max().item()
        oracle.assert_accurate(name, ours, exact_gradients[direction].cpu(), None, summands(case, name), largest)
