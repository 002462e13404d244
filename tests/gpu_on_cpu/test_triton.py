"""The Triton kernels in Triton's interpreter: compared with float64, and with the compiled ops to the bit if possible.

The interpreter runs the kernels' source, not compiled code; test_triton_ahead.py checks that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import alexnet_ext as ax
from tests.ops.local_response_norm.spec import OTHER_RANKS
from tests.support import cases, oracle
from tests.support.cases import Case, block, lrn, pool

_triton = pytest.importorskip("alexnet_ext.ops._triton", reason="Triton is not installed", exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("interpreter")

# The interpreter is slow.
EXAMPLES = [case for case in cases.EXAMPLES if case.op in cases.IN_TRITON and case.shapes.get("bias", True)]
each_example = pytest.mark.parametrize("case", cases.params(EXAMPLES))

LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")


def sampled(values: list[Any], every: int) -> list[Any]:
    """One in ``every`` of these parameters in the plain suite, the others with ``pytest -m slow``: it is slow here."""
    return [
        pytest.param(*value.values, id=value.id, marks=[pytest.mark.slow] if i % every else [])
        for i, value in enumerate(values)
    ]


# Every shared case in one layout or another.
SHARED = sampled(
    [
        pytest.param(case, LAYOUTS[i // 3 % 2], id=f"{case.id}-{LAYOUTS[i // 3 % 2]}")
        for op in cases.MEMORY_BOUND
        for i, case in enumerate(cases.CASES[op])
        if cases.is_covered(case)
    ],
    every=3,
)
SHARED += [pytest.param(case, "contiguous", id=case.id) for case in OTHER_RANKS]


@pytest.mark.parametrize(("case", "layout"), SHARED)
def test_shared_cases_in_fp32(case: Case, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, layout=layout), "triton")


@pytest.mark.parametrize(
    ("case", "dtype", "layout"),
    sampled(
        [
            pytest.param(case, dtype, layout, id=f"{case.id}-{cases.dtype_id(dtype)}-{layout}")
            for case in EXAMPLES
            if case.op in cases.MEMORY_BOUND
            for dtype in (torch.float64, torch.bfloat16, torch.float16)
            for layout in LAYOUTS
        ],
        every=3,
    ),
)
def test_dtypes_and_layouts(case: Case, dtype: torch.dtype, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, dtype, layout), "triton")


@pytest.mark.parametrize("dy_layout", ["expanded", "channels_last", "sliced"])
@each_example
def test_gradients_of_any_layout(case: Case, dy_layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, layout="channels_last"), "triton", dy_layout=dy_layout)


@pytest.mark.parametrize("then", [Tensor.sum, lambda y: torch.cat([y, y], 1), lambda y: y.mT], ids=["sum", "cat", "mT"])
@each_example
def test_whatever_follows_the_op_its_gradient_is_right(case: Case, then: Callable[[Tensor], Tensor]) -> None:
    oracle.assert_matches_float64(case, cases.make(case), "triton", then=then)


SPLIT = (
    *(lrn((1, 37, 2, 3), size) for size in (1, 4, 5)),
    *(block(op, (1, 37, 3, 5), lrn_size=4) for op in cases.BLOCKS),
    pool((1, 37, 5, 3)),
)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", cases.params(SPLIT))
def test_channels_that_do_not_fit_one_tile(case: Case, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of channels overlap by the reach of a window."""
    monkeypatch.setattr(_triton, "CHANNELS", 16)
    oracle.assert_matches_float64(case, cases.make(case, layout=layout), "triton")


# Windows of LRN that reach beyond the eight channels of a thread, to the next lanes' and further.
REACHING = tuple(lrn((1, 24, 2, 3), size) for size in (6, 16, 17, 18))
# Windows that share a row with the next one: several runs of rows, the last one shorter, or one window alone.
SHARING = tuple(
    block("relu_lrn_max_pool2d", (1, 8, height, 5), kernel_size=kernel, stride=stride)
    for height, kernel, stride in ((35, 3, 2), (19, (2, 3), (1, 2)), (3, 3, 2), (9, (3, 2), (1, 1)))
)


@pytest.mark.parametrize("case", cases.params(REACHING + SHARING))
def test_windows_that_reach_far_and_rows_that_are_shared(case: Case) -> None:
    oracle.assert_matches_float64(case, cases.make(case, layout="channels_last"), "triton")


