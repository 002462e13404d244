"""accelerate(method="fx"): neighbours that a forward calls, and calls of torch.nn.functional."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alexnet_ext as ax
from alexnet_ext.accelerate.calls import Rewritten
from tests.support.networks import BLOCK, CONV, PAPER, Functional, fused, sequential

NORM, RELU_POOL = "local_response_norm", "relu -> max_pool2d"


def test_minds_a_second_reader_and_both_modes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
            self.ra, self.rb, self.rc, self.rd = (nn.ReLU() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            x = self.ra(a) + a  # two readers
            x = self.rb(self.b(self.rb(self.b(x))))  # twice, and each time the same neighbours
            x = self.c(x)
            if self.training:
                x = x + 1
            return self.rd(self.d(self.rc(x)))

    model = Net().eval()
    x = torch.randn(2, 4, 5, 5)
    y = model(x)
    report = ax.accelerate(model, method="fx")
    assert [tuple(row)[:3] for row in report] == [
        ("a", "Conv2d", "left alone"),
        ("b", "Conv2d -> ReLU", "fused"),
        ("c", "Conv2d", "left alone"),
        ("d", "Conv2d -> ReLU", "fused"),
    ]
    assert not model.training
    torch.testing.assert_close(model(x), y)


def test_says_what_it_cannot_trace() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.body = nn.Conv2d(4, 4, 1), nn.ReLU(), sequential()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.b(self.a(x)) if x.sum() > 0 else x)

    model = Net().eval()
    report = ax.accelerate(model, method="fx")
    assert report[0][:3] == ("a", "Conv2d", "left alone")
    assert report[0].reason.startswith("torch.fx cannot trace the forward of Net: symbolically traced variables")
    assert fused(report) == {PAPER: 1}
    assert not any(module.training for module in model.modules())


def test_sees_that_a_sequential_is_read_between_its_layers() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = sequential(*BLOCK[:2], nn.MaxPool2d(2))

        def forward(self, x: Tensor) -> list[Tensor]:
            outputs = []
            for layer in self.layers:
                x = layer(x)
                outputs.append(x)
            return outputs

    model, x = Reads(), torch.randn(1, 4, 9, 9)
    expected = model(x)
    assert fused(ax.accelerate(model, method="fx")) == {}
    torch.testing.assert_close(model(x), expected)


def test_leaves_neighbours_in_different_places_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.relu = nn.ModuleList([nn.Conv2d(4, 6, 3)]), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.layers[0](x))

    model, x = Net(), torch.randn(1, 4, 5, 5)
    expected = model(x)
    assert fused(ax.accelerate(model, method="fx")) == {}
    torch.testing.assert_close(model(x), expected)


@pytest.fixture
def model() -> nn.Module:
    return Functional().double().eval()


def test_calls_are_fused_and_unfused(model: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 30, dtype=torch.float64)
    y = model(x)
    report = ax.accelerate(model, method="fx")
    assert [tuple(row)[:3] for row in report] == [
        *(("conv1", "Conv2d", "left alone"), ("conv2", "Conv2d", "left alone"), ("conv3", CONV, "fused")),
        *(("forward", RELU_POOL, "fused"), ("forward", NORM, "fused")),
    ]
    torch.testing.assert_close(model(x), y)
    names = {node.split()[0] for node in ops_of(model, x) if "alexnet_ext" in node}
    assert names == {
        "alexnet_ext::relu_max_pool2d",
        "alexnet_ext::local_response_norm",
        "alexnet_ext::conv2d_bias_relu",
    }
    again = ax.accelerate(model, method="fx")
    assert again[-1] == ("forward", "calls", "already fused", "")
    assert inspect.signature(model.forward) == inspect.signature(Functional().forward)
    ax.restore(model)
    assert "forward" not in vars(model)
    assert not [node for node in ops_of(model, x) if "alexnet_ext" in node]
    torch.testing.assert_close(model(x), y)


def ops_of(model: nn.Module, x: Tensor) -> list[str]:
    """The operators that a call runs, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        model(x)
    return [event.name for event in profile.events()]


def test_what_is_replaced_later_is_used(model: nn.Module) -> None:
    ax.accelerate(model, method="fx")
    x = torch.randn(2, 3, 32, 30, dtype=torch.float64)
    model.fc = nn.Linear(16, 3).double()
    assert model(x).shape == (2, 3)
    model.load_state_dict({name: torch.zeros_like(t) for name, t in model.state_dict().items()}, assign=True)
    assert not model(x).any()


