"""Races: the fastest correct way, by call; the convolution's candidates; what a network's ops are raced on."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alexnet_ext as ax
from alexnet_ext.ops import _backend, _known, _race
from alexnet_ext.ops._known import Proof, Race, Unit
from alexnet_ext.ops._race import Candidate, fastest, winner
from alexnet_ext.selfcheck import calls, prove, prover
from alexnet_ext.selfcheck.calls import Call, calls_of, units_of
from alexnet_ext.selfcheck.cases import CASES, Case, OpCase
from alexnet_ext.selfcheck.info import Choice, choice
from tests.support import cases, oracle
from tests.support.cases import conv

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


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None
import torch
import torch.nn.functional as F
from alexnet_ext import _library
from alexnet_ext.ops import _backend
from alexnet_ext.ops.conv2d_bias_relu import candidates, cutlass
from alexnet_ext.ops.conv2d_bias_relu.shared import Convolution, Direction

assert not _library.TRITON.loaded
on_gpu = {"auto", "native"} if _library.LIBRARIES[1].loaded else set()
assert set(_backend.kernels("conv2d_bias_relu", "cuda")) == on_gpu


def forward(x, weight, bias, *constants):
    y = F.conv2d(x, weight, bias, *constants[:4])
    return (F.relu(y) if constants[4] else y).contiguous(memory_format=torch.channels_last)


def gradient(dz, x, weight, stride, padding, dilation, groups, wanted):
    mask = [wanted == 0, wanted == 1, False]
    constants = (None, stride, padding, dilation, False, [0, 0], groups, mask)
    return torch.ops.aten.convolution_backward(dz, x, weight, *constants)[wanted]


_backend.ORDER["cpu"]["auto"] = _backend.PROVEN
cutlass.CUTLASS = cutlass.SM90 = _library.Library("for a test", "cuda", True)
chosen = []
x = torch.randn(2, 16, 7, 6, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
weight, bias = torch.randn(32, 8, 3, 3, dtype=torch.float16) / 8, torch.randn(32, dtype=torch.float16)
p = Convolution([1, 1], [1, 1], [1, 1], 2)
exact = [t.double().requires_grad_() for t in (x, weight, bias)]
expected = F.relu(F.conv2d(*exact, padding=1, groups=2))
dy = torch.randn_like(expected).half()
gradients = torch.autograd.grad(expected, exact, dy.double())
with torch.library._scoped_library("alexnet_ext", "IMPL") as library:
    for name in ("cutlass", "sm90"):
        library.impl(f"conv2d_bias_relu_{name}", forward, "CPU")
        library.impl(f"conv2d_bias_relu_{name}_gradient", gradient, "CPU")
    for cutlass.capability in (lambda x: (8, 0), lambda x: (9, 0)):
        for name in [algorithm.name for algorithm in candidates.offered(x, weight, p, Direction.FORWARD)]:
            def fastest(what, device, given):
                chosen.append(name)
                return next(candidate for candidate in given if candidate.name == name)

            candidates.fastest = fastest
            y = candidates.forward(x, weight, bias, *p)
            found = candidates.backward(dy, x, weight, y, *p, [True, True, True])
            for ours, right in zip((y, *found), (expected, *gradients), strict=True):
                assert (ours - right).abs().max() <= 2**-8 * right.abs().max(), name
print(*dict.fromkeys(chosen), sep=", ")
"""


