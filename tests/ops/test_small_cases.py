"""The small cases that prove a kernel: right kernels meet their limits, each kind of wrong one fails."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from alexnet_ext import ops
from alexnet_ext._difference import relative_difference
from alexnet_ext.ops import _backend
from alexnet_ext.ops.augment.reference import as_planes
from alexnet_ext.selfcheck.cases import ANY, DENSE, DTYPES, GRADS, SMALL, Case, OpCase
from alexnet_ext.selfcheck.compare import CheckRow, case_row
from tests.support import cases

CPU = torch.device("cpu")
each_op = pytest.mark.parametrize("op", _backend.OPS)
each_op_with_gradient = pytest.mark.parametrize("op", [op for op in _backend.OPS if op not in cases.WITHOUT_GRADIENT])


def of(op: str) -> list[Case]:
    return [case for case in SMALL if case.op == op]


def combinations(case: Case, dtypes: Any = tuple(DTYPES)) -> Iterator[tuple[Any, str, str]]:
    return itertools.product(dtypes, case.layouts, case.grads)


def failed(op: str) -> tuple[set[tuple[str, str, str]], set[tuple[str, str, str]]]:
    """The (dtype, layout, kind of gradient) that a case of the op fails with, and all there are."""
    found: dict[tuple[str, str, str], list[CheckRow]] = {}
    for case in of(op):
        for dtype, layout, grad in combinations(case):
            found.setdefault((dtype, layout, grad), []).append(case_row(case, CPU, dtype, layout, grad))
    return {given for given, rows in found.items() if not all(row.ok for row in rows)}, set(found)


@each_op
def test_every_op_has_small_cases_of_every_kind(op: str) -> None:
    small = of(op)
    assert len({case.name for case in small}) == len(small) >= 3
    for case in small:
        assert case.layouts == ANY
        assert case.grads in ((("dense",),) if op in cases.WITHOUT_GRADIENT else (GRADS, DENSE))
    assert sum(case.grads == small[0].grads for case in small) >= 3


@each_op
def test_references_say_something(op: str) -> None:
    """A reference of zeros alone would leave a kernel that writes nothing unnoticed."""
    for case in of(op):
        for grad in case.grads:
            reference = case.reference(grad)
            assert len(reference) == len(case.results)
            for name, tensor in zip(case.results, reference, strict=True):
                assert tensor.dtype == torch.float64
                assert tensor.isfinite().all()
                assert tensor.any(), (case.name, grad, name)


@each_op
def test_our_kernels_meet_the_limits(op: str) -> None:
    for case in of(op):
        for given in combinations(case):
            row = case_row(case, CPU, *given)
            assert row.ok, (given, row)
        for dtype, layout, grad in combinations(case, [torch.float64]):
            results = case.ours(CPU, dtype, layout, grad)
            for ours, exact, (_, cap) in zip(results, case.reference(grad), case.limits(dtype), strict=True):
                assert relative_difference(ours, exact) <= cap < 1e-12, (case.name, layout, grad)


def plant(monkeypatch: pytest.MonkeyPatch, op: str, fault: Callable[[Tensor, Tensor], Tensor]) -> None:
    """``fault`` makes a result of what is right and of the first tensor that is only read."""
    right = getattr(ops, op)

    def returning(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return fault(right(x, *args, **kwargs), x)

    def in_place(*, parameters: list[Tensor], gradients: list[Tensor], **kwargs: Any) -> None:
        right(parameters=parameters, gradients=gradients, **kwargs)
        parameters[-1].copy_(fault(parameters[-1].clone(), gradients[-1]))

    monkeypatch.setattr(ops, op, in_place if op == "sgd_step" else returning)


@each_op
def test_a_kernel_that_is_wrong_in_one_dtype_fails_there(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(y: Tensor, x: Tensor) -> Tensor:
        given = y.dtype if op == "augment" else x.dtype
        return y * 1.1 if given == torch.bfloat16 else y

    plant(monkeypatch, op, fault)
    wrong, there = failed(op)
    assert wrong == {given for given in there if given[0] == "bf16"}


@each_op
def test_a_kernel_that_reads_gaps_fails_where_there_are_some(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(y: Tensor, x: Tensor) -> Tensor:
        return y if _is_dense(x) else y + x.detach().as_strided((), (), x.storage_offset() + 1).to(y.dtype)

    plant(monkeypatch, op, fault)
    wrong, there = failed(op)
    assert wrong == {given for given in there if given[1] == "strided"}


def _is_dense(x: Tensor) -> bool:
    images = as_planes(x) if x.dtype == torch.uint8 else x
    return images.is_contiguous() or (images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last))


@each_op_with_gradient
@pytest.mark.parametrize("grad", GRADS)
def test_a_gradient_that_is_wrong_for_some_strides_fails_there(
    op: str, grad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kind(dy: Tensor, y: Tensor) -> str:
        if dy.stride() == y.stride():
            return "dense"
        return "expanded" if 0 in dy.stride() else "permuted"

    def fault(y: Tensor, x: Tensor) -> Tensor:
        if y.numel() > y.shape[1]:  # of one pixel all gradients are dense
            y.register_hook(lambda dy: dy * 1.1 if kind(dy, y) == grad else None)
        return y

    plant(monkeypatch, op, fault)
    wrong, there = failed(op)
    assert wrong == {given for given in there if given[2] == grad}


@each_op
def test_a_kernel_that_leaves_the_last_value_out_fails(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(y: Tensor, x: Tensor) -> Tensor:
        last = torch.ones(y.shape, dtype=y.dtype)
        last.view(-1)[-1:] = torch.nan
        return y * last

    plant(monkeypatch, op, fault)
    wrong, there = failed(op)
    assert wrong == there


def test_values_in_doubt_get_no_gradient() -> None:
    """Every result that a gradient reaches keeps its ReLU and its winner where values are rounded to bf16."""
    masked = [case for case in SMALL if isinstance(case, OpCase) and case.settled is not None]
    assert {case.op for case in masked} == {"conv2d_bias_relu", "linear_bias_relu", "relu_lrn_max_pool2d"}
    assert any((case._dy["dense"] == 0).float().mean() > 0.1 for case in masked)
    for case in masked:
        dense, expanded = case._dy["dense"], case._dy["expanded"]
        assert not ((dense == 0) & (expanded != 0) & (_drawn(case, dense) != 0)).any(), case.name


def _drawn(case: OpCase, dy: Tensor) -> Tensor:
    """What dy is where nothing is masked."""
    unmasked = OpCase(case.name, case.op, case.shapes, case.spacings, case.constants, case.terms)
    return unmasked._dy["dense"]
