"""Races: the fastest correct way, by call, once; and that calls follow what was proven and raced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import alexnet_ext as ax
from alexnet_ext.ops import _backend, _known, _race
from alexnet_ext.ops._known import Proof, Race, Unit
from alexnet_ext.ops._race import Candidate, fastest, winner
from alexnet_ext.selfcheck.info import Choice, choice

CPU = torch.device("cpu")
RIGHT = torch.tensor([1.0, -2.0, 3.0])

pytestmark = pytest.mark.usefixtures("known_files")


class FakeTime:
    """A clock that moves when a candidate runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[str] = []

    def __call__(self) -> float:
        return self.now

    def candidate(self, name: str, seconds: float, result: Tensor | Exception = RIGHT) -> Candidate:
        def run() -> list[Tensor]:
            self.runs.append(name)
            self.now += seconds
            if isinstance(result, Exception):
                raise result
            return [result]

        return Candidate(name, run)


@pytest.fixture
def clock() -> FakeTime:
    return FakeTime()


def test_the_fastest_is_picked_and_raced_once(clock: FakeTime) -> None:
    given = [clock.candidate("a", 3), clock.candidate("b", 1), clock.candidate("c", 2)]
    assert fastest("call", CPU, given, clock).name == "b"
    assert clock.runs[:3] == ["a", "b", "c"], "the first runs"
    assert clock.runs[3:] == ["a", "b", "c"] * (1 + _race.ROUNDS), "a warm-up and rounds, in turns"
    clock.runs.clear()
    assert fastest("call", CPU, given, clock).name == "b"
    _known.reopen()
    assert fastest("call", CPU, given, clock).name == "b"
    assert clock.runs == []
    race = _known.on(CPU).races["call"]
    assert (race.choice, race.microseconds) == ("b", {"a": 3e6, "b": 1e6, "c": 2e6})


@pytest.mark.parametrize(("seconds", "turns", "repeats"), [(1e-3, 201, 10), (1e-2, 21, 4), (0.1, 3, 1), (1.0, 1, 1)])
def test_a_race_warms_up_for_200_ms_and_takes_little_longer(
    seconds: float, turns: int, repeats: int, clock: FakeTime
) -> None:
    times = _race.race([clock.candidate("a", seconds)], clock)
    assert times == {"a": pytest.approx(seconds)}
    assert abs(len(clock.runs) - turns - _race.ROUNDS * repeats) <= 1, "the clock adds up roundings"
    assert clock.now <= 0.2 + seconds + max(0.2, _race.ROUNDS * seconds) + 1e-9


@pytest.mark.parametrize("slow_rounds", [1, 2])
def test_a_disturbance_does_not_decide(slow_rounds: int, clock: FakeTime) -> None:
    """The median round counts: slow ones of the best candidate, or fast ones of another, change nothing."""
    first = 2 + _race.ROUNDS - slow_rounds  # runs before the disturbance
    times = {"a": iter([2.0] * first + [0.001] * slow_rounds), "b": iter([1.0] * first + [100.0] * slow_rounds)}

    def run(name: str) -> Callable[[], list[Tensor]]:
        def one() -> list[Tensor]:
            clock.now += next(times[name])
            return [RIGHT]

        return one

    assert fastest("call", CPU, [Candidate(name, run(name)) for name in "ab"], clock).name == "b"
    assert not any(list(left) for left in times.values()), "the disturbance was measured"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"stock": 1.0, "native": 0.96}, "stock"),
        ({"stock": 1.0, "native": 0.94}, "native"),
        ({"stock": 1.0, "native": 0.94, "triton": 0.93}, "triton"),
        ({"stock": 1.0, "native": 2.0}, "stock"),
        ({"native": 1.0, "triton": 0.99}, "triton"),
        ({"native": 1.0}, "native"),
    ],
)
def test_ours_must_beat_stock_by_more_than_noise(seconds: Mapping[str, float], expected: str) -> None:
    assert winner(seconds) == expected


def test_what_raises_or_differs_is_dropped(clock: FakeTime) -> None:
    given = [
        clock.candidate("raises", 0.1, RuntimeError("no engine")),
        clock.candidate("first", 3),
        clock.candidate("wrong", 0.1, RIGHT + 1),
        clock.candidate("shape", 0.1, RIGHT[:2]),
        clock.candidate("nan", 0.1, torch.tensor([1.0, torch.nan, 3.0])),
        clock.candidate("rounded", 2, RIGHT * (1 + 2**-11)),
    ]
    with pytest.warns(UserWarning, match="no engine|its result differs") as caught:
        assert fastest("call", CPU, given, clock).name == "rounded"
    assert [str(w.message).split(" is")[0] for w in caught] == ["raises", "wrong", "shape", "nan"]


def test_a_result_of_another_dtype_does_not_agree() -> None:
    x = torch.randn(5)
    assert _race.agree([x], [x.clone()])
    assert not _race.agree([x.bfloat16().float()], [x.bfloat16()])


def test_nothing_that_runs_is_an_error(clock: FakeTime) -> None:
    with pytest.warns(UserWarning, match="is not measured"), pytest.raises(RuntimeError, match="none of a, b runs"):
        fastest("call", CPU, [clock.candidate(n, 1, ValueError(n)) for n in "ab"], clock)


def test_a_race_is_of_one_call(clock: FakeTime) -> None:
    fastest("call", CPU, [clock.candidate("a", 1), clock.candidate("b", 2)], clock)
    turned = [clock.candidate("a", 2), clock.candidate("b", 1)]
    assert fastest("call", CPU, turned, clock).name == "a"
    assert fastest("another call", CPU, turned, clock).name == "b"


