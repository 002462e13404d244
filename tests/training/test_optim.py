"""alexnet_ext.optim.SGD: torch.optim.SGD's results, states and habits, with fp32 masters of bf16 and fp16 weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import alexnet_ext as ax
from alexnet_ext import _library
from alexnet_ext.optim import SGD

# Products by these are not rounded, so that PyTorch's kernels and ours give the same bits.
POWERS = {"lr": 0.25, "momentum": 0.5, "weight_decay": 2.0**-6}
LOW = (torch.bfloat16, torch.float16)
each_low = pytest.mark.parametrize("dtype", LOW, ids=str)


@pytest.fixture(params=["auto", "stock"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with ax.use_backend(request.param):
        yield


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 4, 5, 5), (7,), (33, 9), ())
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    made[0].data = made[0].data.contiguous(memory_format=torch.channels_last)
    return made


def give_gradients(given: list[nn.Parameter], step: int) -> None:
    """Multiples of 1/64, exact in every dtype."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in given:
        drawn = torch.randint(-127, 128, parameter.shape, generator=generator) / 64
        parameter.grad = drawn.to(parameter.dtype)


def run(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients([p for group in optimizer.param_groups for p in group["params"]], step)
        optimizer.step()


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def masters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    given = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p].get("master", p).detach().clone() for p in given]


def momenta(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


VARIATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"nesterov": True},
    {"dampening": 0.5},
    {"momentum": 0.0},
    {"maximize": True, "weight_decay": 0.0},
)


