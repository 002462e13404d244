"""The progress of a run: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import errno
import os
import sys
import time
from types import TracebackType
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # seconds


class _Unread:
    """A stream whose reader or terminal may go away: the rest is then dropped."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._or_nowhere(self.stream.write, text)

    def flush(self) -> None:
        self._or_nowhere(self.stream.flush)

    def _or_nowhere(self, call: Any, *arguments: str) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return len("".join(arguments))


def lasting_console(quiet: bool = False) -> Console:
    """A console on stdout for a run that goes on even if nobody reads it any longer."""
    return Console(file=cast(TextIO, _Unread(sys.stdout)), quiet=quiet)


def _bar(console: Console) -> Progress:
    """A live bar with a status and the time left, on a terminal alone."""
    return Progress(
        TextColumn("[bold]{task.description:8s}"),
        BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        refresh_per_second=2,
        expand=True,
        disable=not console.is_terminal,
        speed_estimate_period=60,
    )


class Counter:
    """Context manager: counts images up to ``total``. Its first call tells how many were done before."""

    def __init__(self, name: str, total: int, console: Console) -> None:
        self.name, self.total, self.console, self.bar = name, total, console, _bar(console)
        self.task = self.bar.add_task(name, total=total, status="")
        self.first: tuple[int, float] | None = None  # images done, and when
        self.last_line = time.monotonic()

    def __call__(self, done: int) -> None:
        """After ``done`` images."""
        now = time.monotonic()
        self.first = self.first or (done, now)
        rate = (done - self.first[0]) / max(now - self.first[1], 1e-9)
        self.bar.update(self.task, completed=done, status=f"{rate:,.0f} images/s")
        if not self.console.is_terminal and now - self.last_line > LINE_EVERY and rate > 0:
            seconds = (self.total - done) / rate
            text = f"{self.name} {done:,}/{self.total:,}  {rate:,.0f} images/s  {_clock(seconds)} left"
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
            self.last_line = now

    def __enter__(self) -> Counter:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()


def _clock(seconds: float) -> str:
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


class Reporter:
    """Context manager. A resumed run has taken ``start`` of ``total`` steps already."""

    def __init__(self, total: int, start: int = 0, console: Console | None = None) -> None:
        self.console = console or Console()
        self.live = self.console.is_terminal
        self.total = total
        self.last_line = time.monotonic()
        self.first_step = start
        self.first_time = self.last_line
        self.bar = _bar(self.console)
        self.training = self.bar.add_task("train", total=total, completed=start, status="")
        self.evaluation: Any = None

    def step(self, step: int, loss: float, accuracy: float, rate: float, waiting: float, memory: int) -> None:
        """After step number ``step``; ``accuracy`` and ``waiting``, the share of time that the loop waited for data, in
        0 to 1, ``rate`` in images a second, ``memory`` in bytes."""
        status = f"loss {loss:6.3f}  accuracy {accuracy:6.1%}  {rate:7,.1f} images/s"
        status += f"  data {waiting:4.0%}  {memory / 2**30:.1f} GiB"
        self.bar.update(self.training, completed=step, status=status)
        now = time.monotonic()
        if not self.live and (now - self.last_line > LINE_EVERY or step == self.total):
            seconds = (now - self.first_time) / max(1, step - self.first_step) * (self.total - step)
            self.note(f"step {step}/{self.total}  {status}  {_clock(seconds)} left")
            self.last_line = now

    def evaluating(self, done: int, total: int) -> None:
        """After ``done`` of ``total`` held-out images."""
        if self.evaluation is None:
            self.evaluation = self.bar.add_task("evaluate", total=total, status="held-out images")
        self.bar.update(self.evaluation, completed=done, total=total)
        if done == total:
            self.bar.remove_task(self.evaluation)
            self.evaluation = None

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()
