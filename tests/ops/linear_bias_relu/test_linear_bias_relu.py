"""linear_bias_relu: float64, exact integers, weights of any layout, ReLU's edges, and its errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ext.ops import linear_bias_relu
from tests.ops.linear_bias_relu.spec import MASKED, masked_gradients
from tests.support import cases, oracle
from tests.support.cases import Case, each_dtype, linear

nan = math.nan

SMALL = linear((10, 7), 6)


@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("case", cases.params(cases.CASES["linear_bias_relu"]))
def test_values_and_gradients(case: Case, dtype: torch.dtype, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, dtype, layout))


@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("weight_layout", cases.LAYOUTS)
@pytest.mark.parametrize("rows", [3, 12])
def test_weight_layouts(rows: int, weight_layout: str, dtype: torch.dtype) -> None:
    case = linear((rows, 40), 18)
    tensors = cases.make(case, dtype)
    tensors["weight"] = cases.lay_out(tensors["weight"].detach(), weight_layout).requires_grad_()
    oracle.assert_matches_float64(case, tensors)


@each_dtype
@pytest.mark.parametrize("rows", [4, 35])
def test_integers_come_out_exact(rows: int, dtype: torch.dtype) -> None:
    """Sums below 2^8 are exact in every dtype, in any order."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randint(-1, 2, shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((rows, 50), (60, 50), (60,))
    )
    y, expected = linear_bias_relu(x, weight, bias), F.relu(F.linear(x.double(), weight.double(), bias.double()))
    assert torch.equal(y.double(), expected)
    dy = torch.randint(-1, 2, y.shape, generator=generator)
    found = torch.autograd.grad(y, (x, weight, bias), dy.to(dtype))
    wanted = torch.autograd.grad(expected, (x, weight, bias), dy.double())
    assert all(torch.equal(ours, exact) for ours, exact in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rows", [1, 7, 8, 40])
@each_dtype
def test_relu_as_stock_at_zero_nan_and_inf(dtype: torch.dtype, rows: int) -> None:
    """One input and weight 1: ReLU itself. NaN passes with gradient 1, 0 gets none, -0. comes out 0."""
    values = torch.tensor([nan, -1, 0, -0.0, 1, math.inf, -math.inf, 3], dtype=dtype)[torch.arange(rows) % 8][:, None]
    weight = torch.ones(1, 1, dtype=dtype)
    x, plain = values.clone().requires_grad_(), values.clone().requires_grad_()
    y, expected = linear_bias_relu(x, weight), F.relu(F.linear(plain, weight))
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.grad, plain.grad, rtol=0, atol=0)


@pytest.mark.usefixtures("native", "poisoned")
@each_dtype
@pytest.mark.parametrize("for_bias", [True, False])
@pytest.mark.parametrize(("rows", "outputs"), MASKED)
def test_the_backward_masks_as_relu_does(rows: int, outputs: int, for_bias: bool, dtype: torch.dtype) -> None:
    assert all(torch.equal(ours, exact) for ours, exact in masked_gradients(rows, outputs, for_bias, dtype))


@pytest.mark.parametrize("rows", [3, 20])
def test_nan_and_inf_stay_in_their_row_and_output(rows: int) -> None:
    x, weight = torch.randn(rows, 30), torch.randn(25, 30)
    x[1, 4], weight[7, 9] = nan, math.inf
    y, expected = linear_bias_relu(x, weight), F.relu(F.linear(x, weight))
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_and_gradgradcheck(bias: bool) -> None:
    case = linear((9, 5), 4, bias)
    tensors = cases.make(case, torch.float64)
    inputs = list(cases.wanting_grad(tensors).values())

    def apply(*values: Tensor) -> Tensor:
        return cases.fused(case, tensors | dict(zip(cases.wanting_grad(tensors), values, strict=True)))

    assert torch.autograd.gradcheck(apply, inputs)
    assert torch.autograd.gradgradcheck(apply, inputs)