@pytest.mark.parametrize("variation", VARIATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_torch_optims_steps_on_the_masters(variation: dict[str, Any], dtype: torch.dtype) -> None:
    ours = SGD(parameters(dtype), **POWERS | variation)
    wide = [nn.Parameter(p.detach().float()) for p in parameters(dtype)]
    stock = torch.optim.SGD(wide, **POWERS | variation)
    run(ours, range(4)), run(stock, range(4))
    assert_equal(masters(ours), weights(stock))
    assert_equal(weights(ours), [p.to(dtype) for p in weights(stock)])
    assert_equal(momenta(ours), momenta(stock))


def test_small_steps_add_up() -> None:
    """Each changes a bf16 weight by less than half its last place."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = SGD([weight], lr=2.0**-12)
    for _ in range(64):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.tolist() == [1 - 2.0**-6] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
def test_a_resumed_run_continues_bit_for_bit(dtype: torch.dtype) -> None:
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    whole = SGD(parameters(dtype), **settings)
    run(whole, range(3))
    file = io.BytesIO()
    torch.save({"optimizer": whole.state_dict(), "weights": weights(whole)}, file)
    run(whole, range(3, 6))
    for weights_first in (True, False):
        state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        resumed = SGD(parameters(dtype, seed=1), **settings | {"lr": 1.0})
        if not weights_first:
            resumed.load_state_dict(state["optimizer"])
        for parameter, value in zip(resumed.param_groups[0]["params"], state["weights"], strict=True):
            with torch.no_grad():
                parameter.copy_(value)
        if weights_first:
            resumed.load_state_dict(state["optimizer"])
        run(resumed, range(3, 6))
        assert_equal(weights(resumed), weights(whole))
        assert_equal(masters(resumed), masters(whole))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_states_go_to_torch_optim_and_back(dtype: torch.dtype) -> None:
    ours = SGD(parameters(dtype), **POWERS)
    run(ours, range(2))
    stock = torch.optim.SGD([nn.Parameter(p) for p in masters(ours)], lr=1.0, fused=True)
    stock.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert stock.param_groups[0]["momentum"] == 0.5
    back = SGD([nn.Parameter(p) for p in weights(ours)], lr=1.0)
    back.load_state_dict(copy.deepcopy(stock.state_dict()))
    for optimizer in (ours, stock, back):
        run(optimizer, range(2, 4))
    assert_equal(masters(ours), weights(stock))
    assert_equal(masters(ours), masters(back))


@each_low
def test_a_state_of_torch_optim_alone_loads(dtype: torch.dtype) -> None:
    stock = torch.optim.SGD(parameters(), **POWERS)
    run(stock, range(2))
    ours = SGD([nn.Parameter(p.to(dtype)) for p in weights(stock)], **POWERS)
    ours.load_state_dict(stock.state_dict())
    begun = [p.float() for p in weights(ours)]
    run(ours, range(2, 3))
    for parameter, before, state in zip(weights(ours), begun, stock.state.values(), strict=True):
        assert parameter.dtype == dtype
        assert not torch.equal(parameter.float(), before)
        assert state["momentum_buffer"].dtype == torch.float32
    stock.param_groups[0]["params"][:] = [nn.Parameter(p) for p in begun]
    stock.state = type(stock.state)(dict, zip(stock.param_groups[0]["params"], stock.state.values(), strict=True))
    run(stock, range(2, 3))
    assert_equal(masters(ours), weights(stock))


def test_a_hook_may_put_another_state_in_place() -> None:
    ours, other = SGD(parameters(torch.bfloat16), **POWERS), SGD(parameters(torch.bfloat16), **POWERS)
    run(ours, range(1)), run(other, range(1))
    state = copy.deepcopy(other.state_dict())
    for values in state["state"].values():
        values["master"] += 2.0**-20
    ours.register_load_state_dict_pre_hook(lambda _, given: state)
    ours.load_state_dict(other.state_dict())
    assert_equal(masters(ours), [values["master"] for values in state["state"].values()])


@each_low
def test_a_weight_that_somebody_else_wrote_is_kept(dtype: torch.dtype) -> None:
    optimizer = SGD(parameters(dtype), **POWERS)
    run(optimizer, range(2))
    first, second, *_ = optimizer.param_groups[0]["params"]
    kept = masters(optimizer)[1]
    with torch.no_grad():
        first.fill_(3.0)
        second.copy_(second.clone())  # what it was: the master's last bits stay
    for parameter in (first, second):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.param_groups[0].update(momentum=0, weight_decay=0)
    optimizer.step()
    assert torch.equal(first, torch.full_like(first, 3.0))
    assert torch.equal(masters(optimizer)[1], kept)


@pytest.mark.parametrize("other", [0.0, torch.nan])
def test_masked_elements_disturb_no_other(other: float) -> None:
    """A mask after each step, or a NaN: the element beside goes on in fp32, by steps that bf16 cannot hold."""
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = SGD([parameter], lr=2.0**-12)
    for _ in range(64):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with torch.no_grad():
            parameter[1] = other
    assert parameter[0].item() == 1 - 64 * 2.0**-12
    assert parameter[1].isnan() == (other != 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_skipped_first_step_is_not_the_first(dtype: torch.dtype) -> None:
    """With dampening, which the first step has not: as torch.optim.SGD after GradScaler found an inf."""
    ends = []
    for kind, of in ((SGD, dtype), (torch.optim.SGD, torch.float32)):
        parameter = nn.Parameter(torch.ones(1, dtype=of))
        optimizer = kind([parameter], lr=0.25, momentum=0.5, dampening=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for gradient in (torch.inf, 1.0, 1.0):
            scaler.scale(torch.ones(()))
            parameter.grad = torch.full_like(parameter, gradient * scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
        ends.append(parameter.item())
    assert ends[0] == ends[1] == 0.5


def test_a_step_that_raises_leaves_no_state_behind() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = SGD([parameter], lr=1.0, momentum=0.5, dampening=0.5)
    parameter.grad = torch.ones_like(parameter)
    optimizer.param_groups[0]["nesterov"] = "no"
    with pytest.raises(TypeError, match="nesterov must be a bool"):
        optimizer.step()
    optimizer.param_groups[0]["nesterov"] = False
    optimizer.step()
    assert parameter.item() == 0.0


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_continue_alike(way: str) -> None:
    optimizer = SGD(parameters(torch.bfloat16), lr=0.1, momentum=0.9)
    run(optimizer, range(2))
    other = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
    run(optimizer, range(2, 4)), run(other, range(2, 4))
    assert_equal(weights(other), weights(optimizer))
    assert_equal(masters(other), masters(optimizer))


def test_groups_schedulers_and_missing_gradients() -> None:
    ours, stock = ([*parameters(), nn.Parameter(torch.ones(3))] for _ in range(2))
    found = []
    for kind, given in ((SGD, ours), (torch.optim.SGD, stock)):
        optimizer = kind([{"params": given[:2]}, {"params": given[2:4], "lr": 0.5, "momentum": 0.0}], **POWERS)
        optimizer.add_param_group({"params": given[4:], "weight_decay": 0.0})
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for step in range(4):
            give_gradients(given, step)
            if step == 1:
                given[1].grad = None  # between two steps with a gradient
            if step < 2:
                given[0].grad = None  # its first step is another's third
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in given)
        found.append((weights(optimizer), [group["lr"] for group in optimizer.param_groups]))
    assert_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_closure_and_hooks() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = SGD([weight], lr=0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight * 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6
    assert weight.tolist() == [0.0] * 3
    assert seen == ["before", "after"]


@pytest.mark.parametrize("lr", [torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25, dtype=torch.float64)])
def test_a_rate_in_a_tensor(lr: Tensor) -> None:
    lr = lr.clone()
    one, other = SGD(parameters(torch.bfloat16), **POWERS), SGD(parameters(torch.bfloat16), **POWERS | {"lr": lr})
    run(one, range(2)), run(other, range(2))
    assert_equal(masters(one), masters(other))
    lr.fill_(0.5)
    one.param_groups[0]["lr"] = 0.5
    run(one, range(2, 3)), run(other, range(2, 3))
    assert_equal(masters(one), masters(other))


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaler_leaves_its_work_to_the_step(unscaled: bool) -> None:
    """A step with an inf changes nothing, and the first step after it is the first."""
    if unscaled:
        ours, plain = SGD(parameters(), **POWERS), SGD(parameters(), **POWERS)  # GradScaler unscales no fp16
    else:
        ours, plain = SGD(parameters(torch.float16), **POWERS), SGD(parameters(torch.float16), **POWERS)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    given = ours.param_groups[0]["params"]
    for step in range(3):
        give_gradients(given, max(step - 1, 0))
        scaler.scale(torch.ones(()))
        for parameter in given:
            parameter.grad *= scaler.get_scale()
        if step == 0:
            given[2].grad[5] = torch.inf
            before = weights(ours)
        if unscaled:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        if step == 0:
            assert_equal(weights(ours), before)
    run(plain, range(2))
    assert_equal(masters(ours), masters(plain))


def test_a_network_in_bf16_learns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).bfloat16()
    x, y = torch.randn(32, 8, dtype=torch.bfloat16), torch.randint(0, 4, (32,))
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


class Casts(TorchDispatchMode):
    """The shapes of what is cast to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            self.shapes.append(result.shape)
        return result


def test_no_weight_or_gradient_is_cast() -> None:
    model = nn.Sequential(ax.nn.Conv2dReLU(3, 8, 3), ax.nn.ReLUMaxPool2d(2), nn.Flatten(), ax.nn.LinearReLU(200, 6))
    model = model.bfloat16()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = torch.randn(2, 3, 12, 12, dtype=torch.bfloat16), torch.tensor([1, 4])

    def step() -> None:
        F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Casts() as casts:
        step()
    logits = torch.Size([2, 6])
    if ax.ops._backend.current() == "auto" and _library.LIBRARIES[0].loaded:
        assert set(casts.shapes) == {logits}
    else:
        assert set(casts.shapes) > {logits}


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = nn.Parameter(torch.ones(3, dtype=dtype)), torch.ones(3, dtype=dtype, requires_grad=True)
        optimizer = SGD([weight], lr=0.5)
        loss = (weight * x).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_is_refused() -> None:
    for bad, message in (({"lr": -1.0}, "Invalid learning rate"), ({"momentum": -1.0}, "Invalid momentum")):
        with pytest.raises(ValueError, match=message):
            SGD(parameters(), **bad)
    with pytest.raises(ValueError, match="Nesterov momentum requires"):
        SGD(parameters(), nesterov=True)
    optimizer = SGD(parameters())
    with pytest.raises(ValueError, match=r"parameters must be of .*torch.float16, got torch.complex64"):
        optimizer.add_param_group({"params": [torch.zeros(3, dtype=torch.complex64)]})
    assert len(optimizer.param_groups) == 1
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = SGD(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="SGD does not support sparse gradients"):
        optimizer.step()
