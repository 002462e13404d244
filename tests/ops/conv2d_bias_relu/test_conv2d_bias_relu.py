"""conv2d_bias_relu: float64, exact integers, groups, weights of any layout, padding, and its errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ext.ops import conv2d_bias_relu
from tests.ops.conv2d_bias_relu.spec import WINOGRAD_CASES
from tests.support import cases, oracle
from tests.support.cases import Case, conv, each_dtype, each_layout

nan = math.nan

TOWERS = conv((2, 4, 7, 5), 6, (3, 3), padding=1, groups=2)


@pytest.mark.usefixtures("poisoned")
@each_dtype
@each_layout
@pytest.mark.parametrize("case", cases.params(cases.CASES["conv2d_bias_relu"]))
def test_values_and_gradients(case: Case, dtype: torch.dtype, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, dtype, layout))


@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("weight_layout", cases.LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", cases.params([TOWERS, conv((2, 3, 6, 8), 5, (3, 2), bias=False)]))
def test_weight_layouts(case: Case, layout: str, weight_layout: str, dtype: torch.dtype) -> None:
    tensors = cases.make(case, dtype, layout)
    tensors["weight"] = cases.lay_out(tensors["weight"].detach(), weight_layout).requires_grad_()
    y = oracle.assert_matches_float64(case, tensors)
    assert y.stride() == cases.stock(case, tensors).stride()


def test_size_one_dimensions_with_odd_strides() -> None:
    """Strides of size-1 dimensions do not matter (pytorch#195394)."""
    x = torch.randn(15).as_strided((1, 3, 1, 5), (77, 5, 3, 1))
    weight = torch.randn(6).as_strided((2, 3, 1, 1), (3, 1, 99, 5))
    torch.testing.assert_close(
        conv2d_bias_relu(x, weight),
        F.relu(F.conv2d(x.contiguous(), weight.clone(memory_format=torch.contiguous_format))),
    )


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", cases.params([TOWERS, conv((2, 3, 9, 8), 5, (3, 2), stride=(2, 1), padding=(1, 0))]))
def test_small_integers_are_exact(case: Case, layout: str, dtype: torch.dtype) -> None:
    """Sums below 2**8 in magnitude are exact in every dtype, so no tolerance is needed."""
    tensors = cases.make(case, dtype, layout)
    for name, tensor in tensors.items():
        integers = torch.randint(-2, 3, tensor.shape).to(dtype)
        tensors[name] = cases.lay_out(integers, layout if name == "x" else "contiguous").requires_grad_()
    exact = oracle.widened(tensors)
    y, expected = cases.fused(case, tensors), cases.stock(case, exact)
    assert torch.equal(y.double(), expected)
    dy = torch.randint(-1, 2, y.shape)
    found = torch.autograd.grad(y, list(tensors.values()), dy.to(dtype))
    for ours, theirs in zip(found, torch.autograd.grad(expected, list(exact.values()), dy.double()), strict=True):
        assert theirs.abs().max() < 256
        assert torch.equal(ours.double(), theirs)


def test_groups_do_not_leak() -> None:
    tensors = cases.make(conv((1, 4, 5, 5), 4, (3, 3), groups=2), requires_grad=False)
    tensors["x"][:, 1] = nan
    y = conv2d_bias_relu(**tensors, groups=2)
    assert y.isnan().any(3).any(2)[0].tolist() == [True, True, False, False]


def test_groups_are_two_convolutions_and_swap_with_them() -> None:
    tensors = cases.make(TOWERS)
    x, weight, bias = tensors.values()
    y = cases.fused(TOWERS, tensors)
    halves = [
        conv2d_bias_relu(x[:, 2 * g : 2 * g + 2], weight[3 * g : 3 * g + 3], bias[3 * g : 3 * g + 3], padding=1)
        for g in (0, 1)
    ]
    torch.testing.assert_close(y, torch.cat(halves, 1))
    dy = torch.randn(y.shape)
    whole = torch.autograd.grad(y, (x, weight, bias), dy)
    parts = torch.autograd.grad(torch.cat(halves, 1), (x, weight, bias), dy)
    torch.testing.assert_close(whole, parts)
    swapped = conv2d_bias_relu(x.roll(2, 1), weight.roll(3, 0), bias.roll(3, 0), padding=1, groups=2)
    torch.testing.assert_close(swapped, y.roll(3, 1))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@each_dtype
def test_relu_as_stock_at_zero_nan_and_inf(dtype: torch.dtype, layout: str) -> None:
    """A 1 x 1 convolution with weight 1 is ReLU itself: NaN passes with gradient 1, 0 gets none, -0. comes out 0.

    There is a second channel of zeros, as oneDNN with AVX-512 takes bf16 channels in pairs: the NaN of a lone channel,
    channels-last, would enter the pixel before it too.
    """
    values = torch.tensor([nan, -1, 0, -0.0, 1, math.inf, -math.inf, 3, -3] * 3, dtype=dtype).view(1, 1, 3, 9)
    values = torch.cat([values, torch.zeros_like(values)], 1)
    weight = torch.ones(1, 2, 1, 1, dtype=dtype)
    x, plain = cases.lay_out(values, layout).requires_grad_(), values.clone().requires_grad_()
    y, expected = conv2d_bias_relu(x, weight), F.relu(F.conv2d(plain, weight))
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.grad, plain.grad, rtol=0, atol=0)
    assert x.grad.flatten()[:9].tolist() == [1, 0, 0, 0, 1, 1, 0, 1, 0]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", cases.params(WINOGRAD_CASES))
