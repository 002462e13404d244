"""Fused kernels for PyTorch, and AlexNet on top of them."""

from . import models, nn, ops
from ._version import __version__
from .diagnostics import info
from .ops import use_backend

__all__ = ["__version__", "info", "models", "nn", "ops", "use_backend"]
