"""The candidates of a convolution: each is proven alone, and what is not proven takes part in no race."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alexnet_ext.ops import _backend, _known, _race
from alexnet_ext.ops._known import Proof, Unit
from alexnet_ext.ops.conv2d_bias_relu.shared import Convolution, Direction
from alexnet_ext.selfcheck import child
from alexnet_ext.selfcheck.calls import Call, names_of
from alexnet_ext.selfcheck.cases import SMALL, OpCase
from alexnet_ext.selfcheck.races import Setting, race_calls

CPU = torch.device("cpu")
CONV = "conv2d_bias_relu"
candidates: Any = importlib.import_module("alexnet_ext.ops.conv2d_bias_relu.candidates")
CUDNN = ["cudnn channels_last", "cudnn contiguous", "cudnn per tower"]
"""On the CPU PyTorch's convolution plays cuDNN's; the first is the trusted one for a channels-last x."""


@pytest.fixture(autouse=True)
def candidates_on_the_cpu(monkeypatch: pytest.MonkeyPatch, interpreter: None, cpu_as_gpu: None) -> None:
    """One case proves a convolution, as the interpreter takes a second for it."""
    monkeypatch.setitem(_backend.ORDER, "cpu", {"auto": _backend.UNKNOWN, "native": _backend.UNKNOWN})
    there = _backend.KERNELS[CONV]["cpu"]
    monkeypatch.setitem(_backend.KERNELS[CONV], "cpu", {"auto": f"{CONV}_auto", **there})
    case = next(case for case in SMALL if isinstance(case, OpCase) and case.op == CONV and case.constants[-1] == 2)
    smaller = replace(case, shapes=((2, 4, 5, 4), (6, 2, 3, 3), (6,)))
    monkeypatch.setattr(child, "SMALL", [smaller])


def unit(name: str, dtype: str = "float32") -> Unit:
    return Unit(CONV, name, dtype, "channels_last")


def judged(unit: Unit) -> tuple[str, str]:
    """As in the process that proves kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_race, "allowed", False)
        return child.judge(unit, CPU)


def know(**states: Any) -> None:
    _known.on(CPU).add(proofs={str(unit(f"auto {name}")): Proof(state) for name, state in states.items()})


def offered(dtype: torch.dtype = torch.float32, direction: Direction = Direction.FORWARD) -> list[str]:
    x = torch.randn(2, 4, 7, 6, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(6, 2, 3, 3, dtype=dtype)
    given = candidates.offered(x, weight, Convolution([1, 1], [1, 1], [1, 1], 2), direction)
    return [algorithm.name for algorithm in given]


def test_a_candidate_is_offered_once_it_is_proven() -> None:
    assert offered() == CUDNN
    know(triton="refused")
    assert offered() == CUDNN
    _known.forget()
    know(triton="proven")
    assert offered() == ["cudnn channels_last", "triton", "cudnn contiguous", "cudnn per tower"]
    assert "triton" in offered(direction=Direction.WEIGHT)
    assert offered(torch.float16) == CUDNN, "of another dtype nothing is known"
    _known.distrust(CPU, "the ranks differ")
    assert offered() == CUDNN


def test_every_candidate_except_cudnns_has_a_proof_of_its_own() -> None:
    names = names_of(CONV, "cpu")
    assert names[:2] == ["auto", "native"]
    assert names[2:] == ["auto triton", "auto triton persistent", "auto cutlass", "auto cutlass sm90"]
    assert names_of("relu_max_pool2d", "cpu") == ["native"]


def test_a_wrong_candidate_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    right = candidates.Triton.gradient

    def wrong(self: Any, dz: Tensor, x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> Tensor:
        return right(self, dz, x, weight, p, direction) * (1.5 if direction == Direction.WEIGHT else 1.0)

    assert judged(unit("auto triton")) == ("proven", "")
    monkeypatch.setattr(candidates.Triton, "gradient", wrong)
    state, reason = judged(unit("auto triton"))
    assert state == "refused"
    assert "gradient dense: dweight is off by" in reason
    assert judged(unit("auto")) == ("proven", "")
    assert judged(unit("native")) == ("proven", "")


def test_what_applies_to_no_small_case_is_refused() -> None:
    """As CUTLASS where it is not built, and the persistent kernel where there are no tensor cores."""
    candidates.taken.clear()
    for name in ("auto cutlass", "auto triton persistent"):
        assert judged(unit(name)) == ("refused", _known.NOT_APPLICABLE)


@pytest.mark.parametrize("name", ["auto", "auto triton", "auto triton persistent"])
def test_while_one_is_proven_no_other_runs_and_nothing_is_raced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is unproven may crash, and a race takes longer than all the proof."""
    ran = set()
    fastest = candidates.fastest

    def noted(what: str, device: torch.device, given: list[_race.Candidate]) -> _race.Candidate:
        chosen = fastest(what, device, given)
        ran.add(chosen.name)
        return chosen

    monkeypatch.setattr(candidates, "fastest", noted)
    monkeypatch.setattr(_race, "race", None)
    state, _ = judged(unit(name, "float16"))
    assert state == "proven"
    asked = name.partition(" ")[2]
    assert ran <= {asked, "cudnn channels_last", "cudnn contiguous"}
    assert not asked or asked in ran
    assert _known.on(CPU).races == {}


def test_the_race_of_a_direction_is_among_what_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    raced = []

    def race(given: list[_race.Candidate], clock: _race.Clock) -> dict[str, float]:
        raced.append([candidate.name for candidate in given])
        return {candidate.name: 1.0 - 0.1 * i for i, candidate in enumerate(given)}

    monkeypatch.setattr(_race, "race", race)
    _known.on(CPU).add(proofs={str(unit("auto")): Proof("proven")})
    x, weight, bias = (torch.empty(shape, device="meta") for shape in ((2, 4, 7, 6), (6, 2, 3, 3), (6,)))
    call = Call("layer", CONV, (x, weight, bias, [1, 1], [1, 1], [1, 1], 2, True))
    where = Setting(CPU, torch.float32, torch.channels_last)
    rows = list(race_calls([call], where, math.inf, again=False))
    assert raced == [CUDNN, CUDNN, CUDNN, ["stock", "auto"]]
    assert [row.choice for row in rows] == ["cudnn per tower"] * 3 + ["auto"]
    del raced[:]
    _known.forget()
    know(triton="proven")
    _known.on(CPU).add(proofs={str(unit("auto")): Proof("proven")})
    list(race_calls([call], where, math.inf, again=False))
    assert [sorted(names) for names in raced[:3]] == [sorted([*CUDNN, "triton"])] * 3
