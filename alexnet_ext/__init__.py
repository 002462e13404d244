"""Fused kernels for PyTorch, and AlexNet on top of them."""

from typing import TYPE_CHECKING

from ._command import COMMAND
from ._version import __version__

if TYPE_CHECKING or not COMMAND:
    from . import models, nn, ops, optim
    from .accelerate import Report, accelerate, accelerated, restore
    from .ops import use_backend
    from .selfcheck import first_call as _first_call  # noqa: F401 (it is what an unproven op's first call runs)
    from .selfcheck.info import info
    from .selfcheck.prove import Proved, prove, tune
else:
    from .training.interrupt import begin

    begin()

__all__ = [
    "Proved",
    "Report",
    "__version__",
    "accelerate",
    "accelerated",
    "info",
    "models",
    "nn",
    "ops",
    "optim",
    "prove",
    "restore",
    "tune",
    "use_backend",
]
