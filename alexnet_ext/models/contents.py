"""What a reader of weights finds in a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.preprocessing import Preprocessing
from ..variants import LRN


class Entry(NamedTuple):
    """A tensor of a file, its shape known before its values are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Contents(NamedTuple):
    """What a reader finds in a file, under this package's names."""

    entries: dict[str, Entry]
    order: tuple[str, ...] | None = None
    """The kinds that follow conv1, as in ``Variant.order``, where the format tells."""
    variant: str | None = None
    """The variant, where the format names it."""
    activation: str | None = None
    """One of ``ACTIVATIONS``, where the format names it."""
    groups: tuple[int, ...] | None = None
    """The groups of each convolution, where the format tells."""
    lrn: LRN | None = None
    """The constants of the normalization, where the format tells."""
    preprocessing: Preprocessing | None = None
    bgr: bool = False
    """Whether conv1 takes blue, green, red."""


def linear_or_conv(name: str) -> str:
    """The module of a layer called conv1 ... fc8."""
    return f"{'features' if name.startswith('conv') else 'classifier'}.{name}"
