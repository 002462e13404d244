"""accelerate(example_inputs=...): a fused layer that changes a result is found, put back and named."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import alexnet_ext as ax
from tests.support.networks import BLOCK, CONV, LRN, PAPER, POOL, Functional, fused, sequential

X = torch.randn(2, 4, 13, 11, generator=torch.Generator().manual_seed(0))


def deep() -> nn.Sequential:
    """Four patterns."""
    layers = [nn.Conv2d(6, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.LocalResponseNorm(3)]
    return sequential(*BLOCK, *layers)


PATTERNS = {PAPER: 1, CONV: 1, POOL: 1, LRN: 1}


@pytest.mark.parametrize("given", [X, (X,), {"input": X}], ids=["tensor", "tuple", "dict"])
def test_what_agrees_is_fused(given: Any) -> None:
    model = deep()
    assert fused(ax.accelerate(model, example_inputs=given, strict=True)) == PATTERNS
    functional = Functional()
    report = ax.accelerate(functional, example_inputs=torch.randn(2, 3, 32, 30), method="fx")
    assert fused(report) == {CONV: 1, "relu -> max_pool2d": 1, "local_response_norm": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_in_every_precision(dtype: torch.dtype) -> None:
    model = sequential(*deep()[:5]).to(dtype)
    if dtype != torch.float64:
        model[2] = nn.Identity()  # stock PyTorch has no LRN of four dimensions there
    assert any(row.action == "fused" for row in ax.accelerate(model, example_inputs=X.to(dtype), strict=True))


def break_layer(monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], change: Any) -> None:
    right = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, input: change(right(self, input), self))


class OtherGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 1.5 * dy


FAULTS = {
    "values": (lambda y, layer: y * 1.01, r"(output 0|buffer .*) in (training|evaluation) by"),
    "gradients": (lambda y, layer: OtherGradient.apply(y), "gradient of"),
    "evaluation": (lambda y, layer: y if layer.training else y * 1.01, "output 0 in evaluation by"),
    "shape": (lambda y, layer: y[..., :1], "output 0 in training is torch.float32 of shape|it raises RuntimeError"),
    "dtype": (lambda y, layer: y.double(), "it raises RuntimeError|is torch.float64"),
    "NaN": (lambda y, layer: torch.where(y == y.max(), torch.nan, y), "output 0 in training by inf"),
    "error": (lambda y, layer: 1 / 0, "it raises ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "kind", [ax.nn.Conv2dReLULRNMaxPool2d, ax.nn.Conv2dReLU, ax.nn.ReLUMaxPool2d, ax.nn.LocalResponseNorm]
)
def test_a_wrong_layer_is_put_back_and_named(
    kind: type[nn.Module], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, words = FAULTS[fault]
    break_layer(monkeypatch, kind, change)
    model = deep()
    stock, y = list(model), model.eval()(X)
    report = ax.accelerate(model, example_inputs=X)
    (row,) = [row for row in report if row.reason.startswith("it differs from stock PyTorch on example_inputs: ")]
    assert row.action == "left alone"
    assert sum(fused(report).values()) == 3
    torch.testing.assert_close(model(X), y)
    assert kind not in map(type, model)
    assert re.search(words, row.reason), row.reason
    ax.restore(model)
    assert all(a is b for a, b in zip(model, stock, strict=True))
    with pytest.raises(RuntimeError, match=rf"strict=True and {row.name}: it differs from stock PyTorch"):
        ax.accelerate(model, example_inputs=X, strict=True)
    assert all(a is b for a, b in zip(model, stock, strict=True))


class WithAnInfiniteGradient(nn.Module):
    """The square root has an infinite slope at its parameter's zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.shift = deep(), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.shift.sqrt()


