"""accelerate leaves layers alone if code reads between them, or if a forward does more than a trace shows."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alexnet_ext as ax
from tests.accelerate.test_accelerate_models import torchvision_model
from tests.support.networks import LRN, fused

SEEN: list[Any] = []
"""Tensors that a case's code keeps outside of its model."""


def convolution() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


class Net(nn.Module):
    """A convolution, a ReLU and a pooling; each case's forward calls them in its own way."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = convolution(), nn.ReLU(inplace), nn.MaxPool2d(2)
        self.kept: Any = None

    def see(self, x: Tensor) -> Any:
        """The tensors that the user of this model looks at."""
        return self(x)

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.conv(x))


class Tap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        return x


class OnNorm(Net):
    """A hook keeps the output of the layer before a ReLU in place, which writes into it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.body[1].register_forward_hook(lambda module, given, output: SEEN.append(output))

    def see(self, x: Tensor) -> Any:
        SEEN.clear()
        return [self(x), *SEEN]

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Tapped(OnNorm):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(), Tap(), nn.ReLU(inplace=True), nn.MaxPool2d(2))

    def see(self, x: Tensor) -> Any:
        return [self(x), self.body[1].kept]


class KeepsItsOutput(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        self.kept = super().forward(input)
        return self.kept


class KeptBySubclass(Tapped):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(), KeepsItsOutput(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))


class Skips(Net):
    """The ReLU in place that begins a Sequential writes into a tensor that is added afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.body(y) + F.avg_pool2d(y, 2)


class Walks(Net):
    """Iterates over a Sequential and keeps everything."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Any:
        if x.abs().max() > 100:
            x = x / 255
        found = []
        for layer in self.body:
            x = layer(x)
            found.append(x)
        return found


class WalksChildren(Walks):
    def forward(self, x: Tensor) -> Any:
        found = {}
        for name, layer in self.body.named_children():
            found[name] = x = layer(x)
        return list(found.values())


class WalksByIndex(Walks):
    def forward(self, x: Tensor) -> Any:
        body = self.body
        return [body[0](x), body(x)]


class WalksByName(Walks):
    def forward(self, x: Tensor) -> Any:
        return [getattr(self.body, "0")(x), self.body(x)]


class Slices(Walks):
    def forward(self, x: Tensor) -> Any:
        return [self.body[:1](x), self.body[1:](self.body[:1](x))]


class HandsOver(Walks):
    def forward(self, x: Tensor) -> Any:
        return functools.reduce(lambda found, layer: [*found, layer(found[-1])], self.body, [x])


class WalksFromOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Walks()

    def see(self, x: Tensor) -> Any:
        return self(x)

    def forward(self, x: Tensor) -> Any:
        layers = list(self.net.body)
        return [layers[0](x), self.net.body(x)]


class WalksElsewhere(Walks):
    """Its forward runs the Sequential as a whole, another of its methods does not."""

    def features(self, x: Tensor) -> Any:
        return self.body[0](x)

    def see(self, x: Tensor) -> Any:
        return [self(x), self.features(x)]

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Chain(nn.Sequential):
    """Runs as a Sequential does, and can give its first layer's output."""

    def first(self, x: Tensor) -> Any:
        return self[0](x)

    def see(self, x: Tensor) -> Any:
        return [self(x), self.first(x)]


class ForwardReplaced(Walks):
    def __init__(self) -> None:
        super().__init__()
        self.forward = types.MethodType(Walks.forward, self)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


DEFAULT: dict[str, Callable[[], nn.Module]] = {
    **{kind.__name__: kind for kind in (OnNorm, Tapped, KeptBySubclass, Skips, Walks, WalksChildren, WalksByIndex)},
    **{kind.__name__: kind for kind in (WalksByName, Slices, HandsOver, WalksFromOutside, WalksElsewhere)},
    "Chain": lambda: Chain(nn.Conv2d(4, 4, 3), nn.ReLU()),
    "ForwardReplaced": ForwardReplaced,
}
"""Both methods of accelerate must leave these as they are."""


def assert_as_before(model: Any, method: str) -> ax.Report:
    x = torch.randn(2, 4, 6, 6)
    model.train()
    expected = model.see(x.clone())
    expected = [t.detach().clone() for t in (expected if isinstance(expected, (list, tuple)) else [expected])]
    model.load_state_dict(model.state_dict())
    report = ax.accelerate(model, method=method)
    found = model.see(x.clone())
    found = [t.detach() for t in (found if isinstance(found, (list, tuple)) else [found])]
    torch.testing.assert_close(found, expected)
    return report


@pytest.mark.parametrize("method", ["modules", "fx"])
@pytest.mark.parametrize("name", DEFAULT)
def test_what_is_between_is_as_before(name: str, method: str) -> None:
    report = assert_as_before(DEFAULT[name](), method)
    assert any(row.action == "left alone" and row.reason for row in report)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_hooks_on_torchvisions_alexnet(at: int) -> None:
    """Its ReLUs are in place: a hook on a convolution holds what the next one overwrites."""
    model = torchvision_model("alexnet", num_classes=2).features
    seen: list[Tensor] = []
    model[at].register_forward_hook(lambda module, given, output: seen.append(output))
    x = torch.randn(1, 3, 64, 64)
    y = model(x)
    ax.accelerate(model)
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(seen[1], seen[0])


def test_hooks_on_all_modules() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        report = ax.accelerate(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    finally:
        handle.remove()
    assert report[0].reason == "hooks on all modules are set"


def test_reasons_name_the_code() -> None:
    reasons = {
        "Walks": "Walks.forward may run its layers one by one",
        "WalksElsewhere": "WalksElsewhere.features may run its layers one by one",
        "HandsOver": "HandsOver.forward may run its layers one by one",
        "ForwardReplaced": "the forward of ForwardReplaced was replaced",
    }
    for name, reason in reasons.items():
        assert reason in [row.reason for row in ax.accelerate(DEFAULT[name]())]


def test_code_whose_source_is_not_there() -> None:
    scope: dict[str, Any] = {"Net": Net, "nn": nn}
    exec("class Typed(Net):\n    def forward(self, x):\n        return self.body(x)", scope)
    model = scope["Typed"]()
    model.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.LocalResponseNorm(3))
    assert fused(ax.accelerate(model)) == {LRN: 1}
    report = ax.accelerate(scope["Typed"]())
    assert "the source of Typed.forward cannot be read" in [row.reason for row in ax.accelerate(model)], report
