"""Values and all gradients of the tests' own cases against float64, on the device, by every backend of ours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from alexnet_ext.ops import _backend
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


def compare(case: Case, dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    tensors = cases.make(case, dtype, layout, device=device)
    oracle.assert_matches_float64(cases.in_dtype(case, dtype), tensors, backend)
