"""The part of AlexNet that one rank has: the same layers and names, with exchanges between them.

**LRN at the towers' border.** LRN at a channel reads two channels on each side. In one process its window crosses the
border between the towers. ``lrn_border="exchange"`` computes the same on two ranks: each sends the two channels at
the border. With ``"per-tower"`` the window ends at the border and nothing is sent: another network there, so its
checkpoint gives slightly other results in one process.

The paper's towers communicate only in certain layers, before conv3 and the fully connected ones. Its formula of LRN
cuts the window off at the ends of the layer, and names no tower. What its hardware computed at the border is not known
here: the first sentence alone would mean ``"per-tower"``, the second ``"exchange"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as fused_nn
from .. import ops
from ..models.alexnet import BLOCKS, AlexNet
from ..variants import HIDDEN, Stage, stages
from .collectives import Wire, exchange_border, gather, gather_for_copies, to_own_images
from .data import Place, SharedDropout
from .layout import Layout
from .volume import TOWERS


class _Exchange(nn.Module):
    """An exchange as a layer of ``nn.Sequential``."""

    def __init__(self, exchange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.exchange = exchange

    def forward(self, x: Tensor) -> Tensor:
        return self.exchange(x)


class _BorderBlock(fused_nn.Conv2dReLULRNMaxPool2d):
    """The fused block over the own channels and the border of the other tower."""

    border: tuple[Wire, str]

    def forward(self, input: Tensor) -> Tensor:
        y, bias = self.convolution(input), self.bias
        assert bias is not None
        width = self.norm[0] // 2
        x, start = exchange_border(y, width, *self.border, bias)
        padded = F.pad(bias, (start, width - start))  # the other's channels come with their bias added
        return ops.relu_lrn_max_pool2d(x, padded, *self.norm, *self.window).narrow(1, start, y.shape[1])


class _BorderNorm(nn.Module):
    """A normalization over the own channels and the border of the other tower."""

    def __init__(self, norm: nn.LocalResponseNorm, border: tuple[Wire, str]) -> None:
        super().__init__()
        self.norm, self.border = norm, border

    def forward(self, x: Tensor) -> Tensor:
        wide, start = exchange_border(x, self.norm.size // 2, *self.border)
        return self.norm(wide).narrow(1, start, x.shape[1])


class RankAlexNet(AlexNet):
    """One rank's part of the network of ``whole``, with the same weights, for layout ``towers`` or ``weird-trick``.

    A loss must be this rank's share: the sum of the losses of its images, divided by the images of the global batch.
    Then the gradient of each parameter, summed over ``layout.data`` where ``layout.sums`` says so, is that of one
    process. With dropout the default generators of all ranks must be in the same state.
    """

    def __init__(self, whole: AlexNet, layout: Layout) -> None:
        config, fused, towers = whole.config, whole.fused, layout.name == "towers"
        found = [_own_stage(stage) for stage in stages(config)] if towers else None
        exchanges = towers and layout.lrn_border == "exchange"
        # After pooling the border is a quarter as large: CaffeNet's order sends it there, from a layer of its own.
        blocks: Any = {("relu", "norm", "pool"): _BorderBlock} if exchanges else BLOCKS
        super().__init__(config, fused, found, HIDDEN // layout.parts.size, blocks)
        self.layout, self.images = layout, ()  # type: Layout, Sequence[int]
        weight = whole.get_parameter("features.conv1.weight")
        self.to(device=weight.device, dtype=weight.dtype)
        self.load_state_dict(layout.own(whole.state_dict()))
        self.train(whole.training)
        self.sides = whole.sides
        if exchanges:
            self._add_borders()
        self._add_exchanges()

    def forward(self, x: Tensor, images: Sequence[int] | None = None) -> Tensor:
        """This rank's images to their logits, as ``AlexNet.forward``.

        Args:
            images: the number of images of each rank of ``layout.data``; None: as many as here on each.

        Raises ValueError where ``images`` has another number for this rank, or of ranks.
        """
        data = self.layout.data
        self.images = tuple(images or (len(x),) * data.size)
        if len(self.images) != data.size or self.images[data.rank] != len(x):
            raise ValueError(f"images must be {data.size} numbers, {len(x)} for rank {data.rank}, got {images}")
        whole, towers = sum(self.images), self.layout.name == "towers"
        place = Place(sum(self.images[: data.rank]) if towers else 0, whole)  # of the rows that fc6 and fc7 have here
        for layer in self.classifier:
            if isinstance(layer, SharedDropout):
                layer.begin(place)
        return super().forward(x)

    def _add_borders(self) -> None:
        for index in (1, 2):
            border = (self.layout.parts, f"norm{index}")
            conv, norm = (getattr(self.features, f"{kind}{index}") for kind in ("conv", "norm"))
            if isinstance(conv, _BorderBlock):
                conv.border = border
            else:
                setattr(self.features, f"norm{index}", _BorderNorm(norm, border))

    def _add_exchanges(self) -> None:
        """Put the exchanges before their layers, and the own columns of the masks into dropout's places."""
        wire, towers = self.layout.parts, self.layout.name == "towers"
        width = HIDDEN // wire.size
        columns = slice(width * wire.rank, width * (wire.rank + 1))
        before: dict[str, Callable[[Tensor], Tensor]] = {"fc7": lambda x: gather(x, 1, wire, "fc7")}
        if towers:
            before["conv3"] = lambda x: gather(x, 1, wire, "conv3")
            before["fc6"] = lambda x: gather(x, 1, wire, "fc6")
            before["fc8"] = lambda x: gather_for_copies(x, 1, wire, "fc8")
        else:
            before["fc6"] = lambda x: gather(x, 0, wire, "fc6", self.images)
            before["fc8"] = lambda x: to_own_images(x, self.images, wire, "fc8")
        for name in ("features", "classifier"):
            layers = nn.Sequential()
            for kind, layer in getattr(self, name).named_children():
                if kind in before:
                    layers.add_module(f"exchange_{kind}", _Exchange(before[kind]))
                dropped = SharedDropout(layer.p, HIDDEN, columns) if isinstance(layer, nn.Dropout) else layer
                layers.add_module(kind, dropped)
            setattr(self, name, layers.train(self.training))


def _own_stage(stage: Stage) -> Stage:
    """One tower's half of a convolution's kernels, which see their own tower where the whole has two groups."""
    conv = stage.conv._replace(channels=stage.conv.channels // TOWERS, groups=1)
    return stage._replace(conv=conv, in_channels=stage.in_channels // stage.conv.groups)
