"""relu_max_pool2d: bit for bit as stock; its rules for NaN and ties, its sizes and its errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ext.ops import relu_max_pool2d
from tests.support import cases, oracle
from tests.support.cases import Case, each_dtype, each_layout, pool

inf, nan = math.inf, math.nan


def assert_exactly_stock(case: Case, x: Tensor) -> None:
    """Values and gradients equal stock's, for dy of small integers, whose sums are exact."""
    plain = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    y, expected = cases.fused(case, {"x": x}), cases.stock(case, {"x": plain})
    dy = torch.randint(-3, 4, y.shape).to(y.dtype)
    (dx,), (dx_expected,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, plain, dy)
    for ours, stock in ((y, expected), (dx, dx_expected)):
        torch.testing.assert_close(ours, stock, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("poisoned")
@each_dtype
@each_layout
@pytest.mark.parametrize("case", cases.params(cases.CASES["relu_max_pool2d"]))
def test_values_and_gradients(case: Case, dtype: torch.dtype, layout: str) -> None:
    tensors = cases.make(case, dtype, layout)
    oracle.assert_matches_float64(case, tensors)
    assert_exactly_stock(case, tensors["x"])


@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("case", cases.params(cases.CASES["relu_max_pool2d"]))
def test_ties_nan_inf_and_zeros(case: Case, dtype: torch.dtype, layout: str) -> None:
    values = torch.tensor([-2, -1, -0.0, 0, 1, 2, 1, 2, nan, inf, -inf], dtype=dtype)
    for kinds in (8, 9, 11):
        x = values[torch.randint(0, kinds, case.shapes["x"])]
        assert_exactly_stock(case, cases.lay_out(x, layout).requires_grad_())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [-5.0, -inf, nan, 0.0, -0.0, 7.0])
@pytest.mark.parametrize("case", cases.params([pool((2, 9, 6, 19), 3, 1, padding=1), pool((1, 3, 7, 18), 3, 2)]))
def test_one_value_everywhere(case: Case, value: float, layout: str) -> None:
    """Padding never wins over a value in the image, and no gradient flows back where ReLU is 0."""
    x = cases.lay_out(torch.full(case.shapes["x"], value), layout).requires_grad_()
    assert_exactly_stock(case, x)
    cases.fused(case, {"x": x}).sum().backward()
    assert bool(x.grad.any()) == (value > 0 or math.isnan(value))


