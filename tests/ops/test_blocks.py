"""relu_lrn_max_pool2d and relu_max_pool2d_lrn together: bias, ReLU's edge, constants, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alexnet_ext import nn, ops
from tests.support import cases, oracle
from tests.support.cases import block, each_dtype

inf, nan = math.inf, math.nan

each_block = pytest.mark.parametrize("op", cases.BLOCKS)


@each_block
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 15])
def test_gradcheck(op: str, size: int, layout: str) -> None:
    case = block(op, (1, 4, 3, 5), lrn_size=size, kernel_size=(2, 3), stride=(1, 2))
    tensors = cases.make(case, torch.float64, layout)
    assert torch.autograd.gradcheck(lambda x, b: cases.fused(case, {"x": x, "bias": b}), list(tensors.values()))


@each_block
@pytest.mark.parametrize("bias", [True, False])
def test_gradgradcheck(op: str, bias: bool) -> None:
    case = block(op, (1, 3, 3, 4), bias, lrn_size=2, kernel_size=2, stride=1)
    tensors = cases.make(case, torch.float64)
    inputs = list(cases.wanting_grad(tensors).values())
    assert torch.autograd.gradgradcheck(lambda x, b=None: cases.fused(case, {"x": x, "bias": b}), inputs)


@each_block
@pytest.mark.parametrize("wanted", [("x",), ("bias",), ()], ids=str)
def test_only_the_gradients_asked_for(op: str, wanted: tuple[str, ...]) -> None:
    oracle.assert_gradients_of(block(op, (2, 5, 7, 6)), wanted)


@each_block
@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_bias_is_added_before_relu(op: str, dtype: torch.dtype, layout: str) -> None:
    """x + bias is 0, positive or negative by channel: exact in every dtype, so the gradient's zeros are exact."""
    x = cases.lay_out(torch.full((2, 19, 5, 7), 2.0, dtype=dtype), layout).requires_grad_()
    bias = torch.tensor([-2.0, -1.0, -3.0, 1.0]).repeat(5)[:19].to(dtype).requires_grad_()
    y = getattr(ops, op)(x, bias, 1, 1.0, 1.0, 1.0, 1, 1)
    z = x.detach() + bias.detach()[:, None, None]
    torch.testing.assert_close(y, torch.where(z > 0, z / (1 + z * z), 0))
    y.sum().backward()
    slope = torch.where(z > 0, (1 - z.double() ** 2) / (1 + z.double() ** 2) ** 2, 0)
    torch.testing.assert_close(x.grad, slope.to(dtype))
    torch.testing.assert_close(bias.grad, slope.sum((0, 2, 3)).to(dtype))


@each_block
@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, -inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nothing_active_means_zero_and_no_gradient(op: str, value: float, layout: str) -> None:
    x = cases.lay_out(torch.full((2, 9, 5, 7), value), layout).requires_grad_()
    y = getattr(ops, op)(x, None, 5, 1e-4, 0.75, 2.0, 3, 2)
    y.sum().backward()
    assert (y == 0).all()
    assert not x.grad.any()


@each_block
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.3])
def test_overflow_of_the_square_gives_zero_and_no_nan(op: str, beta: float, layout: str) -> None:
    x = cases.lay_out(torch.full((1, 9, 5, 7), 1e20), layout).requires_grad_()
    y = getattr(ops, op)(x, None, 3, 1e-4, beta, 1.0, 3, 2)
    y.sum().backward()
    assert (y == 0).all()
    assert (x.grad == 0).all()


