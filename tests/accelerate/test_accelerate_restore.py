"""Changes to an accelerated model survive restore, or are named; other tools lose no part of a layer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.mkldnn import to_mkldnn

import alexnet_ext as ax
from tests.support.networks import BLOCK, CAFFENET, CONV, LRN, PAPER, POOL, Functional, fused, sequential

PATTERNS: dict[str, tuple[nn.Module, ...]] = {
    PAPER: BLOCK,
    CAFFENET: (BLOCK[0], BLOCK[1], BLOCK[3], BLOCK[2]),
    CONV: BLOCK[:2],
    POOL: (nn.Tanh(), nn.ReLU(), nn.MaxPool2d(2)),
    LRN: (nn.Tanh(), nn.LocalResponseNorm(3)),
}
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def accelerated(pattern: str) -> tuple[nn.Sequential, int]:
    """A model with this pattern fused, and its place."""
    model = sequential(*PATTERNS[pattern])
    assert fused(ax.accelerate(model)) == {pattern: 1}
    return model, int(isinstance(model[0], nn.Tanh))


HOOKS: dict[str, Callable[[nn.Module, list[int]], Any]] = {
    "forward_pre": lambda m, seen: m.register_forward_pre_hook(lambda *_: seen.append(1)),
    "forward": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1)),
    "forward_kwargs": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1), with_kwargs=True),
    "always": lambda m, seen: m.register_forward_hook(lambda *_: seen.append(1), always_call=True),
    "full_backward": lambda m, seen: m.register_full_backward_hook(lambda *_: seen.append(1)),
    "full_backward_pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *_: seen.append(1)),
    "state_dict": lambda m, seen: m._register_state_dict_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("hook", HOOKS)
@each_pattern
def test_hooks_of_every_place_are_the_layers_own_after_restore(pattern: str, hook: str) -> None:
    model, _ = accelerated(pattern)
    seen: list[list[int]] = [[] for _ in model]
    handles = [HOOKS[hook](layer, calls) for layer, calls in zip(model, seen, strict=True)]

    def step() -> list[int]:
        for calls in seen:
            calls.clear()
        model(torch.randn(2, 4, 9, 9, requires_grad=True)).sum().backward()
        model.state_dict()
        return [len(calls) for calls in seen]

    assert step() == [1] * len(model)
    rows = ax.restore(model)
    assert [(row.pattern, row.action, row.reason) for row in rows] == [(pattern, "restored", "")]
    assert step() == [1] * len(model)
    for handle in handles:
        if hasattr(handle, "remove"):
            handle.remove()
    assert step() == [0 if hasattr(handle, "remove") else 1 for handle in handles]


def test_hooks_on_one_place_of_a_relu_that_stands_in_two() -> None:
    relu, seen = nn.ReLU(), []
    model = nn.Sequential(nn.Conv2d(4, 4, 1), relu, nn.Conv2d(4, 4, 1), relu)
    ax.accelerate(model)
    model[1].register_full_backward_hook(lambda *_: seen.append(1))
    ax.restore(model)
    model(torch.randn(1, 4, 3, 3)).sum().backward()
    assert len(seen) == 2


SETTINGS: dict[str, dict[str, Any]] = {
    PAPER: {"stride": (2, 2), "norm": (5, 0.5, 0.6, 2.0), "window": (2, 1)},
    CAFFENET: {"padding": (1, 1), "norm": (1, 0.5, 0.6, 2.0), "window": ((2, 1), (1, 2))},
    CONV: {"stride": (1, 2), "dilation": (2, 1), "padding": (2, 2)},
    POOL: {"kernel_size": 3, "stride": 1, "padding": 1, "ceil_mode": True},
    LRN: {"size": 5, "alpha": 0.5, "beta": 0.6, "k": 2.0},
}


@each_pattern
def test_settings_of_a_fused_layer_are_taken_over(pattern: str) -> None:
    model, at = accelerated(pattern)
    stock, x = sequential(*PATTERNS[pattern]), torch.randn(2, 4, 13, 12)
    for name, value in SETTINGS[pattern].items():
        setattr(model[at], name, value)
    model[at].note = "mine"
    expected = model(x)
    ax.restore(model)
    assert model[at].note == "mine"
    torch.testing.assert_close(model(x), expected)
    stock.load_state_dict(model.state_dict())
    assert stock(x).shape != expected.shape or not torch.allclose(stock(x), expected)


def test_what_cannot_be_taken_over_is_named() -> None:
    model = sequential(*BLOCK)
    ax.accelerate(model)
    model[0].compile(backend="eager")
    (row,) = ax.restore(model)
    assert row == ("0", PAPER, "restored", "its forward was replaced or compiled meanwhile, which is lost")
    assert model[0]._compiled_call_impl is None
    functional = Functional()
    ax.accelerate(functional, method="fx")
    assert [row.name for row in ax.restore(functional)] == ["forward", "conv3"]
    assert ax.restore(functional) == ()


def test_pickles_of_before_load_and_restore() -> None:
    """In them placeholders share no hooks with their layers, and ReLU -> MaxPool2d has the pool's dictionary."""
    model = sequential(nn.Tanh(), nn.ReLU(), nn.MaxPool2d(2))
    relu, pool = model[1], model[2]
    model[1] = ax.nn.sharing(ax.nn.ReLUMaxPool2d, pool, _replaces=(("1", relu), ("2", pool)))
    model[2] = nn.Identity()
    twin, x = pickle.loads(pickle.dumps(model)), torch.randn(1, 2, 4, 4)
    y = twin(x)
    ax.restore(twin)
    assert [type(layer) for layer in twin] == [nn.Tanh, nn.ReLU, nn.MaxPool2d]
    assert torch.equal(twin(x), y)
    from alexnet_ext.calls import Rewritten

    assert Rewritten.__module__ == "alexnet_ext.accelerate.calls"


