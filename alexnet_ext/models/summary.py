"""The layer table of a model; ``alexnet_ext.layers`` makes the same table from a model's arguments."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .. import layers
from ..layers import LayerRow, total, training_flops
from .alexnet import AlexNet

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LayerRow", "render", "summary", "total", "training_flops"]


def summary(model: AlexNet) -> list[LayerRow]:
    """The rows of ``model`` for one image: each convolution, pooling and linear layer with the layers that follow it.

    A fused model, whose layers run several at once, has the same table as its stock twin; parameters are counted in
    ``model`` itself.

    Raises TypeError for a model that ``alexnet_ext.models.alexnet`` did not make.
    """
    if not isinstance(model, AlexNet):
        raise TypeError(f"model must come from alexnet_ext.models.alexnet, got {type(model).__name__}")
    counted = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    return [
        dataclasses.replace(row, parameters=sum(p.numel() for p in counted[row.layer].parameters()))
        for row in layers.layer_rows(model.config)
    ]


def render(model: AlexNet) -> Table:
    """``summary(model)`` with its totals as a ``rich.table.Table`` to print."""
    return layers.render(model.config, summary(model))
