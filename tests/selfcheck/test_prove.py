"""What is wrong is refused alone, with a reason; what is right is raced, and runs where it is faster than PyTorch."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import alexnet_ext as ax
from alexnet_ext.ops import _backend, _known, _race
from alexnet_ext.ops._known import Unit
from alexnet_ext.selfcheck import child
from alexnet_ext.selfcheck.calls import Call
from tests.selfcheck.conftest import SHAPE, Times
from tests.selfcheck.planted import planted

CPU = torch.device("cpu")
NORM, POOL = "local_response_norm", "relu_max_pool2d"
pytestmark = pytest.mark.usefixtures("cpu_as_gpu")
in_this_process = pytest.mark.usefixtures("in_this_process", "two_ops")


def prove(dtype: torch.dtype = torch.float32, **more: Any) -> ax.Proved:
    return ax.prove("cpu", dtype=dtype, layout=torch.contiguous_format, **more)


def unit(op: str, dtype: str = "float32", layout: str = "contiguous") -> Unit:
    return Unit(op, "native", dtype, layout)


def runs(op: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend of a call at the model's shape."""
    return _backend.decide(op, CPU, dtype, x=torch.zeros(SHAPE, dtype=dtype)).backend


LAYOUTS = [(op, layout) for op in _backend.OPS for layout in ("contiguous", "channels_last", "strided")]


@pytest.mark.parametrize(("op", "layout"), [pair for pair in LAYOUTS if pair[0] != "sgd_step"])
def test_right_kernels_are_proven(op: str, layout: str) -> None:
    assert child.judge(unit(op, layout=layout), CPU) == ("proven", "")


def test_sgd_step_is_proven_in_all_layouts_at_once() -> None:
    assert child.judge(unit("sgd_step", "bfloat16"), CPU) == ("proven", "")


def test_what_cannot_be_judged_stays_unknown() -> None:
    assert child.judge(unit(NORM, layout="blocked"), CPU) == ("unknown", "no small case is blocked")
    state, reason = child.judge(Unit(NORM, "triton", "float32", "contiguous"), CPU)
    assert (state, reason) == ("unknown", "no such kernel is loaded in the process that proves it")


REFUSED = {
    (NORM, "wrong"): r"gradient dense: y is off by \S+ in run 1, \S+ is allowed$",
    (NORM, "wrong_at_second_call"): r"y is off by \S+ in run 2, \S+ is allowed$",
    (NORM, "rounds_differently_at_second_call"): "run 2 differs from run 1$",
    (NORM, "leaves_a_part"): "y is off by inf in run 1",
    (NORM, "writes_behind"): "it wrote behind a tensor of 4 bytes$",
    (NORM, "writes_before"): "it wrote before a tensor of 4 bytes$",
    (NORM, "raises"): "^RuntimeError: no kernel image is available for execution on the device$",
    (f"{NORM}_backward", "wrong"): "gradient dense: dx is off by",
    (f"{NORM}_backward", "wrong_for_expanded"): "gradient expanded: dx is off by",
    (f"{NORM}_backward", "wrong_for_permuted"): "gradient permuted: dx is off by",
    (f"{NORM}_backward", "writes_behind"): "it wrote behind a tensor of 4 bytes$",
}


@in_this_process
@pytest.mark.parametrize(("operator", "fault"), REFUSED)
def test_a_wrong_kernel_is_refused_alone(operator: str, fault: str, times: Times) -> None:
    raced = times(native=0.5)
    with planted(**{operator: fault}):
        proved = prove()
    refused = proved.proofs[unit(NORM)]
    assert refused.state == "refused"
    assert re.search(REFUSED[operator, fault], refused.reason), refused.reason
    assert proved.proofs[unit(POOL)].state == "proven"
    assert raced == [["stock", "native"]], "the other's"
    assert [row.op for row in proved.races] == [POOL]
    assert (runs(NORM), runs(POOL)) == ("stock", "native")
    assert "refused on this device" in _backend.decide(NORM, CPU).reason
    said = f"1 right, 1 faster than PyTorch, 1 refused: {NORM} by native ({refused.reason})"
    assert re.fullmatch(rf"proved 2 ops on cpu in \d+ s: {re.escape(said)}", str(proved))
    assert f"refused, just now, in 0.0 s: {unit(NORM)}: {refused.reason}\n" in str(ax.info())


