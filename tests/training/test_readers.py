"""Processes that read images: no failure in one of them makes the trainer wait for ever."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from alexnet_ext.data import CommandError, Readers, Split, Synthetic, batches
from alexnet_ext.data.batches import Key, Sample
from alexnet_ext.data.images import read_image
from alexnet_ext.training import checkpoint
from alexnet_ext.training.files import locked
from alexnet_ext.training.interrupt import Interrupted
from tests.training.test_training import SIZE, reporter, split, trainer


class Trap(Synthetic):
    """Synthetic images; something happens before the seventh."""

    def __init__(self, happens: Callable[[], object]) -> None:
        super().__init__(12, 3, 8)
        self.happens = happens

    def __getitem__(self, key: Key) -> Sample:
        if key[1] == 7:
            self.happens()
        return super().__getitem__(key)


def raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def runs(pid: int) -> bool:
    """Whether a process runs and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(readers: Readers) -> list[int | None]:
    return [process.pid for process in readers.processes]


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (CommandError("a.png: gone", 2), CommandError, "a.png: gone"),
        (OSError(28, "No space left on device", "b.png"), OSError, "No space left on device: 'b.png'"),
        (MemoryError("too large"), MemoryError, "too large"),
        (ZeroDivisionError("one / none"), (RuntimeError, ZeroDivisionError), "one / none"),
    ],
    ids=["command", "system", "memory", "any"],
)
def test_what_is_raised_while_reading_is_raised_where_the_batch_is_wanted(
    count: int, error: Exception, kind: type[Exception], words: str
) -> None:
    with Readers(Trap(raising(error)), count) as readers:
        found = batches(readers.dataset, 2, read=readers)
        assert [next(found).indices.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
        with pytest.raises(kind) as caught:
            next(found)
        assert words in str(caught.value)
        assert getattr(caught.value, "code", None) == getattr(error, "code", None)
        whole = list(batches(readers.dataset, 2, read=readers, limit=6))
        assert len(whole) == 3, "and the processes go on"


def test_a_process_that_dies_is_told_whoever_it_is_waited_for() -> None:
    """The process that reads the fourth of five batches is not the one that sleeps over the first."""
    data = Trap(lambda: os.kill(os.getpid(), signal.SIGKILL))
    plain = Synthetic.__getitem__

    def slow(self: Synthetic, key: Key) -> Sample:
        time.sleep(60 if key[1] == 0 else 0)
        return plain(self, key)

    with pytest.MonkeyPatch.context() as patch, Readers(data, 4) as readers:
        patch.setattr(Synthetic, "__getitem__", slow)
        began = time.monotonic()
        with pytest.raises(CommandError, match=r"has died \(by SIGKILL\); try fewer --workers"):
            next(batches(data, 2, read=readers))
        assert time.monotonic() - began < 20


def test_a_signal_to_the_whole_group_is_a_wish_to_stop() -> None:
    """It ends the readers, and the trainer sees the end of their pipe before it looks for a signal."""
    stopping: list[int] = []

    def look() -> None:
        if stopping:
            raise Interrupted

    def stop() -> None:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGTERM)

    with Readers(Trap(stop), 1, look) as readers:
        found = batches(readers.dataset, 2, read=readers)
        assert [next(found).indices.tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
        readers.processes[0].join()
        stopping.append(1)
        with pytest.raises(Interrupted):
            next(found)


def test_a_signal_is_heard_while_processes_start() -> None:
    asked: list[int] = []

    def look() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise Interrupted

    with Readers(Synthetic(12, 3, 8), 100, look) as readers:
        with pytest.raises(Interrupted):
            next(readers([[(0, 1)]]))
        assert len(readers.processes) == 2


def test_processes_live_from_the_first_batch_to_the_end_of_the_block() -> None:
    data = Synthetic(12, 3, 8)
    with Readers(data, 2) as readers:
        assert not pids(readers)
        first = batches(data, 2, seed=1, read=readers)
        next(first)
        known = pids(readers)
        assert len(known) == 2
        for epoch in range(3):  # the first one was left in the middle: its batches must not appear later
            found = torch.cat([batch.indices for batch in batches(data, 2, seed=1, epoch=epoch, read=readers)])
            assert torch.equal(
                found, torch.cat([batch.indices for batch in batches(data, 2, seed=1, epoch=epoch, read=None)])
            )
        assert pids(readers) == known
    assert not pids(readers)


def test_batches_need_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/shm has 64 MB in a container, and may be full."""
    for name in ("_share_fd_cpu_", "_share_filename_cpu_", "_new_using_fd_cpu", "_new_using_filename_cpu"):
        monkeypatch.setattr(torch.UntypedStorage, name, raising(OSError("shared memory")))
    data = Synthetic(6, 3, 64)
    with Readers(data, 2) as readers:
        for found, expected in zip(batches(data, 2, read=readers), batches(data, 2), strict=True):
            assert torch.equal(found.images, expected.images)
            assert torch.equal(found.targets, expected.targets)


def test_few_descriptors_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    path = tmp_path / "a.png"
    path.touch()
    held = [os.open(path, os.O_RDONLY)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 6, before[1]))
        with (
            pytest.raises(CommandError, match=r"--workers 20: Too many open files, .* try fewer --workers"),
            Readers(Synthetic(90, 3, 8), 20) as readers,
        ):
            next(readers([[(0, 0)]]))
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[0], before[1]))
        with pytest.raises(OSError, match="Too many open files"):
            read_image(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(held[0])


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_signal_is_heard_while_a_batch_is_waited_for(tmp_path: Path, evaluating: bool) -> None:
    slow = Trap(lambda: time.sleep(60))
    slow.size = SIZE
    data = split()
    data = Split(data.train, slow, data.preprocessing) if evaluating else Split(slow, data.held_out, data.preprocessing)
    run = trainer(tmp_path / "run", data=data, workers=1)
    timer = threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        run.run(reporter())
    assert time.monotonic() - began < 30
    timer.join()
    assert [path.name for path in checkpoint.generations(run.out)] == [f"step-{run.step:08d}"]


def test_a_lock_is_its_process_alone_and_readers_end_with_the_trainer(tmp_path: Path) -> None:
    told, telling = os.pipe()

    def hold() -> None:
        with locked(tmp_path), Readers(Trap(lambda: time.sleep(1)), 2) as readers:
            next(batches(readers.dataset, 4, read=readers))  # 7 is in the second batch, which is being read
            os.write(telling, (" ".join(map(str, pids(readers))) + "\n").encode())
            time.sleep(60)

    holder = multiprocessing.get_context("fork").Process(target=hold)
    holder.start()
    numbers = [int(word) for word in os.read(told, 100).split()]
    with pytest.raises(CommandError, match="another process"), locked(tmp_path):
        pass
    holder.kill()
    holder.join()
    with locked(tmp_path):
        pass
    deadline = time.monotonic() + 20
    while any(map(runs, numbers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [number for number in numbers if runs(number)] == []
    os.close(told)
    os.close(telling)
