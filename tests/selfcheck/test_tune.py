"""What a network's ops are raced on, once they are proven, by ``tune`` and ``prove``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alexnet_ext as ax
from alexnet_ext import _library
from alexnet_ext.ops import _backend, _known
from alexnet_ext.ops._known import Proof, Race, Unit
from alexnet_ext.selfcheck import calls, prove, prover
from alexnet_ext.selfcheck.calls import Call, calls_of, units_of
from alexnet_ext.selfcheck.cases import CASES, Case, OpCase
from tests.ops.conv2d_bias_relu.test_candidates import interpreted, quick

CPU = torch.device("cpu")
SMALL = {"local_response_norm": (2, 9, 7, 5), "conv2d_bias_relu": (2, 4, 6, 5), "linear_bias_relu": (3, 6)}


@pytest.fixture
def quick_tune(as_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The CPU plays a GPU: the compiled kernels and the interpreted ones, on small tensors, timed once."""
    quick(monkeypatch)
    for op, kernels in _backend.KERNELS.items():
        if "cpu" in _library.triton_devices(op) and op != "augment":  # whose images are no smaller
            monkeypatch.setitem(kernels["cpu"], "triton", f"{op}_triton")
    monkeypatch.delitem(_backend.KERNELS["augment"]["cpu"], "triton", raising=False)
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
    assert [(row.layer, row.direction) for row in rows[:7]] == [
        *(("0", direction) for direction in ("forward", "weight gradient")),  # its x is the model's input
        ("0", "forward and backward"),
        *(("1", direction) for direction in ("forward without relu", *directions)),
        ("1", "forward and backward"),
    ]
    assert {row.op for row in rows} == set(_backend.OPS)
    for row in rows:
        best = min(row.microseconds.values())
        assert row.microseconds[row.choice] == best or row.choice == "stock"
    assert all(len(row.microseconds) == 4 for row in rows[:7] if row.direction != "forward and backward")
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
    first = ax.prove("cpu", small_network(), SHAPE, dtype=torch.float32, layout=torch.channels_last)
    assert len(first.races) > len(_backend.OPS)
    assert ax.prove("cpu", small_network(), SHAPE, dtype=torch.float32, layout=torch.channels_last).races == []
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
        proved = ax.prove("cpu", small_network(), SHAPE, dtype=torch.float32, layout=torch.channels_last, again=True)
    rows = {row.op: row for row in proved.races}
    assert rows["local_response_norm"].microseconds.keys() == {"stock"}
    assert "local_response_norm" not in proved.faster
    assert _backend.decide("local_response_norm", CPU, x=images()).backend == "stock"
    assert rows["relu_max_pool2d"].microseconds.keys() == {"native", "stock"}
    assert "refused: local_response_norm by native (it differs from stock PyTorch" in str(proved)


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
    everybody = {"stock": 1.0, "native": 1.0}
    races = {call_key(call): Race.of(choices[call.op], everybody) for call in found}
    first = next(call for call in found if call.op == "conv2d_bias_relu")
    _known.on(CPU).add(races=races | {call_key(first): Race.of("native", everybody)})
    proved = ax.prove("cpu", small_network(), SHAPE, dtype=torch.float32, layout=torch.channels_last)
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


def test_tune_refuses_what_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backend.ORDER, "cpu", {"native": _backend.PROVEN})
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
