"""Classes with their own ``__torch_function__``, Tensors or not, reach stock PyTorch's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import alexnet_ext as ax
from tests.support import cases
from tests.support.cases import Case, each_example


def unwrapped(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(unwrapped(v) for v in value)
    return value.tensor if isinstance(value, Thing) else value


class Thing:
    """No Tensor, and without a Tensor's attributes; PyTorch's functions take it, like other libraries' arrays."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        return cls(func(*unwrapped(args), **(kwargs or {})))


class Strict(Tensor):
    """Refuses any function that is not PyTorch's own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            raise NotImplementedError(f"{func} is none of PyTorch's")
        return super().__torch_function__(func, types, args, kwargs or {})


class Plain(Tensor):
    """Inherits all of Tensor."""


@pytest.mark.parametrize("names", [("x",), ("weight",), ("bias",), ("x", "bias")], ids="+".join)
@each_example
def test_an_object_that_is_no_tensor(case: Case, names: tuple[str, ...]) -> None:
    names = tuple(name for name in names if case.shapes.get(name) is not None) or ("x",)
    name = names[0]
    tensors = cases.make(case, requires_grad=False)
    found = cases.fused(case, tensors | {name: Thing(tensors[name]) for name in names})
    assert isinstance(found, Thing)
    torch.testing.assert_close(found.tensor, cases.stock(case, tensors))
    with pytest.raises(RuntimeError, match="backend='native' does not cover tensors of type Thing"):
        cases.fused(case, tensors | {name: Thing(tensors[name])}, "native")
    with ax.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' does not cover tensors of type Thing"):
        cases.fused(case, tensors | {name: Thing(tensors[name])})


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@each_example
def test_a_tensor_that_knows_functions_alone(case: Case, name: str, compiled: bool) -> None:
    tensors = cases.make(case)
    if tensors.get(name) is None:
        name = "x"
    given = tensors | {name: tensors[name].as_subclass(Strict)}
    torch._dynamo.reset()
    run = torch.compile(cases.fused, fullgraph=True, backend="eager") if compiled else cases.fused
    y, expected = run(case, given), cases.stock(case, tensors)
    assert isinstance(y, Strict)
    wanted = list(cases.wanting_grad(tensors).values())
    torch.testing.assert_close(y.as_subclass(Tensor), expected)
    found = torch.autograd.grad(y.sum(), wanted)
    torch.testing.assert_close(tuple(g.as_subclass(Tensor) for g in found), torch.autograd.grad(expected.sum(), wanted))


@pytest.mark.usefixtures("native")
@each_example
def test_a_plain_subclass_runs_ours(case: Case) -> None:
    tensors = cases.make(case)
    y = cases.fused(case, tensors | {"x": tensors["x"].as_subclass(Plain)})
    assert isinstance(y, Plain)
    assert cases.runs_ours(y)
    torch.testing.assert_close(y.as_subclass(Tensor), cases.fused(case, tensors))


NORM, POOL = nn.LocalResponseNorm(3, alpha=1.5, k=2.0), nn.MaxPool2d(3, 2)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "conv": (
        lambda: ax.nn.Conv2dReLU(4, 6, 3, 2, groups=2),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, groups=2), nn.ReLU()),
    ),
    "conv_same": (
        lambda: ax.nn.Conv2dReLU(4, 6, (3, 5), padding="same", bias=False),
        lambda: nn.Sequential(nn.Conv2d(4, 6, (3, 5), padding="same", bias=False), nn.ReLU()),
    ),
    "linear": (lambda: ax.nn.LinearReLU(11, 5), lambda: nn.Sequential(nn.Linear(11, 5), nn.ReLU())),
    "norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), ax.nn.LocalResponseNorm(3, 1.5)),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.LocalResponseNorm(3, 1.5)),
    ),
    "pool": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), ax.nn.ReLUMaxPool2d(3, 2)),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), POOL),
    ),
    "block": (
        lambda: ax.nn.Conv2dReLULRNMaxPool2d(4, 6, 3, norm=NORM, pool=POOL),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), NORM, POOL),
    ),
    "caffe_block": (
        lambda: ax.nn.Conv2dReLUMaxPool2dLRN(4, 6, 3, bias=False, norm=NORM, pool=POOL),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.ReLU(), POOL, NORM),
    ),
    "caffe_block_bias": (
        lambda: ax.nn.Conv2dReLUMaxPool2dLRN(4, 6, 3, norm=NORM, pool=POOL),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), POOL, NORM),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_per_sample_gradients_by_expanded_weights(layer: str) -> None:
    """``ExpandedWeight`` handles a few of PyTorch's functions and refuses all others."""
    ours, stock = (build() for build in LAYERS[layer])
    for parameter, other in zip(ours.parameters(), stock.parameters(), strict=True):
        other.data.copy_(parameter.data)
    x = torch.randn(5, 4, 9, 11)
    for model in (ours, stock):
        call_for_per_sample_grads(model)(x).square().sum().backward()
    for parameter, other in zip(ours.parameters(), stock.parameters(), strict=True):
        assert parameter.grad_sample.shape == (5, *parameter.shape)
        torch.testing.assert_close(parameter.grad_sample, other.grad_sample)


@pytest.mark.parametrize("layer", LAYERS)
def test_torch_fx_traces_layers_as_stock_functions(layer: str) -> None:
    ours = LAYERS[layer][0]()
    x = torch.randn(5, 4, 9, 11)
    traced = torch.fx.symbolic_trace(ours)
    assert not any("alexnet_ext" in str(node.target) for node in traced.graph.nodes if node.op == "call_function")
    torch.testing.assert_close(traced(x), ours(x))
