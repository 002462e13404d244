"""Ctrl-C and SIGTERM as a wish to stop at the next good place."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Training stopped on request, with its state saved."""


class Interrupt:
    """Context manager: ``requested`` turns true with the first signal; the second acts as it did before."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interrupt:
        self.before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def look(self) -> None:
        """Raise Interrupted once a stop is requested: for whoever waits."""
        if self.requested:
            raise Interrupted

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
