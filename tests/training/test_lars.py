"""LARS, step by step against plain loops in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alexnet_ext.optim import LARS

SHAPES = ((4, 3, 5), (7,), (6, 2), (), (3, 3))
NUMBERS = {"momentum": 0.8, "weight_decay": 0.05, "trust_coefficient": 0.02}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Tensors of several shapes; the last weight is all zeros."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    values[-1].zero_()
    return [nn.Parameter(value) for value in values]


def gradients(step: int) -> list[np.ndarray]:
    """Those of step 2 are zero for the third tensor."""
    chance = np.random.default_rng(step)
    found = [np.float32(chance.standard_normal(shape)) * np.float32(10.0**step) for shape in SHAPES]
    if step == 2:
        found[2] *= 0
    return found


def give(weights: list[nn.Parameter], step: int) -> None:
    for weight, gradient in zip(weights, gradients(step), strict=True):
        weight.grad = torch.tensor(gradient, dtype=weight.dtype)


def expected(start: list[np.ndarray], rates: list[float], m: float, beta: float, eta: float) -> list[np.ndarray]:
    """Algorithm 1 of the paper in float64, one number at a time."""
    weights = [value.copy() for value in start]
    velocities = [np.zeros_like(value) for value in start]
    for step, rate in enumerate(rates):
        for w, v, g in zip(weights, velocities, gradients(step), strict=True):
            length = sum(float(x) ** 2 for x in w.flat) ** 0.5
            slope = sum(float(x) ** 2 for x in g.flat) ** 0.5
            is_bias = w.ndim <= 1
            trust = 1.0 if is_bias or length == 0 or slope == 0 else eta * length / (slope + beta * length)
            for i in np.ndindex(w.shape):
                v[i] = m * v[i] + rate * trust * (float(g[i]) + (0 if is_bias else beta) * w[i])
                w[i] -= v[i]
    return weights


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_steps_are_those_of_the_paper(dtype: torch.dtype, tolerance: float, as_tensor: bool) -> None:
    rates, weights = [0.5, 0.5, 0.05, 0.2], parameters(dtype)
    want = expected([w.detach().double().numpy() for w in weights], rates, *NUMBERS.values())
    rate = torch.tensor(0.0)
    optimizer = LARS(weights, rate if as_tensor else 0.0, **NUMBERS)
    for step, value in enumerate(rates):
        rate.fill_(value)
        if not as_tensor:
            optimizer.param_groups[0]["lr"] = value
        give(weights, step)
        optimizer.step()
    # A rate in a tensor is of fp32, and so is its rounding.
    bound = max(tolerance, 1e-7 if as_tensor else 0)
    for weight, value in zip(weights, want, strict=True):
        error = np.abs(weight.detach().double().numpy() - value).max()
        assert error <= bound * max(1.0, np.abs(value).max())


def test_a_step_has_the_length_of_its_share_whatever_the_gradient() -> None:
    for scale in (1e-6, 1.0, 1e6):
        weight = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))
        before = weight.detach().clone()
        weight.grad = scale * torch.ones(5, 5)
        LARS([weight], 0.01, momentum=0.0, trust_coefficient=1.0).step()
        assert float((weight.detach() - before).norm() / before.norm()) == pytest.approx(0.01, rel=1e-4)


def test_a_saved_state_continues_bit_for_bit_with_groups_and_missing_gradients() -> None:
    def made(weights: list[nn.Parameter]) -> LARS:
        return LARS([{"params": weights[:2], "lr": 0.3}, {"params": weights[2:]}], 0.1, **NUMBERS)

    straight = parameters(torch.float32)
    optimizer = made(straight)
    give(straight, 0)
    straight[2].grad = None
    untouched = straight[2].detach().clone()
    optimizer.step()
    assert torch.equal(straight[2], untouched)
    assert straight[2] not in optimizer.state
    again = [nn.Parameter(weight.detach().clone()) for weight in straight]
    other = made(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for weights, each in ((straight, optimizer), (again, other)):
        give(weights, 1)
        assert each.step(lambda: torch.tensor(7.0)) == 7.0
    assert all(torch.equal(one, two) for one, two in zip(straight, again, strict=True))


def test_a_step_reads_no_value_on_the_host() -> None:
    """On tensors without values: neither norms nor the rate are asked for, so that a CUDA graph can hold the step."""
    weights = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    LARS(weights, torch.empty((), device="meta"), **NUMBERS).step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"trust_coefficient": 0.0}, "trust_coefficient must be a finite number above 0, got 0.0"),
    ],
)
def test_impossible_numbers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LARS(parameters(torch.float32), **({"lr": 0.1} | changes))


def test_what_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parameters must be of torch.float32 or torch.float64, got torch.bfloat16"):
        LARS(parameters(torch.bfloat16), 0.1)
    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="LARS does not support sparse gradients"):
        LARS([weight], 0.1).step()
