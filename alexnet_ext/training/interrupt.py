"""Ctrl-C and other signals as a wish to stop at the next good place."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from .._errors import path_text

# Ctrl-C, the system's wish to end, a terminal that closes, and what batch systems send before the time is up.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOPPED = 130


class Interrupted(Exception):
    """Training stopped on request before step ``step``, with its state saved in the folder ``checkpoint``."""

    def __init__(self, step: int = 0, checkpoint: Path | None = None) -> None:
        super().__init__(f"stopped before step {step}")
        self.step, self.checkpoint = step, checkpoint

    def told(self) -> str:
        """What stopped where, and how it goes on."""
        if self.checkpoint is None:
            return "stopped"
        saved, run = path_text(self.checkpoint), shlex.quote(path_text(self.checkpoint.parent.parent))
        return f"stopped at step {self.step}, saved in {saved}; to go on: alexnet train --resume {run}"


class Interrupt:
    """Context manager. The first signal sets ``requested`` and prints a line, if this process ``speaks``; the second
    ends it at once. A signal that was ignored before, as SIGHUP is under nohup, stays ignored."""

    def __init__(self, speaks: bool = True) -> None:
        self.requested, self.speaks = False, speaks
        self.process = os.getpid()  # processes that read images inherit the handlers, and must print nothing

    def __enter__(self) -> Interrupt:
        numbers = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        self.before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def look(self) -> None:
        """Raise Interrupted once a stop is requested; for loops that wait."""
        if self.requested:
            raise Interrupted

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return
        if self.requested:
            import multiprocessing

            for child in multiprocessing.active_children():
                child.kill()
            end_at_once("stopped at once; checkpoints of earlier steps stay as they were")
        self.requested = True
        if self.speaks:
            tell("stopping after this step, with a checkpoint; once more to stop at once")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _restore(self.before)


_process = os.getpid()  # of the command; processes that it forks inherit the handlers


def begin() -> None:
    """From here on a signal ends the process with one line. Within an import a KeyboardInterrupt could surface
    anywhere, and there is nothing to save yet."""
    global _process
    _process = os.getpid()
    _handle_by(_stop_at_start)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Context manager around imports: ``begin`` inside; after them Ctrl-C is a KeyboardInterrupt again. Where the
    command has begun, the other signals still end the process."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    begin()
    try:
        yield
    finally:
        if before[signal.SIGINT] == _stop_at_start:
            before[signal.SIGINT] = signal.default_int_handler
        _restore(before)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Context manager, or a decorator by ``@stoppable()``: each signal raises KeyboardInterrupt in this process, as
    Ctrl-C does, unless ignored."""
    process = os.getpid()

    def stop(_number: int, _frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise KeyboardInterrupt

    before = _handle_by(stop)
    try:
        yield
    finally:
        _restore(before)


def ignore() -> None:
    """From here on no signal interrupts this process, which is about to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _handle_by(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Set the handler of each signal that nobody else handles or ignores; the handlers before."""
    own = (signal.SIG_DFL, signal.default_int_handler, _stop_at_start)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: found for number, found in before.items() if found in own}
    for number in before:
        signal.signal(number, handler)
    return before


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:  # None: of another language
            signal.signal(number, handler)


def _stop_at_start(_number: int, _frame: FrameType | None) -> None:
    if os.getpid() == _process:
        end_at_once("stopped")


def end_at_once(text: str) -> None:
    tell(text)
    os._exit(STOPPED)


def tell(text: str) -> None:
    """Print a line on stderr from a signal's handler; no error if nobody reads it any longer."""
    with contextlib.suppress(OSError):
        os.write(2, f"alexnet: {text}\n".encode())
