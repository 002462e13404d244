"""The specs found on disk, and what follows from them: lists of ops and cases, tensors of a case, calls.

What pytest is needed for is in cases.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alexnet_ext import ops
from tests.support import ROOT
from tests.support.spec import Case, Spec, Tensors, lay_out, pair

SPECS: dict[str, Spec] = {
    folder.name: importlib.import_module(f"tests.ops.{folder.name}.spec").SPEC
    for folder in sorted((ROOT / "tests/ops").iterdir())
    if (folder / "spec.py").is_file()
}


def named(*flags: str) -> tuple[str, ...]:
    """The ops of which all of these are true ("not product": of which it is not)."""
    wanted = [(flag.removeprefix("not "), not flag.startswith("not ")) for flag in flags]
    return tuple(name for name, spec in SPECS.items() if all(getattr(spec, flag) == value for flag, value in wanted))


# Those with a gradient are compared with float64 by one oracle; those without have their own test.
OPS, WITHOUT_GRADIENT = named("gradient"), named("not gradient")
ON_GPU, IN_TRITON = named("gradient", "on_gpu"), named("gradient", "in_triton")
PRODUCTS = named("product")
MEMORY_BOUND = named("gradient", "on_gpu", "not product")
CASES = {name: spec.cases for name, spec in SPECS.items()}
ALEXNET = {name: spec.alexnet for name, spec in SPECS.items()}


def of_all(field: str, names: tuple[str, ...] = OPS) -> tuple[Any, ...]:
    """What these ops' specs have in a field, in one tuple."""
    return tuple(value for name in names for value in getattr(SPECS[name], field))


EXAMPLES = of_all("examples")
OTHER_EXAMPLES = of_all("examples", WITHOUT_GRADIENT)


def alexnet_cases(op: str, batch: int) -> tuple[Case, ...]:
    """The op's calls in AlexNet, at this batch size where they have one."""

    def batched(case: Case) -> Case:
        grown = {"x"} if "x" in case.shapes else set(case.shapes)
        batches = {n: (batch, *s[1:]) for n, s in case.items() if s and s[0] == 1 and n in grown}
        return replace(case, shapes=case.shapes | batches)

    return tuple(batched(case) for case in ALEXNET[op])


def is_covered(case: Case) -> bool:
    """Whether our kernels take a case: a winner is one byte, and LRN takes one unbatched image for (N, C, L)."""
    taps = torch.Size(pair(case.constants.get("kernel_size", 1))).numel()
    return taps <= 225 and ("lrn_size" not in case.constants or len(case.shapes["x"]) == 4)


def fused(case: Case, tensors: Tensors, backend: str = "auto") -> Tensor:
    return _result(partial(getattr(ops, case.op), backend=backend), case, tensors)


def stock(case: Case, tensors: Tensors) -> Tensor:
    return _result(SPECS[case.op].stock, case, tensors)


def _result(function: Callable[..., Any], case: Case, tensors: Tensors) -> Tensor:
    in_place = SPECS[case.op].in_place
    if in_place is None:
        return function(**tensors, **case.constants)
    copies = in_place.copies(case, tensors)
    in_place.call(function, case, copies)
    return in_place.result(case, copies)


def repeated(case: Case, tensors: Tensors, backend: str = "auto") -> Callable[[], Any]:
    """Calls the op, on the same tensors each time if it updates them."""
    in_place = SPECS[case.op].in_place
    if in_place is None:
        return partial(fused, case, tensors, backend)
    function = partial(getattr(ops, case.op), backend=backend)
    return partial(in_place.call, function, case, in_place.copies(case, tensors))


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The case in this dtype where that is one of its constants; of the others ``make`` makes the tensors so."""
    return replace(case, constants=case.constants | {"dtype": dtype}) if "dtype" in case.constants else case


def make(
    case: Case,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    requires_grad: bool = True,
    seed: int = 0,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensors:
    """The case's tensors as its spec draws them; ``layout`` is the first one's. Rounded once, so that all oracles see
    the same. Where dtype is a constant of the op, the tensors have their own."""
    drawn = SPECS[case.op].draw(case, torch.Generator().manual_seed(seed))
    first, has_gradient = next(iter(drawn)), SPECS[case.op].gradient
    tensors: Tensors = {}
    for name, values in drawn.items():
        if values is None:
            tensors[name] = None
            continue
        placed = ((values * scale).to(dtype) if has_gradient else values).to(device)
        tensors[name] = lay_out(placed, layout if name == first else "contiguous")
        if has_gradient:
            tensors[name].requires_grad_(requires_grad)
    return tensors


def wanting_grad(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}


def raw_forward(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.alexnet_ext.<op>``."""
    pairs = ("kernel_size", "stride", "padding", "dilation")
    constants = (pair(value) if name in pairs else value for name, value in case.constants.items())
    return (*tensors.values(), *constants)


def raw_backward(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.alexnet_ext.<op>_backward`` after a forward of the same tensors, dy random."""
    arguments = raw_forward(case, tensors)
    with torch.no_grad():
        outputs = getattr(torch.ops.alexnet_ext, case.op)(*arguments)
    y, *saved = outputs if isinstance(outputs, tuple) else (outputs,)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    return SPECS[case.op].backward_arguments(dy, tensors, y, saved, arguments[len(tensors) :])


def runs_ours(y: Tensor) -> bool:
    """Whether one of the package's operators is among those that y was computed by."""
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if "alexnet_ext" in type(node).__name__:  # PyTorch 2.11 tells neither name() nor next_functions of such a node
            return True
        nodes += [following for following, _ in node.next_functions if following is not None]
    return False


def bytes_moved(case: Case, width: int = 4) -> tuple[int, int]:
    """(forward, backward): bytes that must be read and written at least, in values of this many bytes."""
    return SPECS[case.op].moved(case, width)
