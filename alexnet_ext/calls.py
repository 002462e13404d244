"""Where ``Rewritten`` stood before; pickles of accelerated models name it here."""

from .accelerate.calls import Rewritten

__all__ = ["Rewritten"]
