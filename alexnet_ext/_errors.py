"""Errors that the command line prints as one line, and the text of paths and exceptions on one line."""

from __future__ import annotations

import os
from typing import Any


def path_text(path: str | os.PathLike[str]) -> str:
    """A path on one line, without the newlines and terminal escapes that a file name may contain."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)[1:-1]


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, without a full stop, for use inside a sentence."""
    text = str(error).strip() or type(error).__name__
    return path_text(text.splitlines()[0][:200]).rstrip(".")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator found too little memory: Python's, PyTorch's for the CPU or a GPU, a library's."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    # torch's own type by its name: this module is read before torch.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(word in str(error) for word in words)


class CommandError(Exception):
    """An error that the user can fix: one sentence for stderr, and the exit code (2: wrong usage, 1: anything else)."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[CommandError], tuple[Any, ...]]:
        return CommandError, (str(self), self.code)  # a process that reads images sends it to the trainer


class BadImage(CommandError):
    """An image file that cannot be read: ``path`` and the ``reason``."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{path_text(path)}: {reason}")
        self.path = os.fspath(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[Any, ...]]:
        return BadImage, (self.path, self.reason)


def os_error(path: str | os.PathLike[str], error: OSError) -> CommandError:
    """One line for a failed system call: the file, and the system's error message."""
    return CommandError(f"{path_text(path)}: {error.strerror or error}")
