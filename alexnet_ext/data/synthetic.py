"""Images that need no file: each class has a colour and a direction of its stripes, with noise on top."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .batches import Sample
from .preprocessing import Preprocessing


class Synthetic:
    """``length`` images of ``num_classes`` kinds, made on request, the same for the same ``seed``."""

    def __init__(self, length: int, num_classes: int, size: int, seed: int = 0) -> None:
        self.length, self.size, self.seed = length, size, seed
        self.classes = tuple(f"class {index}" for index in range(num_classes))

    @staticmethod
    def preprocessing(size: int) -> Preprocessing:
        """No scaling; values around zero."""
        return Preprocessing(size, size, (0.5,) * 3, (0.25,) * 3)

    def __len__(self) -> int:
        return self.length

    def image(self, index: int) -> Tensor:
        """uint8 (3, size, size)."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**32)
        target = index % len(self.classes)
        angle = math.pi * target / len(self.classes)
        line = torch.arange(self.size, dtype=torch.float32)
        phase = 2 * math.pi * float(torch.rand((), generator=generator))
        wave = torch.sin((line * math.cos(angle) + line[:, None] * math.sin(angle)) * 0.4 + phase)
        tint = torch.tensor([math.cos(2 * angle), math.cos(2 * angle + 2), math.cos(2 * angle + 4)])
        noise = torch.randn(3, self.size, self.size, generator=generator)
        return (128 + 40 * wave + 30 * tint[:, None, None] + 25 * noise).clamp(0, 255).to(torch.uint8)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        _epoch, index = key
        return Sample(index, self.image(index), index % len(self.classes))