@in_this_process
def test_a_refusal_outlasts_the_process_and_the_fault(times: Times, in_this_process: list[Unit]) -> None:
    times(native=0.5)
    with planted(local_response_norm="wrong"):
        first = prove()
    _known.reopen()
    del in_this_process[:]
    second = prove()
    assert in_this_process == [], "nothing is proven twice"
    assert second.races == [], "nor raced"
    assert second.proofs == first.proofs
    assert [row.op for row in prove(again=True).races] == [POOL]
    assert runs(NORM) == "stock"
    assert runs(POOL) == "native"
    for state in ("refused", "proven"):
        _known.on(CPU).add(proofs={str(unit(POOL)): _known.Proof(state)})
        assert runs(POOL) == "stock", "a kernel that is wrong now and then is wrong"


@in_this_process
def test_what_is_wrong_in_one_dtype_runs_in_the_other(times: Times) -> None:
    times(native=0.5)
    with planted(local_response_norm="wrong_in_bf16"):
        assert "2 right, 2 faster" in str(prove())
        assert "1 right, 1 faster" in str(prove(torch.bfloat16))
    assert [runs(NORM, dtype) for dtype in (torch.float32, torch.bfloat16)] == ["native", "stock"]
    assert [runs(POOL, dtype) for dtype in (torch.float32, torch.bfloat16)] == ["native", "native"]
    assert runs(NORM, torch.float16) == "stock"
    assert "not yet proven" in _backend.decide(NORM, CPU, torch.float16).reason


@in_this_process
def test_what_needs_more_memory_is_tried_again(times: Times) -> None:
    times(native=0.5)
    with planted(local_response_norm="needs_memory"):
        proved = prove()
    said = f"1 not yet known: {NORM} by native (OutOfMemoryError: tried to allocate 20.00 GiB of 8)"
    assert str(proved).endswith(said)
    assert "not yet proven" in _backend.decide(NORM, CPU).reason
    assert str(unit(NORM)) not in str(ax.info())
    assert prove().proofs[unit(NORM)].state == "proven"
    assert runs(NORM) == "native"


@in_this_process
def test_what_differs_at_the_models_shape_is_refused_and_never_raced(times: Times) -> None:
    raced = times(native=0.5)
    reason = "it differs from stock PyTorch for x of shape [2, 6, 40, 40]"
    with planted(local_response_norm="wrong_where_large"):
        with pytest.warns(UserWarning, match=re.escape(f"{NORM} by native is refused: {reason}")):
            proved = prove()
        assert (runs(NORM), runs(POOL)) == ("stock", "native")
        assert (proved.proofs[unit(NORM)].state, proved.proofs[unit(NORM)].reason) == ("refused", reason)
        assert raced == [["stock"], ["stock", "native"]]
        assert f"1 right, 1 faster than PyTorch, 1 refused: {NORM} by native ({reason})" in str(proved)
        assert prove(again=True).faster == (POOL,)
    assert raced[2:] == [["stock", "native"]]
    _known.reopen()
    assert runs(NORM) == "stock"


@in_this_process
def test_what_raises_at_the_models_shape_is_refused(times: Times) -> None:
    raced = times(native=0.5)
    with planted(local_response_norm="raises_where_large"):
        with pytest.warns(UserWarning, match=f"{NORM} by native is refused: it raises for x of shape"):
            proved = prove()
        assert raced == [["stock"], ["stock", "native"]]
        assert proved.faster == (POOL,)
        assert runs(NORM) == "stock"


