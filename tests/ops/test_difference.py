"""``relative_difference``: the numbers by hand, and every way in which two tensors do not agree at all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alexnet_ext._difference import relative_difference

NAN, INF = math.nan, math.inf


def of(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("tensor", "reference", "order", "least", "expected"),
    [
        ((3, -8), (3, -8), INF, 0, 0),
        ((1, -8.5, 3), (1, -8, 4), INF, 0, 1 / 8),
        ((3, 4, 1), (3, 4, 0), 2, 0, 1 / 5),
        ((3, 4, 1), (3, 4, 0), 2, 4, 1 / 5),
        ((3, 4, 1), (3, 4, 0), 2, 10, 1 / 10),
        ((0, 1), (0, 0), INF, 4, 1 / 4),
        ((0, 1), (0, 0), INF, 0, INF),
        ((0, 0), (-0.0, 0), INF, 0, 0),
        # What is alike and not finite is no part of either norm.
        ((NAN, INF, -INF, 0.5), (NAN, INF, -INF, 0.25), INF, 0, 1),
        ((NAN, INF, -INF, 0.5), (NAN, INF, -INF, 0.25), 2, 0, 1),
        ((NAN, INF, -INF), (NAN, INF, -INF), 2, 0, 0),
        ((NAN, 1), (1, NAN), INF, 8, INF),
        ((1, NAN), (1, 1), 2, 8, INF),
        ((1, 1), (1, NAN), 2, 8, INF),
        ((1, INF), (1, -INF), INF, 8, INF),
        ((1, INF), (1, NAN), INF, 8, INF),
        ((1, 1), (1, INF), 2, 8, INF),
        ((1, INF), (1, 1), 2, 8, INF),
        ((), (), INF, 0, 0),
        ((), (), 2, 0, 0),
    ],
)
def test_difference(
    tensor: tuple[float, ...], reference: tuple[float, ...], order: float, least: float, expected: float
) -> None:
    assert relative_difference(of(*tensor), of(*reference), order, least) == pytest.approx(expected, rel=1e-12)


def test_other_shapes_never_agree() -> None:
    assert relative_difference(torch.ones(3), torch.ones(1, 3)) == INF
    assert relative_difference(torch.ones(0, 3), torch.ones(3, 0)) == INF


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_what_is_no_float_agrees_where_it_is_equal(dtype: torch.dtype) -> None:
    one, other = of(1, 0, 1, dtype=dtype), of(1, 1, 1, dtype=dtype)
    assert relative_difference(one, one.clone()) == 0
    assert relative_difference(one, other, least=100) == INF
    for alike in (of(1, 0, 1, dtype=torch.int32), of(1, 0, 1)):
        assert relative_difference(one, alike) == relative_difference(alike, one) == INF


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [INF, 2])
def test_low_precision_is_compared_in_a_wider_one(dtype: torch.dtype, order: float) -> None:
    """The difference has more digits than the dtype, the sum of squares leaves fp16's range."""
    eps = torch.finfo(dtype).eps
    reference, tensor = torch.full((4096,), 512.0, dtype=dtype), torch.full((4096,), 1 + eps, dtype=dtype)
    assert relative_difference(tensor, reference, order) == pytest.approx((511 - eps) / 512, rel=1e-9)
    exact = reference.double() + 2.0**-30
    assert relative_difference(reference, exact, order) == pytest.approx(2.0**-39, rel=1e-9)


def test_norms_are_summed_in_fp64() -> None:
    assert relative_difference(of(1.5e30, 1e30), of(1e30, 1e30), 2) == pytest.approx(0.5 / 2**0.5, rel=1e-6)


def test_norms_beyond_the_range_of_fp64_prove_nothing() -> None:
    huge = of(1e200, 1e200, 1, dtype=torch.float64)
    assert relative_difference(of(1e200, 1e200, 2, dtype=torch.float64), huge, 2) == INF
    assert relative_difference(huge.clone(), huge, 2) == 0
