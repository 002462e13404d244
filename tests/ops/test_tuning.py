"""Measured choices: the fastest correct candidate, remembered by key, even if the file is damaged."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alexnet_ext as ax
from alexnet_ext import cli
from alexnet_ext.ops import _backend, _choices
from alexnet_ext.ops._choices import Candidate, Choices, fastest
from alexnet_ext.selfcheck import compare, tune
from alexnet_ext.selfcheck.cases import CASES, Case, OpCase
from alexnet_ext.selfcheck.info import Choice, choice
from alexnet_ext.selfcheck.tune import calls_of
from tests.support import cases, oracle
from tests.support.cases import conv

CPU = torch.device("cpu")
RIGHT = torch.tensor([1.0, -2.0, 3.0])


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


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _choices.choices.cache_clear()
    _choices.versions.cache_clear()
    yield tmp_path / "alexnet_ext" / "choices.json"
    _choices.choices.cache_clear()
    _choices.versions.cache_clear()


def anew() -> None:
    """As in another process: only the file is left."""
    _choices.choices.cache_clear()


def test_the_fastest_is_picked_and_measured_once(clock: FakeTime, file: Path) -> None:
    given = [clock.candidate("a", 3), clock.candidate("b", 1), clock.candidate("c", 2)]
    assert fastest("call", CPU, given, clock).name == "b"
    assert clock.runs.count("b") == 1 + _choices.ROUNDS * _choices.REPEATS
    assert clock.runs[1:4] == ["b", "c", "a"], "the first runs, then rounds that take turns"
    clock.runs.clear()
    assert fastest("call", CPU, given, clock).name == "b"
    anew()
    assert fastest("call", CPU, given, clock).name == "b"
    assert clock.runs == []
    (entry,) = json.loads(file.read_text(encoding="utf-8")).values()
    assert entry == {"choice": "b", "microseconds": {"a": 3e6, "b": 1e6, "c": 2e6}}


def test_a_disturbance_does_not_decide(clock: FakeTime) -> None:
    """The fastest round counts: one slow round of the best candidate changes nothing."""
    slow = iter([1.0] * 15 + [100.0] * 5 + [1.0] * 1000)

    def run() -> list[Tensor]:
        clock.now += next(slow)
        return [RIGHT]

    assert fastest("call", CPU, [clock.candidate("a", 2), Candidate("b", run)], clock).name == "b"


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
    assert _choices.agree([x], [x.clone()])
    assert not _choices.agree([x.bfloat16().float()], [x.bfloat16()])


def test_nothing_that_runs_is_an_error(clock: FakeTime) -> None:
    with pytest.warns(UserWarning, match="is not measured"), pytest.raises(RuntimeError, match="none of a, b runs"):
        fastest("call", CPU, [clock.candidate(n, 1, ValueError(n)) for n in "ab"], clock)


def test_choices_are_of_one_call_device_and_version(clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest("call", CPU, [clock.candidate("a", 1), clock.candidate("b", 2)], clock)
    turned = [clock.candidate("a", 2), clock.candidate("b", 1)]
    assert fastest("call", CPU, turned, clock).name == "a"
    assert fastest("another call", CPU, turned, clock).name == "b"
    with monkeypatch.context() as patch:
        patch.setattr(_choices, "device_name", lambda _: "another device 9.0")
        assert fastest("call", CPU, turned, clock).name == "b"
    for module, name in ((_choices, "__version__"), (torch, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "99.0")
            _choices.versions.cache_clear()
            assert "99.0" in _choices.versions()
            assert fastest("call", CPU, turned, clock).name == "b"
        _choices.versions.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(_choices.importlib.metadata, "version", lambda _: "98.0")
        _choices.versions.cache_clear()
        assert fastest("call", CPU, turned, clock).name == "b"
    _choices.versions.cache_clear()
    assert fastest("call", CPU, turned, clock).name == "a"


def test_a_choice_that_is_no_candidate_any_more_is_measured_again(clock: FakeTime) -> None:
    fastest("call", CPU, [clock.candidate("gone", 1), clock.candidate("b", 2)], clock)
    assert fastest("call", CPU, [clock.candidate("b", 2), clock.candidate("c", 1)], clock).name == "c"


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"k": 3}', "\0\xff"])
def test_a_corrupt_file_is_a_warning_and_is_replaced(content: str, file: Path, clock: FakeTime) -> None:
    file.parent.mkdir()
    file.write_bytes(content.encode("latin-1"))
    given = [clock.candidate("a", 2), clock.candidate("b", 1)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fastest("call", CPU, given, clock).name == "b"
    assert content == '{"k": 3}' or all("is not used" in str(w.message) for w in caught)
    assert bool(caught) == (content != '{"k": 3}')
    anew()
    clock.runs.clear()
    assert fastest("call", CPU, given, clock).name == "b"
    assert clock.runs == []


@pytest.mark.parametrize("entry", [3, {}, {"choice": ["a"], "microseconds": {}}, {"choice": "a", "microseconds": 3}])
def test_an_entry_of_another_form_is_passed_over(entry: object, file: Path, clock: FakeTime) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps({_choices.key_of("call", CPU): entry}), encoding="utf-8")
    given = [clock.candidate("a", 2), clock.candidate("b", 1)]
    assert fastest("call", CPU, given, clock).name == "b"


def test_a_folder_that_cannot_be_written_is_a_warning(file: Path, clock: FakeTime) -> None:
    file.parent.write_text("a file stands where the folder should be", encoding="utf-8")
    given = [clock.candidate("a", 2), clock.candidate("b", 1)]
    with pytest.warns(UserWarning, match="choices last as long as this process"):
        assert fastest("call", CPU, given, clock).name == "b"
    clock.runs.clear()
    assert fastest("call", CPU, given, clock).name == "b"
    assert clock.runs == []


def write_some(path: Path, writer: int) -> None:
    choices = Choices(path)
    for i in range(20):
        choices.remember(f"{writer} {i}", {"a": 1.0, "b": 2.0})


def test_writers_at_once_lose_nothing(file: Path) -> None:
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "fork")
    processes = [context.Process(target=write_some, args=(file, writer)) for writer in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(Choices(file).known()) == 80
    assert [path.name for path in file.parent.glob("*tmp*")] == []


def test_nothing_is_measured_while_a_graph_is_captured(clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [clock.candidate("static", 2), clock.candidate("b", 1)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest("call", CPU, given, clock).name == "static"
    assert clock.runs == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert fastest("call", CPU, given, clock).name == "b"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest("call", CPU, given, clock).name == "b", "what is known already holds in a capture too"


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
    """``conv2d_bias_relu`` by ``pick(the call in words, candidates)``, in place of a measurement."""
    folder = "alexnet_ext.ops.conv2d_bias_relu"
    candidates = importlib.import_module(f"{folder}.candidates")
    monkeypatch.setattr(candidates, "fastest", lambda what, device, given: pick(what, given))
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
def test_a_direction_that_is_not_wanted_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_choices, "ROUNDS", 0)
    tensors = cases.make(LAYER)
    tensors["x"] = tensors["x"].detach()
    torch.ops.alexnet_ext.conv2d_bias_relu_auto(*cases.raw_forward(LAYER, tensors)).sum().backward()
    kept = [key.split(" x ")[0] for key in _choices.choices().known()]
    assert kept == ["conv2d_bias_relu forward", "conv2d_bias_relu weight gradient"]


SMALL = {"local_response_norm": (2, 9, 7, 5), "conv2d_bias_relu": (2, 4, 6, 5), "linear_bias_relu": (3, 6)}


@pytest.fixture
def quick_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU plays a GPU: the compiled kernels and the interpreted ones, on small tensors, timed once."""
    monkeypatch.setattr(_backend, "TUNED", ("cpu",))
    monkeypatch.setattr(_choices, "ROUNDS", 1)
    monkeypatch.setattr(_choices, "REPEATS", 1)
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
    for module in (compare, tune):
        monkeypatch.setattr(module, "CASES", tuple(small))


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in _backend.KERNELS.values():
        for backend in ("triton", "auto"):
            monkeypatch.delitem(found["cpu"], backend, raising=False)


