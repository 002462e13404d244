"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) and its relatives: one table, one class, fused or stock.

``fused=True`` and ``fused=False`` have the same module names and the same state_dict. A fused layer also computes the
layers after it; ``nn.Identity`` takes their places.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as fused_nn
from ..ops._backend import decide
from ..variants import ANY_SIZE, HIDDEN, STRIDE, VARIANTS, WINDOW, AlexNetConfig, Stage, Variant, config_of, stages

Block = type[fused_nn.Conv2dReLULRNMaxPool2d] | type[fused_nn.Conv2dReLUMaxPool2dLRN]
BLOCKS: dict[tuple[str, ...], Block] = {
    ("relu", "norm", "pool"): fused_nn.Conv2dReLULRNMaxPool2d,
    ("relu", "pool", "norm"): fused_nn.Conv2dReLUMaxPool2dLRN,
}

DEPTH = 4  # conv1's stride, and the space_to_depth that ``ops.augment`` has

# A bias of 1 feeds the ReLUs positive values from the start, "which accelerates the early stages of learning".
BIAS_ONE = ("conv2", "conv4", "conv5", "fc6", "fc7")

# By the names of ``ACTIVATIONS``. A layer of another one is still called relu1 ... relu7, by its place.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}

Weighted = nn.Conv2d | nn.Linear


def _init_paper(name: str, layer: Weighted) -> None:
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, 1.0 if name in BIAS_ONE else 0.0)


def _init_kaiming(name: str, layer: Weighted) -> None:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _init_torch(name: str, layer: Weighted) -> None:
    """PyTorch's own start: the layers' constructors have made it."""


INITS: dict[str, Callable[[str, Weighted], None]] = {
    "paper": _init_paper,
    "kaiming": _init_kaiming,
    "torch": _init_torch,
}


