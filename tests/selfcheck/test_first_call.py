"""The first call of an unproven op: one warning, or with ALEXNET_EXT_PROVE=lazy a proof."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import alexnet_ext as ax
from alexnet_ext.ops import _backend, _known
from alexnet_ext.ops._known import Proof, Race, Unit
from alexnet_ext.selfcheck import first_call, prover
from tests.selfcheck.conftest import SHAPE, Times
from tests.selfcheck.planted import planted

pytestmark = pytest.mark.usefixtures("cpu_as_gpu")
CPU = torch.device("cpu")
NORM = "local_response_norm"


def norm(x: Tensor) -> Tensor:
    return ax.ops.local_response_norm(x, 5)


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch, cpu_as_gpu: None) -> None:
    monkeypatch.setenv(first_call.VARIABLE, "lazy")


def backend_of(x: Tensor) -> str:
    """What a call runs, made now."""
    function = norm(x.detach().requires_grad_()).grad_fn
    assert function is not None
    return "native" if "alexnet_ext" in function.name() else "stock"


def test_the_first_call_says_once_what_runs_and_what_to_call() -> None:
    x = torch.randn(SHAPE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = norm(x)
        norm(x.bfloat16())
        ax.ops.relu_max_pool2d(x, 2)
    (warning,) = caught
    assert str(warning.message) == (
        "alexnet_ext runs stock PyTorch on cpu, as its kernels were not yet proven there for float32, contiguous: call "
        "alexnet_ext.prove(model=..., shape=..., dtype=torch.float32) once, or set ALEXNET_EXT_PROVE=lazy"
    )
    assert torch.equal(y, torch.nn.functional.local_response_norm(x, 5))


def traced_by_fx(x: Tensor) -> None:
    make_fx(norm)(x)


def fake(x: Tensor) -> None:
    with FakeTensorMode() as mode:
        norm(mode.from_tensor(x))


def compiled(x: Tensor) -> None:
    torch.compiler.reset()
    torch.compile(norm, backend="eager", fullgraph=True)(x)


def transformed(x: Tensor) -> None:
    torch.func.grad(lambda x: norm(x).sum())(x)


HIDDEN: list[Callable[[Tensor], Any]] = [compiled, torch.vmap(lambda x: norm(x[None])), transformed, fake, traced_by_fx]
NAMES = ["compile", "vmap", "grad", "fake", "make_fx"]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("asked", ["", "lazy"])
@pytest.mark.parametrize("call", HIDDEN, ids=NAMES)
def test_where_a_function_is_traced_or_transformed_nothing_is_said_or_proven(
    call: Callable[[Tensor], Any], asked: str, monkeypatch: pytest.MonkeyPatch, in_this_process: list[Unit]
) -> None:
    monkeypatch.setenv(first_call.VARIABLE, asked)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "alexnet_ext")
        call(torch.randn(SHAPE))
    assert in_this_process == []
    if not asked:
        with pytest.warns(UserWarning, match="were not yet proven there"):
            norm(torch.randn(SHAPE))


def test_during_the_capture_of_a_graph_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    _known.on(CPU)  # it asks for the GPU's driver, where there is one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm(torch.randn(SHAPE))
    with pytest.raises(RuntimeError, match="cannot be proven during the capture of a CUDA graph"):
        ax.prove("cpu")


@pytest.mark.usefixtures("lazy")
def test_lazily_an_op_is_proven_and_raced_at_its_first_call(times: Times, in_this_process: list[Unit]) -> None:
    raced = times(native=0.5)
    x = torch.randn(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [backend_of(x) for _ in range(3)] == ["native"] * 3, "the first call too"
        assert in_this_process == [Unit(NORM, "native", "float32", "contiguous")]
        assert raced == [["stock", "native"]]
        assert backend_of(torch.randn(1, 3, 2, 2)) == "native"
        assert len(in_this_process) == len(raced) == 1, "of another shape"
        assert backend_of(x.to(memory_format=torch.channels_last)) == "native"
    assert [unit.layout for unit in in_this_process] == ["contiguous", "channels_last"]


@pytest.mark.usefixtures("lazy")
def test_lazily_what_was_raced_elsewhere_is_proven_and_not_raced(times: Times, in_this_process: list[Unit]) -> None:
    """As the races of an imported file."""
    raced = times(native=2.0)
    call = _known.call_of(NORM, "float32", "contiguous", SHAPE)
    _known.on(CPU).add(races={call: Race.of("native", {"stock": 2.0, "native": 1.0})})
    x = torch.randn(SHAPE)
    assert [backend_of(x) for _ in range(2)] == ["native"] * 2
    assert (len(in_this_process), raced) == (1, [])


@pytest.mark.usefixtures("lazy", "in_this_process")
def test_lazily_stock_runs_where_it_is_faster(times: Times) -> None:
    times(native=2.0)
    x = torch.randn(SHAPE)
    y = norm(x)
    assert torch.equal(y, torch.nn.functional.local_response_norm(x, 5))
    assert backend_of(x) == "stock"
    assert _backend.decide(NORM, CPU, x=x).reason == "faster here than our kernels"


@pytest.mark.usefixtures("lazy")
def test_what_is_lazily_refused_stays_stock(in_this_process: list[Unit]) -> None:
    x = torch.randn(SHAPE)
    with planted(local_response_norm="wrong"):
        for _ in range(3):
            assert torch.equal(norm(x), torch.nn.functional.local_response_norm(x, 5))
    assert len(in_this_process) == 1
    assert "refused" in _backend.decide(NORM, CPU, x=x).reason


@pytest.mark.usefixtures("lazy")
def test_what_cannot_be_proven_lazily_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def examine(units: Sequence[Unit], device: torch.device, seconds: float, tell: prover.Tell) -> dict[Unit, Proof]:
        tried.append(seconds)
        return dict.fromkeys(units, Proof("unknown", "there was no time for it"))

    monkeypatch.setattr(prover, "examine", examine)
    x = torch.randn(SHAPE)
    for _ in range(3):
        assert torch.equal(norm(x), torch.nn.functional.local_response_norm(x, 5))
    assert tried == [first_call.SECONDS]
    ax.ops.relu_max_pool2d(x, 2)
    assert len(tried) == 2, "another op is"


@pytest.mark.usefixtures("lazy", "in_this_process")
def test_lazily_nothing_is_raced_under_deterministic_algorithms(times: Times) -> None:
    raced = times(native=2.0)
    torch.use_deterministic_algorithms(True)
    try:
        assert [backend_of(torch.randn(SHAPE)) for _ in range(2)] == ["native"] * 2
    finally:
        torch.use_deterministic_algorithms(False)
    assert raced == []


@pytest.mark.usefixtures("lazy", "in_this_process")
def test_in_inference_mode_an_op_is_proven_and_raced_too(times: Times) -> None:
    raced = times(native=0.5)
    with torch.inference_mode():
        x = torch.randn(SHAPE)
        norm(x)
    assert raced == [["stock", "native"]]
    assert _known.on(CPU).proof(Unit(NORM, "native", "float32", "contiguous")).state == "proven"


@pytest.mark.parametrize("value", ["eager", "1", "LAZY"])
def test_another_value_of_the_variable_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(first_call.VARIABLE, value)
    with pytest.raises(ValueError, match=f"ALEXNET_EXT_PROVE must be 'lazy' or not set, got '{value}'"):
        norm(torch.randn(SHAPE))
