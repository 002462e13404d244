"""Runs that are killed or stopped at any moment: nothing is lost, and they end as the run that nobody disturbed."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_ext import cli
from alexnet_ext.data import Split
from alexnet_ext.training import checkpoint, runs
from alexnet_ext.training import run as running
from alexnet_ext.training.trainer import Trainer
from tests.cli.test_cli import SMALL, fails
from tests.support import ROOT
from tests.training.test_runs import striped
from tests.training.test_training import TINY, augmented_split, reporter, resumed, same, split, trainer

FORK = multiprocessing.get_context("fork")
EACH_STEP = replace(TINY, save_every=1)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """fc6 and fc7 of 16 outputs: 10 MB a checkpoint."""
    monkeypatch.setattr(importlib.import_module("alexnet_ext.models.alexnet"), "HIDDEN", 16)


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """What each process of these tests would otherwise import anew."""
    for name in ("torch._dynamo", "torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)


def begun_or_resumed(out: Path, data: Split, workers: int = 0) -> Trainer:
    """A trainer at the newest checkpoint of a run, or at its start."""
    found = out.exists() and checkpoint.generations(out)
    return resumed(out, EACH_STEP, data, workers) if found else trainer(out, EACH_STEP, data, workers)


def train_on(out: Path, data: Split, workers: int) -> None:
    torch.set_num_threads(1)
    begun_or_resumed(out, data, workers).run(reporter())


def killed(process: Any, after: float) -> bool:
    """Whether a process was still there to be killed after some seconds."""
    process.start()
    process.join(after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize(
    ("make_split", "workers"),
    [(lambda _: split(), 0), (augmented_split, 2)],
    ids=["no workers", "files, two workers"],
)
@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_as_the_straight_run(
    tmp_path: Path, make_split: Callable[[Path], Split], workers: int, kills: int
) -> None:
    """Six steps in two epochs; a checkpoint that loads is there after each kill, and no step is lost for good."""
    data, chance, out = make_split(tmp_path), random.Random(kills), tmp_path / "run"
    began = time.monotonic()
    straight = trainer(tmp_path / "straight", EACH_STEP, data)
    straight.run(reporter())
    whole, done, met = time.monotonic() - began, 0, set()
    while done < kills or len(met) < 2:
        assert done < 20 * kills, f"the kills met steps {met}"
        if killed(FORK.Process(target=train_on, args=(out, data, workers)), chance.uniform(0, 1.5 * whole)):
            done += 1
            step = begun_or_resumed(out, data).step
            whole *= 1.5 if step in met else 1  # longer and shorter as needed, where other work slows the processes
            met.add(step)
        else:
            assert same(straight, begun_or_resumed(out, data))
            shutil.rmtree(out)
            whole *= 0.7
    train_on(out, data, workers)
    assert same(straight, begun_or_resumed(out, data))


# One command line again and again.


def command(arguments: list[str]) -> None:
    """``alexnet`` in a process of its own, which prints nothing."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        code = cli.run_command(arguments)
    os._exit(code)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """A run of five steps on files."""
    data = striped(tmp_path / "data", 12, 3)
    return ["train", str(data), *SMALL, "--steps", "5", "--lr", "0.001", "--save-every", "1", "--quiet"]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_weights(checkpoint.newest(run, pytest.fail) / checkpoint.WEIGHTS)[1]


def test_one_command_line_that_is_killed_until_it_is_done(tmp_path: Path, options: list[str]) -> None:
    chance, root = random.Random(1), tmp_path / "queue"
    began = time.monotonic()
    process = FORK.Process(target=command, args=([*options, "--out", str(tmp_path / "straight")],))
    process.start()
    process.join()
    whole = time.monotonic() - began
    assert process.exitcode == 0
    arguments = [*options, "--resume", "auto", "--out", str(root / "run")]
    for number in range(40):
        if not killed(FORK.Process(target=command, args=(arguments,)), chance.uniform(0.2, 0.7 + 0.1 * number) * whole):
            break
    assert number > 0, "the first one was killed"
    assert [path.name for path in root.iterdir()] == ["run"]
    expected, found = weights_of(tmp_path / "straight"), weights_of(root / "run")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((root / "run" / runs.RESULT).read_text())["steps"] == 5


