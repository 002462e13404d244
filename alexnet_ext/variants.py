"""The 2012 network and its relatives in numbers: one table, and the shapes that follow from it. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


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
    """One row of the table: the convolutions, and where the variants differ around them.

    ``order`` lists the layers after conv1 and conv2. conv3 and conv4 are followed by ReLU, conv5 by ReLU and pooling.
    """

    convs: tuple[Conv, ...]
    order: tuple[str, ...]
    lrn: LRN | None = None
    ceil_mode: bool = False  # pooled sizes round up, as Caffe rounds them
    image_size: int = 227
    any_size: bool = False  # an average pool scales every image to 6 x 6 before fc6
    dropout_first: bool = False  # dropout before fc6 and fc7, not after them


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

ANY_SIZE = 6  # side of the average pool's output, in a variant of any size
HIDDEN = 4096  # outputs of fc6 and fc7
INIT_NAMES = ("paper", "kaiming", "torch")
ACTIVATIONS = {"relu": "ReLU", "tanh": "tanh", "sigmoid": "sigmoid"}  # by name, as tables and pictures print them
LARGEST = 2**24  # of image_size and num_classes: larger byte counts overflow 63 bits


@dataclass(frozen=True)
class AlexNetConfig:
    """What a checkpoint must record to build the network again: ``alexnet(**dataclasses.asdict(config))``."""

    variant: str
    num_classes: int
    image_size: int
    dropout: float
    activation: str = "relu"


def config_of(
    variant: str, num_classes: int, image_size: int | None, dropout: float, activation: str = "relu"
) -> AlexNetConfig:
    """The checked arguments of ``models.alexnet``, which says what they and the errors are."""
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    size = VARIANTS[variant].image_size if image_size is None else image_size
    for name, value in (("num_classes", num_classes), ("image_size", size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if value > LARGEST:
            raise ValueError(f"{name} must be at most {LARGEST:,}, got {value:,}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be between 0 and 1, got {dropout!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return AlexNetConfig(variant, num_classes, size, float(dropout), activation)


class Stage(NamedTuple):
    """A convolution and the layers after it. ``size`` is the side of its square output, ``output`` that after all of
    ``after``; ``rounds_up``: pooling leaves a row that only rounding up keeps."""

    conv: Conv
    in_channels: int
    padding: int
    after: tuple[str, ...]
    size: int
    output: int
    rounds_up: bool


def stages(config: AlexNetConfig) -> list[Stage]:
    """The five convolutions of a network. Raises ValueError for an image that they leave nothing of."""
    table, channels, side = VARIANTS[config.variant], 3, config.image_size
    found = []
    for index, conv in enumerate(table.convs, 1):
        after = table.order if index <= 2 else ("relu",) if index <= 4 else ("relu", "pool")
        # The paper prints 224 where its 55 outputs at stride 4 need 227, or 224 padded by 2.
        padding = 2 if index == 1 and config.image_size == 224 else conv.padding
        size = output = (side + 2 * padding - conv.kernel) // conv.stride + 1
        rounds_up = False
        if "pool" in after:
            rounds_up = table.ceil_mode and (size - WINDOW) % STRIDE != 0
            output = (size - WINDOW) // STRIDE + 1 + rounds_up
        if min(size, output) < 1:
            raise ValueError(
                f"image_size={config.image_size} is too small for variant {config.variant!r}: "
                f"conv{index} and its pooling leave nothing"
            )
        found.append(Stage(conv, channels, padding, after, size, output, rounds_up))
        channels, side = conv.channels, output
    return found