def window_loop(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Any:
    """(y, dx for dy = 1) of an (N, C, H, W) tensor, by the rules: the last NaN wins, else the first maximum."""
    height, width = x.shape[2:]
    rows = (height + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (width + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    y, dx = x.new_empty(*x.shape[:2], rows, columns), torch.zeros_like(x)
    for n, c, i, j in torch.cartesian_prod(*(torch.arange(size) for size in y.shape)).tolist():
        best, winner = -inf, None
        for r in range(kernel[0]):
            for s in range(kernel[1]):
                h, w = i * stride[0] - padding[0] + r * dilation[0], j * stride[1] - padding[1] + s * dilation[1]
                if not (0 <= h < height and 0 <= w < width):
                    continue
                value = x[n, c, h, w].item()
                value = 0.0 if value < 0 else value
                if winner is None or value > best or math.isnan(value):
                    best, winner = value, (h, w)
        y[n, c, i, j] = best
        if best > 0 or math.isnan(best):
            dx[n, c][winner] += 1
    return y, dx


@pytest.mark.parametrize(
    "windows",
    [([3, 3], [2, 2], [0, 0], [1, 1]), ([2, 3], [1, 2], [1, 1], [1, 1]), ([3, 2], [2, 1], [1, 0], [2, 3])],
    ids=["3x3", "2x3_padded", "3x2_dilated"],
)
def test_against_a_loop(windows: tuple[list[int], ...]) -> None:
    x = torch.randint(-2, 3, (2, 2, 7, 8)).double()
    x[torch.rand(x.shape) < 0.05] = nan
    y_loop, dx_loop = window_loop(x, *windows)
    x.requires_grad_()
    y = relu_max_pool2d(x, *windows)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), y_loop, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.grad, dx_loop, rtol=0, atol=0)


@each_dtype
@pytest.mark.parametrize(
    ("row", "value", "gradient"),
    [
        ([nan, 5, nan, 4], nan, [0, 0, 1, 0]),
        ([inf, nan, inf, 0], nan, [0, 1, 0, 0]),
        ([2, 3, 3, 3], 3, [0, 1, 0, 0]),
        ([-3, -1, -2, -5], 0, [0, 0, 0, 0]),
        ([-inf, -inf, -inf, -inf], 0, [0, 0, 0, 0]),
        ([0, -0.0, -1, 0], 0, [0, 0, 0, 0]),
        ([-1, nan, inf, nan], nan, [0, 0, 0, 1]),
        ([1, inf, inf, 2], inf, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_who_wins_a_window(row: list[float], value: float, gradient: list[float], dtype: torch.dtype) -> None:
    """As one window of 1 x 4 and as 2 x 2, in every channel of a vector and beyond."""
    for kernel in ((1, 4), (2, 2)):
        for layout in ("contiguous", "channels_last"):
            x = torch.tensor(row, dtype=dtype).view(1, 1, *kernel).expand(2, 19, *kernel)
            x = cases.lay_out(x, layout).requires_grad_()
            y = relu_max_pool2d(x, kernel)
            y.sum().backward()
            torch.testing.assert_close(y, torch.full_like(y, value), rtol=0, atol=0, equal_nan=True)
            assert (x.grad == torch.tensor(gradient, dtype=dtype).view(kernel)).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("row", [[-0.0, 0.0], [0.0, -0.0], [-0.0, -1.0], [-1.0, -0.0], [-1.0, -1.0]], ids=str)
def test_the_sign_of_a_zero_is_that_of_stock(row: list[float], layout: str) -> None:
    """ReLU keeps -0., and of equal values a window's first is returned."""
    x = cases.lay_out(torch.tensor(row).view(1, 1, 1, 2).repeat(1, 9, 1, 9), layout)
    assert torch.equal(relu_max_pool2d(x, (1, 2)).signbit(), F.max_pool2d(F.relu(x), (1, 2)).signbit())


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("padding", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("dilation", [1, 2, (3, 5)], ids=str)
def test_the_sign_of_a_zero_beside_padding_is_that_of_stock(
    dilation: Any, padding: tuple[int, int], layout: str, dtype: torch.dtype
) -> None:
    """A window that begins in the padding has its first value in the image."""
    x = torch.tensor([-1, -0.0, 0, -inf], dtype=dtype)[torch.randint(0, 4, (2, 17, 13, 23))]
    for stride in (1, 2, (3, 4)):
        y = relu_max_pool2d(cases.lay_out(x, layout), 5, stride, padding, dilation)
        expected = F.max_pool2d(F.relu(x), 5, stride, padding, dilation)
        assert torch.equal(y.signbit(), expected.signbit())


def test_takes_the_integers_that_stock_takes() -> None:
    x = torch.randn(1, 2, 9, 9)
    for two in (np.int64(2), np.uint8(2), (np.int32(2), 2), torch.tensor(2), [2], torch.Size([2, 2])):
        expected = F.max_pool2d(F.relu(x), two, two, 1, two)
        assert torch.equal(relu_max_pool2d(x, two, two, 1, two), expected)
    assert torch.equal(relu_max_pool2d(x, 2, ()), F.max_pool2d(F.relu(x), 2, ()))
    for wrong in (2.0, np.float64(2), np.array([2, 2]), range(2, 4), b"2", True, "2"):
        with pytest.raises(TypeError, match="stride must be an int or a pair of ints"):
            relu_max_pool2d(x, 2, wrong)
    with pytest.raises(ValueError, match="stride must be below"):
        relu_max_pool2d(x, 2, 2**63)
    with pytest.raises(TypeError, match="ceil_mode must be a bool, got 1"):
        relu_max_pool2d(x, 2, ceil_mode=1)


def test_with_ceil_mode_a_window_may_be_larger_than_the_image() -> None:
    x = torch.randn(1, 2, 1, 2)
    expected = F.max_pool2d(F.relu(x), 2, 3, 0, 1, True)
    assert expected.shape == (1, 2, 1, 1)
    assert torch.equal(relu_max_pool2d(x, 2, 3, 0, 1, True), expected)


def test_a_window_in_the_padding_alone_gives_what_stock_gives() -> None:
    """Dilation 2 over one pixel with padding 1: no tap falls into the image, and the maximum over nothing is -inf."""
    x = torch.randn(1, 2, 1, 3)
    assert torch.equal(relu_max_pool2d(x, 2, 1, 1, 2), F.max_pool2d(F.relu(x), 2, 1, 1, 2))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=cases.dtype_id)
def test_overlapping_windows_add_up(dtype: torch.dtype, layout: str) -> None:
    x = torch.zeros(1, 1, 5, 5, dtype=dtype)
    x[0, 0, 2, 2] = 9
    x = cases.lay_out(x, layout).requires_grad_()
    relu_max_pool2d(x, 3, 1).sum().backward()
    assert torch.equal(x.grad, (x.detach() == 9) * torch.tensor(9, dtype=dtype))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.dtype_id)
def test_gradients_of_half_precision_add_up_in_fp32(dtype: torch.dtype, layout: str) -> None:
    """256 + 8 * 0.75: added one by one in bf16, as stock does on the CPU, each 0.75 is lost."""
    x = torch.zeros(1, 3, 5, 5, dtype=dtype)
    x[:, :, 2, 2] = 9
    x = cases.lay_out(x, layout).requires_grad_()
    y = relu_max_pool2d(x, 3, 1)
    dy = torch.full(y.shape, 0.75)
    dy[:, :, 0, 0] = 256
    y.backward(dy.to(dtype))
    assert (x.grad[:, :, 2, 2] == torch.tensor(262.0).to(dtype)).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("constants", [(2,), ((2, 3), (1, 2), (0, 1)), (3, 2, 1, 1, True)], ids=str)
def test_gradcheck_and_gradgradcheck(constants: tuple[Any, ...], layout: str) -> None:
    x = torch.randperm(2 * 3 * 5 * 7).double().view(2, 3, 5, 7) / 10 - 7
    x = cases.lay_out(x, layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: relu_max_pool2d(t, *constants), x)
    assert torch.autograd.gradgradcheck(lambda t: relu_max_pool2d(t, *constants), x)


@pytest.mark.parametrize(
    ("size", "constants", "expected"),
    [
        (6, {"kernel_size": 3, "stride": 2, "ceil_mode": True}, 3),
        (2, {"kernel_size": 1, "stride": 2, "ceil_mode": True}, 1),
        (3, {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True}, 2),
        (3, {"kernel_size": 2, "stride": 2, "padding": 1, "ceil_mode": True}, 2),
        (4, {"kernel_size": 2, "stride": 2, "padding": 1, "ceil_mode": True}, 3),
        (9, {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2}, 4),
        (9, {"kernel_size": 3}, 3),
        (9, {"kernel_size": 3, "stride": None}, 3),
        (9, {"kernel_size": 3, "stride": []}, 3),
        (9, {"kernel_size": [3], "stride": [2]}, 4),
    ],
    ids=str,
)
def test_sizes(size: int, constants: dict[str, Any], expected: int) -> None:
    x = torch.randn(2, 3, size, size)
    y = relu_max_pool2d(x, **constants)
    assert y.shape == (2, 3, expected, expected)
    assert torch.equal(y, F.max_pool2d(F.relu(x), **constants))


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_every_small_size_as_stock(ceil_mode: bool) -> None:
    grid = [
        (n, k, s, p, d) for n in range(1, 8) for k in range(1, 4) for s in range(1, 4) for p in (0, 1) for d in (1, 2)
    ]
    compared = 0
    for n, k, s, p, d in grid:
        x = torch.randn(1, 1, n, n + 1)
        try:
            expected = F.max_pool2d(F.relu(x), k, s, p, d, ceil_mode)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                relu_max_pool2d(x, k, s, p, d, ceil_mode)
            continue
        assert torch.equal(relu_max_pool2d(x, k, s, p, d, ceil_mode), expected), (n, k, s, p, d)
        compared += 1
    assert compared > 150


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("shape", [(2, 3, 7, 9), (1, 4, 6, 3)], ids=str)
def test_strides_are_those_of_stock(shape: tuple[int, ...], layout: str) -> None:
    x = cases.lay_out(torch.randn(shape), layout)
    ours, stock = x.detach().requires_grad_(), x.detach().requires_grad_()
    y, expected = relu_max_pool2d(ours, 3, 2), F.max_pool2d(F.relu(stock), 3, 2)
    assert y.stride() == expected.stride()
    if layout != "expanded":  # autograd, not this op, accumulates the gradient of an expanded tensor
        y.sum().backward()
        expected.sum().backward()
        assert ours.grad.stride() == stock.grad.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 1, 5, 6), (2, 1, 7, 5), (1, 3, 1, 1)], ids=str)