@each_block
@pytest.mark.parametrize(
    "constants",
    [(3, 1e-4, 0.75, 0.0), (3, 0.0, 0.75, 0.0), (3, 1e-4, 0.75, -1.0), (3, 1e-4, 2.0, -1.0), (3, 1.0, -1.0, 1.0)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constants_without_sense_give_what_pytorch_gives(op: str, constants: tuple[Any, ...], layout: str) -> None:
    names = dict(zip(("lrn_size", "alpha", "beta", "k"), constants, strict=True))
    case = block(op, (2, 9, 7, 9), False, **names)
    x = torch.randint(-2, 2, (2, 9, 7, 9)).float()
    expected = cases.stock(case, {"x": x, "bias": None})
    torch.testing.assert_close(
        cases.fused(case, {"x": cases.lay_out(x, layout), "bias": None}), expected, equal_nan=True
    )


@each_block
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 4, 6, 3)], ids=str)
def test_strides_are_those_of_pooling(op: str, shape: tuple[int, ...], layout: str) -> None:
    x = cases.lay_out(torch.randn(shape), layout).requires_grad_()
    y = getattr(ops, op)(x, None, 3, 1e-4, 0.75, 1.0, 3, 2)
    assert y.stride() == torch.nn.functional.max_pool2d(x, 3, 2).stride()
    y.sum().backward()
    if layout == "channels_last":
        assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("kind", "order"), [(nn.Conv2dReLULRNMaxPool2d, (0, 1, 2)), (nn.Conv2dReLUMaxPool2dLRN, (0, 2, 1))]
)
def test_an_unbatched_image_is_normalized_as_stock_does(kind: type[Any], order: tuple[int, ...]) -> None:
    """Over its rows: LRN alone takes (C, H, W) for (N, C, L)."""
    norm, pool = torch.nn.LocalResponseNorm(3, 1.5, k=2.0), torch.nn.MaxPool2d(2)
    ours = kind(3, 6, 3, norm=norm, pool=pool).double()
    behind = (torch.nn.ReLU(), norm, pool)
    x = torch.randn(3, 11, 10, dtype=torch.float64)
    z = torch.nn.functional.conv2d(x, ours.weight, ours.bias)
    expected = torch.nn.Sequential(*(behind[i] for i in order))(z)
    torch.testing.assert_close(ours(x), expected)
    parameters = list(ours.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(ours(x).sum(), parameters), torch.autograd.grad(expected.sum(), parameters)
    )


X, BIAS = torch.randn(1, 4, 8, 8), torch.randn(4)


@each_block
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0, 0]}, RuntimeError, r"x has shape \[8, 8\], expected 3D .* or 4D"),
        ({"x": X[:, :, :0]}, RuntimeError, "non-empty C, H and W"),
        ({"x": None}, TypeError, "x must be a Tensor, got NoneType"),
        ({"bias": BIAS[:3]}, RuntimeError, r"bias has shape \[3\], expected \[4\]"),
        ({"bias": BIAS.double()}, RuntimeError, r"bias has dtype torch\.float64, expected torch\.float32"),
        ({"bias": BIAS.to("meta")}, RuntimeError, "bias is on device meta, expected cpu"),
        ({"bias": 0.0}, TypeError, "bias must be a Tensor, got float"),
        ({"lrn_size": 0}, RuntimeError, "lrn_size must be greater than zero, got 0"),
        ({"lrn_size": 5.0}, TypeError, r"lrn_size must be an int, got float 5\.0"),
        ({"alpha": "1"}, TypeError, "alpha must be a float, got str"),
        ({"kernel_size": 9}, RuntimeError, r"kernel_size \[9, 9\] .* leaves an output of \[0, 0\]"),
        ({"kernel_size": 0}, RuntimeError, "kernel_size must be at least 1, got 0"),
        ({"stride": 0}, RuntimeError, "stride must be at least 1, got 0"),
        ({"stride": None}, TypeError, "stride must be an int or a pair of ints, got None"),
        ({"backend": "fastest"}, ValueError, "backend must be one of auto, native, triton, stock, got 'fastest'"),
    ],
    ids=lambda value: (
        "-".join(f"{k}{v if isinstance(v, (int, str)) else ''}" for k, v in value.items())
        if isinstance(value, dict)
        else ""
    ),
)
def test_bad_arguments(op: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"x": X, "bias": BIAS, "lrn_size": 5, "alpha": 1e-4, "beta": 0.75, "k": 1.0}
    with pytest.raises(error, match=message):
        getattr(ops, op)(**(good | {"kernel_size": 3, "stride": 2} | change))


@each_block
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
def test_under_autocast_the_bias_follows_x_and_its_gradient_does_not(op: str, bias_dtype: torch.dtype) -> None:
    case = block(op, (2, 5, 7, 6))
    tensors = cases.make(case, torch.bfloat16)
    bias = tensors["bias"].detach().to(bias_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = cases.fused(case, {"x": tensors["x"], "bias": bias})
    assert y.dtype == torch.bfloat16
    dy = torch.randn(y.shape).bfloat16()
    dx, dbias = torch.autograd.grad(y, (tensors["x"], bias), dy)
    assert (dx.dtype, dbias.dtype) == (torch.bfloat16, bias_dtype)
    expected: Tensor = cases.fused(case, tensors)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dbias, torch.autograd.grad(expected, tensors["bias"], dy)[0].to(bias_dtype))