def test_auto_takes_the_newest_run_of_the_same_options(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root, auto = tmp_path / "runs", [*options[:-1], "--steps", "1", "--resume", "auto"]
    assert cli.run_command(auto) == 0, "begun, as there is none"
    (first,) = root.iterdir()
    assert cli.run_command([*auto, "--seed", "1"]) == 0, "another recipe is another run"
    (second,) = set(root.iterdir()) - {first}
    (root / "notes").mkdir()
    (root / "notes" / runs.RECIPE).write_text("[]")
    capsys.readouterr()
    assert cli.run_command(auto) == 0
    assert capsys.readouterr().out == f"runs/{first.name}: this run is finished\n"
    assert cli.run_command([*auto, "--steps", "2"]) == 0, "a longer one goes on"
    assert checkpoint.generations(first)[0].name == "step-00000002"
    copy = root / "copy"
    shutil.copytree(first, copy)
    os.utime(copy / runs.RECIPE, ns=(0, time.time_ns() + 10**9))
    assert cli.run_command([*auto, "--steps", "3"]) == 0
    assert [checkpoint.generations(run)[0].name[-1] for run in (first, copy, second)] == ["2", "3", "1"]
    named = [*auto, "--out", f"runs/{first.name}", "--steps", "3"]
    assert cli.run_command(named) == 0, "--out itself goes first"
    assert checkpoint.generations(first)[0].name == "step-00000003"
    assert len(list(root.iterdir())) == 4


def test_auto_refuses_a_run_that_is_being_written_and_begins_one_without_a_checkpoint(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "run"
    auto = [*options, "--resume", "auto", "--out", str(out)]
    assert cli.run_command(auto) == 0
    newest = checkpoint.generations(out)[0]
    with running.locked(out):
        assert fails(capsys, 1, *auto, "--steps", "6") == f"alexnet: {out}: another process writes into this folder"
    os.truncate(newest / checkpoint.STATE, 1000)
    assert cli.run_command([*auto, "--steps", "6"]) == 0, "from the one before"
    assert f"going back to {checkpoint.place(out, 4).name}" in capsys.readouterr().err
    for name in (checkpoint.CHECKPOINTS, checkpoint.BEST):
        shutil.rmtree(out / name)
    assert cli.run_command([*auto, "--steps", "6"]) == 0
    assert not checkpoint.generations(out), "a result without checkpoints is finished too"
    (out / runs.RESULT).unlink()
    (out / ".01234567.tmp-99.json").write_text("of a killed process")
    assert cli.run_command([*auto, "--steps", "6"]) == 0
    assert checkpoint.generations(out)[0].name == "step-00000006"
    assert not list(out.glob(".*"))


# Signals, in every phase.

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

PHASES = {
    "opening of data": (running, "open_split"),
    "proving": (running, "prove_kernels"),
    "building": (running, "Trainer"),
    "introduction": (running, "has_events"),
    "training": (Trainer, "_train"),
    "evaluation": (Trainer, "_evaluate"),
    "saving": (checkpoint, "save"),
    "drawing": (running, "draw"),
}
BEFORE = {"opening of data", "proving", "building", "introduction"}


@contextlib.contextmanager
def errors_in(path: Path) -> Iterator[None]:
    """What this process prints on stderr, also from a signal's handler, goes into a file."""
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 (pytest's has no descriptor)
        yield
        sys.stderr.flush()


def command_with_signal(arguments: list[str], phase: str, number: int, told: Path) -> None:
    """``alexnet``, which gets a signal at the beginning of this phase."""
    owner, name = PHASES[phase]
    right = getattr(owner, name)

    def signalled(*given: Any, **rest: Any) -> Any:
        setattr(owner, name, right)
        os.kill(os.getpid(), number)
        return right(*given, **rest)

    setattr(owner, name, signalled)
    with errors_in(told), open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        torch.set_num_threads(1)
        code = cli.run_command(arguments)
    os._exit(code)


# All signals share their handlers: one is tried in every phase, the others in two.
TRIED = [(phase, signal.SIGTERM) for phase in PHASES] + [
    (phase, number) for phase in ("building", "evaluation") for number in SIGNALS if number != signal.SIGTERM
]


@pytest.mark.parametrize(("phase", "number"), TRIED, ids=[f"{phase}-{number.name}" for phase, number in TRIED])
def test_a_signal_in_any_phase_leaves_a_run_that_goes_on(
    tmp_path: Path, options: list[str], phase: str, number: signal.Signals
) -> None:
    out, told = tmp_path / "run", tmp_path / "errors"
    arguments = [*options, "--evaluate-every", "2", "--out", str(out)]
    process = FORK.Process(target=command_with_signal, args=(arguments, phase, number, told))
    process.start()
    process.join(120)
    assert process.exitcode == 130, told.read_text()
    lines = told.read_text().splitlines()
    if phase in BEFORE:
        assert (lines, out.exists()) == (["alexnet: stopped"], False)
        return
    assert lines[-1].endswith(f"to go on: alexnet train --resume {out}")
    assert len(lines) == 1 + (phase != "drawing"), "drawing is not waited for"
    process = FORK.Process(target=command, args=(["train", "--resume", str(out), "--quiet"],))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert json.loads((out / runs.RESULT).read_text())["steps"] == 5


@pytest.mark.parametrize("number", SIGNALS, ids=[number.name for number in SIGNALS])
def test_a_signal_during_the_imports_is_one_line(tmp_path: Path, number: signal.Signals) -> None:
    """From the package's import on; before that Python itself starts."""
    code = (
        "import os, sys; sys.argv = ['-m', 'train']; sys.orig_argv = ['python', '-m', 'alexnet_ext']; "
        f"import alexnet_ext; os.kill(os.getpid(), {number.value}); import torch; print('imported')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "alexnet: stopped\n")
