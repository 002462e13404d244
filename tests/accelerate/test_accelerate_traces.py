"""accelerate(method="fx") of forwards that do more than a trace shows: none of it may be lost."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import alexnet_ext as ax
from tests.accelerate.test_accelerate_readers import SEEN, Net, assert_as_before
from tests.support.networks import CONV, POOL, fused

LAYERS: list[nn.Module] = []
COUNT = 0


class TwoReaders(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.relu(y) + y


class TwoNames(Net):
    """The pooling is called by its second name."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.pool

    def forward(self, x: Tensor) -> Any:
        return self.again(self.relu(x))


class Listed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.conv]

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.steps[0](x))


class InADict(Net):
    def __init__(self) -> None:
        super().__init__()
        self.by_name = {"pool": self.pool}

    def forward(self, x: Tensor) -> Any:
        return self.by_name["pool"](self.relu(x))


class InAnObject(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = types.SimpleNamespace(conv=self.conv)

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.layers.conv(x))


class InAVariable(Net):
    def __init__(self) -> None:
        super().__init__()
        LAYERS[:] = [self.pool]

    def forward(self, x: Tensor) -> Any:
        return LAYERS[0](self.relu(x))


class InATuple(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pair = (self.conv, 1)

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.pair[0](x))


class InAFunction(Net):
    def __init__(self) -> None:
        super().__init__()
        conv = self.conv
        self.convolve = lambda x: conv(x)

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.convolve(x))


class BoundMethod(Net):
    def __init__(self) -> None:
        super().__init__()
        self.convolve = self.conv.forward

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.convolve(x)) + self.relu(self.conv(x))


class BelowTwoParents(nn.Module):
    """One block below two parents, one of which reads its convolution alone."""

    def __init__(self) -> None:
        super().__init__()
        block = Net()
        self.first, self.second = nn.ModuleDict({"block": block}), nn.ModuleDict({"block": block})

    def see(self, x: Tensor) -> Any:
        return self(x)

    def forward(self, x: Tensor) -> Any:
        return self.first["block"](x), self.second["block"].conv(x)


class KeptByIt(Net):
    def see(self, x: Tensor) -> Any:
        return [self(x), self.kept]

    def forward(self, x: Tensor) -> Any:
        self.kept = self.conv(x)
        return self.relu(self.kept)


class KeptInAList(KeptByIt):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        SEEN[:] = [y]
        return self.relu(y)

    def see(self, x: Tensor) -> Any:
        return [self(x), *SEEN]


class Appended(KeptInAList):
    def forward(self, x: Tensor) -> Any:
        y = F.max_pool2d(F.relu(x), 2)
        SEEN.clear()
        SEEN.append(y)
        return y


class KeptByAnObject(KeptByIt):
    def __init__(self) -> None:
        super().__init__()
        self.state = types.SimpleNamespace()

    def forward(self, x: Tensor) -> Any:
        self.state.kept = F.max_pool2d(F.relu(x), 2)
        return self.state.kept

    def see(self, x: Tensor) -> Any:
        return [self(x), self.state.kept]


class KeptByAChild(KeptByIt):
    def forward(self, x: Tensor) -> Any:
        y = F.max_pool2d(F.relu(x), 2)
        object.__setattr__(self.relu, "kept", y)
        return y

    def see(self, x: Tensor) -> Any:
        return [self(x), self.relu.kept]


class KeptByAdding(KeptInAList):
    def forward(self, x: Tensor) -> Any:
        y, seen = F.max_pool2d(F.relu(x), 2), SEEN
        seen.clear()
        seen += [y]
        return y


class KeptInADefault(KeptByIt):
    def forward(self, x: Tensor, cache: dict[str, Any] = {}) -> Any:  # noqa: B006
        cache["last"] = F.max_pool2d(F.relu(x), 2)
        return cache["last"]

    def see(self, x: Tensor) -> Any:
        return [self(x), *type(self).forward.__defaults__[0].values()]  # type: ignore[index]


class Counts(Net):
    """Counts its calls in a global variable."""

    def forward(self, x: Tensor) -> Any:
        global COUNT
        COUNT += 1
        return F.max_pool2d(F.relu(x), 2)

    def see(self, x: Tensor) -> Any:
        before = COUNT
        self(x)
        return torch.tensor(COUNT - before)


class Prints(Counts):
    def forward(self, x: Tensor) -> Any:
        SEEN.append(1)
        return F.max_pool2d(F.relu(x), 2)

    def see(self, x: Tensor) -> Any:
        SEEN.clear()
        self(x)
        return torch.tensor(len(SEEN))


class CountsByAFunction(Prints):
    def forward(self, x: Tensor) -> Any:
        count()
        return F.max_pool2d(F.relu(x), 2)


def count() -> None:
    SEEN.insert(0, 1)


def counted(function: Any) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        SEEN.append(1)
        return function(*args, **kwargs)

    return run


class Decorated(Prints):
    @counted
    def forward(self, x: Tensor) -> Any:
        return F.max_pool2d(F.relu(x), 2)


class Draws(Net):
    def forward(self, x: Tensor) -> Any:
        y = F.max_pool2d(F.relu(x), 2)
        return y if torch.rand(()) < 0.5 else -y

    def see(self, x: Tensor) -> Any:
        torch.manual_seed(0)
        return [self(x) for _ in range(8)]


class Checkpoints(Prints):
    def inner(self, x: Tensor) -> Tensor:
        SEEN.append(1)
        return F.max_pool2d(F.relu(x.sin()), 2)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, F.max_pool2d(F.relu(x), 2), use_reentrant=False)

    def see(self, x: Tensor) -> Any:
        SEEN.clear()
        self(x.requires_grad_()).sum().backward()
        return torch.tensor(len(SEEN))