def test_many_tiles(case: Case, layout: str, weight_layout: str, request: pytest.FixtureRequest) -> None:
    tensors = cases.make(case, torch.float32, layout)
    tensors["weight"] = cases.lay_out(tensors["weight"].detach(), weight_layout).requires_grad_()
    y = oracle.assert_matches_float64(case, tensors)
    expected = cases.stock(case, tensors)
    assert y.stride() == expected.stride()
    if not request.config.getoption("--emulated"):  # another order of the same sums, unless oneDNN has AVX-512
        by_winograd = torch.ops.alexnet_ext.cpu_capability() != "AVX512"
        assert torch.equal(y, expected) != by_winograd


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [nan, math.inf, 2e38], ids=str)
@pytest.mark.parametrize("name", ["x", "weight", "dy"])
def test_many_tiles_are_convolved_where_a_value_is_not_finite(name: str, value: float, layout: str) -> None:
    """Of inf, and of 2e38 beside -2e38, Winograd's tiles make NaN, or inf, where a convolution does not."""
    tensors = cases.make(WINOGRAD_CASES[0], torch.float32, layout)
    dy = torch.randn(cases.stock(WINOGRAD_CASES[0], tensors).shape)
    with torch.no_grad():
        given = dy if name == "dy" else tensors[name]
        if value == 2e38:
            for tensor in (tensors["x"], tensors["weight"], dy):
                tensor.mul_(1e-6)
        given[1, 3, :, 0] = value
        given[1, 3, :, 2] = -value
    results = []
    for run in (cases.fused, cases.stock):
        y = run(WINOGRAD_CASES[0], tensors)
        results.append((y, *torch.autograd.grad(y, (tensors["x"], tensors["weight"]), dy)))
    for ours, theirs in zip(*results, strict=True):
        largest = theirs.nan_to_num(0, 0, 0).abs().max().item()
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=1e-5 * largest)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (4, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)], ids=str)
def test_padding_same(kernel: tuple[int, int], dilation: Any, layout: str) -> None:
    case = conv((2, 4, 7, 9), 6, kernel, padding="same", dilation=dilation, groups=2)
    y = oracle_same(case, cases.make(case, torch.float64, layout))
    assert y.shape == (2, 6, 7, 9)


def oracle_same(case: Case, tensors: cases.Tensors) -> Tensor:
    """Value and gradients equal stock's, which also takes padding="same"."""
    exact = oracle.widened(tensors)
    y, expected = cases.fused(case, tensors), cases.stock(case, exact)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), list(tensors.values()))
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), list(exact.values())))
    return y


