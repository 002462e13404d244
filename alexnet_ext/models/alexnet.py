"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) and its relatives: one table, one class, fused or stock.

``fused=True`` and ``fused=False`` have the same module names and the same state_dict: where a fused layer
does the work of the ones behind it, ``nn.Identity`` stands in their places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import nn as fused_nn
from ..ops._checks import pooled_size


class Conv(NamedTuple):
    """One convolution. Its input channels are those of the layer before, 3 at the start."""

    channels: int
    kernel: int
    stride: int
    padding: int
    groups: int


class LRN(NamedTuple):
    """Local response normalization, in the order ``nn.LocalResponseNorm`` takes it (alpha is divided by size)."""

    size: int
    alpha: float
    beta: float
    k: float


class Variant(NamedTuple):
    """One row of the table: the convolutions and what differs around them.

    ``order`` is what follows conv1 and conv2. conv3 and conv4 are followed by ReLU, conv5 by ReLU and pooling.
    """

    convs: tuple[Conv, ...]
    order: tuple[str, ...]
    lrn: LRN | None = None
    ceil_mode: bool = False  # pooled sizes round up, as Caffe rounds them
    image_size: int = 227
    any_size: bool = False  # an average pool brings every image to 6 x 6 before fc6
    dropout_first: bool = False  # dropout before fc6 and fc7, not behind them


# The two GPUs of 2012 each held half of the kernels: groups=2 where a layer saw its own tower only.
TWO_TOWERS = (
    #    channels kernel stride padding groups
    Conv(96, 11, 4, 0, 1),
    Conv(256, 5, 1, 2, 2),
    Conv(384, 3, 1, 1, 1),
    Conv(384, 3, 1, 1, 2),
    Conv(256, 3, 1, 1, 2),
)
ONE_TOWER = (
    Conv(64, 11, 4, 2, 1),
    Conv(192, 5, 1, 2, 1),
    Conv(384, 3, 1, 1, 1),
    Conv(256, 3, 1, 1, 1),
    Conv(256, 3, 1, 1, 1),
)
# Sum over 5 channels with alpha=1e-4 in the paper's formula, which does not divide alpha by 5: 5e-4 here.
PAPER_LRN = LRN(5, 5e-4, 0.75, 2.0)
CAFFE_LRN = LRN(5, 1e-4, 0.75, 1.0)

VARIANTS: dict[str, Variant] = {
    "paper": Variant(TWO_TOWERS, ("relu", "norm", "pool"), PAPER_LRN),
    "caffe": Variant(TWO_TOWERS, ("relu", "norm", "pool"), CAFFE_LRN, ceil_mode=True),
    "caffenet": Variant(TWO_TOWERS, ("relu", "pool", "norm"), CAFFE_LRN),
    "tutorial": Variant(TWO_TOWERS, ("pool", "norm", "relu"), LRN(5, 1e-4, 0.75, 2.0)),
    "torchvision": Variant(ONE_TOWER, ("relu", "pool"), image_size=224, any_size=True, dropout_first=True),
}

# Overlapping pooling, window 3 and stride 2, in every variant.
WINDOW, STRIDE = 3, 2

Block = type[fused_nn.Conv2dReLULRNMaxPool2d] | type[fused_nn.Conv2dReLUMaxPool2dLRN]
BLOCKS: dict[tuple[str, ...], Block] = {
    ("relu", "norm", "pool"): fused_nn.Conv2dReLULRNMaxPool2d,
    ("relu", "pool", "norm"): fused_nn.Conv2dReLUMaxPool2dLRN,
}

# A bias of 1 feeds the ReLUs positive values from the start, "which accelerates the early stages of learning".
BIAS_ONE = ("conv2", "conv4", "conv5", "fc6", "fc7")

LARGEST = 2**24  # of image_size and num_classes: beyond, bytes are more than 63 bits can count

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
    """PyTorch's own start, which the layers' constructors have made."""


INITS: dict[str, Callable[[str, Weighted], None]] = {
    "paper": _init_paper,
    "kaiming": _init_kaiming,
    "torch": _init_torch,
}


@dataclass(frozen=True)
class AlexNetConfig:
    """What a checkpoint must record to build the network again: ``alexnet(**dataclasses.asdict(config))``."""

    variant: str
    num_classes: int
    image_size: int
    dropout: float


