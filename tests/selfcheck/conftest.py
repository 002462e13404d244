"""Fixtures: the CPU as a GPU that has proven nothing, races with given times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from alexnet_ext.ops import _backend, _known, _race
from alexnet_ext.ops._known import Proof, Unit
from alexnet_ext.selfcheck import child, first_call, prover
from alexnet_ext.selfcheck import prove as proving
from alexnet_ext.selfcheck.calls import Call

Times = Callable[..., list[list[str]]]
SHAPE = (2, 6, 40, 40)
"""Larger than any case that proves a kernel."""


@pytest.fixture
def cpu_as_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: None) -> Iterator[None]:
    """Its compiled kernels are unknown, the cache folder is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(first_call.VARIABLE, raising=False)
    monkeypatch.setitem(_backend.ORDER, "cpu", {"native": _backend.UNKNOWN})
    for kernels in _backend.KERNELS.values():
        monkeypatch.delitem(kernels["cpu"], "triton", raising=False)
    for name in ("_warned", "_attempted"):
        monkeypatch.setattr(first_call, name, set())
    _known.reopen()
    yield
    _known.reopen()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    """Kernels are proven in this process, which takes less time than another; the units that were."""
    proven: list[Unit] = []

    def examine(units: Sequence[Unit], device: torch.device, seconds: float, tell: prover.Tell) -> dict[Unit, Proof]:
        proven.extend(units)
        with torch.inference_mode(False):
            return {unit: Proof(*child.judge(unit, device)) for unit in units}

    monkeypatch.setattr(prover, "examine", examine)
    return proven


@pytest.fixture
def two_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's calls are one of ``local_response_norm`` and one of ``relu_max_pool2d``."""
    x = torch.empty(SHAPE, device="meta")
    calls = [
        Call("norm", "local_response_norm", (x, 5, 1e-4, 0.75, 1.0)),
        Call("pool", "relu_max_pool2d", (x, [3, 3], [2, 2], [0, 0], [1, 1], False)),
    ]
    monkeypatch.setattr(proving, "calls_of", lambda *_: calls)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """``times(native=0.5)``: each race finds these seconds, stock's being 1; it returns who took part in each race."""

    def found(**seconds: float) -> list[list[str]]:
        raced: list[list[str]] = []

        def race(candidates: Sequence[_race.Candidate], clock: _race.Clock) -> dict[str, float]:
            raced.append([candidate.name for candidate in candidates])
            return {candidate.name: {"stock": 1.0, **seconds}[candidate.name] for candidate in candidates}

        monkeypatch.setattr(_race, "race", race)
        return raced

    return found