def small_network() -> nn.Module:
    with torch.device("meta"):
        norm, pool = nn.LocalResponseNorm(5), nn.MaxPool2d(2)
        block = ax.nn.Conv2dReLULRNMaxPool2d(6, 6, 3, groups=2, norm=norm, pool=pool)
        return nn.Sequential(ax.nn.Conv2dReLU(3, 6, 3, padding="same", groups=3), block)


@interpreted
@pytest.mark.usefixtures("native", "quick_tune")
def test_tune_measures_a_networks_convolutions_and_every_op(file: Path) -> None:
    with pytest.warns(
        UserWarning, match="conv2d_bias_relu by triton is not used, as in bf16"
    ):  # the interpreter gets bf16 products wrong
        rows = ax.tune(small_network(), (2, 3, 9, 8), device=CPU)
    directions = ("input gradient", "weight gradient")
    assert [(row.layer, row.direction) for row in rows[:7]] == [
        *(("0", direction) for direction in ("forward", *directions)),
        *(("1", direction) for direction in ("forward without relu", *directions)),
        ("conv2d_bias_relu", "forward and backward"),
    ]
    assert {row.layer for row in rows[6:]} == set(_backend.OPS)
    assert all(row.choice == min(row.microseconds, key=row.microseconds.__getitem__) for row in rows)
    assert all(len(row.microseconds) == 4 for row in rows[:6])
    by_op = {row.layer: row for row in rows[6:]}
    others = {op: {"native", "stock"} for op in ("linear_bias_relu", "augment", "sgd_step")}
    others["conv2d_bias_relu"] = {"auto", "native", "stock"}
    for op, row in by_op.items():
        assert row.microseconds.keys() == others.get(op, {"native", "triton", "stock"})
        assert choice(op, "cpu") == Choice(op, "cpu", row.choice, "right and fastest here, as `alexnet tune` found")
    info = ax.info()
    assert info.measured_file == str(file)
    assert f"{rows[0].choice}: conv2d_bias_relu forward x [2, 3, 9, 8]" in str(info)
    assert f"{by_op['local_response_norm'].choice}: local_response_norm | cpu" in str(info)