@pytest.mark.usefixtures("native")
def test_the_compiled_candidates_need_no_triton() -> None:
    """PyTorch's convolution stands for the kernels of CUTLASS, as for cuDNN's."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = "cudnn channels_last, cudnn contiguous, cudnn per tower, cutlass, cutlass sm90"
    assert done.stdout.splitlines()[-1] == said


interpreted = pytest.mark.usefixtures("interpreter")
LAYER = conv((2, 4, 6, 5), 6, (3, 3), padding=1, groups=2)


def convolve_by(pick: Callable[[str, list[Candidate]], Candidate], monkeypatch: pytest.MonkeyPatch) -> None:
    """``conv2d_bias_relu`` by ``pick(the call in words, all candidates)``, in place of a race."""
    folder = "alexnet_ext.ops.conv2d_bias_relu"
    candidates = importlib.import_module(f"{folder}.candidates")
    monkeypatch.setattr(candidates, "fastest", lambda what, device, given: pick(what, given))
    monkeypatch.setitem(_backend.ORDER["cpu"], "auto", _backend.PROVEN)
    op = torch.ops.alexnet_ext.conv2d_bias_relu_auto
    monkeypatch.setattr(importlib.import_module(f"{folder}.op"), "operator", lambda *_: op)


@interpreted
@pytest.mark.parametrize("winner", ["triton", "cudnn contiguous", "cudnn channels_last", "cudnn per tower"])
def test_every_candidate_computes_the_convolution(winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's convolution on the CPU plays cuDNN's."""
    taken = []

    def pick(what: str, given: list[Candidate]) -> Candidate:
        taken.append(what)
        return next(candidate for candidate in given if candidate.name == winner)

    convolve_by(pick, monkeypatch)
    for layout in ("contiguous", "channels_last"):
        oracle.assert_matches_float64(LAYER, cases.make(LAYER, layout=layout))
    assert [what.split(" x ")[0] for what in taken[:3]] == [
        f"conv2d_bias_relu {direction}" for direction in ("forward", "input gradient", "weight gradient")
    ]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=cases.dtype_id)
def test_the_persistent_forward_is_offered_last_and_on_tensor_cores_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = []

    def last(what: str, given: list[Candidate]) -> Candidate:
        offered.append([candidate.name for candidate in given])
        return given[-1]

    convolve_by(last, monkeypatch)
    oracle.assert_matches_float64(LAYER, cases.make(LAYER, dtype))
    forward, *gradients = offered[:3]
    assert ("triton persistent" in forward[-1:]) == (dtype == torch.float16)
    assert all("triton persistent" not in names for names in (forward[:-1], *gradients))


@interpreted
def test_a_direction_that_is_not_wanted_is_not_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    tensors = cases.make(LAYER)
    tensors["x"] = tensors["x"].detach()
    torch.ops.alexnet_ext.conv2d_bias_relu_auto(*cases.raw_forward(LAYER, tensors)).sum().backward()
    kept = [key.split(" x ")[0] for key in _known.on(CPU).races]
    assert kept == ["conv2d_bias_relu forward", "conv2d_bias_relu weight gradient"]


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A race is one call of each, without a warm-up."""
    monkeypatch.setattr(_race, "WARM_UP", 0.0)
    monkeypatch.setattr(_race, "ROUNDS", 1)
    monkeypatch.setattr(_race, "REPEATS", 1)


@interpreted
@pytest.mark.usefixtures("as_gpu")
def test_a_candidate_takes_part_once_it_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's ways are trusted; ``preferring`` asks for one to prove it, and counts how often it was taken."""
    quick(monkeypatch)
    candidates = importlib.import_module("alexnet_ext.ops.conv2d_bias_relu.candidates")
    tensors = cases.make(LAYER)
    given = tensors["x"], tensors["weight"], candidates.Convolution([1, 1], [1, 1], [1, 1], 2)

    def names() -> set[str]:
        return {algorithm.name for algorithm in candidates.offered(*given, candidates.Direction.FORWARD)}

    cudnn = {"cudnn contiguous", "cudnn channels_last", "cudnn per tower"}
    assert names() == cudnn
    unit = Unit("conv2d_bias_relu", "auto triton", "float32", "contiguous")
    _known.on(CPU).add(proofs={str(unit): Proof("proven")})
    assert names() == {*cudnn, "triton"}
    assert not any("triton" in a.name for a in candidates.offered(given[0].bfloat16(), *given[1:], 0)), "another dtype"
    _known.on(CPU).add(proofs={str(unit): Proof("refused", "for a test")})
    assert names() == cudnn
    before = candidates.taken["triton"]
    with _backend.preferring(("auto triton",), "cpu"):
        assert names() == {"triton"}
    assert candidates.taken["triton"] == before + 1


