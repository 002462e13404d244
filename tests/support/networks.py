"""Networks of 2012 to 2014 as people write them, of stock layers only, for tests of other people's models."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alexnet_ext as ax

with torch.random.fork_rng([]):
    torch.manual_seed(0)  # else its weights depend on the modules that were imported before
    BLOCK = (nn.Conv2d(4, 6, 3), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(3, 2))

# Patterns as a report names them.
PAPER = "Conv2d -> ReLU -> LocalResponseNorm -> MaxPool2d"
CAFFENET = "Conv2d -> ReLU -> MaxPool2d -> LocalResponseNorm"
CONV, POOL, LRN = "Conv2d -> ReLU", "ReLU -> MaxPool2d", "LocalResponseNorm"


def sequential(*layers: nn.Module) -> nn.Sequential:
    """Copies of these layers, or of ``BLOCK``."""
    return nn.Sequential(*map(copy.deepcopy, layers or BLOCK))


def fused(report: ax.Report) -> dict[str, int]:
    """How often each pattern was fused."""
    found: dict[str, int] = {}
    for row in report:
        if row.action == "fused":
            found[row.pattern] = found.get(row.pattern, 0) + 1
    return found


class CaffeNet(nn.Module):
    """bvlc_reference_caffenet: pooling before normalization. ``hidden`` is the width of fc6 and fc7."""

    def __init__(self, num_classes: int = 1000, hidden: int = 4096, image_size: int = 227) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 11, 4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0),
            nn.Conv2d(96, 256, 5, padding=2, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0),
            nn.Conv2d(256, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
        )
        side = image_size // 32 - 1
        self.classifier = nn.Sequential(
            nn.Linear(256 * side * side, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class ZFNet(nn.Module):
    """Zeiler and Fergus 2013: conv1 of 7 x 7 at stride 2, pooling rounded up, then contrast normalization."""

    def __init__(self, num_classes: int = 1000, hidden: int = 4096) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 7, 2, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0),
            nn.Conv2d(96, 256, 5, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0),
            nn.Conv2d(256, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
        )
        self.pool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(nn.Linear(9216, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class Functional(nn.Module):
    """A network as tutorials write them: layers with weights, and calls."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 5), nn.Conv2d(8, 16, 3)
        self.conv3, self.relu3 = nn.Conv2d(16, 16, 3), nn.ReLU()
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.local_response_norm(x, 5, alpha=1e-2, k=2.0)
        x = F.max_pool2d(torch.relu_(self.conv2(x)), kernel_size=3, stride=2)
        x = F.dropout(self.relu3(self.conv3(x)), training=self.training)
        return self.fc(x.mean((2, 3)))


class Inception(nn.Module):
    """Four branches side by side, the layers called one by one."""

    def __init__(self, channels: int, one: int, three: tuple[int, int], five: tuple[int, int], pooled: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)  # one for all: stateless
        self.one = nn.Conv2d(channels, one, 1)
        self.reduce3, self.three = nn.Conv2d(channels, three[0], 1), nn.Conv2d(*three, 3, padding=1)
        self.five = nn.Sequential(
            *(nn.Conv2d(channels, five[0], 1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(*five, 5, padding=2), nn.ReLU(inplace=True)),
        )
        self.pool, self.project = nn.MaxPool2d(3, 1, padding=1), nn.Conv2d(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        relu = self.relu
        three = relu(self.three(relu(self.reduce3(x))))
        return torch.cat([relu(self.one(x)), three, self.five(x), relu(self.project(self.pool(x)))], 1)


class GoogLeNet(nn.Module):
    """Szegedy and others 2014 with its two normalizations, to the third inception module; the stem's layers are
    called one by one."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.relu1, self.pool1 = nn.Conv2d(3, 64, 7, 2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2)
        self.norm1 = nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0)
        self.conv2_reduce, self.relu2_reduce = nn.Conv2d(64, 64, 1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(64, 192, 3, padding=1), nn.ReLU()
        self.norm2, self.pool2 = nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0), nn.MaxPool2d(3, 2)
        self.inception = nn.Sequential(
            Inception(192, 64, (96, 128), (16, 32), 32),
            Inception(256, 128, (128, 192), (32, 96), 64),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Inception(480, 192, (96, 208), (16, 48), 64),
        )
        self.average, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.pool1(self.relu1(self.conv1(x))))
        x = self.relu2(self.conv2(self.relu2_reduce(self.conv2_reduce(x))))
        x = self.inception(self.pool2(self.norm2(x)))
        return self.fc(torch.flatten(self.average(x), 1))
