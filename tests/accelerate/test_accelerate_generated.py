"""accelerate on drawn modules: their results, and the tensors that others see, are those of the untouched model.

A module is a class whose source is written here, so that torch.fx and accelerate see code as people write it. Each part
of its forward is one habit: layers in an nn.Sequential or called one by one; functional calls; a skip connection; a
layer in a list or under a second name; a tensor kept; a hook; a checkpoint; another method.
"""

from __future__ import annotations

import itertools
import linecache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import alexnet_ext as ax

HEADER = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SEEN = []

def note():
    note.calls += 1

note.calls = 0

class Tap(nn.Module):
    def forward(self, x):
        SEEN.append(x)
        return x

class Drawn(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu, self.kept, self.calls = nn.ReLU({inplace}), None, 0
{layers}
    def forward(self, x):
{steps}
        return x
{methods}
"""
LAYERS = {
    "conv": "nn.Conv2d(4, 4, 3, padding=1)",
    "norm": "nn.BatchNorm2d(4)",
    "relu": "nn.ReLU()",
    "relu_": "nn.ReLU(inplace=True)",
    "pool": "nn.MaxPool2d(2, 1)",
    "lrn": "nn.LocalResponseNorm(3, 0.5)",
    "drop": "nn.Dropout(0.0)",
    "tap": "Tap()",
}
ORDERS = (
    *(("conv", "relu"), ("conv", "relu_"), ("relu_", "pool"), ("conv", "relu_", "pool"), ("norm", "relu_", "pool")),
    *(("conv", "relu", "lrn", "pool"), ("conv", "relu_", "pool", "lrn"), ("conv", "tap", "relu_", "pool"), ("lrn",)),
    *(("conv", "drop", "relu_", "pool"), ("norm", "relu_"), ("conv", "norm", "relu_", "pool")),
)
orders = st.sampled_from(ORDERS) | st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4).map(tuple)

# A part's use of its Sequential {b}, whose first layer is {b}[0]: lines of forward, and of further methods.
OF_A_SEQUENTIAL: dict[str, tuple[str, str]] = {
    "whole": ("x = self.{b}(x)", ""),
    "skip": ("y = x.sin()\nx = self.{b}(y)\nx = x + y[..., : x.shape[-2], : x.shape[-1]]", ""),
    "after a layer": ("y = self.{b}_conv(x)\nx = self.{b}(y)\nx = x + y[..., : x.shape[-2], : x.shape[-1]]", ""),
    "walks": ("for layer in self.{b}:\n    x = layer(x)\n    SEEN.append(x)", ""),
    "walks when it can be traced": ("for layer in self.{b}:\n    x = layer(x)\nx = x + self.{b}[0](x).mean()", ""),
    "walks after a branch": (
        "if x.sum() > 1e9:\n    x = -x\nfor layer in self.{b}:\n    x = layer(x)\n    SEEN.append(x)",
        "",
    ),
    "slices": ("SEEN.append(self.{b}[:1](x))\nx = self.{b}(x)", ""),
    "checkpoint": ("x = checkpoint(self.{b}, x, use_reentrant=False)", ""),
    "another method": ("x = self.{b}(x)", "def {b}_first(self, x):\n    return self.{b}[0](x)"),
}
# Layers called one by one: {b}_conv, {b}_pool and the one self.relu.
ONE_BY_ONE: dict[str, tuple[str, str]] = {
    "chain": ("x = self.{b}_pool(self.relu(self.{b}_conv(x)))", ""),
    "two readers": ("y = self.{b}_conv(x)\nx = self.relu(y) + y", ""),
    "kept": ("self.kept = self.{b}_conv(x)\nx = self.relu(self.kept)", ""),
    "in a list": ("x = self.relu(self.{b}_list[0](x))", ""),
    "in a dict": ("x = self.{b}_dict['pool'](self.relu(x.sin()))", ""),
    "second name": ("x = self.{b}_again(self.relu(x.sin()))", ""),
    "appended": ("y = self.{b}_conv(x)\nSEEN.append(y)\nx = self.relu(y)", ""),
    "counted": ("self.calls += 1\nx = self.{b}_pool(self.relu(self.{b}_conv(x)))", ""),
    "embeds": ("x = self.relu(self.{b}_embed(x))", "def {b}_embed(self, x):\n    return self.{b}_conv(x)"),
    "embeds elsewhere": (
        "x = self.{b}_pool(self.relu(x.sin()))",
        "def {b}_embed(self, x):\n    return self.relu(self.{b}_conv(x)) + self.{b}_pool(x.sin()).mean()",
    ),
}
CALLS: dict[str, tuple[str, str]] = {
    "relu pool": ("x = F.max_pool2d(F.relu(x), 2, 1)", ""),
    "relu in place, pool": ("y = self.{b}_conv(x)\nx = F.max_pool2d(F.relu(y, inplace=True), 2, 1)", ""),
    "relu in place, read": ("y = self.{b}_conv(x)\nx = F.max_pool2d(F.relu_(y), 2, 1) + y.mean()", ""),
    "written between": ("y = x.clone()\nz = F.relu(y)\ny.zero_()\nx = F.max_pool2d(z, 2, 1)", ""),
    "pool kept": ("x = F.max_pool2d(F.relu(x), 2, 1)\nSEEN.append(x)", ""),
    "pool counted": ("global SEEN\nSEEN = [*SEEN, torch.ones(1)]\nx = F.max_pool2d(F.relu(x), 2, 1)", ""),
    "norm": ("x = F.local_response_norm(x, 3, 0.5)", ""),
    "norm learned": ("x = F.local_response_norm(x, 3, self.{b}_alpha)", ""),
    "norm checkpointed": ("x = checkpoint(self.{b}_tap, F.local_response_norm(x, 3, 0.5), use_reentrant=False)", ""),
    "noted": ("note()\nx = F.local_response_norm(x, 3, 0.5)", ""),
}
HOOKS = ("none", "before a relu", "on a layer", "on a sequential")
# A Sequential that runs as a whole is drawn more often than the others: most patterns are fused there.
kinds = st.just("whole") | st.sampled_from(list(OF_A_SEQUENTIAL)) | st.sampled_from([*ONE_BY_ONE, *CALLS])
parts = st.tuples(kinds, orders, st.sampled_from(HOOKS))
programs = st.tuples(st.lists(parts, min_size=1, max_size=3), st.booleans())
numbers = itertools.count()


def source(program: Any) -> str:
    """The text of a module with the class ``Drawn``."""
    drawn, inplace = program
    layers, steps, methods = [], [], []
    for i, (kind, order, _) in enumerate(drawn):
        b = f"b{i}"
        step, method = (OF_A_SEQUENTIAL | ONE_BY_ONE | CALLS)[kind]
        if kind in OF_A_SEQUENTIAL:
            layers.append(f"self.{b} = nn.Sequential({', '.join(LAYERS[name] for name in order)})")
        layers += [f"self.{b}_conv, self.{b}_pool = {LAYERS['conv']}, {LAYERS['pool']}"]
        layers += [f"self.{b}_tap = Tap()"]
        layers += [f"self.{b}_list, self.{b}_dict = [self.{b}_conv], {{'pool': self.{b}_pool}}"]
        layers += [f"self.{b}_again, self.{b}_alpha = self.{b}_pool, nn.Parameter(torch.tensor(0.5))"]
        steps += step.format(b=b).splitlines()
        methods += method.format(b=b).splitlines()
    steps.sort(key=lambda line: not line.startswith("global"))
    indented = {
        "layers": "\n".join(f"        {line}" for line in layers),
        "steps": "\n".join(f"        {line}" for line in steps),
        "methods": "\n".join(f"    {line}" for line in methods),
    }
    return HEADER.format(inplace=inplace, **indented)


class Run:
    """A drawn module and the tensors that others see."""

    def __init__(self, program: Any) -> None:
        text, name = source(program), f"<drawn {next(numbers)}>"
        # So that inspect finds the source.
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        self.name, self.scope = name, {"__name__": "drawn"}
        exec(compile(text, name, "exec"), self.scope)
        torch.manual_seed(0)
        self.model = self.scope["Drawn"]().double()
        self.methods = [key for key in vars(type(self.model)) if key.startswith("b")]
        for i, (kind, order, hook) in enumerate(program[0]):
            self._hook(getattr(self.model, f"b{i}", None) if kind in OF_A_SEQUENTIAL else None, order, hook)

    def _hook(self, body: nn.Sequential | None, order: tuple[str, ...], hook: str) -> None:
        if body is None or hook == "none":
            return
        at = next((i for i, name in enumerate(order) if i and name.startswith("relu")), 1) - 1
        layer = {"before a relu": body[at], "on a layer": body[-1], "on a sequential": body}[hook]
        layer.register_forward_hook(lambda module, given, output: self.scope["SEEN"].append(output))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: Any) -> None:
        del linecache.cache[self.name]

    def results(self) -> list[Tensor]:
        """Values, the tensors seen, and gradients, in training and in evaluation."""
        found: list[Any] = []
        for training in (True, False):
            self.model.train(training)
            state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            torch.manual_seed(1)
            x = torch.randn(2, 4, 16, 16, dtype=torch.float64, requires_grad=True)
            self.scope["SEEN"], self.model.kept, self.model.calls = [], None, 0
            y = self.model(x * 1)
            seen = [t for t in (*self.scope["SEEN"], self.model.kept) if t is not None]
            others = [getattr(self.model, name)(x * 1) for name in self.methods]
            leaves = [x, *self.model.parameters()]
            sums = (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()
            gradients = torch.autograd.grad(sums, leaves, allow_unused=True)
            counts = [self.model.calls, len(self.scope["SEEN"]), self.scope["note"].calls]
            self.scope["note"].calls = 0
            found += [torch.tensor(counts), *(t.detach().clone() for t in (y, *seen, *others))]
            found += [torch.zeros(()) if g is None else g for g in gradients]
            self.model.load_state_dict(state)
        return found


def compare(program: Any, method: str) -> ax.Report:
    """Compare the accelerated module with the untouched one, and the restored one with both."""
    with Run(program) as run:
        try:
            expected = run.results()
        except RuntimeError as error:  # stock PyTorch raises: a ReLU in place after a layer that keeps its output
            if "modified by an inplace operation" not in str(error):
                raise
            return ax.Report()
        report = ax.accelerate(run.model, method=method)
        found = run.results()
        assert len(found) == len(expected), f"other things are seen\n{source(program)}"
        for ours, stock in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, stock, msg=lambda text: f"{text}\n{report}\n{source(program)}")
        ax.restore(run.model)
        for ours, stock in zip(run.results(), expected, strict=True):
            assert torch.equal(ours, stock)
    return report


def counted(examples: int) -> Any:
    """A few examples are the same every time; many are new ones."""
    few = examples <= 300
    return settings(
        max_examples=examples,
        derandomize=few,
        database=None,
        deadline=None,
        print_blob=not few,
        phases=[Phase.explicit, Phase.generate] if few else list(Phase),  # a smaller example takes minutes to find
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("method", ["modules", "fx"])
@pytest.mark.parametrize("examples", [300, pytest.param(5_000, marks=pytest.mark.slow)])
def test_drawn_modules_are_as_before(examples: int, method: str) -> None:
    actions = set()

    @counted(examples)
    @given(programs)
    def drawn(program: Any) -> None:
        actions.update(row.action for row in compare(program, method))

    drawn()
    assert {"fused", "left alone"} <= actions


@pytest.mark.parametrize("method", ["modules", "fx"])
@pytest.mark.parametrize("kind", [*OF_A_SEQUENTIAL, *ONE_BY_ONE, *CALLS])
def test_each_part_alone(kind: str, method: str) -> None:
    """In every order of layers, and with every hook where a Sequential runs as a whole."""
    for order in ORDERS if kind in OF_A_SEQUENTIAL else ORDERS[:1]:
        for hook in dict.fromkeys(HOOKS) if kind == "whole" else ("none",):
            compare(([(kind, order, hook)], False), method)