def test_where_both_memory_formats_are_one_the_result_is_in_both(shape: tuple[int, ...], layout: str) -> None:
    y = relu_max_pool2d(cases.lay_out(torch.randn(shape), layout), 1, 2)
    assert y.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_unbatched_and_empty_batch() -> None:
    x = torch.randn(3, 7, 6, requires_grad=True)
    assert torch.equal(relu_max_pool2d(x, 3, 2), F.max_pool2d(F.relu(x), 3, 2))
    empty = torch.randn(0, 3, 7, 6, requires_grad=True)
    y = relu_max_pool2d(empty, 3, 2)
    assert y.shape == (0, 3, 3, 2)
    y.sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=cases.dtype_id)
def test_integers_run_stock(dtype: torch.dtype) -> None:
    x = torch.randint(0, 100, (2, 3, 7, 6)).to(dtype)
    assert torch.equal(relu_max_pool2d(x, 3, 2), F.max_pool2d(F.relu(x), 3, 2))


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64], ids=cases.dtype_id)
def test_dtypes_that_stock_refuses_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        relu_max_pool2d(torch.ones(1, 3, 7, 6).to(dtype), 3, 2)


def test_a_window_too_large_for_one_byte_runs_stock() -> None:
    case = pool((1, 2, 17, 19), (16, 15), 1)
    x = torch.randn(1, 2, 17, 19, requires_grad=True)
    assert_exactly_stock(case, x)


