"""The former module of ``Rewritten``: older pickles of accelerated models name it."""

from .accelerate.calls import Rewritten

__all__ = ["Rewritten"]
