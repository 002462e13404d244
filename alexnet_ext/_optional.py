"""Packages that only some commands need: their import, and the error where one is not installed."""

from __future__ import annotations

import importlib
from types import ModuleType

from ._errors import CommandError


def require(name: str, extra: str = "train") -> ModuleType:
    """Import a module of an optional package; CommandError with the pip command where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or name.split(".")[0] != error.name.split(".")[0]:
            raise
        raise CommandError(f"{name.split('.')[0]} is not installed: pip install -e '.[{extra}]'") from error


def missing(package: str, extra: str, what: str) -> ImportError:
    """The error for a caller in Python whose reader or writer needs a package that is not there."""
    return ImportError(f"{what} needs {package}: pip install 'alexnet_ext[{extra}]'")
