"""``tune``: measure the convolutions of a network ahead of training. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import nn as layers
from .ops import _tuning


@dataclass(frozen=True)
class TunedRow:
    """What was found for one direction of one layer: the choice, and the microseconds of every candidate."""

    layer: str
    direction: str
    choice: str
    microseconds: dict[str, float]


def tune(
    network: nn.Module,
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.channels_last,
) -> Iterator[TunedRow]:
    """Measure every convolution of ``network``'s fused layers for inputs of ``shape``.

    The network may be on the meta device. The three directions of each layer are measured on ``device`` where their
    choice is not known yet.
    """
    from .ops.conv2d_bias_relu.measured import FORWARD, describe

    found: list[tuple[str, layers._FusedConv2d, torch.Size]] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, inputs, name=name: found.append((name, m, inputs[0].shape)))
        for name, module in network.named_modules()
        if isinstance(module, layers._FusedConv2d)
    ]
    try:
        with torch.no_grad():
            network(torch.empty(tuple(shape), device=next(network.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer, size in found:
        x = torch.randn(size, device=device, dtype=dtype).to(memory_format=layout).requires_grad_()
        weight = torch.randn(layer.weight.shape, device=device, dtype=dtype).to(memory_format=layout).requires_grad_()
        has_bias = layer.relu and layer.bias is not None
        bias = torch.zeros(len(weight), device=device, dtype=dtype) if has_bias else None
        constants = [*map(list, (layer.stride, layer.padding, layer.dilation)), layer.groups]
        y = torch.ops.alexnet_ext.conv2d_bias_relu_measured(x, weight, bias, *constants, layer.relu)
        y.backward(torch.randn_like(y))
        for direction in (FORWARD[layer.relu], "input gradient", "weight gradient"):
            entry = (
                _tuning.choices().known().get(_tuning.key_of(describe(direction, x, weight, *constants), device), {})
            )
            yield TunedRow(name, direction, entry["choice"], entry["microseconds"])
