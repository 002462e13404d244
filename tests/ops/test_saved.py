"""The tensors saved for the backward: those that the required gradients need. Others may change meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import cases, oracle
from tests.support.cases import Case


def needed(case: Case, wanted: tuple[str, ...]) -> set[str]:
    names = set().union(*(cases.SPECS[case.op].needs[name] for name in wanted))
    return names if case.constants.get("relu", True) else names - {"y"}


def subsets(case: Case) -> list[tuple[str, ...]]:
    names = [name for name, shape in case.items() if shape is not None]
    return [some for count in range(1, len(names) + 1) for some in itertools.combinations(names, count)]


each_subset = pytest.mark.parametrize(
    ("case", "wanted"),
    [pytest.param(case, some, id=f"{case.id}-{'+'.join(some)}") for case in cases.EXAMPLES for some in subsets(case)],
)


def make(case: Case, wanted: tuple[str, ...], layout: str = "contiguous") -> cases.Tensors:
    """The case's tensors, no leaves, so that they may be written to; those ``wanted`` have a gradient."""
    tensors = cases.make(case, layout=layout, requires_grad=False)
    return {name: t if t is None else t.requires_grad_(name in wanted) * 1 for name, t in tensors.items()}


def gradients(y: Tensor, tensors: cases.Tensors, wanted: tuple[str, ...]) -> tuple[Tensor, ...]:
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad(y, [tensors[name] for name in wanted], dy)


@pytest.mark.usefixtures("native")
@each_subset
def test_nothing_is_saved_that_no_wanted_gradient_needs(case: Case, wanted: tuple[str, ...]) -> None:
    tensors, saved = make(case, wanted), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = cases.fused(case, tensors)
    names = {t.data_ptr(): name for name, t in (tensors | {"y": y}).items() if t is not None}
    assert {names[pointer] for pointer in saved if pointer in names} == needed(case, wanted)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("case", "wanted", "changed"),
    [
        pytest.param(case, some, changed, id=f"{case.id}-{'+'.join(some)}-{changed}")
        for case in cases.EXAMPLES
        for some in subsets(case)
        for changed in (*(name for name, shape in case.items() if shape is not None), "y")
    ],
)
def test_what_is_not_needed_may_change_before_the_backward(case: Case, wanted: tuple[str, ...], changed: str) -> None:
    """The gradients stay what they were. Ours lets one change whatever stock does, except x of a block."""

    def after_a_change(op: Callable[..., Tensor]) -> tuple[Tensor, ...] | None:
        tensors = make(case, wanted)
        y = op(case, tensors)
        (tensors | {"y": y})[changed].detach().add_(1)
        try:
            return gradients(y, tensors, wanted)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            return None

    found, stock = after_a_change(cases.fused), after_a_change(cases.stock)
    if changed in needed(case, wanted):
        assert found is None
        assert stock is None or case.op == "relu_lrn_max_pool2d"
    else:
        untouched = make(case, wanted)
        torch.testing.assert_close(found, gradients(cases.fused(case, untouched), untouched, wanted))


def in_one_go(op: Callable[..., Tensor], case: Case, tensors: cases.Tensors, wanted: tuple[str, ...]) -> Any:
    return gradients(op(case, tensors), tensors, wanted)


def compiled(op: Callable[..., Tensor], case: Case, tensors: cases.Tensors, wanted: tuple[str, ...]) -> Any:
    torch._dynamo.reset()
    run = torch.compile(lambda given: op(case, given), fullgraph=True, backend="aot_eager")
    return gradients(run(tensors), tensors, wanted)


def kept_elsewhere(op: Callable[..., Tensor], case: Case, tensors: cases.Tensors, wanted: tuple[str, ...]) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        return gradients(op(case, tensors), tensors, wanted)


def second_order(op: Callable[..., Tensor], case: Case, tensors: cases.Tensors, wanted: tuple[str, ...]) -> Any:
    inputs = [tensors[name] for name in wanted]
    first = torch.autograd.grad(op(case, tensors).square().sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


@pytest.mark.usefixtures("poisoned", "native")
@pytest.mark.parametrize("how", [in_one_go, compiled, kept_elsewhere, second_order])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@each_subset
def test_gradients_are_right_without_the_rest(
    case: Case, wanted: tuple[str, ...], layout: str, how: Callable[..., tuple[Tensor, ...]]
) -> None:
    """The placeholder of a tensor that was not saved is full of NaN here."""
    tensors = make(case, wanted, layout)
    exact = oracle.widened(tensors)
    other = how if how is second_order else in_one_go
    for ours, theirs in zip(
        how(cases.fused, case, tensors, wanted), other(cases.stock, case, exact, wanted), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