class AlexNet(nn.Module):
    """The network of ``alexnet()``, which checks the arguments and gives the weights their start.

    ``features`` (conv1, relu1, ... pool5) and ``classifier`` (fc6, ... fc8) are ``nn.Sequential``; ``config``
    holds the arguments and ``fused`` whether the layers are fused: never where the activation is not ReLU, which the
    fused ones contain.

    ``found`` (the convolutions) and ``hidden`` (outputs of fc6 and of fc7) are given where a rank has a part of each
    layer, and ``blocks`` where it computes some in another way (``parallel.network``).
    """

    def __init__(
        self,
        config: AlexNetConfig,
        fused: bool = True,
        found: Sequence[Stage] | None = None,
        hidden: int | None = None,
        blocks: Mapping[tuple[str, ...], Block] = BLOCKS,
    ) -> None:
        super().__init__()
        self.config = config
        self.fused = fused = fused and config.activation == "relu"
        self.sides: tuple[int, ...] = (config.image_size,)  # of the images that forward takes
        table = VARIANTS[config.variant]
        self.features = nn.Sequential()
        for index, stage in enumerate(found or stages(config), 1):
            for kind, layer in _convolution(table, stage, config, fused, blocks).items():
                self.features.add_module(f"{kind}{index}", layer)
        last = stages(config)[-1]
        size = last.output
        if table.any_size:
            size = ANY_SIZE
            self.features.add_module("avgpool", nn.AdaptiveAvgPool2d(size))
        self.classifier = _classifier(table, last.conv.channels * size * size, config, fused, hidden or HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, image_size, image_size) to (N, num_classes) before the softmax.

        Raises RuntimeError for another shape; the torchvision variant takes any height and width that its
        layers can take. After ``take_depth`` x may also be what ``ops.augment(space_to_depth=4)`` gives, after
        ``take_sides`` its sides may be others.
        """
        side = self.config.image_size
        any_size, shape = VARIANTS[self.config.variant].any_size, x.shape[1:]
        sized = any_size or any(shape[1:] == (side, side) for side in self.sides)
        takes_depth = getattr(self.features.conv1, "takes_depth", False)
        of_depth = takes_depth and any(shape == self._depth_shape(side) for side in self.sides)
        if x.dim() != 4 or not (of_depth or (x.shape[1] == 3 and sized)):
            raise RuntimeError(f"x has shape {list(x.shape)}, expected (N, 3, {side}, {side})")
        whole = any_size or shape == (3, side, side) or (of_depth and shape == self._depth_shape(side))
        return self.classifier(torch.flatten(self.features(x) if whole else self._resized_features(x), 1))

    def _resized_features(self, x: Tensor) -> Tensor:
        """``features`` with as many outputs as at ``image_size``: pool5's windows adapt to the image."""
        *layers, pool = self.features
        for layer in layers:
            x = layer(x)
        if isinstance(pool, fused_nn.ReLUMaxPool2d):
            x = F.relu(x)
        return F.adaptive_max_pool2d(x, stages(self.config)[-1].output)

    def take_sides(self, sides: Sequence[int]) -> None:
        """``forward`` then also takes images of these ``sides``, with the same weights.

        conv5's output is pooled to the size that fc6 takes, by windows as even as possible
        (``F.adaptive_max_pool2d``). At 227 these are pool5's own: 3 wide, in steps of 2.

        Raises ValueError for a side that the convolutions leave nothing of.
        """
        for side in sides:
            stages(dataclasses.replace(self.config, image_size=side))
        self.sides = tuple(dict.fromkeys((self.config.image_size, *sides)))

    def take_depth(self, device: torch.device, dtype: torch.dtype) -> int:
        """The ``space_to_depth`` of ``ops.augment`` for training in ``dtype`` on ``device``: 1, or 4 where images would
        be rewritten to it at every step (``ops.conv2d_bias_relu``). Then ``forward`` takes both forms, of every side
        that ``take_sides`` named before.
        """
        conv = self.features.conv1
        images = torch.empty(1, 3, 2, 2, memory_format=torch.channels_last)
        backend = decide("conv2d_bias_relu", device, dtype, x=images).backend
        rewritten = dtype.itemsize == 2 and backend in ("auto", "triton")
        if not (all(map(self._fits_depth, self.sides)) and rewritten and hasattr(conv, "takes_depth")):
            return 1
        conv.takes_depth = True
        return DEPTH

    def _fits_depth(self, side: int) -> bool:
        """Whether conv1 leaves as much of images of this side after space-to-depth as before."""
        stage = stages(dataclasses.replace(self.config, image_size=side))[0]
        taps = -(-stage.conv.kernel // DEPTH)
        blocks = self._depth_shape(side)[1]
        return stage.conv.stride == DEPTH and stage.padding == 0 and blocks == stage.size + taps - 1

    def _depth_shape(self, side: int) -> tuple[int, int, int]:
        blocks = -(-side // DEPTH)
        return 3 * DEPTH**2, blocks, blocks

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.config).items())


def _convolution(
    table: Variant, stage: Stage, config: AlexNetConfig, fused: bool, blocks: Mapping[tuple[str, ...], Block]
) -> dict[str, nn.Module]:
    """A convolution and the layers that follow it, by kind."""
    conv, after = stage.conv, stage.after
    arguments = (stage.in_channels, conv.channels, conv.kernel, conv.stride, stage.padding, 1, conv.groups)
    pool = nn.MaxPool2d(WINDOW, STRIDE, ceil_mode=table.ceil_mode)
    stock: dict[str, nn.Module] = {"relu": LAYERS[config.activation](), "pool": pool}
    if table.lrn is not None:
        stock["norm"] = (fused_nn if fused else nn).LocalResponseNorm(*table.lrn)
    layers = {kind: stock[kind] for kind in after}
    convolution: nn.Module
    if not fused:
        convolution = nn.Conv2d(*arguments)
    elif after in blocks and not stage.rounds_up and table.lrn is not None:
        plain = nn.MaxPool2d(WINDOW, STRIDE)
        convolution = blocks[after](*arguments, norm=nn.LocalResponseNorm(*table.lrn), pool=plain)
        layers = {kind: nn.Identity() for kind in after}
    elif after[0] == "relu":
        layers["relu"] = nn.Identity()
        if after[1:2] == ("pool",):  # pooling applies ReLU, so that no gradient is masked; a winner is one byte
            convolution = fused_nn.Conv2d(*arguments)
            layers["pool"] = fused_nn.ReLUMaxPool2d(WINDOW, STRIDE, ceil_mode=table.ceil_mode)
        else:
            convolution = fused_nn.Conv2dReLU(*arguments)
    else:  # the tutorial's order: normalization sees negative values, so no ReLU can move before it
        convolution = nn.Conv2d(*arguments)
    return {"conv": convolution, **layers}