@pytest.mark.usefixtures("native")
@each_example
def test_wide_offsets_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for tensors of 2^31 elements and more."""
    tensors = cases.make(case)
    narrow = cases.fused(case, tensors, "triton")
    for name in cases.IN_TRITON:
        kernels = importlib.import_module(f"alexnet_ext.ops.{name}.triton_kernels")
        monkeypatch.setattr(kernels, "is_wide", lambda *_: True)
    wide = cases.fused(case, tensors, "triton")
    assert torch.equal(wide, narrow)
    inputs = list(cases.wanting_grad(tensors).values())
    for ours, expected in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (wide, narrow)), strict=True):
        assert torch.equal(ours, expected)


def test_is_wide_where_an_offset_may_pass_31_bits() -> None:
    small, large = (torch.empty(shape, device="meta") for shape in ((8, 96, 55, 55), (190, 64, 420, 421)))
    strided = torch.empty_strided((2, 3, 4, 5), (2**31, 1, 15, 3), device="meta")
    assert not _triton.is_wide(small)
    assert _triton.is_wide(large)
    assert _triton.is_wide(small, strided)


def awkward(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Ties, zeros of both signs, infinities and NaN."""
    values = torch.tensor([-2.0, -1, -0.0, 0.0, 1, 1, 2, 3, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    weights = torch.tensor([8.0, 8, 4, 4, 8, 8, 8, 4, 0.3, 0.3, 0.3])
    return values[torch.multinomial(weights, torch.Size(shape).numel(), replacement=True)].view(shape)


def identical(ours: Tensor, theirs: Tensor) -> bool:
    """Equal, zeros' signs included, NaN where NaN is."""
    same = (ours == theirs) & (ours.signbit() == theirs.signbit())
    return bool((same | (ours.isnan() & theirs.isnan())).all())


POOLS = (
    *(pool((2, 5, 9, 11)), pool((2, 3, 9, 7), 3, 2, padding=1, ceil_mode=True), pool((2, 9, 8, 6), 2, 2)),
    *(pool((1, 3, 11, 9), (2, 3), (2, 1), padding=(0, 1), dilation=(3, 2)), pool((1, 2, 9, 10), 2, 4)),
)


@pytest.mark.usefixtures("native", "poisoned")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("case", cases.params(POOLS))
def test_pooling_is_the_compiled_op_to_the_bit(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Values, winners and gradients, with ties, NaN and zeros of both signs."""
    ops = torch.ops.alexnet_ext
    x = cases.lay_out(awkward(case.shapes["x"], dtype), layout)
    arguments = cases.raw_forward(case, {"x": x})
    y, winners = ops.relu_max_pool2d_triton(*arguments)
    expected, expected_winners = ops.relu_max_pool2d(*arguments)
    assert identical(y, expected)
    assert torch.equal(winners, expected_winners)
    assert y.stride() == expected.stride()
    dy = -torch.randint(-4, 5, y.shape).to(dtype)  # zeros have a sign
    given = (dy, winners, *x.shape[2:], *arguments[1:-1])
    assert identical(ops.relu_max_pool2d_triton_backward(*given), ops.relu_max_pool2d_backward(*given))


@pytest.mark.usefixtures("native", "poisoned")
@pytest.mark.parametrize("case", cases.params(block(op, (2, 9, 7, 9)) for op in cases.BLOCKS))
def test_blocks_save_what_the_compiled_ops_save(case: Case) -> None:
    """Both backends save the same tensors: winners, and the pooled values before normalization."""
    x, bias = awkward(case.shapes["x"], torch.float32), torch.zeros(case.shapes["bias"])
    arguments = cases.raw_forward(case, {"x": x, "bias": bias})
    ours = getattr(torch.ops.alexnet_ext, f"{case.op}_triton")(*arguments)
    theirs = getattr(torch.ops.alexnet_ext, case.op)(*arguments)
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
    if case.op == "relu_lrn_max_pool2d":  # a winner may depend on the last bit of the normalized values
        assert (ours[-1] != theirs[-1]).float().mean() < 0.02
    else:
        assert all(identical(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))


@pytest.mark.parametrize(
    ("x", "size"), [([1, torch.inf, 2, 3, 4], 3), ([1, torch.nan, 2, 3, 4], 3), ([1e20] * 5, 5), ([-0.0, 1e-40, 0], 2)]
)
def test_normalization_of_inf_nan_and_what_overflows(x: list[float], size: int) -> None:
    """Inf and NaN stay inside their windows; if the square overflows, the gradient is 0, not NaN."""
    results = []
    for backend in ("triton", "stock"):
        values = torch.tensor(x).view(1, -1, 1).requires_grad_()
        y = ax.ops.local_response_norm(values, size, 1.0, 0.75, 1.0, backend=backend)
        results.append((y, *torch.autograd.grad(y.sum(), values)))
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.75, 1.0, 2.0, 3.0, -1.0, 0.3])
@pytest.mark.parametrize("k", [2.0, 0.0, -3.0])
def test_powers_of_whatever_base(beta: float, k: float) -> None:
    x = torch.randn(1, 7, 3)
    x[0, 2:5, 0] = 0
    ours, stock = (ax.ops.local_response_norm(x, 2, 1.0, beta, k, backend=b) for b in ("triton", "stock"))
    torch.testing.assert_close(ours, stock, equal_nan=True, rtol=2e-5, atol=1e-5)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("suffix", ["", "_backward"])
@pytest.mark.parametrize("op", cases.IN_TRITON)
def test_schemas_are_the_compiled_ops(op: str, suffix: str) -> None:
    names = f"{op}{suffix}", f"{op}_triton{suffix}"
    theirs, ours = (str(getattr(torch.ops.alexnet_ext, name).default._schema) for name in names)
    assert ours.replace(f"::{names[1]}(", f"::{names[0]}(") == theirs


@each_example
def test_opcheck(case: Case) -> None:
    """Schema, autograd and fake; tracing needs a compiler, which the interpreter lacks (test_triton_ahead)."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    tensors = cases.make(case)
    torch.library.opcheck(
        getattr(torch.ops.alexnet_ext, f"{case.op}_triton"), cases.raw_forward(case, tensors), test_utils=tests
    )
    arguments = cases.raw_backward(case, cases.make(case, requires_grad=False))
    torch.library.opcheck(
        getattr(torch.ops.alexnet_ext, f"{case.op}_triton_backward"), arguments, test_utils=tests[::2]
    )


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
@each_example
def test_fakes_tell_the_real_strides(case: Case, layout: str) -> None:
    tensors = cases.make(case, layout=layout, requires_grad=False)
    for suffix, arguments in (("", cases.raw_forward), ("_backward", cases.raw_backward)):
        op = getattr(torch.ops.alexnet_ext, f"{case.op}_triton{suffix}")
        given = arguments(case, tensors)
        real = op(*given)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(value) if isinstance(value, Tensor) else value for value in given))
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for ours, theirs in pairs:
            assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


@each_example
def test_double_backward_autocast_and_vmap_as_the_compiled_op(case: Case) -> None:
    tensors = cases.make(case, torch.float64)
    inputs = list(cases.wanting_grad(tensors).values())

    def second(backend: str) -> tuple[Tensor, ...]:
        y = cases.fused(case, tensors, backend)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    torch.testing.assert_close(second("triton"), second("stock"))
    tensors = cases.make(case, requires_grad=False)
    with torch.autocast("cpu", torch.float16):
        y = cases.fused(case, tensors, "triton")
    assert y.dtype == (torch.float16 if case.op in cases.PRODUCTS else torch.float32)
    x = torch.stack([tensors["x"], -tensors["x"]])
    mapped = torch.vmap(lambda x: cases.fused(case, tensors | {"x": x}, "triton"))(x)
    torch.testing.assert_close(mapped, torch.stack([cases.fused(case, tensors | {"x": x}, "triton") for x in x]))


@each_example
def test_the_same_bits_every_time(case: Case) -> None:
    tensors = cases.make(case, layout="channels_last")
    inputs = list(cases.wanting_grad(tensors).values())
    runs = [torch.autograd.grad(cases.fused(case, tensors, "triton").sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_use_backend_reaches_modules() -> None:
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    with ax.use_backend("triton"):
        y = ax.nn.LocalResponseNorm(3)(x)
    assert "triton" in type(y.grad_fn).__name__
