"""Values and all gradients of the tests' own cases against float64, on the device, by every backend of ours.

The convolution by CUTLASS, which is no backend, is held against it on AlexNet's five layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from alexnet_ext import _library
from alexnet_ext.ops import _backend
from benchmarks import harness
from tests import cases, oracle
from tests.cases import Case

from ..common import attempt, backends, each_backend
from ..report import Finding

# Triton compiles each new set of constants for a second: there the layouts that it treats alike are left out.
LAYOUTS = {"native": ("channels_last", "contiguous", "sliced", "offset"), "triton": ("channels_last", "contiguous")}
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
EXAMPLES = cases.EXAMPLES + cases.AUGMENT_EXAMPLES
SHOWN = 5


def run(device: str) -> Iterator[Finding]:
    """A finding an op, backend and dtype, and one for each of the first failures in it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for backend, dtype, op in itertools.product(each_backend(device), DTYPES, _backend.OPS):
        if backend not in backends(op, device):
            continue
        chosen = cases.CASES[op] if device == "cuda" else [case for case in EXAMPLES if case.op == op]
        failed = []
        for case, layout in itertools.product(chosen, LAYOUTS[backend]):
            name = f"{case.id} {layout} {cases.dtype_id(dtype)} {backend}"
            found = attempt(name, partial(compare, case, dtype, layout, backend, device))
            if not found.ok:
                failed.append(found)
        yield from failed[:SHOWN]
        count = len(chosen) * len(LAYOUTS[backend])
        detail = f"{count - len(failed)} of {count} as float64"
        yield Finding(f"{op} {backend} {cases.dtype_id(dtype)}", not failed, detail)
    if device == "cuda":
        yield from cutlass_findings()


def cutlass_findings() -> Iterator[Finding]:
    torch.backends.cudnn.allow_tf32 = True
    layers, halves = harness.alexnet_cases("conv2d_bias_relu", 4), (torch.bfloat16, torch.float16)
    for library, sm90, dtypes in ((_library.CUTLASS, False, (*halves, torch.float32)), (_library.SM90, True, halves)):
        reason = library.reason
        if sm90 and torch.cuda.get_device_capability() != (9, 0):
            reason = "the device is not of compute capability 9.0"
        if reason:
            yield Finding(f"conv2d_bias_relu {library.name}", None, f"skipped: {reason}")
            continue
        for dtype, case in itertools.product(dtypes, layers):
            name = f"{case.id} channels_last {cases.dtype_id(dtype)} {library.name}"
            yield attempt(name, partial(compare_cutlass, case, dtype, "cuda", sm90))


def compare(case: Case, dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    tensors = cases.make(case, dtype, layout, device=device)
    oracle.assert_matches_float64(cases.in_dtype(case, dtype), tensors, backend)


def compare_cutlass(case: Case, dtype: torch.dtype, device: str, sm90: bool = False) -> None:
    """All values are of bf16, which fp16 and TF32 can say as well: but for sums nothing is rounded. One of x is NaN."""
    from alexnet_ext.ops.conv2d_bias_relu import cutlass

    tensors = cases.make(case, torch.bfloat16, "channels_last", requires_grad=False, device=device)
    x, weight, bias, *constants = cases.raw_forward(
        case, {n: t if t is None else t.to(dtype) for n, t in tensors.items()}
    )
    gradients = ((0, "x"),) if sm90 else ((0, "x"), (1, "weight"))
    directions = (None, *(wanted for wanted, _ in gradients))
    assert all(cutlass.applies(x, weight, *constants, wanted, sm90) for wanted in directions), "it does not apply"
    holed = x.clone()
    holed[0, 0, 5, 5] = torch.nan
    exact = [t.double() for t in (holed, weight, bias)]
    y, size = F.relu(F.conv2d(*exact, *constants)), F.conv2d(*(t.abs() for t in exact), *constants).nan_to_num(0)
    ours = cutlass.forward(holed, weight, bias, *constants, sm90=sm90)
    oracle.assert_accurate("y", ours, y.cpu(), None, oracle.summands(case, "y"), size.max().item())
    dz = torch.randn_like(y).bfloat16()
    mask = [True, True, False]
    given = [t.double() for t in (dz, x, weight)]
    exact_gradients, of_parts = (
        torch.ops.aten.convolution_backward(*each, None, *constants[:3], False, [0, 0], constants[3], mask)
        for each in (given, [t.abs() for t in given])
    )
    for wanted, name in gradients:
        (ours,) = cutlass.gradients(dz.to(dtype), x, weight, *constants, wanted, sm90)
        largest = of_parts[wanted].max().item()
        oracle.assert_accurate(name, ours, exact_gradients[wanted].cpu(), None, oracle.summands(case, name), largest)
