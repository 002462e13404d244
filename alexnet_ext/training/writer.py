"""Checkpoints are written while training goes on: from copies, and by one thread. Copies from a GPU: not yet run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .interrupt import SIGNALS


class Copies:
    """Copies of what a checkpoint holds, in CPU memory of their own: pinned where the tensors are on a GPU.

    The next call writes into the memory of the one before, so that a run takes it once.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[Any, ...], Tensor] = {}

    @torch.no_grad()
    def __call__(self, value: Any) -> Any:
        """The same dictionaries, lists and tuples, with a copy in place of each tensor: the values of this moment."""
        copied = self._copied(value, ())
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copied

    def _copied(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            held = self.held.get(place)
            if held is None or _layout(held) != _layout(value):
                held = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                self.held[place] = held
            return held.copy_(value, non_blocking=True)
        if isinstance(value, dict):
            return {name: self._copied(entry, (*place, name)) for name, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copied(entry, (*place, number)) for number, entry in enumerate(value))
        return value


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()


class Writer:
    """Context manager: runs one job at a time in a thread, and waits for it at the end of the block.

    What a job raises is raised here, once: by the next ``look``, ``wait`` or ``start``. At the end of the block an
    error that ended the block goes first.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin ``job``, once the one before has ended."""
        self.wait()
        self.thread = threading.Thread(target=self._run, args=(job,), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.look()

    @property
    def failed(self) -> bool:
        """Whether ``look`` would raise."""
        return self.error is not None

    def look(self) -> None:
        """Raise what a job has raised; for the moments between two steps."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        # A signal that reached this thread would not wake the trainer out of its wait, and be heard after it.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            job()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if kind is None:
            self.look()
