"""relu_max_pool2d_lrn, CaffeNet's order: float64, and the effect of the order.

Tests for relu_lrn_max_pool2d too are in test_blocks.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from alexnet_ext.ops import local_response_norm, relu_max_pool2d, relu_max_pool2d_lrn
from tests.support import cases, oracle
from tests.support.cases import Case, each_dtype, each_layout

inf, nan = math.inf, math.nan


@pytest.mark.usefixtures("poisoned")
@each_dtype
@each_layout
@pytest.mark.parametrize("case", cases.params(cases.CASES["relu_max_pool2d_lrn"]))
def test_values_and_gradients(case: Case, dtype: torch.dtype, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, dtype, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_winner_is_the_largest_value_and_then_normalized(layout: str) -> None:
    """Each channel's maximum is normalized by the other channels' maxima, wherever in the window they are."""
    x = torch.zeros(1, 2, 1, 2)
    x[0, :, 0, 0] = torch.tensor([4.0, 1.0])
    x[0, :, 0, 1] = torch.tensor([2.0, 3.0])
    x = cases.lay_out(x, layout).requires_grad_()
    y = relu_max_pool2d_lrn(x, None, 3, 3.0, 1.0, 1.0, (1, 2), 1)
    torch.testing.assert_close(y.flatten(), torch.tensor([4 / 26, 3 / 26]))
    y[0, 0].sum().backward()
    expected = torch.tensor([[[[1 / 26 - 2 * 16 / 26**2, 0.0]], [[0.0, -2 * 12 / 26**2]]]])
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_inf_reach_the_windows_that_see_them(layout: str) -> None:
    x = torch.rand(1, 9, 7, 9) + 0.5
    x[0, 2, 3, 3], x[0, 7, 3, 3] = nan, inf
    y = relu_max_pool2d_lrn(cases.lay_out(x, layout), None, 3, 0.5, 0.75, 1.0, 3, 2)
    expected = torch.zeros(9, 3, 4, dtype=torch.bool)
    expected[[1, 2, 3, 7], 1, 1] = True
    assert torch.equal(y[0].isnan(), expected)
    assert (y[0, [6, 8], 1, 1] == 0).all()


def test_one_op_equals_its_parts() -> None:
    x, bias = torch.randn(2, 7, 9, 8), torch.randn(7)
    y = relu_max_pool2d_lrn(x, bias, 4, 0.9, 0.75, 2.0, 3, 2)
    torch.testing.assert_close(
        y, local_response_norm(relu_max_pool2d(x + bias[:, None, None], 3, 2), 4, 0.9, 0.75, 2.0)
    )