@pytest.mark.usefixtures("native", "quick_tune")
def test_what_is_wrong_here_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    without_triton(monkeypatch)
    right = ax.ops.local_response_norm
    monkeypatch.setattr(ax.ops, "local_response_norm", lambda *given: right(*given) * 1.01)
    with pytest.warns(UserWarning, match="local_response_norm by native is not used, as in fp32, contiguous, its y is"):
        rows = {row.layer: row for row in ax.tune(small_network(), (2, 3, 9, 8), device="cpu")}
    assert rows["local_response_norm"].microseconds.keys() == {"stock"}
    assert _backend.decide("local_response_norm", CPU).backend == "stock"
    assert rows["relu_max_pool2d"].microseconds.keys() == {"native", "stock"}


@pytest.mark.usefixtures("native", "quick_tune")
def test_what_does_not_run_at_the_models_shapes_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory does not suffice for it."""
    without_triton(monkeypatch)
    run = tune.Call.run

    def limited(call: tune.Call, backend: str, arguments: Any) -> list[Tensor]:
        if call.op == "relu_max_pool2d" and backend == "native":
            raise torch.OutOfMemoryError("as large as that")
        return run(call, backend, arguments)

    monkeypatch.setattr(tune.Call, "run", limited)
    with pytest.warns(UserWarning, match="native is not measured, as it raises OutOfMemoryError"):
        rows = {row.layer: row for row in ax.tune(small_network(), (2, 3, 9, 8), device="cpu")}
    assert rows["relu_max_pool2d"].microseconds.keys() == {"stock"}
    assert rows["local_response_norm"].microseconds.keys() == {"native", "stock"}


def test_tune_refuses_what_is_no_gpu() -> None:
    with pytest.raises(RuntimeError, match="device must be a GPU that PyTorch sees, got 'cpu'"):
        ax.tune(small_network(), (2, 3, 9, 8), device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="device must be a GPU that PyTorch sees, got 'cuda'"):
            ax.tune(small_network(), (2, 3, 9, 8))


@interpreted
@pytest.mark.usefixtures("native", "quick_tune")
def test_a_convolution_that_differs_from_stock_is_not_left_to_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = importlib.import_module("alexnet_ext.ops.conv2d_bias_relu.candidates")
    forward = candidates.CuDNN.forward
    monkeypatch.setattr(candidates.CuDNN, "forward", lambda *given: forward(*given) * 1.1)
    monkeypatch.setattr(tune, "calls_of", lambda *given: [c for c in calls_of(*given) if c.op == "conv2d_bias_relu"])
    with pytest.warns(
        UserWarning, match="conv2d_bias_relu: what is fastest differs from stock PyTorch and is not used"
    ):
        *_, row = ax.tune(small_network(), (2, 3, 9, 8), device="cpu")
    assert row.microseconds.keys() == {"native", "stock"}


@pytest.mark.usefixtures("native")
def test_auto_follows_what_was_found_on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "TUNED", ("cpu",))
    x = torch.randn(2, 6, 4, 4)
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.code)
        return module.forward

    def runs(found: str, dtype: torch.dtype = torch.float32) -> str:
        """What runs, eager and compiled, once this is found."""
        _choices.choices().remember(_choices.key_of("local_response_norm", CPU), {found: 1.0, "another": 2.0})
        torch.compiler.reset()
        torch.compile(lambda x: ax.ops.local_response_norm(x, 5), backend=backend, fullgraph=True)(x.to(dtype))
        traced = "native" if "alexnet_ext" in graphs.pop() else "stock"
        assert _backend.decide("local_response_norm", CPU, dtype).backend == traced
        return traced

    assert runs("stock") == "stock"
    assert runs("native") == "native"
    assert runs("stock", torch.float64) == "native", "which tune does not prove: the static order holds"
    for gone in ("gone", "measured"):  # the latter as earlier versions called "auto"
        assert runs(gone) == "native", "what has no kernel any more: the static order holds"
    assert runs("stock") == "stock"
    with _backend.preferring(("native",), "cpu"):
        assert _backend.decide("local_response_norm", CPU).backend == "native"
    monkeypatch.setattr(_choices, "device_name", lambda _: "another device 9.0")
    assert _backend.decide("local_response_norm", CPU).backend == "native"


def test_the_command_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(["tune", "--device", "cpu"]) == 1
    assert "choices are measured on a GPU" in capsys.readouterr().err
