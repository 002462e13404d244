"""local_response_norm: float64, a plain loop over the windows, and the edge values of PyTorch's formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ext.ops import local_response_norm
from tests.ops.local_response_norm.spec import OTHER_RANKS
from tests.support import cases, oracle
from tests.support.cases import Case, each_dtype, each_layout, lrn

inf, nan = math.inf, math.nan


@pytest.mark.usefixtures("poisoned")
@each_dtype
@each_layout
@pytest.mark.parametrize("case", cases.params(cases.CASES["local_response_norm"]))
def test_values_and_gradients(case: Case, dtype: torch.dtype, layout: str) -> None:
    tensors = cases.make(case, dtype, layout)
    y = oracle.assert_matches_float64(case, tensors)
    exact = cases.stock(case, oracle.widened(tensors))
    bound = oracle.TOLERANCE[dtype] * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((y.double() - exact).abs() <= bound).all(), "nothing cancels in the forward: every value is near"


@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "offset", "expanded_batch"])
@pytest.mark.parametrize("case", cases.params(OTHER_RANKS))
def test_other_ranks(case: Case, dtype: torch.dtype, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, dtype, layout))


@pytest.mark.usefixtures("native", "poisoned")
@each_dtype
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("case", cases.params(OTHER_RANKS))
def test_other_ranks_with_strides_that_stock_refuses(case: Case, dtype: torch.dtype, layout: str) -> None:
    tensors = cases.make(case, dtype, layout)
    plain = {"x": tensors["x"].detach().clone(memory_format=torch.contiguous_format).requires_grad_()}
    y, expected = cases.fused(case, tensors), cases.fused(case, plain)
    dy = torch.randn(y.shape, dtype=dtype)
    (dx,), (dx_expected,) = torch.autograd.grad(y, tensors["x"], dy), torch.autograd.grad(expected, plain["x"], dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, dx_expected)


def window_loop(x: Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[Tensor, Tensor]:
    """(y, sum of dy / dx for dy = 1) of an (N, C, L) float64 tensor, straight from the definition."""
    channels = x.shape[1]
    scale = torch.empty_like(x)
    for c in range(channels):
        window = x[:, max(0, c - size // 2) : c + (size - 1) // 2 + 1]
        scale[:, c] = k + alpha / size * (window * window).sum(1)
    y, dx = x * scale**-beta, scale**-beta
    for i in range(channels):
        for j in range(max(0, i - (size - 1) // 2), min(channels, i + size // 2 + 1)):
            dx[:, i] -= 2 * alpha * beta / size * x[:, i] * x[:, j] * scale[:, j] ** (-beta - 1)
    return y, dx


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [1, 2, 7, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 15, 33])
def test_window_against_a_loop(size: int, channels: int, layout: str) -> None:
    x = cases.lay_out(torch.randn(2, channels, 3, dtype=torch.float64), layout).requires_grad_()
    y = local_response_norm(x, size, 0.9, 0.6, 1.5)
    y.sum().backward()
    y_loop, dx_loop = window_loop(x.detach(), size, 0.9, 0.6, 1.5)
    torch.testing.assert_close(y.detach(), y_loop, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(x.grad, dx_loop, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 15])
def test_gradcheck_and_gradgradcheck(size: int, layout: str) -> None:
    x = cases.lay_out(torch.randn(2, 6, 2, 3, dtype=torch.float64), layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: local_response_norm(t, size, 0.7, 0.75, 2.0), x)
    assert torch.autograd.gradgradcheck(lambda t: local_response_norm(t, size, 0.7, 0.75, 2.0), x)


def channels(*values: float) -> Tensor:
    """(1, C, 1, 1), repeated along the width so that vector code and its tail both see it."""
    return torch.tensor(values, dtype=torch.float32)[None, :, None, None].repeat(1, 1, 1, 19)


def assert_channels(result: Tensor, *expected: float, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(result, channels(*expected).to(result.dtype), rtol=rtol, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("values", "expected", "gradient"),
    [
        ((1, inf, 2, 3, 4), (0, nan, 0, 2.9978, 3.9975), (nan, nan, nan, 0.998, 0.998)),
        ((1, nan, 2, 3, 4), (nan, nan, nan, 2.9978, 3.9975), (nan, nan, nan, nan, 0.998)),
    ],
    ids=["inf", "nan"],
)
def test_inf_and_nan_stay_in_their_window(
    values: tuple[float, ...], expected: tuple[float, ...], gradient: tuple[float, ...], layout: str
) -> None:
    x = cases.lay_out(channels(*values), layout).requires_grad_()
    y = local_response_norm(x, 3, 1e-4, 0.75, 1.0)
    y.sum().backward()
    assert_channels(y.detach(), *expected)
    assert_channels(x.grad, *gradient, rtol=2e-3)


@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 2.0, 0.3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_running_sum_carries_inf_through_the_channels(layout: str, beta: float) -> None:
    x = cases.lay_out(torch.randn(1, 64, 2, 9), layout)
    far = x.clone()
    far[:, 0] = inf
    clean, dirty = local_response_norm(x, 5, 0.5, beta, 1.0), local_response_norm(far, 5, 0.5, beta, 1.0)
    assert torch.equal(clean[:, 3:], dirty[:, 3:])
    assert dirty[:, 0].isnan().all()
    assert (dirty[:, 1:3] == 0).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_running_sum_loses_small_values_behind_a_large_one(layout: str) -> None:
    x = torch.full((1, 40, 1, 17), 1e-3)
    x[:, 0] = 1e6
    y = local_response_norm(cases.lay_out(x, layout), 5, 1.0, 0.75, 1e-6)
    exact = F.local_response_norm(x.double(), 5, 1.0, 0.75, 1e-6)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_overflow_of_the_square_gives_signed_zero_and_no_nan(layout: str, beta: float) -> None:
    x = cases.lay_out(channels(1e20, -1e20, 1e20, -1e20), layout).requires_grad_()
    y = local_response_norm(x, 3, 1e-4, beta, 1.0)
    y.sum().backward()
    assert (y == 0).all()
    assert torch.equal(y.signbit(), x.signbit())
    assert (x.grad == 0).all()


@pytest.mark.parametrize("rank", [3, 4])
def test_fp16_accumulates_in_fp32(rank: int) -> None:
    """Stock squares in fp16, so 300 becomes 0; ours is the float64 result, rounded once."""
    x = torch.full((1, 3, 2, 9)[:rank], 300.0, dtype=torch.float16)
    y = local_response_norm(x, 3, 1e-4, 0.75, 1.0)
    expected = torch.tensor([69.71, 53.35, 69.71])
    torch.testing.assert_close(y[0].flatten(1)[:, 0].float(), expected, rtol=1e-3, atol=0)
    assert (y[0] == y[0].flatten(1)[:, 0].view(3, *[1] * (rank - 2))).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("values", "constants", "expected"),
    [
        ((1.0,), {"size": 5, "alpha": 5.0, "beta": 1.0, "k": 1.0}, (0.5,)),
        ((0.0, 0.0), {"size": 3, "alpha": 1e-4, "beta": 0.75, "k": 0.0}, (nan, nan)),
        ((1.0, -2.0), {"size": 3, "alpha": 0.0, "beta": 0.75, "k": 0.0}, (inf, -inf)),
        ((1.0, 1.0), {"size": 3, "alpha": 1e-4, "beta": 0.75, "k": -1.0}, (nan, nan)),
        ((1.0,), {"size": 1, "alpha": 1e-4, "beta": 2.0, "k": -1.0}, (1.0002,)),
        ((2.0, 2.0), {"size": 1, "alpha": -1.0, "beta": 0.75, "k": 1.0}, (nan, nan)),
        ((3.0, 3.0), {"size": 1, "alpha": -1.0, "beta": 1.0, "k": 1.0}, (-0.375, -0.375)),
        ((3.0, 3.0), {"size": 1, "alpha": -1.0, "beta": 0.5, "k": 1.0}, (nan, nan)),
        ((3.0, -3.0, 3.0), {"size": 3, "alpha": 1.0, "beta": -1.0, "k": 1.0}, (21.0, -30.0, 21.0)),
    ],
    ids=[
        "alpha_is_divided_by_size",
        "k0_at_0",
        "k0_alpha0",
        "negative_base",
        "negative_base_to_an_even_power",
        "negative_alpha",
        "negative_alpha_to_a_whole_power",
        "negative_alpha_to_a_half",
        "beta_minus_1",
    ],
)
def test_constants_without_sense_give_what_pytorch_gives(
    values: tuple[float, ...], constants: dict[str, float], expected: tuple[float, ...], layout: str
) -> None:
    x = cases.lay_out(channels(*values), layout).requires_grad_()
    plain = channels(*values).requires_grad_()
    y, stock = local_response_norm(x, **constants), F.local_response_norm(plain, **constants)
    assert_channels(y.detach(), *expected)
    torch.testing.assert_close(y, stock, equal_nan=True)
    y.sum().backward()
    stock.sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-4, atol=1e-5, equal_nan=True)


@each_dtype
@pytest.mark.parametrize("constants", [(5, 0.3, 0.0, 2.0), (3, 0.0, 0.75, 1.0), (3, 0.0, 0.3, 1.0)], ids=str)
def test_identity_bit_for_bit(constants: tuple[int, float, float, float], dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 5, 9).to(dtype)
    assert torch.equal(local_response_norm(x, *constants), x)


@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_denormals_are_kept(layout: str, beta: float) -> None:
    x = cases.lay_out(channels(1e-40, -1e-40, 3e-41), layout)
    y = local_response_norm(x, 3, 1e-4, beta, 1.0)
    assert torch.equal(y, x)


@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 2.0, -1.0, 0.3, 1.7])
def test_power_over_the_whole_range_of_scales(beta: float) -> None:
    x = torch.logspace(-18, 18, 1009)[None, None]
    y = local_response_norm(x, 1, 1.0, beta, 1e-12)
    exact = F.local_response_norm(x.double(), 1, 1.0, beta, 1e-12)
    normal = (x < 1e18) & (exact / x > 1e-36) & (exact < 1e38)
    assert normal.sum() > 500
    torch.testing.assert_close(y[normal].double(), exact[normal], rtol=4e-6, atol=0)


def test_odd_in_x_and_the_same_for_every_pixel_and_image() -> None:
    x = torch.randn(3, 9, 5, 7)
    y = local_response_norm(x, 4, 0.5, 0.75, 1.0)
    assert torch.equal(local_response_norm(-x, 4, 0.5, 0.75, 1.0), -y)
    for permute in (lambda t: t.flip(0), lambda t: t.flip(2), lambda t: t.flip(3)):
        torch.testing.assert_close(local_response_norm(permute(x), 4, 0.5, 0.75, 1.0), permute(y), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "shape", [(2, 3, 4), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (1, 5, 2, 3, 4), (1, 5, 2, 3, 1, 2)]
)
def test_shape_kept_and_gradient_flows(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = local_response_norm(x, 3)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, ::2, ::2, ::2],
        lambda x: x[..., :1].expand(x.shape),
    ],
    ids=["contiguous", "channels_last", "transposed", "sliced", "expanded"],
)
def test_strides_are_those_of_stock(change: oracle.Apply) -> None:
    x = change(torch.randn(2, 6, 5, 4))
    assert local_response_norm(x, 3).stride() == F.local_response_norm(x, 3).stride()


def test_channels_last_3d_is_kept() -> None:
    x = torch.randn(2, 6, 3, 5, 4).contiguous(memory_format=torch.channels_last_3d)
    assert local_response_norm(x, 3).is_contiguous(memory_format=torch.channels_last_3d)


def test_takes_the_numbers_that_stock_takes() -> None:
    x = torch.randn(1, 7, 4, 4)
    numbers = (np.int64(5), np.float32(0.25), np.float64(0.75), np.int32(2))
    torch.testing.assert_close(local_response_norm(x, *numbers), F.local_response_norm(x, *numbers))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(2, 3), 3), ValueError, r"x has 2 dimensions, expected 3D or higher"),
        ((torch.randn(3), 3), ValueError, r"x has 1 dimensions, expected 3D or higher"),
        ((torch.randn(1, 3, 4, 4), 0), RuntimeError, "size must be greater than zero, got 0"),
        ((torch.randn(1, 3, 4, 4), -2), RuntimeError, "size must be greater than zero, got -2"),
        ((torch.randn(1, 3, 4, 4), 3.0), TypeError, r"size must be an int, got float 3\.0"),
        ((torch.randn(1, 3, 4, 4), True), TypeError, "size must be an int, got bool"),
        ((torch.randn(1, 3, 4, 4), 3, "a"), TypeError, "alpha must be a float, got str"),
        ((torch.randn(1, 3, 4, 4), 3, 1e-4, None), TypeError, "beta must be a float, got NoneType"),
        ((torch.randn(1, 3, 4, 4), 3, 1e-4, 0.75, 1j), TypeError, "k must be a float, got complex"),
        (([1.0], 3), TypeError, "x must be a Tensor, got list"),
    ],
    ids=["rank2", "rank1", "size0", "size-2", "size_float", "size_bool", "alpha", "beta", "k", "list"],
)
def test_bad_arguments(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        local_response_norm(*arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool], ids=cases.dtype_id)
def test_dtypes_that_stock_refuses_are_refused(dtype: torch.dtype) -> None:
    x = torch.ones(1, 3, 4, 4, dtype=dtype)
    with pytest.raises((RuntimeError, TypeError)):
        F.local_response_norm(x, 3)
    with pytest.raises((RuntimeError, TypeError)):
        local_response_norm(x, 3)


def test_int64_gives_what_stock_gives() -> None:
    x = torch.arange(24).view(1, 6, 2, 2)
    torch.testing.assert_close(local_response_norm(x, 3, 0.1), F.local_response_norm(x, 3, 0.1))


def test_default_constants_are_those_of_stock() -> None:
    x = torch.randn(2, 7, 3, 4) * 50
    torch.testing.assert_close(local_response_norm(x, 5), F.local_response_norm(x, 5))


def test_gradcheck_beyond_the_channels() -> None:
    case = lrn((1, 3, 2, 2), size=15, beta=0.5)
    x = cases.make(case, torch.float64)["x"]
    assert torch.autograd.gradcheck(lambda t: cases.fused(case, {"x": t}), x)
