"""From the bytes of a batch of images to the network's input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._layout import filled

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""Mean and deviation of ImageNet's colours, in 0 to 1, as torchvision's models are trained with."""


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for the network; a checkpoint records it, so that prediction does the same.

    size: side of the network's input. resize: side that an image file's shorter side is scaled to before the
    square is cut out. mean, std: of each colour, in 0 to 1. Raises ValueError for an impossible number.
    """

    size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not (type(self.size) is type(self.resize) is int and 1 <= self.size <= self.resize):
            raise ValueError(f"expected ints 1 <= size <= resize, got {self.size!r} and {self.resize!r}")
        for name, low in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(v, (int, float)) and low < v < math.inf for v in values):
                raise ValueError(f"{name} must be three finite numbers, those of std above 0, got {values!r}")

    def at(self, side: int) -> Preprocessing:
        """The same view of each image in another number of pixels: ``side`` in place of ``size``."""
        return replace(self, size=side, resize=max(side, round(self.resize * side / self.size)))

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 1 or 3, height, width) to normalized fp32 (N, 3, size, size), on the images' device.

        A grey image counts as three equal colours, normalized like the first.
        """
        channels = images.shape[1]
        mean, std = (
            filled(values[:channels], torch.float32, images.device).mul(255).view(1, -1, 1, 1)
            for values in (self.mean, self.std)
        )
        # Normalized first: bilinear scaling commutes with it, and 28 x 28 is a sixtieth of 227 x 227.
        x = (images.float() - mean) / std
        if x.shape[-2:] != (self.size, self.size):
            x = bilinear(x, self.size)
        return x.expand(-1, 3, -1, -1) if channels == 1 else x


def bilinear(x: Tensor, side: int) -> Tensor:
    """Images (N, channels, height, width) of floats scaled to ``side`` x ``side``, antialiased where they shrink, as
    ``data.images.square`` scales files."""
    shrinks = side < max(x.shape[-2:])
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=shrinks)