def test_training_and_evaluation_differ_as_before(model: nn.Module) -> None:
    ax.accelerate(model, method="fx")
    x = torch.randn(2, 3, 32, 30, dtype=torch.float64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(model: nn.Module, how: str) -> None:
    ax.accelerate(model, method="fx")
    x = torch.randn(2, 3, 32, 30, dtype=torch.float64)
    y = model(x)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin(x), y)
    assert isinstance(twin.forward, Rewritten)
    with torch.no_grad():
        twin.fc.bias.add_(1)
    torch.testing.assert_close(twin(x), y + 1)
    torch.testing.assert_close(model(x), y)
    ax.restore(twin)
    torch.testing.assert_close(twin(x), y + 1)


def test_compile_and_export(model: nn.Module) -> None:
    torch._dynamo.reset()
    ax.accelerate(model, method="fx")
    x = torch.randn(2, 3, 32, 30, dtype=torch.float64)
    y = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x), y)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_torch_jit_traces_and_says_that_it_cannot_script(model: nn.Module) -> None:
    ax.accelerate(model, method="fx", conv_relu=False)
    with pytest.raises(AttributeError, match=r"torch.jit.script cannot compile the traced forward of Functional: use"):
        torch.jit.script(model)
    x = torch.randn(2, 3, 32, 30, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))
    ax.restore(model)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_nested_blocks_and_options(model: nn.Module) -> None:
    with ax.accelerated(model, method="fx", relu_pool=False, conv_relu=False) as report:
        assert fused(report) == {NORM: 1}
        forward = model.forward
        with ax.accelerated(model, method="fx"):
            assert model.forward is forward
        assert model.forward is forward
    assert "forward" not in vars(model)
    assert fused(ax.accelerate(model, method="fx", filter_fn=lambda module, name: bool(name))) == {CONV: 1}
    ax.restore(model)
    assert fused(ax.accelerate(model)) == {}


def test_a_relu_in_place_whose_input_is_read_elsewhere_stays() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.same = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Identity()

        def forward(self, x: Tensor) -> tuple[Any, ...]:
            a, b = self.a(x), self.b(x)
            first = F.max_pool2d(F.relu(a, inplace=True), 2)
            second = F.max_pool2d(F.relu(b.view_as(b), inplace=True), 2)
            third = F.max_pool2d(F.relu(x), 2, return_indices=True)
            fourth = F.max_pool2d(F.relu(self.same(b), inplace=True), 2)
            return first, second, third, fourth, a, b, F.max_pool2d(x.relu(), 3, ceil_mode=True)

    model, x = Writes(), torch.randn(1, 4, 7, 7)
    expected = model(x)
    report = ax.accelerate(model, method="fx")
    assert fused(report) == {RELU_POOL: 1}
    assert model.forward.found[True] == [RELU_POOL]
    torch.testing.assert_close(model(x), expected)


def test_a_forward_that_makes_tensors_is_left_alone() -> None:
    class Makes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.local_response_norm(x, 3) * torch.tensor(2.0)

    model, x = Makes(), torch.randn(1, 4, 5, 5)
    before = set(vars(model))
    expected = model(x)
    ax.accelerate(model, method="fx")
    assert set(vars(model)) == before
    torch.testing.assert_close(model(x), expected)


