"""relu_lrn_max_pool2d, the paper's order: float64, the pooling of normalized values, and the edges where they meet.

Tests for relu_max_pool2d_lrn too are in test_blocks.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from alexnet_ext.ops import local_response_norm, relu_lrn_max_pool2d, relu_max_pool2d
from tests.ops.blocks import winners_of_ties
from tests.support import cases, oracle
from tests.support.cases import Case, each_dtype, each_layout

inf, nan = math.inf, math.nan


@pytest.mark.usefixtures("poisoned")
@each_dtype
@each_layout
@pytest.mark.parametrize("case", cases.params(cases.CASES["relu_lrn_max_pool2d"]))
def test_values_and_gradients(case: Case, dtype: torch.dtype, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, dtype, layout))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_winner_is_the_largest_normalized_value_not_the_largest(layout: str) -> None:
    """A large value with a large neighbour loses to a small one with none."""
    x = torch.zeros(1, 2, 1, 2)
    x[0, :, 0, 0] = torch.tensor([4.0, 100.0])
    x[0, :, 0, 1] = torch.tensor([2.0, 0.0])
    x = cases.lay_out(x, layout).requires_grad_()
    y = relu_lrn_max_pool2d(x, None, 3, 3.0, 1.0, 1.0, (1, 2), 1)
    torch.testing.assert_close(y.flatten(), torch.tensor([2 / 5, 100 / 10017]))
    y[0, 0].sum().backward()
    expected = torch.tensor([[[[0.0, 1 / 5 - 2 * 4 / 25]], [[0.0, 0.0]]]])
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_wins_its_window_in_all_channels_that_see_it(layout: str) -> None:
    x = torch.rand(1, 9, 7, 9) + 0.5
    x[0, 4, 3, 3] = nan
    y = relu_lrn_max_pool2d(cases.lay_out(x, layout), None, 5, 0.5, 0.75, 1.0, 3, 2)
    expected = torch.zeros(9, 3, 4, dtype=torch.bool)
    expected[2:7, 1, 1] = True
    assert torch.equal(y[0].isnan(), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inf_becomes_nan_and_its_neighbours_zero(layout: str) -> None:
    x = torch.rand(1, 9, 3, 3) + 0.5
    x[0, 4, 1, 1] = inf
    y = relu_lrn_max_pool2d(cases.lay_out(x, layout), None, 3, 0.5, 0.75, 1.0, 1, 1)
    assert y[0, 4, 1, 1].isnan()
    assert (y[0, [3, 5], 1, 1] == 0).all()
    assert y.isnan().sum() == 1


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 6, 9, 8), (2, 24, 7, 12)], ids=str)
def test_winners_of_ties_and_nan_are_pytorchs(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    winners, expected = winners_of_ties(shape, dtype, layout)
    assert torch.equal(winners, expected)


def test_one_op_equals_its_parts() -> None:
    x, bias = torch.randn(2, 7, 9, 8), torch.randn(7)
    y = relu_lrn_max_pool2d(x, bias, 4, 0.9, 0.75, 2.0, 3, 2)
    active = torch.relu(x + bias[:, None, None])
    torch.testing.assert_close(y, relu_max_pool2d(local_response_norm(active, 4, 0.9, 0.75, 2.0), 3, 2))