def _classifier(table: Variant, features: int, config: AlexNetConfig, fused: bool, hidden: int) -> nn.Sequential:
    layers = nn.Sequential()
    for index, inputs in ((6, features), (7, HIDDEN)):
        if table.dropout_first:
            layers.add_module(f"drop{index}", nn.Dropout(config.dropout))
        layers.add_module(f"fc{index}", fused_nn.LinearReLU(inputs, hidden) if fused else nn.Linear(inputs, hidden))
        layers.add_module(f"relu{index}", nn.Identity() if fused else LAYERS[config.activation]())
        if not table.dropout_first:
            layers.add_module(f"drop{index}", nn.Dropout(config.dropout))
    layers.add_module("fc8", nn.Linear(HIDDEN, config.num_classes))
    return layers


def alexnet(
    variant: str = "paper",
    fused: bool = True,
    num_classes: int = 1000,
    image_size: int | None = None,
    dropout: float = 0.5,
    init: str = "paper",
    activation: str = "relu",
) -> AlexNet:
    """The 2012 network or one of its relatives, (N, 3, image_size, image_size) to (N, num_classes).

    Args:
        variant: ``"paper"`` (the 2012 paper: two towers; ReLU, LRN, pool), ``"caffe"`` (BVLC bvlc_alexnet),
            ``"caffenet"`` (BVLC bvlc_reference_caffenet: pool before LRN), ``"tutorial"`` (pool, LRN, ReLU) or
            ``"torchvision"`` (one tower, no LRN). The table is ``VARIANTS``.
        fused: the layers of ``alexnet_ext.nn``; False builds the same network of ``torch.nn`` layers alone, with
            the same state_dict.
        num_classes: outputs of fc8.
        image_size: side of the input; None is the variant's own (227, torchvision 224). At 224 conv1 pads by 2,
            so that its output is 55 x 55 too. fc6 has as many inputs as the size needs.
        dropout: probability on fc6 and fc7 in training.
        init: ``"paper"`` (N(0, 0.01), biases 1 in conv2, conv4, conv5, fc6, fc7 and 0 elsewhere), ``"kaiming"``
            (N(0, 2 / inputs), biases 0) or ``"torch"`` (PyTorch's own).
        activation: ``"relu"``, ``"tanh"`` or ``"sigmoid"``, to compare them as the paper's figure 1 does. The last two
            build stock layers, whatever ``fused`` says.

    Raises:
        ValueError: an unknown variant, init or activation, num_classes below 1, dropout outside 0 to 1, an image too
            small; or a number beyond ``LARGEST``.
    """
    config = config_of(variant, num_classes, image_size, dropout, activation)
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    model = AlexNet(config, fused)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if issubclass(fused_nn.stock_kind(layer), (nn.Conv2d, nn.Linear)):
                INITS[init](name.split(".")[-1], layer)
    return model


def from_torchvision(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict of ``torchvision.models.alexnet`` under the names of ``alexnet("torchvision")``.

    Raises KeyError for a name that torchvision's AlexNet does not have.
    """
    # Torchvision numbers the layers of its two Sequentials: convolutions 0, 3, 6, 8, 10 and linears 1, 4, 6.
    names = {f"features.{i}": f"features.conv{n}" for n, i in enumerate((0, 3, 6, 8, 10), 1)}
    names |= {f"classifier.{i}": f"classifier.fc{n}" for n, i in enumerate((1, 4, 6), 6)}
    renamed = {}
    for key, value in state_dict.items():
        layer, _, kind = key.rpartition(".")
        if layer not in names or not re.fullmatch("weight|bias", kind):
            raise KeyError(f"{key!r} is not in the state_dict of torchvision.models.alexnet")
        renamed[f"{names[layer]}.{kind}"] = value
    return renamed
