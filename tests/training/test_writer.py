"""Checkpoints that are written while training goes on: of one moment, by one thread, its errors heard."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_ext.data import CommandError
from alexnet_ext.training import checkpoint
from alexnet_ext.training.interrupt import Interrupted
from alexnet_ext.training.trainer import Trainer
from alexnet_ext.training.writer import Copies, Writer
from tests.training.test_checkpoint import full_disk_by_fsync, left_over, save
from tests.training.test_training import TINY, reporter, resumed, same, trainer


def stopped(out: Path, step: int, **changes: Any) -> Trainer:
    """A run that stopped before this step."""
    run = trainer(out, replace(TINY, **changes))
    with pytest.raises(Interrupted):
        run.run(reporter(), stop_at=step)
    return run


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The writer begins to write once this is set."""
    event, right = threading.Event(), checkpoint.save

    def late(*given: Any, **rest: Any) -> Path:
        assert event.wait(60)
        return right(*given, **rest)

    monkeypatch.setattr(checkpoint, "save", late)
    return event


def test_what_is_written_is_of_its_step_though_training_went_on(
    tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, momenta and the state of the generator are others after two more steps."""
    run = trainer(tmp_path / "run", replace(TINY, save_every=2, evaluate_every=9))
    weights = run.model.state_dict()

    def train(*given: Any) -> bool:
        done = Trainer._train(run, *given)
        if run.step == 3:
            held.set()
        return done

    monkeypatch.setattr(run, "_train", train)
    with pytest.raises(Interrupted):
        run.run(reporter(), stop_at=4)
    monkeypatch.undo()
    straight = stopped(tmp_path / "straight", 2, evaluate_every=9)
    now, then = checkpoint.generations(run.out)
    assert then.name == "step-00000002"
    shutil.rmtree(now)
    again = resumed(run.out, run.recipe)
    assert same(straight, again)
    assert not torch.equal(weights["classifier.fc8.bias"], again.model.state_dict()["classifier.fc8.bias"])
    for other in (straight, again):
        other = resumed(other.out, run.recipe)  # its generator too
        with pytest.raises(Interrupted):
            other.run(reporter(), stop_at=4)
        assert all(torch.equal(a, b) for a, b in zip(weights.values(), other.model.state_dict().values(), strict=True))


def test_copies_are_of_the_moment_in_memory_that_is_taken_once() -> None:
    copies, tensors = Copies(), [torch.ones(3), torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)]
    given = {"a": tensors[0], "b": [tensors[1], {"c": (tensors[0], 7, "x")}], "none": None}
    first = copies(given)
    places = [first["a"].data_ptr(), first["b"][0].data_ptr()]
    before = tensors[1].clone()
    for tensor in tensors:
        tensor.mul_(3)
    assert torch.equal(first["a"], torch.ones(3))
    assert torch.equal(first["b"][0], before)
    assert first["b"][0].stride() == before.stride()
    assert torch.equal(first["b"][1]["c"][0], torch.ones(3))
    assert (first["b"][1]["c"][1:], first["none"]) == ((7, "x"), None)
    again = copies(given)
    assert [again["a"].data_ptr(), again["b"][0].data_ptr()] == places
    assert torch.equal(again["a"], tensors[0])
    other = copies({"a": torch.zeros(4, dtype=torch.float64)})["a"]
    assert (other.shape, other.dtype) == ((4,), torch.float64)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, held: threading.Event) -> None:
    run = trainer(tmp_path / "run", replace(TINY, save_every=1))
    path = run.save()
    run._train(next(iter([[batch] for batch in run._loader()])), reporter())
    assert not path.exists(), "the step did not wait for the writer"
    held.set()
    run.writer.wait()
    assert checkpoint.damage(path) is None


def test_one_job_at_a_time_and_the_end_waits_for_it() -> None:
    running, most = [], []

    def job() -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()

    with Writer() as writer:
        for _ in range(5):
            writer.start(job)
    assert (running, most) == ([], [1] * 5)


def failing() -> None:
    raise CommandError("no space")


@pytest.mark.parametrize("asked", ["look", "wait", "start", "__exit__"])
def test_an_error_of_the_writer_is_raised_once(asked: str) -> None:
    writer, later = Writer(), []
    arguments = {"start": (lambda: later.append(1),), "__exit__": (None, None, None)}.get(asked, ())
    writer.start(failing)
    assert writer.thread is not None
    while writer.thread.is_alive():
        time.sleep(0.001)
    with pytest.raises(CommandError, match="no space"):
        getattr(writer, asked)(*arguments)
    writer.wait()
    assert not later


def test_the_error_that_ends_the_block_goes_first() -> None:
    writer = Writer()
    writer.start(failing)
    writer.__exit__(ValueError, ValueError("first"), None)
    assert writer.thread is None


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel refuses a new folder there, to root as well."""
    mkdir = Path.mkdir

    def refuse(path: Path, *given: Any, **rest: Any) -> None:
        if ".tmp-" in path.name:
            raise OSError(30, os.strerror(30), os.fspath(path))
        mkdir(path, *given, **rest)

    monkeypatch.setattr(Path, "mkdir", refuse)


@pytest.mark.parametrize(
    ("fill", "words"), [(full_disk_by_fsync, "No space left on device"), (read_only, "Read-only file system")]
)
def test_a_write_that_fails_ends_the_run_at_the_next_step_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[pytest.MonkeyPatch], None], words: str
) -> None:
    run = trainer(tmp_path / "run", replace(TINY, save_every=2))
    taken: list[int] = []

    def train(*given: Any) -> bool:
        taken.append(run.step)
        if run.step == 3:
            fill(monkeypatch)
        if run.step == 4:
            run.writer.thread.join()
        return Trainer._train(run, *given)

    monkeypatch.setattr(run, "_train", train)
    with pytest.raises(CommandError, match=rf"step-0000000[34]: {words}") as caught:
        run.run(reporter())
    assert "\n" not in str(caught.value)
    assert taken == [0, 1, 2, 3, 4], "the step after the save is the last"
    monkeypatch.undo()
    assert [path.name for path in checkpoint.generations(run.out)] == ["step-00000002"]
    assert not left_over(run.out)
    again = resumed(run.out, run.recipe)
    again.run(reporter())
    straight = trainer(tmp_path / "straight", run.recipe)
    straight.run(reporter())
    assert same(straight, again)


def test_a_stop_waits_for_its_checkpoint_and_hears_that_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tmp_path / "run", 1)
    assert checkpoint.damage(checkpoint.generations(run.out)[0]) is None
    read_only(monkeypatch)
    again = resumed(run.out, run.recipe)
    with pytest.raises(CommandError, match="step-00000002: Read-only file system"):
        again.run(reporter(), stop_at=2)
    assert [path.name for path in checkpoint.generations(run.out)] == ["step-00000001"]


def test_files_are_on_the_disk_before_their_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure may otherwise keep the name and lose the content."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    path = save(tmp_path, 1, 1000)
    at = done.index("rename")
    assert {checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.RECORD} < set(done[:at])
    assert any(".tmp-" in name for name in done[:at]), "the folder with their names"
    assert done[at + 1] == path.parent.name, "and the folder with its own name"
