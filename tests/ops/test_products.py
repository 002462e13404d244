"""conv2d_bias_relu and linear_bias_relu together: the requested gradients, and the saved output."""

from __future__ import annotations

import pytest
import torch

from tests.support import cases, oracle
from tests.support.cases import Case

each_product = pytest.mark.parametrize(
    "case", cases.params(case for case in cases.EXAMPLES if case.op in cases.PRODUCTS and case.shapes["bias"])
)


@each_product
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias"), ()], ids=str)
def test_only_the_gradients_asked_for(case: Case, wanted: tuple[str, ...]) -> None:
    oracle.assert_gradients_of(case, wanted)


@pytest.mark.usefixtures("native")
@each_product
@pytest.mark.parametrize(
    "mask", [[True, False, False], [False, True, False], [False, False, True], [False] * 3], ids=str
)
def test_gradients_left_out_are_empty(case: Case, mask: list[bool]) -> None:
    backward = getattr(torch.ops.alexnet_ext, f"{case.op}_backward")
    *arguments, _ = cases.raw_backward(case, cases.make(case, requires_grad=False))
    results, full = backward(*arguments, mask), backward(*arguments, [True] * 3)
    for result, whole, wanted in zip(results, full, mask, strict=True):
        if wanted:
            torch.testing.assert_close(result, whole)
        else:
            assert result.numel() == 0


@each_product
def test_writing_into_the_output_before_backward_raises(case: Case) -> None:
    y = cases.fused(case, cases.make(case))
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
