"""What ranks exchange in the forward and the backward, by torch's own differentiable collectives, and the bytes sent.

Every function takes a ``Wire`` and the name of the layer that the exchange is for. A loss is shared out so that
**gradients add up**: the gradient of the whole is the sum over ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor

# The second name is deprecated since PyTorch 2.14 and the only one before.
_NAMES = ("all_gather_single_autograd", "all_gather_tensor_autograd")
_all_gather = next(getattr(functional, name) for name in _NAMES if hasattr(functional, name))


class Wire:
    """A process group, this process's ``rank`` in it and its ``size``.

    ``sent`` counts the bytes that this rank has sent to others, by (layer, ``"forward"`` or ``"backward"``). An
    all-gather of s bytes from each of W ranks counts as (W - 1) * s, its reduce-scatter backward as well.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent: Counter[tuple[str, str]] = Counter()

    def count(self, layer: str, forward: int, y: Tensor, backward: int) -> None:
        """Add the bytes of the forward now, and those of the backward when the gradient of ``y`` is there."""
        self.sent[layer, "forward"] += forward
        if y.requires_grad:
            y.register_hook(lambda _: self.sent.update({(layer, "backward"): backward}))


def gather(x: Tensor, dim: int, wire: Wire, layer: str, sizes: Sequence[int] | None = None) -> Tensor:
    """The ranks' ``x`` side by side along ``dim``; backward: each rank gets the sum of all ranks' gradients of its own.

    Args:
        sizes: the length of each rank's ``x`` along dim 0, where they differ; ``dim`` is 0 then. Each is padded to the
            longest on the wire, so that it stays one all-gather.
    """
    longest = max(sizes) if sizes else x.shape[0]
    padded = F.pad(x, (0, 0) * (x.dim() - 1) + (0, longest - x.shape[0])) if longest > x.shape[0] else x
    parts = list(_gathered(padded, wire, layer))
    if sizes:
        parts = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(parts, dim)


def gather_for_copies(x: Tensor, dim: int, wire: Wire, layer: str) -> Tensor:
    """``gather`` before a layer that every rank has a copy of, with the same loss on every rank.

    The gradient of the own part is then complete on each rank, and the backward sends nothing.
    """
    parts = list(_gathered(x.detach(), wire, layer))
    parts[wire.rank] = x
    return torch.cat(parts, dim)


def exchange_border(x: Tensor, width: int, wire: Wire, layer: str, bias: Tensor | None = None) -> tuple[Tensor, int]:
    """``x``, (N, C, H, W), one of two towers' channels, with the ``width`` channels of the other that adjoin them.

    Returns (N, C + width, H, W) and the index of the first own channel. Backward: the gradient of the borrowed
    channels goes back to their owner, who adds it. A ``bias`` of (C,) is added to what is sent alone.
    """
    first = wire.rank == 0
    border = x[:, -width:] if first else x[:, :width]
    if bias is not None:
        border = border + (bias[-width:] if first else bias[:width]).view(-1, 1, 1)
    border = _rows(border, _is_channels_last(x))
    splits = [0, x.shape[0]] if first else [x.shape[0], 0]
    received = functional.all_to_all_single_autograd(border, splits, splits, wire.group)
    wire.count(layer, border.nbytes, received, border.nbytes)
    other = received.permute(0, 3, 1, 2) if _is_channels_last(x) else received
    return torch.cat([x, other] if first else [other, x], 1), 0 if first else width


def to_own_images(x: Tensor, images: Sequence[int], wire: Wire, layer: str) -> Tensor:
    """(sum of images, features of this rank) to (images of this rank, all features), by one all-to-all.

    ``images`` are the numbers of images of each rank. The backward is the reverse all-to-all.
    """
    own, columns = images[wire.rank], x.shape[1]
    received = functional.all_to_all_single_autograd(x.contiguous(), [own] * wire.size, list(images), wire.group)
    row = columns * x.element_size()
    wire.count(layer, (x.shape[0] - own) * row, received, own * (wire.size - 1) * row)
    return received.view(wire.size, own, columns).transpose(0, 1).reshape(own, wire.size * columns)


def _gathered(x: Tensor, wire: Wire, layer: str) -> tuple[Tensor, ...]:
    """The ranks' ``x``, each in the memory format of this rank's."""
    channels_last = _is_channels_last(x)
    rows = _rows(x, channels_last)
    y = _all_gather(rows, 0, wire.group)
    others = (wire.size - 1) * rows.nbytes
    wire.count(layer, others, y, others)
    parts = y.view(wire.size, *rows.shape).unbind(0)
    return tuple(part.permute(0, 3, 1, 2) for part in parts) if channels_last else parts


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` as collectives take it: contiguous, with the channels last where they are so in memory."""
    return (x.permute(0, 2, 3, 1) if channels_last else x).contiguous()
