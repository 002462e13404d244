"""Fused kernels for PyTorch, and AlexNet on top of them."""

from . import models, nn, ops
from ._version import __version__
from .accelerate import Report, accelerate, accelerated, restore
from .diagnostics import info
from .ops import use_backend
from .tuning import tune

__all__ = [
    "Report",
    "__version__",
    "accelerate",
    "accelerated",
    "info",
    "models",
    "nn",
    "ops",
    "restore",
    "tune",
    "use_backend",
]
