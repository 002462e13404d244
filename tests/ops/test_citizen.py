"""PyTorch's contracts for every op: opcheck, compile, gradients of any layout, double backward, vmap, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.support import cases, oracle
from tests.support.cases import Case, conv, each_dtype, each_example, linear, lrn, pool

layouts_of_memory = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])


def values(tensors: cases.Tensors) -> list[Tensor]:
    return list(cases.wanting_grad(tensors).values())


def run_with(case: Case, tensors: cases.Tensors) -> Callable[..., Tensor]:
    """The op as a function of only those of its tensors that require a gradient."""
    names = list(cases.wanting_grad(tensors))
    return lambda *given: cases.fused(case, tensors | dict(zip(names, given, strict=True)))


# opcheck spends its time compiling: every layout without gradients, and one with them.
opcheck_samples = pytest.mark.parametrize(
    ("case", "layout", "requires_grad"),
    [
        pytest.param(case, layout, requires_grad, id=f"{case.id}-{layout}-{'grad' if requires_grad else 'no_grad'}")
        for case in cases.EXAMPLES + cases.of_all("edges")
        for layout, requires_grad in (
            [("contiguous", False), ("channels_last", False), ("transposed", False), ("contiguous", True)]
            if case in cases.EXAMPLES
            else [("contiguous", False)]
        )
    ],
)


@pytest.mark.usefixtures("native")
@opcheck_samples
def test_opcheck_forward(case: Case, layout: str, requires_grad: bool) -> None:
    tensors = cases.make(case, layout=layout, requires_grad=requires_grad)
    torch.library.opcheck(getattr(torch.ops.alexnet_ext, case.op), cases.raw_forward(case, tensors))


@pytest.mark.usefixtures("native")
@opcheck_samples
def test_opcheck_backward(case: Case, layout: str, requires_grad: bool) -> None:
    if requires_grad and case.op == "conv2d_bias_relu" and torch.__version__ < "2.13":
        pytest.skip(
            "PyTorch before 2.13 does not trace its own gradient of a convolution's gradient with symbolic sizes"
        )
    arguments = cases.raw_backward(case, cases.make(case, layout=layout, requires_grad=False))
    arguments = tuple(
        value.requires_grad_(requires_grad) if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in arguments
    )
    torch.library.opcheck(getattr(torch.ops.alexnet_ext, f"{case.op}_backward"), arguments)


@pytest.mark.usefixtures("native")
@each_dtype
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@each_example
def test_fakes_tell_the_real_strides(case: Case, layout: str, dtype: torch.dtype) -> None:
    tensors = cases.make(case, dtype, layout, requires_grad=False)
    for suffix, arguments in (("", cases.raw_forward), ("_backward", cases.raw_backward)):
        op = getattr(torch.ops.alexnet_ext, case.op + suffix)
        given = arguments(case, tensors)
        real = op(*given)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(value) if isinstance(value, Tensor) else value for value in given))
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for ours, theirs in pairs:
            assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@each_example
def test_compiles_without_a_graph_break(case: Case, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: cases.fused(case, t), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    grown = [case]
    if dynamic:
        x = case.shapes["x"]
        larger = (x[0] + 1, *x[1:]) if case.op == "linear_bias_relu" else (x[0] + 1, x[1], x[2] + 3, x[3] + 2)
        grown.append(Case(case.op, {**case.shapes, "x": larger}, case.constants))
    for i, shape in enumerate(grown):
        tensors = cases.make(shape)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            y = compiled(tensors)
        expected = cases.fused(shape, tensors)
        torch.testing.assert_close(y, expected)
        dy = torch.randn(y.shape)
        torch.testing.assert_close(
            torch.autograd.grad(y, values(tensors), dy), torch.autograd.grad(expected, values(tensors), dy)
        )


AFTERWARDS: dict[str, oracle.Apply] = {
    "sum": lambda y: y.sum(),
    "transpose": lambda y: y.mT,
    "cat": lambda y: torch.cat([y, torch.zeros_like(y)], 1),
    "slice_channels": lambda y: y[:, ::2],
    "slice_width": lambda y: y[..., 1:],
    "permute": lambda y: y.permute(*reversed(range(y.dim()))),
}


@layouts_of_memory
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=cases.dtype_id)
@pytest.mark.parametrize("afterwards", AFTERWARDS)
@each_example
def test_whatever_follows_the_op_its_gradient_is_right(
    case: Case, afterwards: str, dtype: torch.dtype, layout: str
) -> None:
    """The next op decides the strides of the gradient that comes back: that of sum has stride 0."""
    oracle.assert_matches_float64(case, cases.make(case, dtype, layout), then=AFTERWARDS[afterwards])


@each_dtype
@pytest.mark.parametrize("layout", ["sliced", "expanded", "offset"])
@pytest.mark.parametrize("case", cases.params(c for c in cases.EXAMPLES if c.shapes.get("bias")))
def test_a_bias_of_any_layout(case: Case, layout: str, dtype: torch.dtype) -> None:
    tensors = cases.make(case, dtype)
    tensors["bias"] = cases.lay_out(tensors["bias"].detach(), layout).requires_grad_()
    oracle.assert_matches_float64(case, tensors)


@layouts_of_memory
@each_dtype
@pytest.mark.parametrize("dy_layout", cases.LAYOUTS)
@each_example
def test_gradients_of_any_layout(case: Case, dy_layout: str, dtype: torch.dtype, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, dtype, layout), dy_layout=dy_layout)


@each_dtype
@each_example
def test_few_outputs_hang_on_a_rounding(case: Case, dtype: torch.dtype) -> None:
    """The comparisons with float64 give such outputs no gradient: they must remain a minority."""
    settled = oracle.settled(case, oracle.widened(cases.make(case, dtype)), dtype)
    assert settled.double().mean() > (0.99 if dtype in (torch.float64, torch.float32) else 0.4)


@each_example
def test_double_backward_as_stock(case: Case) -> None:
    tensors = cases.make(case, torch.float64)
    exact = oracle.widened(tensors)

    def second(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    torch.testing.assert_close(
        second(cases.fused(case, tensors), values(tensors)), second(cases.stock(case, exact), values(exact))
    )


@each_example
def test_vectorized_second_derivatives_as_stock(case: Case) -> None:
    """As in ``torch.autograd.functional.hessian(..., vectorize=True)``: many vectors through one graph."""
    tensors = cases.make(case, torch.float64)
    exact = oracle.widened(tensors)
    seeds = [torch.randn(3, *tensor.shape, dtype=torch.float64) for tensor in values(tensors)]

    def second(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(first, inputs, seeds, is_grads_batched=True)

    torch.testing.assert_close(
        second(cases.fused(case, tensors), values(tensors)), second(cases.stock(case, exact), values(exact))
    )


@pytest.mark.parametrize("case", cases.params(cases.of_all("small")))
def test_a_whole_hessian_at_once(case: Case) -> None:
    tensors = cases.make(case, torch.float64)
    given = tuple(tensor.detach() for tensor in values(tensors))

    def hessian(op: Callable[..., Tensor]) -> Any:
        def loss(*inputs: Tensor) -> Tensor:
            return op(case, tensors | dict(zip(cases.wanting_grad(tensors), inputs, strict=True))).pow(3).sum()

        return torch.autograd.functional.hessian(loss, given, vectorize=True)

    torch.testing.assert_close(hessian(cases.fused), hessian(cases.stock))


@pytest.mark.parametrize("dim", [0, 1, -1])
@each_example
def test_vmap_over_everything_and_over_x_alone(case: Case, dim: int) -> None:
    many = [cases.make(case, seed=seed, requires_grad=False) for seed in range(3)]
    names = [name for name, tensor in many[0].items() if tensor is not None]
    stacked = {name: torch.stack([tensors[name] for tensors in many], dim) for name in names}
    everything = torch.vmap(lambda *t: cases.fused(case, many[0] | dict(zip(names, t, strict=True))), in_dims=dim)
    expected = torch.stack([cases.fused(case, tensors) for tensors in many])
    torch.testing.assert_close(everything(*stacked.values()), expected)
    alone = torch.vmap(lambda x: cases.fused(case, many[0] | {"x": x}), in_dims=dim, out_dims=1)
    expected = torch.stack([cases.fused(case, many[0] | {"x": tensors["x"]}) for tensors in many], 1)
    torch.testing.assert_close(alone(stacked["x"]), expected)


@each_example
def test_vmap_over_nothing(case: Case) -> None:
    tensors = cases.make(case, requires_grad=False)
    none = {name: t.new_empty(0, *t.shape) for name, t in tensors.items() if t is not None}
    y = torch.vmap(lambda *t: cases.fused(case, tensors | dict(zip(none, t, strict=True))))(*none.values())
    assert y.shape == (0, *cases.fused(case, tensors).shape)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("case", [lrn((2, 3, 4, 5)), pool((2, 3, 7, 5))], ids=lambda case: case.op)
def test_vmap_over_x_is_one_call_where_x_has_a_batch(case: Case) -> None:
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    with Calls():
        torch.vmap(lambda x: cases.fused(case, {"x": x}))(torch.randn(3, *case.shapes["x"]))
    assert called.count(f"alexnet_ext.{case.op}.default") == 1


@each_example
def test_gradients_through_vmap(case: Case) -> None:
    """vmap(grad) and grad(vmap), compared with one backward an item."""
    many = [cases.make(case, torch.float64, seed=seed) for seed in range(3)]
    names = list(cases.wanting_grad(many[0]))
    stacked = [torch.stack([tensors[name].detach() for tensors in many]) for name in names]

    def loss(*given: Tensor) -> Tensor:
        return cases.fused(case, many[0] | dict(zip(names, given, strict=True))).square().sum()

    each = [torch.autograd.grad(cases.fused(case, t).square().sum(), values(t)) for t in many]
    expected = tuple(torch.stack(column) for column in zip(*each, strict=True))
    which = tuple(range(len(names)))
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss, which))(*stacked), expected)
    torch.testing.assert_close(torch.func.grad(lambda *t: torch.vmap(loss)(*t).sum(), which)(*stacked), expected)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.hessian], ids=["jacrev", "hessian"])
def test_jacobians(transform: Callable[..., Any]) -> None:
    case = lrn((1, 3, 1, 2), size=2)
    x = cases.make(case, torch.float64, requires_grad=False)["x"]

    def loss(op: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: op(case, {"x": t}).square().sum()

    torch.testing.assert_close(transform(loss(cases.fused))(x), transform(loss(cases.stock))(x))


@pytest.mark.parametrize("case", cases.params([next(c for c in cases.EXAMPLES if c.op == op) for op in cases.OPS]))
def test_gradient_transforms_inside_torch_compile(case: Case) -> None:
    torch._dynamo.reset()
    tensors = cases.make(case, torch.float64, requires_grad=False)

    def loss(x: Tensor) -> Tensor:
        return cases.fused(case, tensors | {"x": x}).square().sum()

    each = torch.vmap(torch.func.grad(loss))
    x = torch.stack([tensors["x"], 2 * tensors["x"]])
    compiled = torch.compile(lambda x: each(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), each(x))


@each_example
def test_forward_mode_runs_stock_and_native_says_that_it_cannot(case: Case) -> None:
    """A compiled op would silently return a tangent of zero."""
    tensors = cases.make(case, torch.float64, requires_grad=False)
    x, tangent = tensors["x"], torch.randn(case.shapes["x"], dtype=torch.float64)

    def jvp(run: Callable[..., Tensor], **options: Any) -> Any:
        return torch.func.jvp(lambda t: run(case, tensors | {"x": t}, **options), (x,), (tangent,))

    torch.testing.assert_close(jvp(cases.fused), jvp(cases.stock))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        y = torch.autograd.forward_ad.unpack_dual(cases.fused(case, tensors | {"x": dual}))
    torch.testing.assert_close((y.primal, y.tangent), jvp(cases.stock))
    with pytest.raises(RuntimeError, match=r"backend='native' does not cover (forward-mode AD|device 'cpu')"):
        jvp(cases.fused, backend="native")


@each_dtype
@pytest.mark.parametrize("case", cases.params(c for c in cases.EXAMPLES if c.op not in cases.PRODUCTS))
def test_autocast_keeps_the_dtype_of_all_but_products(case: Case, dtype: torch.dtype) -> None:
    tensors = cases.make(case, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = cases.fused(case, tensors)
    assert y.dtype == dtype
    torch.testing.assert_close(y, cases.fused(case, tensors))
    y.sum().backward()
    assert all(tensor.grad.dtype == dtype for tensor in values(tensors))


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=cases.dtype_id)
@pytest.mark.parametrize("x_dtype", cases.DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("case", cases.params(c for c in cases.EXAMPLES if c.op in cases.PRODUCTS))
def test_autocast_casts_products_as_stock(case: Case, x_dtype: torch.dtype, autocast_dtype: torch.dtype) -> None:
    tensors = cases.make(case, torch.float64 if x_dtype == torch.float64 else torch.float32)
    tensors["x"] = tensors["x"].detach().to(x_dtype).requires_grad_()
    with torch.autocast("cpu", autocast_dtype):
        y, expected = cases.fused(case, tensors), cases.stock(case, tensors)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)
    dy = torch.randn(y.shape).to(y.dtype)
    found, wanted = torch.autograd.grad(y, values(tensors), dy), torch.autograd.grad(expected, values(tensors), dy)
    assert [g.dtype for g in found] == [t.dtype for t in values(tensors)]
    for ours, stock in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)


def test_autocast_does_not_mix_fp64_with_fp32() -> None:
    tensors = cases.make(conv((1, 2, 5, 5), 2, (3, 3)))
    tensors["x"] = tensors["x"].double()
    case = conv((1, 2, 5, 5), 2, (3, 3))
    for run in (cases.fused, cases.stock):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            run(case, tensors)


@pytest.mark.parametrize("case", cases.params([conv((2, 4, 7, 9), 6, (3, 2)), linear((10, 7), 6)]))
@pytest.mark.parametrize("wanted", [("x", "weight", "bias"), ("x",), ("weight",), ()], ids=str)
def test_flops_are_counted_as_stock(case: Case, wanted: tuple[str, ...]) -> None:
    def count(op: Callable[..., Tensor]) -> int:
        tensors = {name: t.requires_grad_(name in wanted) for name, t in cases.make(case, requires_grad=False).items()}
        with FlopCounterMode(display=False) as counter:
            y = op(case, tensors)
            if wanted:
                y.sum().backward()
        return counter.get_total_flops()

    assert count(cases.fused) == count(cases.stock) > 0


@each_example
def test_meta_tensors_have_shapes_and_no_values(case: Case) -> None:
    tensors = cases.make(case)
    meta = {name: None if tensor is None else tensor.to("meta") for name, tensor in tensors.items()}
    y = cases.fused(case, meta)
    assert y.is_meta
    assert y.shape == cases.fused(case, tensors).shape


@each_example
def test_no_graph_without_gradients(case: Case) -> None:
    tensors = cases.make(case)
    expected = cases.fused(case, tensors)
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            y = cases.fused(case, tensors)
        assert not y.requires_grad
        assert torch.equal(y, expected)


@each_example
def test_sparse_and_complex_as_stock(case: Case) -> None:
    """Refused, except for the linear layer's sparse x, which stock takes."""
    tensors = cases.make(case, requires_grad=False)
    for x in (tensors["x"].to_sparse(), tensors["x"].to(torch.complex64)):
        if case.op == "linear_bias_relu" and x.is_sparse:
            torch.testing.assert_close(cases.fused(case, tensors | {"x": x}), cases.fused(case, tensors))
            continue
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            cases.fused(case, tensors | {"x": x})


