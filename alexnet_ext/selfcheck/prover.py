"""Proves kernels in a process of their own, where a crash, a hang or an illegal access refuses one kernel alone."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from .. import _library
from ..ops import _known
from ..ops._known import Proof, Unit

START_SECONDS, CASE_SECONDS = 60.0, 30.0
"""The time for importing PyTorch and starting the GPU, and for one case of a unit, Triton's compiler included."""
END_SECONDS = 5.0
Tell = Callable[[int, int, Unit], None]


def command() -> list[str]:
    return [sys.executable, "-P", "-m", f"{__package__}.child"]


class _Child:
    """The process, and its answers as they come."""

    def __init__(self, device: torch.device, units: Sequence[Unit]) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        folder = _library.FOLDER.parent  # a checkout; what is installed is found without
        paths = [*([] if folder.name.endswith("-packages") else [str(folder)]), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,
        )
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        task = {"device": str(device), "settings": _known.settings(), "units": units}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died; there will be no answer
            self.process.stdin.write(f"{json.dumps(task)}\n".encode())
            self.process.stdin.flush()  # and left open: the child ends when it closes

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # what Python prints while it starts is no answer
                    self.answers.put(json.loads(line))
        self.answers.put(None)

    def __enter__(self) -> _Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # and the compilers that it has started
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a broken GPU may not end
            self.process.wait(END_SECONDS)
        self.listener.join(END_SECONDS)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a task that it has not read
            self.process.stdin.close()
        self.said.close()

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next answer; None if the process died. TimeoutError."""
        try:
            return self.answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            raise TimeoutError from None

    def death(self) -> str:
        """How the process died, in words."""
        try:
            code = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "its process answers no more"
        if code < 0:
            return f"its process died of {signal.Signals(-code).name}"
        self.said.seek(0)
        lines = self.said.read()[-4000:].decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"its process ended with code {code}{f': {last[:300]}' if last else ''}"


def examine(units: Sequence[Unit], device: torch.device, seconds: float, tell: Tell) -> dict[Unit, Proof]:
    """What came of each unit within some ``seconds``; ``tell(done, of, unit)`` is called before each."""
    end, found = time.monotonic() + seconds, dict[Unit, Proof]()
    while len(found) < len(units):
        left = units[len(found) :]
        if time.monotonic() >= end:
            return found | dict.fromkeys(left, Proof("unknown", f"there was no time for it within {seconds:.0f} s"))
        try:
            child = _Child(device, left)
        except (OSError, TypeError) as error:  # the latter where no interpreter's path is known
            trouble = f"no process can be started to prove kernels: {getattr(error, 'strerror', error)}"
            return found | dict.fromkeys(left, Proof("unknown", trouble))
        with child:
            trouble = _started(child, min(START_SECONDS, end - time.monotonic()))
            if trouble:
                return found | dict.fromkeys(left, Proof("unknown", trouble))
            for unit in left:
                tell(len(found), len(units), unit)
                found[unit], usable = _outcome(child, end, seconds)
                if not usable:
                    break  # the others need another process
    return found


def _started(child: _Child, seconds: float) -> str:
    """Why the process cannot prove anything; "" if it can."""
    try:
        ready = child.answer(seconds)
    except TimeoutError:
        return f"the process that proves kernels did not start within {seconds:.0f} s"
    if ready is None:
        return f"the process that proves kernels did not start: {child.death()}"
    return "" if ready["ready"] else "the process that proves kernels cannot use this device"


def _outcome(child: _Child, end: float, seconds: float) -> tuple[Proof, bool]:
    """What came of the unit that the process is at, and whether the process can go on."""
    begun = time.monotonic()
    while True:
        limit = min(CASE_SECONDS, end - time.monotonic())
        try:
            said = child.answer(limit)
        except TimeoutError:
            if limit < CASE_SECONDS:
                return Proof("unknown", f"there was no time for it within {seconds:.0f} s"), False
            return Proof("refused", f"a case did not end within {CASE_SECONDS:.0f} s", time.monotonic() - begun), False
        if said is None:
            death = child.death()
            killed = child.process.returncode == -signal.SIGKILL  # by whoever needs the memory: no kernel's fault
            return Proof("unknown" if killed else "refused", death, time.monotonic() - begun), False
        if "state" in said:
            return Proof(said["state"], said["reason"], said["seconds"]), said["usable"]