@contextmanager
def packing() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: SEEN.append(1) or t, lambda t: t):
        yield


class Packs(Prints):
    def forward(self, x: Tensor) -> Any:
        y = F.max_pool2d(F.relu(x), 2)
        with packing():
            return y.sin()

    def see(self, x: Tensor) -> Any:
        SEEN.clear()
        self(x.requires_grad_())
        return torch.tensor(len(SEEN))


class HooksATensor(Prints):
    def forward(self, x: Tensor) -> Any:
        y = F.max_pool2d(F.relu(self.conv(x)), 2)
        y.register_hook(lambda gradient: SEEN.append(1))
        return y

    def see(self, x: Tensor) -> Any:
        SEEN.clear()
        self(x).sum().backward()
        return torch.tensor(len(SEEN))


class Embeds(Net):
    """Another method, which the forward calls too, runs the convolution alone."""

    def embed(self, x: Tensor) -> Any:
        return self.conv(x)

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.embed(x))

    def see(self, x: Tensor) -> Any:
        return [self(x), self.embed(x)]


class EmbedsOnRequest(Embeds):
    def embed(self, x: Tensor, raw: bool = True) -> Any:
        y = self.conv(x)
        return y if raw else self.relu(y)

    def forward(self, x: Tensor) -> Any:
        return self.embed(x, False)


class Learned(Net):
    """The constants of its normalization are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Any:
        return F.local_response_norm(x, 3, self.alpha)

    def see(self, x: Tensor) -> Any:
        (found,) = torch.autograd.grad(self(x).sum(), self.alpha)
        return found


class WrittenBetween(Net):
    def forward(self, x: Tensor) -> Any:
        x = x.clone()
        y = F.relu(x)
        x.zero_()
        return F.max_pool2d(y, 2)


class Flagged(Net):
    """An attribute that is changed later decides which tensor is read."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = False

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return y if self.raw else self.relu(y)

    def see(self, x: Tensor) -> Any:
        found = []
        for self.raw in (True, False):
            found.append(self(x))
        return found


class Scaled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.size = 2.0, 2

    def forward(self, x: Tensor) -> Any:
        return F.max_pool2d(F.relu(x), self.size) * self.scale

    def see(self, x: Tensor) -> Any:
        found = []
        for self.scale, self.size in ((3.0, 2), (2.0, 3), (2.0, 2)):
            found.append(self(x))
        return found


BY_FX: dict[str, Callable[[], nn.Module]] = {
    **{kind.__name__: kind for kind in (TwoReaders, TwoNames, Listed, InADict, InAnObject, InAVariable, InATuple)},
    **{kind.__name__: kind for kind in (InAFunction, BoundMethod, BelowTwoParents, KeptByIt, KeptInAList, Appended)},
    **{kind.__name__: kind for kind in (KeptByAnObject, KeptByAChild, KeptByAdding, KeptInADefault, Counts, Prints)},
    **{kind.__name__: kind for kind in (CountsByAFunction, Decorated, Draws, Checkpoints, Packs, HooksATensor)},
    **{kind.__name__: kind for kind in (Embeds, EmbedsOnRequest, Learned, WrittenBetween, Flagged, Scaled)},
}
"""No trace shows all effects of these."""


@pytest.mark.parametrize("name", BY_FX)
def test_a_trace_does_not_lie(name: str) -> None:
    report = assert_as_before(BY_FX[name](), "fx")
    if name not in ("WrittenBetween", "Scaled", "TwoNames"):
        assert any(row.action == "left alone" and row.reason for row in report), report


def test_what_a_trace_shows_is_fused_all_the_same() -> None:
    """The refusals above do not cover every forward."""

    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.size, self.deep = 2, nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))])

        def _start(self, x: Tensor) -> Tensor:
            return self.pool(self.relu(self.conv(x)))

        def forward(self, x: Tensor) -> Any:
            x = self._start(x)
            for block in self.deep:
                x = block(x)
            return F.max_pool2d(F.relu(F.local_response_norm(x, 3)), self.size)

    assert fused(assert_as_before(Plain(), "modules")) == {CONV: 1}
    assert fused(assert_as_before(Plain(), "fx")) == {
        CONV: 1,
        POOL: 1,
        "relu -> max_pool2d": 1,
        "local_response_norm": 1,
    }
    assert fused(assert_as_before(WrittenBetween(), "fx")) == {"relu -> max_pool2d": 1}
    assert fused(assert_as_before(Scaled(), "fx")) == {"relu -> max_pool2d": 1}


def test_reasons_name_what_no_trace_shows() -> None:
    reasons = {
        "Listed": "it reads self.steps, a list, which may change",
        "InATuple": "it reads self.pair, a tuple, which may change",
        "InAFunction": "it reaches a Conv2d by another way than its name",
        "KeptByIt": "it changes its own attributes",
        "Appended": "it reads the global SEEN, a list, which may change",
        "Counts": "it changes a global variable",
        "Draws": "it makes or keeps tensors of its own",
        "Checkpoints": "it calls torch.utils.checkpoint.checkpoint",
        "Embeds": "Embeds.embed may use 'conv' alone",
    }
    for name, reason in reasons.items():
        assert any(row.reason.endswith(reason) for row in ax.accelerate(BY_FX[name](), method="fx")), name


def test_compilers_trace_what_a_forward_reads_of_its_owner() -> None:
    torch._dynamo.reset()
    model, x = Scaled(), torch.randn(2, 4, 6, 6)
    y = model(x)
    assert fused(ax.accelerate(model, method="fx")) == {"relu -> max_pool2d": 1}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    model.scale = 4.0
    torch.testing.assert_close(compiled(x), 2 * y)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), 2 * y)