BROADCAST = [((3, 4), ()), ((3, 4), (1,)), ((2, 3, 4), (1,)), ((4,), ()), ((0, 4), (1,)), ((3, 4), (5,))]
BY_ROW = [((3, 4), (3, 5)), ((3, 4), (3, 1)), ((2, 3, 4), (2, 3, 1)), ((2, 3, 4), (6, 1)), ((4,), (1, 5))]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("shape", "bias"), BROADCAST + BY_ROW, ids=str)
def test_a_bias_broadcasts_as_in_stock(shape: tuple[int, ...], bias: tuple[int, ...], compiled: bool) -> None:
    """A bias of one value runs ours, one value a row runs stock; gradients of both orders have the bias's shape."""
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, (5, 4), bias)]

    def results(op: Callable[..., Tensor]) -> list[Tensor]:
        y = op(*inputs)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]

    torch._dynamo.reset()
    op = torch.compile(linear_bias_relu, fullgraph=True, backend="eager") if compiled else linear_bias_relu
    torch.testing.assert_close(results(op), results(lambda *given: F.relu(F.linear(*given))))
    meta = linear_bias_relu(*(t.to("meta") for t in inputs))
    assert meta.shape == (*shape[:-1], 5)


@pytest.mark.usefixtures("native")
def test_a_single_value_of_bias_runs_ours_and_one_a_row_does_not() -> None:
    weight = torch.randn(5, 4, requires_grad=True)
    for shape, bias in BROADCAST:
        assert cases.runs_ours(linear_bias_relu(torch.randn(shape), weight, torch.randn(bias)))
    for shape, bias in BY_ROW:
        x, given = torch.randn(shape), torch.randn(bias)
        assert not cases.runs_ours(linear_bias_relu(x, weight, given))
        with pytest.raises(RuntimeError, match="backend='native' does not cover a bias of shape"):
            linear_bias_relu(x, weight, given, backend="native")


def test_vmap_over_single_values_of_bias() -> None:
    x, weight, biases = torch.randn(3, 4), torch.randn(5, 4), torch.randn(7)
    found = torch.func.vmap(linear_bias_relu, in_dims=(None, None, 0))(x, weight, biases)
    torch.testing.assert_close(found, torch.stack([F.relu(F.linear(x, weight, bias)) for bias in biases]))


def test_empty_batch_has_zero_parameter_gradients() -> None:
    tensors = cases.make(linear((0, 7), 6))
    linear_bias_relu(**tensors).sum().backward()
    assert tensors["x"].grad.shape == (0, 7)
    assert not tensors["weight"].grad.any()
    assert not tensors["bias"].grad.any()


X, WEIGHT, BIAS = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[:, :3]}, RuntimeError, r"x has shape \[3, 3\], expected \(\*, 4\) for weight of shape \[5, 4\]"),
        ({"x": X[0, 0]}, RuntimeError, r"x has shape \[\], expected \(\*, 4\)"),
        ({"x": X.double()}, RuntimeError, r"weight has dtype torch\.float32, expected torch\.float64"),
        ({"x": X.numpy()}, TypeError, "x must be a Tensor, got ndarray"),
        ({"weight": WEIGHT[0]}, RuntimeError, r"weight has shape \[4\], expected 2D \(outputs, inputs\)"),
        ({"weight": None}, TypeError, "weight must be a Tensor, got NoneType"),
        ({"bias": BIAS[:3]}, RuntimeError, r"bias has shape \[3\], expected \[5\]"),
        ({"bias": BIAS[:, None]}, RuntimeError, r"bias has shape \[5, 1\], expected \[5\]"),
        ({"bias": BIAS[None, None]}, RuntimeError, r"bias has shape \[1, 1, 5\], expected \[5\]"),
        ({"bias": BIAS[:0]}, RuntimeError, r"bias has shape \[0\], expected \[5\]"),
        ({"bias": BIAS[0].half()}, RuntimeError, r"bias has dtype torch\.float16, expected torch\.float32"),
        ({"bias": BIAS.half()}, RuntimeError, r"bias has dtype torch\.float16, expected torch\.float32"),
        ({"bias": 1.0}, TypeError, "bias must be a Tensor, got float"),
        ({"weight": WEIGHT.to("meta")}, RuntimeError, "weight is on device meta, expected cpu"),
        ({"bias": BIAS.to("meta")}, RuntimeError, "bias is on device meta, expected cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_bias_relu(**({"x": X, "weight": WEIGHT, "bias": BIAS} | change))