@pytest.mark.parametrize("wrong", [False, True])
def test_an_infinite_gradient_excuses_no_other(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong:
        break_layer(monkeypatch, ax.nn.ReLUMaxPool2d, lambda y, layer: OtherGradient.apply(y))
    report = ax.accelerate(WithAnInfiniteGradient(), example_inputs=X)
    assert [row.name for row in report if "differs from stock" in row.reason] == ["layers.7"] * wrong, report


def test_several_wrong_layers_are_found_place_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    convolutions = [layer for _ in range(9) for layer in (nn.Conv2d(4, 4, 1), nn.ReLU())]
    model = sequential(*convolutions, *BLOCK)
    for layer in model[: len(convolutions) : 2]:  # of random weights nine in a row may end in nothing but zeros
        nn.init.dirac_(layer.weight)
        nn.init.constant_(layer.bias, 0.1)
    wrong = {id(model[i].weight) for i in (2, 8, 16)}
    break_layer(monkeypatch, ax.nn.Conv2dReLU, lambda y, layer: -y if id(layer.weight) in wrong else y)
    break_layer(monkeypatch, ax.nn.Conv2dReLULRNMaxPool2d, lambda y, layer: y + 1)
    report = ax.accelerate(model, example_inputs=X)
    assert [row.name for row in report if row.action == "left alone"] == ["2", "8", "16", "18"]
    assert fused(report) == {CONV: 6}


def test_a_wrong_forward_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Functional(), torch.randn(2, 3, 32, 30)
    right = ax.ops.local_response_norm
    monkeypatch.setattr(ax.ops, "local_response_norm", lambda *args, **kwargs: 2 * right(*args, **kwargs))
    report = ax.accelerate(model, example_inputs=x, method="fx")
    assert [row.name for row in report if "differs from stock" in row.reason] == ["forward", "forward"]
    assert fused(report) == {CONV: 1}
    assert "forward" not in vars(model)


class OnceRemoved(nn.Module):
    """Code outside of the model runs its layers one by one: accelerate cannot see it, example_inputs show it."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.layers, self.run = sequential(*BLOCK), (run,)

    def forward(self, x: Tensor) -> Tensor:
        return self.run[0](x)


def test_a_reader_that_nobody_can_see() -> None:
    model = OnceRemoved(None)
    layers = model.layers
    model.run = (lambda x: layers[1](layers[0](x)) + layers[0](x).mean(),)
    y = model(X)
    report = ax.accelerate(model, example_inputs=X)
    assert fused(report) == {}
    assert "differs from stock" in report[0].reason
    torch.testing.assert_close(model(X), y)


class Stateful(nn.Module):
    """Counts, draws, and keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop = deep(), nn.Dropout(0.5)
        self.calls, self.log, self.counter, self.kept = 0, [1], Counter(a=1), None
        self.nested = {"deep": [[2]]}
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        self.counter["a"] += 1
        self.nested["deep"][0].append(3)
        self.steps += 1
        self.kept = y = self.drop(self.body(x))
        return y * (1 + random.random() + np.random.rand())


def state(model: Stateful) -> Any:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = (model.calls, list(model.log), dict(model.counter), repr(model.nested), model.kept)
    return tensors, kept, [m.training for m in model.modules()], [p.grad for p in model.parameters()]


def test_the_model_and_all_generators_are_as_before() -> None:
    model = Stateful()
    model.body[4].eval()
    model.body[0].weight.grad = torch.ones_like(model.body[0].weight)
    before, log, grad = state(model), model.log, model.body[0].weight.grad
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    x = X.clone().requires_grad_()
    report = ax.accelerate(model, example_inputs=x)
    assert fused(report) == PATTERNS
    ax.restore(model)
    after = state(model)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:3] == before[1:3]
    assert model.log is log
    assert model.body[0].weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1]
    assert np.random.get_state()[1].tolist() == draws[2]


def test_what_it_costs() -> None:
    runs: Counter[str] = Counter()

    class Counts(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            runs["forward"] += 1
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            runs["backward"] += 1
            return dy

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = deep()

        def forward(self, x: Tensor) -> Tensor:
            return Counts.apply(self.body(x))

    assert fused(ax.accelerate(Counted(), example_inputs=X)) == PATTERNS
    assert runs == {"forward": 4, "backward": 2}


def test_hooks_of_parameters_and_checkpoints_inside() -> None:
    """An optimizer that steps in the backward does not step; a reentrant checkpoint runs."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = deep()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=True)

    model, stepped = Checkpointed(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: stepped.append(1))
    assert fused(ax.accelerate(model, example_inputs=X)) == PATTERNS
    assert stepped == []
    model(X.clone().requires_grad_()).sum().backward()
    assert len(stepped) == len(list(model.parameters()))


def test_what_hooks_see_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook on a layer after a fused one."""
    model, seen = sequential(*BLOCK, nn.Tanh(), nn.Flatten()), []
    model[4].register_forward_pre_hook(lambda module, given: seen.append(given))
    model.append(nn.Threshold(10.0, 0.0))  # the output is constant
    break_layer(monkeypatch, ax.nn.Conv2dReLULRNMaxPool2d, lambda y, layer: y * 1.01)
    report = ax.accelerate(model, example_inputs=X)
    assert "what hooks of 4 see in training by" in report[0].reason


def test_bad_example_inputs() -> None:
    for given in ((), 3, {"input": None}, [1.0]):
        with pytest.raises(TypeError, match=r"example_inputs must be a Tensor, or a tuple or dict with one, got "):
            ax.accelerate(deep(), example_inputs=given)
    model = deep()
    before = list(model)
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 3"):
        ax.accelerate(model, example_inputs=torch.randn(1, 3, 9, 9))
    assert all(a is b for a, b in zip(model, before, strict=True))
