"""Fused layers for anybody's model: put in, proven on request, taken out again."""

from .replace import accelerate, accelerated, restore
from .report import Report, Row

__all__ = ["Report", "Row", "accelerate", "accelerated", "restore"]