class Optional(nn.Module):
    """Its code depends on arguments that a call may leave out; they are no tensors that fx could trace."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.ra, self.rb, self.rc = (nn.ReLU() for _ in range(3))

    def forward(self, x: Tensor, scale: Tensor | None = None, *, shift: Tensor | None = None) -> Tensor:
        x = self.a(x)
        if scale is not None:
            x = self.ra(x) * scale
        x = self.b(x)
        if scale is not None and shift is None:
            x = self.rb(x)
        x = self.rc(self.c(x))
        return F.max_pool2d(x if shift is None else F.relu(x - shift), 2)


def test_arguments_that_may_be_left_out() -> None:
    model, x = Optional(), torch.randn(2, 4, 6, 6)
    two = torch.tensor(2.0)
    calls: list[tuple[tuple[Tensor, ...], dict[str, Tensor]]] = [
        *(((x,), {}), ((x, two), {}), ((x,), {"scale": two})),
        *(((x,), {"shift": two}), ((x, two), {"shift": two})),
    ]
    expected = [model(*args, **kwargs) for args, kwargs in calls]
    report = ax.accelerate(model, method="fx")
    assert [(row.name, row.action) for row in report if row.pattern != "calls"] == [
        ("a", "left alone"),
        ("b", "left alone"),
        ("c", "fused"),
    ]
    for (args, kwargs), y in zip(calls, expected, strict=True):
        torch.testing.assert_close(model(*args, **kwargs), y)


def test_calls_are_fused_where_arguments_are_left_out_and_not_where_they_are_given() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            y = F.max_pool2d(F.relu(x), 2)
            return y if scale is None else y * scale

    model, x, two = Scaled(), torch.randn(1, 4, 6, 6), torch.tensor(2.0)
    expected = model(x), model(x, two), model(x, scale=two), model(x=x)
    assert fused(ax.accelerate(model, method="fx")) == {RELU_POOL: 1}
    torch.testing.assert_close((model(x), model(x, two), model(x, scale=two), model(x=x)), expected)


def test_a_forward_that_changes_its_owner_is_left_alone_and_the_owner_as_it_was() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.last, self.conv, self.relu = 0, None, nn.Conv2d(4, 4, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.relu(self.conv(x)) * self.calls

    class Keeps(Counts):
        def forward(self, x: Tensor) -> Tensor:
            self.last = self.conv(x)
            return self.relu(self.last)

    class CountsInABuffer(Counts):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return F.max_pool2d(F.relu(self.conv(x)), 2) * self.steps

    for kind in (Counts, Keeps, CountsInABuffer):
        model = kind()
        before = (0, None, [torch.zeros(()) for _ in model.buffers()])
        report = ax.accelerate(model, method="fx")
        assert report[0].action == "left alone"
        assert report[0].reason.endswith("it changes its own attributes")
        assert (model.calls, model.last, list(model.buffers())) == before
        twin, x = copy.deepcopy(model), torch.randn(1, 4, 5, 5)
        ax.restore(twin)
        for _ in range(2):
            torch.testing.assert_close(model(x), twin(x))


class Switches(nn.Module):
    """Has gradients or autocast on or off in a part of its code."""

    def __init__(self, context: Callable[[], Any] | None) -> None:
        super().__init__()
        self.context, self.a, self.b, self.relu = context, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with self.context():
            x = self.b(self.relu(x.float()))
        return F.max_pool2d(F.relu(x), 2)


class Asks(Switches):
    """Asks whether gradients are on."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.relu(self.a(x)) if torch.is_grad_enabled() else self.a(x) - 1), 2)


@pytest.mark.parametrize(
    "context",
    [
        *(torch.no_grad, torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)),
        *(lambda: torch.autocast("cpu", enabled=False), None),
    ],
    ids=["no_grad", "enable_grad", "inference_mode", "autocast", "no_autocast", "asks"],
)
def test_a_forward_that_switches_gradients_or_autocast_is_left_alone(context: Callable[[], Any] | None) -> None:
    model, x = (Asks if context is None else Switches)(context), torch.randn(1, 4, 6, 6)
    twin = copy.deepcopy(model)
    report = ax.accelerate(model, method="fx")
    assert fused(report) == {}
    assert report[0].reason.endswith("gradients or autocast are on" if context is None else "gradients or autocast")
    for around in (torch.enable_grad(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with around:
            y, expected = model(x), twin(x)
        assert (y.requires_grad, y.dtype) == (expected.requires_grad, expected.dtype)
        torch.testing.assert_close(y, expected)


def test_arguments_that_are_no_tensors_run_the_original() -> None:
    class Masks(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            return F.max_pool2d(F.relu(x if mask is None else x * mask), 2)

    class Joins(nn.Module):
        def forward(self, x: Tensor | list[Tensor]) -> Tensor:
            return F.max_pool2d(F.relu(x if isinstance(x, Tensor) else torch.cat(x, 1)), 2)

    masks, joins, x, mask = Masks(), Joins(), torch.randn(1, 4, 6, 6), torch.randn(1, 1, 6, 6)
    calls = [(masks, (x, mask)), (masks, (x, None)), (joins, (x,)), (joins, ([x, x],))]
    expected = [model(*given) for model, given in calls]
    assert fused(ax.accelerate(masks, method="fx")) == {RELU_POOL: 1}
    assert fused(ax.accelerate(joins, method="fx")) == {}
    for (model, given), y in zip(calls, expected, strict=True):
        torch.testing.assert_close(model(*given), y)
