"""Measured choices: the fastest right candidate, remembered by key, whatever happens to the file."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import alexnet_ext as ax
from alexnet_ext import cli
from alexnet_ext.ops import _tuning
from alexnet_ext.ops._tuning import Candidate, Choices, fastest
from alexnet_ext.tuning import tune

from . import cases, oracle
from .cases import conv

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
    _tuning.choices.cache_clear()
    _tuning.versions.cache_clear()
    yield tmp_path / "alexnet_ext" / "choices.json"
    _tuning.choices.cache_clear()
    _tuning.versions.cache_clear()


def anew() -> None:
    """As in another process: only the file is left."""
    _tuning.choices.cache_clear()


def test_the_fastest_is_picked_and_measured_once(clock: FakeTime, file: Path) -> None:
    given = [clock.candidate("a", 3), clock.candidate("b", 1), clock.candidate("c", 2)]
    assert fastest("call", CPU, given, clock).name == "b"
    assert clock.runs.count("b") == 1 + _tuning.ROUNDS * _tuning.REPEATS
    assert clock.runs[1:4] == ["b", "c", "a"], "the first runs, then rounds that take turns"
    clock.runs.clear()
    assert fastest("call", CPU, given, clock).name == "b"
    anew()
    assert fastest("call", CPU, given, clock).name == "b"
    assert clock.runs == []
    (entry,) = json.loads(file.read_text(encoding="utf-8")).values()
    assert entry == {"choice": "b", "microseconds": {"a": 3e6, "b": 1e6, "c": 2e6}}


def test_a_disturbance_does_not_decide(clock: FakeTime) -> None:
    """The least of the rounds counts: one slow round of the fastest changes nothing."""
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


def test_nothing_that_runs_is_an_error(clock: FakeTime) -> None:
    with pytest.warns(UserWarning, match="is not measured"), pytest.raises(RuntimeError, match="none of a, b runs"):
        fastest("call", CPU, [clock.candidate(n, 1, ValueError(n)) for n in "ab"], clock)


def test_choices_are_of_one_call_device_and_version(clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest("call", CPU, [clock.candidate("a", 1), clock.candidate("b", 2)], clock)
    turned = [clock.candidate("a", 2), clock.candidate("b", 1)]
    assert fastest("call", CPU, turned, clock).name == "a"
    assert fastest("another call", CPU, turned, clock).name == "b"
    with monkeypatch.context() as patch:
        patch.setattr(_tuning, "device_name", lambda _: "another device 9.0")
        assert fastest("call", CPU, turned, clock).name == "b"
    for module, name in ((_tuning, "__version__"), (torch, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "99.0")
            _tuning.versions.cache_clear()
            assert "99.0" in _tuning.versions()
            assert fastest("call", CPU, turned, clock).name == "b"
        _tuning.versions.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(_tuning.importlib.metadata, "version", lambda _: "98.0")
        _tuning.versions.cache_clear()
        assert fastest("call", CPU, turned, clock).name == "b"
    _tuning.versions.cache_clear()
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


interpreted = pytest.mark.usefixtures("interpreter")
LAYER = conv((2, 4, 6, 5), 6, (3, 3), padding=1, groups=2)


@interpreted
@pytest.mark.parametrize("winner", ["triton", "cudnn contiguous", "cudnn channels_last", "cudnn per tower"])
def test_every_candidate_computes_the_convolution(winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's convolution on the CPU stands for cuDNN's."""
    taken = []

    def pick(what: str, device: torch.device, given: list[Candidate]) -> Candidate:
        taken.append(what)
        return next(candidate for candidate in given if candidate.name == winner)

    folder = "alexnet_ext.ops.conv2d_bias_relu"
    monkeypatch.setattr(importlib.import_module(f"{folder}.measured"), "fastest", pick)
    measured = torch.ops.alexnet_ext.conv2d_bias_relu_measured
    monkeypatch.setattr(importlib.import_module(f"{folder}.op"), "operator", lambda *_: measured)
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

    def last(what: str, device: torch.device, given: list[Candidate]) -> Candidate:
        offered.append([candidate.name for candidate in given])
        return given[-1]

    folder = "alexnet_ext.ops.conv2d_bias_relu"
    monkeypatch.setattr(importlib.import_module(f"{folder}.measured"), "fastest", last)
    measured = torch.ops.alexnet_ext.conv2d_bias_relu_measured
    monkeypatch.setattr(importlib.import_module(f"{folder}.op"), "operator", lambda *_: measured)
    oracle.assert_matches_float64(LAYER, cases.make(LAYER, dtype))
    forward, *gradients = offered[:3]
    assert ("triton persistent" in forward[-1:]) == (dtype == torch.float16)
    assert all("triton persistent" not in names for names in (forward[:-1], *gradients))


@interpreted
def test_a_direction_that_is_not_wanted_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "ROUNDS", 0)
    tensors = cases.make(LAYER)
    tensors["x"] = tensors["x"].detach()
    torch.ops.alexnet_ext.conv2d_bias_relu_measured(*cases.raw_forward(LAYER, tensors)).sum().backward()
    kept = [key.split(" x ")[0] for key in _tuning.choices().known()]
    assert kept == ["conv2d_bias_relu forward", "conv2d_bias_relu weight gradient"]


@interpreted
def test_tune_measures_the_layers_of_a_network_and_info_shows_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "ROUNDS", 1)
    monkeypatch.setattr(_tuning, "REPEATS", 1)
    with torch.device("meta"):
        pool = nn.MaxPool2d(2)
        block = ax.nn.Conv2dReLULRNMaxPool2d(6, 6, 3, groups=2, norm=nn.LocalResponseNorm(5), pool=pool)
        network = nn.Sequential(ax.nn.Conv2dReLU(4, 6, 3, padding=1, groups=2), block)
    rows = list(tune(network, (2, 4, 6, 5), CPU, torch.float32))
    assert [(row.layer, row.direction) for row in rows] == [
        (layer, direction)
        for layer, forward in (("0", "forward"), ("1", "forward without relu"))
        for direction in (forward, "input gradient", "weight gradient")
    ]
    assert all(row.choice == min(row.microseconds, key=row.microseconds.__getitem__) for row in rows)
    assert all(len(row.microseconds) == 4 for row in rows)
    info = ax.info()
    assert info.measured_file == str(file)
    assert f"{rows[0].choice}: conv2d_bias_relu forward x [2, 4, 6, 5]" in str(info)


def test_the_command_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(["tune", "--device", "cpu"]) == 1
    assert "choices are measured on a GPU" in capsys.readouterr().err
