"""sgd_step: float64, torch.optim.SGD to the bit where no product is rounded, what it refuses, PyTorch's contracts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from alexnet_ext import _library
from alexnet_ext.ops import _backend, sgd_step
from tests.ops.sgd_step.spec import AROUND_CHUNKS, AROUND_VECTORS, EXACT, EXACT_VARIATIONS, sgd
from tests.support import cases, oracle
from tests.support.cases import Case, each_dtype, in_dtype

EXAMPLES = cases.SPECS["sgd_step"].examples
raw = pytest.mark.usefixtures("native")


@pytest.fixture(params=["native", "stock"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not _library.LIBRARIES[0].loaded:
        pytest.skip(f"the compiled CPU library is not loaded: {_library.LIBRARIES[0].reason}")
    return request.param


def lists(shape: tuple[int, ...] = (3, 5, 2, 4), dtype: torch.dtype = torch.bfloat16, count: int = 2) -> dict[str, Any]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = {"parameters": wide, "momenta": wide, "gradients": dtype, "weights": dtype}
    made = {name: [torch.randn(shape).to(t) for _ in range(count)] for name, t in dtypes.items()}
    return made | ({} if dtype.itemsize == 2 else {"weights": []})


def copied(given: dict[str, Any]) -> dict[str, Any]:
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in given.items()}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in one:
        for a, b in zip(one[name], other[name], strict=True):
            assert torch.equal(a.nan_to_num(nan=1.5), b.nan_to_num(nan=1.5)), name


@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("case", cases.params(cases.CASES["sgd_step"]))
def test_values(case: Case, dtype: torch.dtype, backend: str) -> None:
    case = in_dtype(case, dtype)
    oracle.assert_matches_float64(case, cases.make(case), backend)


@each_dtype
@pytest.mark.parametrize("sizes", [AROUND_VECTORS, AROUND_CHUNKS], ids=["vectors", "chunks"])
@pytest.mark.parametrize("variation", EXACT_VARIATIONS, ids=str)
def test_the_same_bits_as_torch_optim_where_no_product_is_rounded(
    variation: dict[str, Any], sizes: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    case = sgd(sizes, dtype, **variation)
    tensors = cases.make(case)
    assert torch.equal(cases.fused(case, tensors, backend), cases.stock(case, tensors))


@raw
@pytest.mark.usefixtures("threads")
def test_threads_change_no_bit() -> None:
    case = sgd((40_000, 3, 16_385), torch.bfloat16)
    tensors = cases.make(case)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(cases.fused(case, tensors, "native"))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, -0.0, 1e-40])
@each_dtype
def test_unusual_numbers(value: float, dtype: torch.dtype, backend: str) -> None:
    """They stay where they are; a decay or momentum of 0 multiplies no inf."""
    for constants in ({}, {"weight_decay": 0.0}, {"momentum": 0.0}):
        case = sgd((7, 9, 16), dtype, **EXACT | constants)
        for name in ("gradients", "parameters", "momenta"):
            tensors = cases.make(case)
            tensors[name][10] = value
            found, expected = cases.fused(case, tensors, backend), cases.stock(case, tensors)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("backend", "layout"), [("native", "offset"), ("stock", "offset"), ("stock", "sliced")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=cases.dtype_id)
@raw
def test_numbers_from_tensors(dtype: torch.dtype, backend: str, layout: str) -> None:
    """Stock PyTorch has a kernel for tensors of one memory order alone."""
    given = lists(dtype=dtype)
    expected, found = copied(given), copied(given)
    scale = torch.tensor([8.0])
    sgd_step(**expected, lr=0.125, momentum=0.5, backend="stock")
    found["gradients"] = [gradient * 8 for gradient in found["gradients"]]
    scaled = [gradient.clone() for gradient in found["gradients"]]
    found["momenta"] = [cases.lay_out(momentum, layout) for momentum in found["momenta"]]
    numbers = {"lr": torch.tensor(0.125), "grad_scale": scale, "found_inf": torch.zeros(1)}
    sgd_step(**found, **numbers, momentum=0.5, backend=backend)
    assert_same(found, expected | {"gradients": scaled})
    before = copied(found)
    sgd_step(**found, **numbers | {"found_inf": torch.ones(())}, momentum=0.5, first_step=True, backend=backend)
    assert_same(found, before)


def test_a_rate_in_a_tensor_of_another_dtype(backend: str) -> None:
    given = lists(dtype=torch.float64)
    expected = copied(given)
    sgd_step(**expected, lr=0.1, momentum=0.5, backend=backend)
    sgd_step(**given, lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.5, backend=backend)
    assert_same(given, expected)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: cases.lay_out(x, "transposed"),
    "sliced": lambda x: cases.lay_out(x, "sliced"),
    "offset": lambda x: cases.lay_out(x, "offset"),
}


@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("others", ["offset", "channels_last", "transposed"])
def test_gradients_of_any_strides(others: str, gradient: str, backend: str) -> None:
    given = lists()
    expected = copied(given)
    sgd_step(**expected, lr=0.1, momentum=0.9, backend=backend)
    placed = {name: [LAYOUTS[others](t) for t in tensors] for name, tensors in given.items()}
    placed["gradients"] = [LAYOUTS[gradient](t) for t in given["gradients"]]
    sgd_step(**placed, lr=0.1, momentum=0.9, backend=backend)
    assert_same(placed, expected)


@raw
@pytest.mark.parametrize("variation", EXACT_VARIATIONS, ids=str)
def test_what_is_written_may_have_any_strides_too(variation: dict[str, Any]) -> None:
    """Then stock PyTorch runs, by its single operations."""
    given = lists()
    if variation["momentum"] == 0:
        given["momenta"] = []
    expected = copied(given)
    sgd_step(**expected, **variation, backend="native")
    placed = copied(given) | {"parameters": [LAYOUTS["sliced"](t) for t in given["parameters"]]}
    with pytest.raises(RuntimeError, match=r"backend='native' does not cover tensors of strides \["):
        sgd_step(**placed, **variation, backend="native")
    sgd_step(**placed, **variation)
    assert_same(placed, expected)


def test_nothing_to_do(backend: str) -> None:
    sgd_step([], [], [], lr=0.1, momentum=0.9, backend=backend)
    given = lists((0,))
    sgd_step(**given, lr=0.1, momentum=0.9, backend=backend)
    scalar = lists(())
    expected = copied(scalar)
    sgd_step(**expected, lr=0.1, momentum=0.9, backend="stock")
    sgd_step(**scalar, lr=0.1, momentum=0.9, backend=backend)
    assert scalar["parameters"][0].item() == pytest.approx(expected["parameters"][0].item(), rel=1e-6)


GIVEN = lists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"parameters": GIVEN["parameters"][0]}, TypeError, "parameters must be a list of Tensors, got Tensor"),
        ({"weights": [None, None]}, TypeError, r"weights\[0\] must be a Tensor, got NoneType"),
        ({"lr": None}, TypeError, "lr must be a float, got NoneType None"),
        ({"lr": "0.1"}, TypeError, "lr must be a float, got str '0.1'"),
        ({"lr": torch.tensor(1j)}, TypeError, "lr must be a real number, got torch.complex64"),
        ({"momentum": "0.9"}, TypeError, "momentum must be a float, got str '0.9'"),
        ({"dampening": True}, TypeError, "dampening must be a float, got bool True"),
        ({"weight_decay": None}, TypeError, "weight_decay must be a float, got NoneType None"),
        ({"nesterov": "no"}, TypeError, "nesterov must be a bool, got str 'no'"),
        ({"first_step": 1}, TypeError, "first_step must be a bool, got int 1"),
        ({"grad_scale": 2.0}, TypeError, "grad_scale must be a Tensor, got float"),
        ({"found_inf": True}, TypeError, "found_inf must be a Tensor, got bool"),
        ({"momenta": []}, RuntimeError, "momenta has 0 tensors, expected 2 for 2 parameters"),
        ({"momentum": 0.0}, RuntimeError, "momenta has 2 tensors, expected 0 for 2 parameters"),
        ({"gradients": GIVEN["gradients"][:1]}, RuntimeError, "gradients has 1 tensors, expected 2 for 2 parameters"),
        ({"weights": GIVEN["weights"][:1]}, RuntimeError, "weights has 1 tensors, expected 0 or 2 for 2 parameters"),
        (
            {"parameters": GIVEN["weights"]},
            RuntimeError,
            r"parameters\[0\] has dtype torch.bfloat16, expected torch.fl",
        ),
        ({"momenta": GIVEN["weights"]}, RuntimeError, r"momenta\[0\] has dtype torch.bfloat16, expected torch.float32"),
        ({"weights": GIVEN["momenta"]}, RuntimeError, r"weights\[0\] has dtype torch.float32, expected torch.bfloat16"),
        (
            {"gradients": [GIVEN["gradients"][0], GIVEN["gradients"][1].half()]},
            RuntimeError,
            r"gradients\[1\] has dtype torch.float16, expected torch.bfloat16",
        ),
        (
            {"gradients": [g.int() for g in GIVEN["gradients"]]},
            RuntimeError,
            "gradients must be of .*, got torch.int32",
        ),
        (
            {"gradients": [g.to(torch.complex64) for g in GIVEN["gradients"]]},
            RuntimeError,
            "gradients must be of .*, got torch.complex64",
        ),
        (
            {"gradients": [g.to_sparse() for g in GIVEN["gradients"]]},
            RuntimeError,
            r"gradients\[0\] has layout torch.sparse_coo, expected torch.strided",
        ),
        (
            {"momenta": [m[:2] for m in GIVEN["momenta"]]},
            RuntimeError,
            r"momenta\[0\] has shape \[2, 5, 2, 4\], expect",
        ),
        (
            {"weights": [w.to("meta") for w in GIVEN["weights"]]},
            RuntimeError,
            r"weights\[0\] is on device meta, expected cpu",
        ),
        ({"lr": torch.ones(2)}, RuntimeError, r"lr has shape \[2\], expected one number"),
        ({"found_inf": torch.ones(0)}, RuntimeError, r"found_inf has shape \[0\], expected one number"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, native, triton, stock, got 'cuda'"),
        ({"backend": "triton"}, RuntimeError, "backend='triton' does not cover"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    before = copied(GIVEN)
    with pytest.raises(error, match=message):
        sgd_step(**GIVEN | {"lr": 0.1, "momentum": 0.9} | change)
    assert_same(GIVEN, before)


def arguments(given: dict[str, Any], momentum: float = 0.9) -> list[Any]:
    order = [given[name] for name in ("parameters", "momenta", "gradients", "weights")]
    return [*order, 0.1, momentum, 0.0, 0.0, False, False, False, None, None, None]


@raw
def test_the_raw_op_checks_what_it_is_given() -> None:
    given = arguments(lists())
    parameters, momenta, gradients, weights = given[:4]
    sliced = [LAYOUTS["sliced"](t) for t in parameters]
    for place, value, message in (
        (0, weights, r"parameters\[0\] must be float32 with such gradients"),
        (0, sliced, r"parameters\[0\] must be dense"),
        (0, parameters[:1], "gradients has 2 tensors, expected 1"),
        (1, momenta[:1], "momenta has 1 tensors, expected 2"),
        (1, weights, r"momenta\[0\] must be of the dtype of parameters"),
        (1, [LAYOUTS["channels_last"](t) for t in momenta], r"momenta\[0\] must have the strides of its parameter"),
        (1, [m[:2] for m in momenta], r"momenta has shape \[2, 5, 2, 4\], expected \[3, 5, 2, 4\]"),
        (2, [g[:2] for g in gradients], r"gradients has shape \[2, 5, 2, 4\], expected \[3, 5, 2, 4\]"),
        (2, [gradients[0], parameters[0]], r"gradients\[1\] must be of the dtype of gradients\[0\]"),
        (2, [g.int() for g in gradients], "gradients must be float64, float32, bfloat16 or float16"),
        (3, weights[:1], "weights has 1 tensors, expected 0 or 2"),
        (3, momenta, r"weights\[0\] must be of the dtype of gradients"),
        (5, 0.0, "momenta has 2 tensors, expected 0"),
        (11, torch.ones(2), "lr_tensor must be one number of float32"),
        (12, torch.ones(1, dtype=torch.float64), "grad_scale must be one number of float32"),
        (13, torch.ones(0), "found_inf must be one number of float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.alexnet_ext.sgd_step(*given[:place], value, *given[place + 1 :])


# ---- PyTorch's contracts


@raw
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=cases.dtype_id)
def test_opcheck(dtype: torch.dtype) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.alexnet_ext.sgd_step, arguments(lists(dtype=dtype)), test_utils=tests)


@pytest.mark.parametrize("backend", ["auto", "stock"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    torch._dynamo.reset()

    def step(given: dict[str, Any]) -> None:
        sgd_step(**given, lr=0.1, momentum=0.9, weight_decay=0.01, backend=backend)

    given = lists()
    expected = copied(given)
    step(expected)
    torch.compile(step, fullgraph=True, backend="aot_eager")(given)
    assert_same(given, expected)


def test_a_backward_that_needs_the_weights_of_before_is_refused(backend: str) -> None:
    weight, x = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    y = (weight * x).sum()
    with torch.no_grad():
        sgd_step([weight], [], [torch.ones(4)], lr=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_auto_runs_the_compiled_kernel_on_a_cpu_and_stock_on_an_unproven_gpu() -> None:
    on_cpu = _backend.decide("sgd_step", torch.device("cpu")).backend
    assert on_cpu == ("native" if _library.LIBRARIES[0].loaded else "stock")
    assert _backend.decide("sgd_step", torch.device("cuda")).backend == "stock"