def two() -> nn.Sequential:
    return sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 2))


def test_tools_that_look_for_convolutions_do_not_take_a_fused_layer_for_one() -> None:
    """They would convert or change the convolution, and the ReLU in it would be lost."""
    model, x = two().eval(), torch.randn(2, 3, 9, 9)
    model.append(ax.nn.LinearReLU(2, 3))
    ax.accelerate(model)
    assert [type(m) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.MaxPool2d))] == [nn.Linear]
    with torch.no_grad():
        expected = model(x)
        try:
            found = to_mkldnn(copy.deepcopy(model))(x.to_mkldnn()).to_dense()
        except RuntimeError as error:  # our op refuses, or the stock function in it
            assert "mkldnn" in str(error).lower()  # noqa: PT017
        else:
            torch.testing.assert_close(found, expected)


def test_low_rank_adapters_put_on_afterwards() -> None:
    """As such libraries do: wrap each layer of a class, and add a low-rank product to its output."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.delta = base, nn.Conv2d(base.in_channels, base.out_channels, base.kernel_size)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.delta(x)

    def adapt(model: nn.Sequential) -> int:
        found = [i for i, layer in enumerate(model) if isinstance(layer, nn.Conv2d)]
        for i in found:
            model[i] = Adapter(model[i])
        return len(found)

    stock, ours = two(), two()
    ax.accelerate(ours)
    assert (adapt(stock), adapt(ours)) == (2, 0)
    assert not torch.equal(ours[0](torch.randn(1, 3, 5, 5)).relu(), torch.zeros(1, 4, 3, 3))


def test_a_convolution_and_its_norm_are_folded_where_they_are_neighbours_alone() -> None:
    model = sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)).eval()
    model[2].running_mean.uniform_()
    ax.accelerate(model)
    x = torch.randn(1, 4, 5, 5)
    expected = model(x)
    layers = [layer for layer in model if type(layer) is not nn.Identity]
    folded = [layers[0], layers[1]]
    if isinstance(layers[0], nn.Conv2d):
        folded = [fuse_conv_bn_eval(layers[0], layers[1])]
    torch.testing.assert_close(nn.Sequential(*folded)(x), expected)


def replica(model: nn.Module, scale: float) -> nn.Module:
    """A replica as ``nn.DataParallel`` makes it for another device, with other parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for key, child in module._modules.items():
            twin._modules[key] = copies[child]
            setattr(twin, key, copies[child])
        for key, parameter in module._parameters.items():
            setattr(twin, key, None if parameter is None else parameter.detach() * scale)
        for key, buffer in module._buffers.items():
            twin._buffers[key] = buffer
    return copies[model]


class Mixed(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.block = sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return self.fc(self.relu3(self.conv3(self.conv2(x))).mean((2, 3)))


@pytest.mark.parametrize("method", ["modules", "fx"])
def test_replicas_of_data_parallel_run_their_own_parameters(method: str) -> None:
    model, x = Mixed(), torch.randn(2, 3, 32, 32)
    expected = [replica(model, scale)(x) for scale in (1.0, 2.0)]
    before = set(vars(model))
    assert fused(ax.accelerate(model, method=method))
    twins = [replica(model, scale) for scale in (1.0, 2.0)]
    torch.testing.assert_close([twin(x) for twin in twins], expected)
    torch.testing.assert_close(replica(copy.deepcopy(model), 2.0)(x), expected[1])
    ax.restore(model)
    assert set(vars(model)) == before