class AlexNet(nn.Module):
    """The network of ``alexnet()``, which checks the arguments and gives the weights their start.

    ``features`` (conv1, relu1, ... pool5) and ``classifier`` (fc6, ... fc8) are ``nn.Sequential``; ``config``
    holds the arguments and ``fused`` whether the layers are fused.
    """

    def __init__(self, config: AlexNetConfig, fused: bool = True) -> None:
        super().__init__()
        self.config = config
        self.fused = fused
        table = VARIANTS[config.variant]
        self.features = nn.Sequential()
        channels, size = 3, config.image_size
        for index in range(1, 6):
            layers, size = _convolution(table, index, channels, size, config, fused)
            for kind, layer in layers.items():
                self.features.add_module(f"{kind}{index}", layer)
            channels = table.convs[index - 1].channels
        if table.any_size:
            size = 6
            self.features.add_module("avgpool", nn.AdaptiveAvgPool2d(size))
        self.classifier = _classifier(table, channels * size * size, config, fused)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, image_size, image_size) to (N, num_classes) before the softmax.

        Raises RuntimeError for another shape; the torchvision variant takes any height and width that its
        layers can take.
        """
        side = self.config.image_size
        sized = VARIANTS[self.config.variant].any_size or x.shape[2:] == (side, side)
        if x.dim() != 4 or x.shape[1] != 3 or not sized:
            raise RuntimeError(f"x has shape {list(x.shape)}, expected (N, 3, {side}, {side})")
        return self.classifier(torch.flatten(self.features(x), 1))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.config).items())


def _convolution(
    table: Variant, index: int, in_channels: int, size: int, config: AlexNetConfig, fused: bool
) -> tuple[dict[str, nn.Module], int]:
    """Convolution ``index`` and what follows it, by kind, and the side of the square they put out."""
    conv = table.convs[index - 1]
    after = table.order if index <= 2 else ("relu",) if index <= 4 else ("relu", "pool")
    # The paper prints 224 where its 55 outputs at stride 4 need 227, or 224 padded by 2.
    padding = 2 if index == 1 and config.image_size == 224 else conv.padding
    size = (size + 2 * padding - conv.kernel) // conv.stride + 1
    rounds_up = table.ceil_mode
    if "pool" in after:
        down, size = (pooled_size(size, WINDOW, STRIDE, 0, 1, ceil) for ceil in (False, table.ceil_mode))
        rounds_up = down != size
    if size < 1:
        raise ValueError(
            f"image_size={config.image_size} is too small for variant {config.variant!r}: "
            f"conv{index} and its pooling leave nothing"
        )

    arguments = (in_channels, conv.channels, conv.kernel, conv.stride, padding, 1, conv.groups)
    pool = nn.MaxPool2d(WINDOW, STRIDE, ceil_mode=table.ceil_mode)
    stock: dict[str, nn.Module] = {"relu": nn.ReLU(inplace=True), "pool": pool}
    if table.lrn is not None:
        stock["norm"] = (fused_nn if fused else nn).LocalResponseNorm(*table.lrn)
    layers = {kind: stock[kind] for kind in after}
    convolution: nn.Module
    if not fused:
        convolution = nn.Conv2d(*arguments)
    elif after in BLOCKS and not rounds_up and table.lrn is not None:
        plain = nn.MaxPool2d(WINDOW, STRIDE)
        convolution = BLOCKS[after](*arguments, norm=nn.LocalResponseNorm(*table.lrn), pool=plain)
        layers = {kind: nn.Identity() for kind in after}
    elif after[0] == "relu":
        convolution = fused_nn.Conv2dReLU(*arguments)
        layers["relu"] = nn.Identity()
        if after[1:2] == ("pool",):  # ReLU twice is ReLU; its winners take one byte where stock pooling's take eight
            layers["pool"] = fused_nn.ReLUMaxPool2d(WINDOW, STRIDE, ceil_mode=table.ceil_mode)
    else:  # the tutorial's order: normalization sees negative values, so no ReLU can move before it
        convolution = nn.Conv2d(*arguments)
    return {"conv": convolution, **layers}, size


def _classifier(table: Variant, features: int, config: AlexNetConfig, fused: bool) -> nn.Sequential:
    layers = nn.Sequential()
    for index, inputs in ((6, features), (7, 4096)):
        if table.dropout_first:
            layers.add_module(f"drop{index}", nn.Dropout(config.dropout))
        layers.add_module(f"fc{index}", fused_nn.LinearReLU(inputs, 4096) if fused else nn.Linear(inputs, 4096))
        layers.add_module(f"relu{index}", nn.Identity() if fused else nn.ReLU(inplace=True))
        if not table.dropout_first:
            layers.add_module(f"drop{index}", nn.Dropout(config.dropout))
    layers.add_module("fc8", nn.Linear(4096, config.num_classes))
    return layers


def alexnet(
    variant: str = "paper",
    fused: bool = True,
    num_classes: int = 1000,
    image_size: int | None = None,
    dropout: float = 0.5,
    init: str = "paper",
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
            so that it too puts out 55 x 55. fc6 has as many inputs as the size needs.
        dropout: probability on fc6 and fc7 in training.
        init: ``"paper"`` (N(0, 0.01), biases 1 in conv2, conv4, conv5, fc6, fc7 and 0 elsewhere), ``"kaiming"``
            (N(0, 2 / inputs), biases 0) or ``"torch"`` (PyTorch's own).

    Raises:
        ValueError: an unknown variant or init, num_classes below 1, dropout outside 0 to 1, an image too small; or
            a number beyond ``LARGEST``.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    size = VARIANTS[variant].image_size if image_size is None else image_size
    for name, value in (("num_classes", num_classes), ("image_size", size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if value > LARGEST:
            raise ValueError(f"{name} must be at most {LARGEST:,}, got {value:,}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout!r}")
    model = AlexNet(AlexNetConfig(variant, num_classes, size, float(dropout)), fused)
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