@pytest.mark.usefixtures("native")
def test_a_window_too_large_for_one_byte_is_refused_by_native() -> None:
    with pytest.raises(RuntimeError, match=r"a window of \[16, 15\]"):
        relu_max_pool2d(torch.randn(1, 2, 17, 19), (16, 15), 1, backend="native")


@pytest.mark.parametrize(
    ("shape", "constants", "error", "message"),
    [
        ((1, 3, 8, 8), (3, 2, 2), RuntimeError, r"padding must be at most half of kernel_size, got padding \[2, 2\]"),
        ((1, 3, 8, 8), (3, 1, 2, 2), RuntimeError, r"padding must be at most half of kernel_size"),
        ((1, 3, 8, 8), (3, 2, -1), RuntimeError, "padding must be at least 0, got -1"),
        ((1, 3, 8, 8), (3, 0), RuntimeError, "stride must be at least 1, got 0"),
        ((1, 3, 8, 8), (3, 2, 0, 0), RuntimeError, "dilation must be at least 1, got 0"),
        ((1, 3, 8, 8), (0, 1), RuntimeError, "kernel_size must be at least 1, got 0"),
        ((1, 3, 8, 8), (9, 1), RuntimeError, r"kernel_size \[9, 9\] .* leaves an output of \[0, 0\]"),
        ((1, 3, 8, 8), (2, 1, 0, 2**31 - 1), RuntimeError, "dilation .* leaves an output of"),
        ((8, 8), (3, 2), RuntimeError, r"x has shape \[8, 8\], expected 3D .* or 4D"),
        ((1, 1, 3, 8, 8), (3, 2), RuntimeError, r"x has shape \[1, 1, 3, 8, 8\], expected 3D .* or 4D"),
        ((2, 0, 8, 8), (3, 2), RuntimeError, r"x has shape \[2, 0, 8, 8\], .* non-empty C, H and W"),
        ((2, 3, 0, 8), (3, 2), RuntimeError, r"x has shape \[2, 3, 0, 8\], .* non-empty C, H and W"),
        ((1, 3, 8, 8), (3.5, 2), TypeError, r"kernel_size must be an int or a pair of ints, got 3\.5"),
        ((1, 3, 8, 8), ((3, 3, 3), 2), TypeError, "kernel_size must be an int or a pair of ints"),
        ((1, 3, 8, 8), (3, "2"), TypeError, "stride must be an int or a pair of ints"),
    ],
    ids=str,
)
def test_bad_arguments(
    shape: tuple[int, ...], constants: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        relu_max_pool2d(torch.randn(shape), *constants)


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("constants", "empty"),
    [
        ((2, 1, 1, (3, 1)), True),
        ((2, 2, 1, (2, 4)), True),
        (((2, 3), (9, 2), 1, (4, 1), True), True),
        ((4, 9, 2, (3, 1), True), False),
    ],
    ids=str,
)
def test_a_window_that_steps_over_the_image(
    constants: tuple[Any, ...], empty: bool, layout: str, dtype: torch.dtype
) -> None:
    """It gives -inf as in stock. Stock's backward then writes elsewhere; in ours nothing flows back."""
    x = cases.lay_out(torch.randn(2, 3, 2, 3).to(dtype), layout).requires_grad_()
    y, expected = relu_max_pool2d(x, *constants), F.max_pool2d(F.relu(x), *constants)
    assert torch.equal(y, expected)
    assert y.is_contiguous(memory_format=getattr(torch, "contiguous_format" if layout == "contiguous" else layout))
    assert y.isneginf().all() == empty
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, torch.zeros_like(x) if empty else torch.autograd.grad(expected.sum(), x)[0])


def test_a_gradient_never_reaches_another_channel() -> None:
    """Stock's gradient is [0, 0, 1, 1]."""
    x = torch.ones(1, 4, 1, 1, requires_grad=True)
    (found,) = torch.autograd.grad(relu_max_pool2d(x, 2, 1, 1, 2).sum(), x)
    assert not found.any()


def test_the_largest_dilation_with_a_window_of_one() -> None:
    x = torch.randn(1, 2, 5, 6)
    assert torch.equal(relu_max_pool2d(x, 1, 1, 0, 2**31 - 1), F.relu(x))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_winners_are_taps(layout: str) -> None:
    x = torch.full((1, 9, 5, 6), -1.0)
    x[..., 1, 2] = 4
    y, winners = torch.ops.alexnet_ext.relu_max_pool2d(cases.lay_out(x, layout), [2, 3], [1, 1], [0, 0], [1, 1], False)
    expected = torch.full((4, 4), 255)
    for i in (0, 1):
        for j in (0, 1, 2):
            expected[i, j] = (1 - i) * 3 + (2 - j)
    assert winners.dtype == torch.uint8
    assert (winners == expected).all()
    assert winners.stride() == y.stride()