SMALL = {"local_response_norm": (2, 9, 7, 5), "conv2d_bias_relu": (2, 4, 6, 5), "linear_bias_relu": (3, 6)}


@pytest.fixture
def quick_tune(as_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The CPU plays a GPU: the compiled kernels and the interpreted ones, on small tensors, timed once."""
    quick(monkeypatch)
    monkeypatch.delitem(_backend.KERNELS["augment"]["cpu"], "triton", raising=False)  # its images are no smaller
    monkeypatch.setitem(_backend.KERNELS["conv2d_bias_relu"]["cpu"], "auto", "conv2d_bias_relu_auto")
    small = list[Case]()
    for case in CASES:
        if not isinstance(case, OpCase):
            small.append(case)
            continue
        x = SMALL.get(case.op, SMALL["local_response_norm"])
        weights = {
            "conv2d_bias_relu": ((6, 4 // (1 + ("two" in case.name)), 3, 3), (6,)),
            "linear_bias_relu": ((4, 6), (4,)),
        }
        others = weights.get(case.op, ((x[1],),) if len(case.shapes) == 2 else ())
        small.append(replace(case, shapes=(x, *others)))
    monkeypatch.setattr(calls, "CASES", tuple(small))
    return as_gpu


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in _backend.KERNELS.values():
        for backend in ("triton", "auto"):
            monkeypatch.delitem(found["cpu"], backend, raising=False)


def small_network() -> nn.Module:
    with torch.device("meta"):
        norm, pool = nn.LocalResponseNorm(5), nn.MaxPool2d(2)
        block = ax.nn.Conv2dReLULRNMaxPool2d(6, 6, 3, groups=2, norm=norm, pool=pool)
        return nn.Sequential(ax.nn.Conv2dReLU(3, 6, 3, padding="same", groups=3), block)


SHAPE = (2, 3, 9, 8)


def prove_all(*but: tuple[str, str]) -> None:
    """As if the child process had found all right that ``small_network`` needs; ``but`` (op, backend) wrong."""
    units = units_of(calls_of(small_network(), SHAPE, torch.float32), "cpu", torch.float32, torch.channels_last)
    wrong = Proof("refused", "wrong in a test")
    proofs = {str(unit): wrong if (unit.op, unit.backend) in but else Proof("proven") for unit in units}
    _known.on(CPU).add(proofs=proofs)


@interpreted
@pytest.mark.usefixtures("native")
def test_tune_races_a_networks_convolutions_and_every_op(quick_tune: Path) -> None:
    prove_all(("conv2d_bias_relu", "triton"))
    with pytest.warns(UserWarning, match="conv2d_bias_relu by triton is not used: wrong in a test"):
        rows = ax.tune(small_network(), SHAPE, device=CPU)
    directions = ("input gradient", "weight gradient")
    assert [(row.layer, row.direction) for row in rows[:8]] == [
        *(("0", direction) for direction in ("forward", *directions)),
        ("0", "forward and backward"),
        *(("1", direction) for direction in ("forward without relu", *directions)),
        ("1", "forward and backward"),
    ]
    assert {row.op for row in rows} == set(_backend.OPS)
    for row in rows:
        best = min(row.microseconds.values())
        assert row.microseconds[row.choice] == best or row.choice == "stock"
    assert all(len(row.microseconds) == 4 for row in rows[:8] if row.direction != "forward and backward")
    by_op = {row.op: row for row in rows if row.direction == "forward and backward"}
    others = {op: {"native", "stock"} for op in ("linear_bias_relu", "augment", "sgd_step")}
    others["conv2d_bias_relu"] = {"auto", "native", "stock"}
    for op, row in by_op.items():
        assert row.microseconds.keys() == others.get(op, {"native", "triton", "stock"})
    info = ax.info()
    (known,) = info.known
    assert (known.file, known.current) == (str(_known.on(CPU).path), True)
    assert f"    {rows[0].choice}, just now: conv2d_bias_relu forward x [2, 3, 9, 8]" in str(info)
    assert f"    {by_op['local_response_norm'].choice}, just now: local_response_norm | float32" in str(info)


@pytest.mark.usefixtures("native", "quick_tune")
def test_what_was_raced_is_raced_again_by_tune_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    without_triton(monkeypatch)
    prove_all()
    first = ax.prove("cpu", small_network(), SHAPE, dtype=torch.float32)
    assert len(first.races) > len(_backend.OPS)
    assert ax.prove("cpu", small_network(), SHAPE, dtype=torch.float32).races == []
    before = {unit: proof.at for unit, proof in _known.on(CPU).proofs.items()}
    assert len(ax.tune(small_network(), SHAPE, device="cpu")) == len(first.races)
    assert {unit: proof.at for unit, proof in _known.on(CPU).proofs.items()} == before, "a proof outlives a new race"


@pytest.mark.usefixtures("native", "quick_tune")
def test_what_is_refused_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    without_triton(monkeypatch)
    prove_all(("local_response_norm", "native"))
    with pytest.warns(UserWarning, match="local_response_norm by native is not used: wrong in a test"):
        rows = {row.op: row for row in ax.tune(small_network(), SHAPE, device="cpu")}
    assert "local_response_norm" not in rows
    assert _backend.decide("local_response_norm", CPU, x=images()).backend == "stock"
    assert rows["relu_max_pool2d"].microseconds.keys() == {"native", "stock"}


def images() -> Tensor:
    return torch.randn(2, 9, 7, 5).to(memory_format=torch.channels_last)


def altered(op: str, backend: str, change: Callable[[list[Tensor]], list[Tensor]]) -> Any:
    """``Call.run``, with the results of one backend changed."""
    run = Call.run

    def changed(call: Call, by: str, arguments: Any) -> list[Tensor]:
        results = run(call, by, arguments)
        return change(results) if (call.op, by) == (op, backend) else results

    return changed


@pytest.mark.usefixtures("native", "quick_tune")
def test_what_differs_from_stock_at_the_models_shapes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if all small cases are right, and whatever was known of its speed."""
    without_triton(monkeypatch)
    prove_all()
    _known.on(CPU).add(races={"local_response_norm | float32 | channels_last | [2, 9, 7, 5]": Race("native", {})})
    wrong = altered("local_response_norm", "native", lambda results: [y * 1.05 for y in results])
    monkeypatch.setattr(Call, "run", wrong)
    with pytest.warns(UserWarning, match="differs from stock PyTorch for x of shape"):
        proved = ax.prove("cpu", small_network(), SHAPE, dtype=torch.float32, again=True)
    rows = {row.op: row for row in proved.races}
    assert rows["local_response_norm"].microseconds.keys() == {"stock"}
    assert "local_response_norm" not in proved.faster
    assert _backend.decide("local_response_norm", CPU, x=images()).backend == "stock"
    assert rows["relu_max_pool2d"].microseconds.keys() == {"native", "stock"}
    assert "1 kernels refused: local_response_norm by native (it differs from stock PyTorch" in str(proved)


@pytest.mark.usefixtures("native", "quick_tune")
def test_what_does_not_run_at_the_models_shapes_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory does not suffice for it."""
    without_triton(monkeypatch)
    prove_all()

    def too_large(results: list[Tensor]) -> list[Tensor]:
        raise torch.OutOfMemoryError("as large as that")

    monkeypatch.setattr(Call, "run", altered("relu_max_pool2d", "native", too_large))
    with pytest.warns(UserWarning, match="native is not measured, as it raises OutOfMemoryError"):
        rows = {row.op: row for row in ax.tune(small_network(), SHAPE, device="cpu")}
    assert rows["relu_max_pool2d"].microseconds.keys() == {"stock"}
    assert rows["local_response_norm"].microseconds.keys() == {"native", "stock"}


@pytest.mark.usefixtures("native", "quick_tune")
def test_an_op_is_faster_if_any_of_its_calls_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only by a kernel that is proven: races may come from another machine."""
    without_triton(monkeypatch)
    prove_all(("relu_max_pool2d", "native"))
    found = calls_of(small_network(), SHAPE, torch.float32)
    choices = {call.op: "stock" for call in found} | {"relu_max_pool2d": "native", "local_response_norm": "native"}
    races = {call_key(call): Race(choices[call.op], {}) for call in found}
    first = next(call for call in found if call.op == "conv2d_bias_relu")
    _known.on(CPU).add(races=races | {call_key(first): Race("native", {})})
    proved = ax.prove("cpu", small_network(), SHAPE, dtype=torch.float32)
    assert proved.races == []
    assert set(proved.faster) == {"conv2d_bias_relu", "local_response_norm"}


def call_key(call: Call) -> str:
    return _known.call_of(call.op, "float32", call.layout(torch.channels_last), call.shape)


@pytest.mark.usefixtures("native", "quick_tune")
def test_under_deterministic_algorithms_nothing_is_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    without_triton(monkeypatch)
    torch.use_deterministic_algorithms(True)
    try:
        prove_all()
        assert ax.tune(small_network(), SHAPE, device="cpu") == []
        assert _backend.decide("local_response_norm", CPU, x=images()).backend == "native", "the static order"
    finally:
        torch.use_deterministic_algorithms(False)
    assert _backend.decide("local_response_norm", CPU, x=images()).backend == "stock", "a proof of other settings"


def test_tune_refuses_what_is_no_gpu() -> None:
    with pytest.raises(RuntimeError, match="device must be a GPU that PyTorch sees, got 'cpu'"):
        ax.tune(small_network(), SHAPE, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device must be a GPU that PyTorch sees, got 'cuda'"):
            ax.tune(small_network(), SHAPE)


@interpreted
@pytest.mark.usefixtures("native", "quick_tune")
def test_a_convolution_that_differs_from_stock_is_not_left_to_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    prove_all()
    candidates = importlib.import_module("alexnet_ext.ops.conv2d_bias_relu.candidates")
    forward = candidates.CuDNN.forward
    monkeypatch.setattr(candidates.CuDNN, "forward", lambda *given: forward(*given) * 1.1)
    monkeypatch.setattr(candidates.Triton, "applies", lambda *_: False)
    monkeypatch.setattr(prove, "calls_of", lambda *given: calls_of(*given)[:1])
    with pytest.warns(UserWarning, match="conv2d_bias_relu by auto is (refused|not used): it differs from"):
        *_, row = ax.tune(small_network(), SHAPE, device="cpu")
    assert row.microseconds.keys() == {"native", "triton", "stock"}
    x = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    assert _backend.decide("conv2d_bias_relu", CPU, x=x).backend == row.choice != "auto"


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
    assert _backend.decide("local_response_norm", CPU, x=images()).backend == "stock", "another layout"
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
def test_nothing_is_examined_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Unit] = []

    def examine(units: list[Unit], *_: Any) -> dict[Unit, Proof]:
        asked.extend(units)
        return {unit: Proof("unknown" if unit.dtype == "float16" else "proven") for unit in units}

    monkeypatch.setattr(prover, "examine", examine)
    units = [Unit("relu_max_pool2d", "native", dtype, "contiguous") for dtype in ("float32", "bfloat16", "float16")]
    _known.on(CPU).add(proofs={str(units[1]): Proof("refused", "for a test")})
    found = prove.prove_units(units, CPU, 9.0)
    assert [proof.state for proof in found.values()] == ["proven", "refused", "unknown"]
    assert asked == [units[0], units[2]]
    asked.clear()
    _known.reopen()
    prove.prove_units(units, CPU, 9.0)
    assert asked == [units[2]], "what there was no time for is tried again"