def test_a_choice_that_is_no_candidate_any_more_is_raced_again(clock: FakeTime) -> None:
    fastest("call", CPU, [clock.candidate("gone", 1), clock.candidate("b", 2)], clock)
    assert fastest("call", CPU, [clock.candidate("b", 2), clock.candidate("c", 1)], clock).name == "c"
    assert _known.on(CPU).races["call"].choice == "c"


def test_another_process_that_raced_later_with_others_does_not_matter(clock: FakeTime) -> None:
    """Its choice, which is no candidate here, arrives from the file while this process races."""
    later = Race("gone", {"gone": 1.0}, Race.of("a", {}).at + 3600)

    def run() -> list[Tensor]:
        clock.now += 1
        _known.Known(_known.on(CPU).identity, _known.on(CPU).path).add(races={"call": later})
        return [RIGHT]

    assert fastest("call", CPU, [clock.candidate("a", 2), Candidate("b", run)], clock).name == "b"


def test_nothing_is_raced_while_a_graph_is_captured(clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [clock.candidate("static", 2), clock.candidate("b", 1)]
    assert _known.on(CPU).races == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest("call", CPU, given, clock).name == "static"
    assert clock.runs == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert fastest("call", CPU, given, clock).name == "b"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest("call", CPU, given, clock).name == "b", "what is known already holds in a capture too"


def test_nothing_is_raced_in_a_transform_a_trace_or_under_deterministic_algorithms(clock: FakeTime) -> None:
    given = [clock.candidate("static", 2), clock.candidate("b", 1)]
    names: list[str] = []

    def look(x: Tensor) -> Tensor:
        names.append(fastest("call", CPU, given, clock).name)
        return x

    torch.func.vmap(look)(torch.ones(2))
    torch.func.grad(lambda x: look(x).sum())(torch.ones(2))
    with torch._subclasses.FakeTensorMode():
        look(torch.ones(2))
    torch.use_deterministic_algorithms(True)
    try:
        look(torch.ones(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert names == ["static"] * 4
    assert clock.runs == []
    look(torch.ones(2))
    assert names[-1] == "b"


@pytest.mark.usefixtures("native", "as_gpu")
def test_auto_follows_what_was_found_on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_backend.KERNELS["local_response_norm"]["cpu"], "triton", raising=False)
    x = torch.randn(2, 6, 4, 4)
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.code)
        return module.forward

    def runs(dtype: torch.dtype = torch.float32) -> str:
        """What runs, eager and compiled."""
        torch.compiler.reset()
        torch.compile(lambda x: ax.ops.local_response_norm(x, 5), backend=backend, fullgraph=True)(x.to(dtype))
        traced = "native" if "alexnet_ext" in graphs.pop() else "stock"
        assert _backend.decide("local_response_norm", CPU, dtype, x=x.to(dtype)).backend == traced
        return traced

    def found(state: Any, choice: str = "", dtype: str = "float32") -> None:
        unit = Unit("local_response_norm", "native", dtype, "contiguous")
        call = _known.call_of(unit.op, dtype, unit.layout, x.shape)
        races = {call: Race(choice, {choice: 1.0, "another": 2.0})} if choice else {}
        _known.on(CPU).add(proofs={str(unit): Proof(state)}, races=races)

    assert runs() == "stock", "nothing is known"
    found("proven")
    assert runs() == "native"
    assert runs(torch.bfloat16) == "stock", "another dtype"
    assert (
        _backend.decide(
            "local_response_norm", CPU, x=torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
        ).backend
        == "stock"
    ), "another layout"
    assert runs(torch.float64) == "stock", "which is proven nowhere"
    found("proven", "stock")
    assert runs() == "stock"
    assert "faster here than our kernels" in _backend.decide("local_response_norm", CPU, x=x).reason
    found("proven", "native")
    assert runs() == "native"
    found("proven", "gone")
    assert runs() == "native", "what has no kernel any more: the static order holds"
    found("refused", "native")
    assert runs() == "stock", "whatever was fast"
    assert choice("local_response_norm", "cpu") == Choice(
        "local_response_norm", "cpu", "stock", "our kernels were refused on this device (`alexnet info` says why)"
    )
    with _backend.preferring(("native",), "cpu"):
        assert _backend.decide("local_response_norm", CPU).backend == "native"


@pytest.mark.usefixtures("native", "as_gpu")
def test_a_shape_that_was_not_raced_follows_the_largest_that_was() -> None:
    op = "local_response_norm"
    known = _known.on(CPU)
    races = {(2, 9, 7, 5): "stock", (64, 9, 7, 5): "native", (8, 9, 7, 5): "stock"}
    known.add(races={_known.call_of(op, "float32", "contiguous", s): Race(c, {}) for s, c in races.items()})
    assert known.winner(op, "float32", "contiguous", (2, 9, 7, 5)) == "stock"
    assert known.winner(op, "float32", "contiguous", (3, 9, 7, 5)) == "native"
    assert known.winner(op, "float32", "contiguous", None) == "native", "traced, with sizes that are symbols"
    assert known.winner(op, "float32", "channels_last", (2, 9, 7, 5)) == ""
    assert known.winner(op, "bfloat16", "contiguous", (2, 9, 7, 5)) == ""
    known.add(races={_known.call_of(op, "float32", "contiguous", (99, 9, 7, 5)): Race("stock", {})})
    assert known.winner(op, "float32", "contiguous", (3, 9, 7, 5)) == "stock", "what is new counts at once"


@pytest.mark.usefixtures("native", "as_gpu")
def test_shapes_without_number_are_not_remembered_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_known, "MAX_RACES", 3)
    for width in range(1, 12):
        assert _backend.decide("relu_max_pool2d", CPU, x=torch.ones(1, 1, 1, width)).backend == "stock"
        assert 1 <= len(_known.on(CPU).decided) <= 3