@each_example
def test_without_anything_in_a_dimension_as_stock(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """Stock's result and gradients, or an exception of stock's type: one line, without a C++ trace."""

    def results(op: Callable[..., Tensor], tensors: cases.Tensors) -> tuple[Tensor, ...]:
        y = op(case, tensors)
        return y, *torch.autograd.grad(y.sum(), values(tensors))

    for name, shape in case.items():
        for dim in range(len(shape or ())):
            tensors = cases.make(case, requires_grad=False)
            tensors[name] = tensors[name].narrow(dim, 0, 0)
            tensors = {n: t if t is None else t.requires_grad_() for n, t in tensors.items()}
            try:
                expected = results(cases.stock, tensors)
            except (RuntimeError, ValueError) as error:
                with pytest.raises(type(error)) as caught:
                    results(cases.fused, tensors)
                assert "\n" not in str(caught.value)
            else:
                torch.testing.assert_close(results(cases.fused, tensors), expected)
    assert "Exception" not in capfd.readouterr().err


@each_example
def test_a_zero_dimensional_tensor_is_refused(case: Case) -> None:
    tensors = cases.make(case, requires_grad=False)
    with pytest.raises((RuntimeError, ValueError), match=r"expected (3D|\(\*, 7\))"):
        cases.fused(case, tensors | {"x": torch.tensor(1.0)})