def test_padding_valid() -> None:
    x, weight = torch.randn(1, 2, 5, 6), torch.randn(3, 2, 3, 3)
    torch.testing.assert_close(conv2d_bias_relu(x, weight, padding="valid"), F.relu(F.conv2d(x, weight)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_and_gradgradcheck(bias: bool, layout: str) -> None:
    case = conv((1, 4, 4, 3), 4, (3, 2), bias, padding=1, groups=2, stride=(1, 2))
    tensors = cases.make(case, torch.float64, layout)
    inputs = list(cases.wanting_grad(tensors).values())

    def apply(*values: Tensor) -> Tensor:
        return cases.fused(case, tensors | dict(zip(cases.wanting_grad(tensors), values, strict=True)))

    assert torch.autograd.gradcheck(apply, inputs)
    assert torch.autograd.gradgradcheck(apply, inputs)


def test_empty_batch_has_zero_parameter_gradients() -> None:
    tensors = cases.make(conv((0, 4, 7, 5), 6, (3, 3), groups=2))
    y = conv2d_bias_relu(**tensors, groups=2)
    assert y.shape == (0, 6, 5, 3)
    y.sum().backward()
    assert tensors["x"].grad.shape == (0, 4, 7, 5)
    assert not tensors["weight"].grad.any()
    assert not tensors["bias"].grad.any()


EMPTY = [
    (x, (outputs, x[-3] // groups, *kernel), groups, padding)
    for x in ((0, 2, 5, 4), (2, 2, 5, 4), (2, 0, 5, 4), (0, 0, 5, 4), (2, 2, 0, 4), (0, 2, 5, 0), (2, 5, 4), (0, 5, 4))
    for outputs, groups in ((4, 1), (4, 2), (0, 1), (0, 2))
    for kernel in ((3, 1), (0, 1), (3, 0), (0, 0))
    for padding in (0, 1, "same")
    if x[-3] % groups == 0
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_of_nothing_as_stock(layout: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Stock's result, or a RuntimeError of one line, without a C++ trace."""
    refused = 0
    for shape, kernel, groups, padding in EMPTY:
        x = torch.randn(shape)
        tensors = [cases.lay_out(x, layout) if x.dim() == 4 else x, torch.randn(kernel), torch.randn(kernel[0])]
        what = f"{shape}, {kernel}, groups={groups}, padding={padding}"

        def results(op: Callable[..., Tensor], tensors: list[Tensor], *options: Any) -> list[Tensor]:
            given = [tensor.clone().requires_grad_() for tensor in tensors]
            y = op(*given, 1, *options)
            y.sum().backward()
            return [y.detach(), *(tensor.grad for tensor in given)]

        options = (padding, 1, groups)
        try:
            expected = results(lambda *given: F.relu(F.conv2d(*given)), tensors, *options)
        except (RuntimeError, IndexError):  # for an empty batch and kernel stock raises IndexError, by accident
            refused += 1
            with pytest.raises(RuntimeError) as caught:
                results(conv2d_bias_relu, tensors, *options)
            assert "\n" not in str(caught.value), what
        else:
            torch.testing.assert_close(results(conv2d_bias_relu, tensors, *options), expected, msg=what)
    assert 50 < refused < len(EMPTY)
    assert "Exception" not in capfd.readouterr().err


def test_numpys_integers_are_integers() -> None:
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 2, 3, 3)
    one, two = np.int64(1), np.int32(2)
    y = conv2d_bias_relu(x, weight, None, two, (one, one), one, two)
    assert torch.equal(y, conv2d_bias_relu(x, weight, None, 2, (1, 1), 1, 2))


X, WEIGHT, BIAS = torch.randn(1, 4, 8, 8), torch.randn(4, 2, 3, 3), torch.randn(4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[:, :3]}, RuntimeError, r"Given groups=2, weight of size \[4, 2, 3, 3\], expected x .* 4 channels"),
        ({"x": X[0, 0]}, RuntimeError, r"x has shape \[8, 8\], expected 3D \(unbatched\) or 4D \(batched\)"),
        ({"x": X[None]}, RuntimeError, r"expected 3D \(unbatched\) or 4D \(batched\)"),
        ({"x": X.double()}, RuntimeError, r"weight has dtype torch\.float32, expected torch\.float64"),
        ({"x": X[..., :2]}, RuntimeError, r"weight reaches over 3 values of dimension -1, expected at most 2"),
        ({"x": X.numpy()}, TypeError, "x must be a Tensor, got ndarray"),
        ({"weight": WEIGHT[0]}, RuntimeError, r"weight has shape \[2, 3, 3\], expected 4D"),
        ({"weight": WEIGHT[:3], "bias": None}, RuntimeError, "groups=2 does not divide the 3 output channels"),
        (
            {"weight": WEIGHT[..., :0]},
            RuntimeError,
            r"weight has shape \[4, 2, 3, 0\], expected a kernel of at least 1",
        ),
        ({"weight": WEIGHT[:0], "bias": None}, RuntimeError, r"weight has shape \[0, .* expected at least 2 output"),
        ({"x": X[:, :, :0]}, RuntimeError, r"x has shape \[1, 4, 0, 8\], expected non-empty H and W"),
        ({"weight": None}, TypeError, "weight must be a Tensor, got NoneType"),
        ({"bias": BIAS[:3]}, RuntimeError, r"bias has shape \[3\], expected \[4\]"),
        ({"bias": BIAS[:, None]}, RuntimeError, r"bias has shape \[4, 1\], expected \[4\]"),
        ({"bias": BIAS.half()}, RuntimeError, r"bias has dtype torch\.float16, expected torch\.float32"),
        ({"bias": 1.0}, TypeError, "bias must be a Tensor, got float"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"groups": -2}, ValueError, "groups must be at least 1, got -2"),
        ({"groups": 2.0}, TypeError, r"groups must be an int, got 2\.0"),
        ({"groups": 3}, RuntimeError, "groups=3 does not divide the 4 output channels"),
        ({"stride": 0}, RuntimeError, "stride must be at least 1, got 0"),
        ({"stride": (1, 2, 3)}, TypeError, "stride must be an int or a pair of ints"),
        ({"padding": -1}, RuntimeError, "padding must be at least 0, got -1"),
        ({"padding": "full"}, RuntimeError, "padding must be 'valid', 'same', an int or a pair of ints, got 'full'"),
        ({"padding": "same", "stride": 2}, RuntimeError, r"padding='same' needs stride 1, got stride \[2, 2\]"),
        ({"dilation": 0}, RuntimeError, "dilation must be at least 1, got 0"),
        ({"dilation": 4}, RuntimeError, "weight reaches over 9 values of dimension -2, expected at most 8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        conv2d_bias_relu(**({"x": X, "weight": WEIGHT, "bias": BIAS, "groups": 2} | change))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_devices_must_agree(name: str) -> None:
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS, "groups": 2}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(RuntimeError, match=f"{name} is on device meta, expected cpu"):
        conv2d_bias_relu(**arguments)