@in_this_process
@pytest.mark.filterwarnings("ignore:.* is not measured")
def test_where_nothing_runs_at_the_models_shape_the_others_are_raced(
    times: Times, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory does not suffice: not for stock PyTorch either, or not for the tensors."""
    times(native=0.5)
    run = Call.run

    def limited(call: Call, backend: str, arguments: Any) -> list[Tensor]:
        if call.op == NORM:
            raise torch.OutOfMemoryError("as large as that")
        return run(call, backend, arguments)

    monkeypatch.setattr(Call, "run", limited)
    with pytest.warns(UserWarning, match=rf"{NORM} is not raced for x of shape \[2, 6, 40, 40\], as it raises"):
        proved = prove()
    assert proved.faster == (POOL,)
    assert (runs(NORM), runs(POOL)) == ("native", "native"), "what is proven runs, in the static order"


@in_this_process
@pytest.mark.parametrize(("seconds", "choice"), [(1.3, "stock"), (1.0, "stock"), (0.96, "stock"), (0.94, "native")])
def test_ours_runs_where_it_is_faster_by_more_than_noise(seconds: float, choice: str, times: Times) -> None:
    times(native=seconds)
    proved = prove()
    assert {proof.state for proof in proved.proofs.values()} == {"proven"}
    assert [(row.layer, row.choice) for row in proved.races] == [("norm", choice), ("pool", choice)]
    assert proved.races[0].microseconds == {"stock": 1e6, "native": seconds * 1e6}
    assert (runs(NORM), runs(POOL)) == (choice, choice)
    assert f"2 right, {2 * (choice == 'native')} faster than PyTorch" in str(proved)
    reason = "faster here than our kernels" if choice == "stock" else "proven on this device, and the fastest"
    assert reason in _backend.decide(NORM, CPU).reason
    assert f"{choice}, just now: {NORM} | float32 | contiguous | [2, 6, 40, 40] (" in str(ax.info())


@in_this_process
def test_a_race_keeps_the_times_of_all() -> None:
    """With the true clock: who wins is not said."""
    prove()
    for op in (NORM, POOL):
        race = _known.on(CPU).races[_known.call_of(op, "float32", "contiguous", SHAPE)]
        assert race.microseconds.keys() == {"stock", "native"}
        assert all(time > 0 for time in race.microseconds.values())
        assert runs(op) == race.choice == _race.winner(race.microseconds)


@in_this_process
def test_nothing_is_raced_under_deterministic_algorithms(times: Times) -> None:
    """No choice may depend on a clock: what is proven runs, in the static order."""
    raced = times(native=2.0)
    torch.use_deterministic_algorithms(True)
    try:
        proved = prove()
        assert runs(NORM) == "native"
    finally:
        torch.use_deterministic_algorithms(False)
    assert (raced, proved.races, proved.faster) == ([], [], ())
    assert {proof.state for proof in proved.proofs.values()} == {"proven"}
    assert "not yet proven" in _backend.decide(NORM, CPU).reason, "of other settings nothing is known"


@in_this_process
def test_compiled_code_follows_what_is_known(times: Times) -> None:
    graphs: list[str] = []
    x = torch.randn(SHAPE)

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.code)
        return module.forward

    def compiled() -> str:
        torch.compiler.reset()
        torch.compile(lambda x: ax.ops.local_response_norm(x, 5), backend=backend, fullgraph=True)(x)
        return "native" if "alexnet_ext" in graphs.pop() else "stock"

    assert compiled() == "stock"
    for seconds, choice in ((0.5, "native"), (2.0, "stock"), (0.5, "native")):
        times(native=seconds)
        prove(again=True)
        assert compiled() == runs(NORM) == choice
    _known.distrust(CPU, "the ranks differ")
    assert compiled() == runs(NORM) == "stock"


CHANGED = {
    "driver": (_known, "driver", lambda: "NVRM version: 999"),
    "library": (_known, "code", lambda: {"library": "another", "sources": "same"}),
    "torch": (_known, "versions", lambda: {"torch": "99.0"}),
    "device": (_known, "device_facts", lambda _: {"device": "another GPU"}),
}


@in_this_process
@pytest.mark.parametrize("what", CHANGED)
def test_of_another_identity_nothing_is_known(what: str, times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    times(native=0.5)
    prove()
    assert runs(NORM) == "native"
    with monkeypatch.context() as patch:
        patch.setattr(*CHANGED[what])
        _known._stores.clear()
        assert runs(NORM) == "stock"
        assert "not yet proven" in _backend.decide(NORM, CPU).reason
    _known.reopen()
    assert runs(NORM) == "native"
