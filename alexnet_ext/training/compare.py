"""Two trained networks on the same held-out images: do they differ beyond chance? The work of ``alexnet compare``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from rich.table import Table

from .._errors import CommandError, path_text
from ..data.batches import Dataset
from ..data.sources import is_folder
from .checkpoint import Description
from .evaluate import Evaluation

SIGNIFICANT = 0.05  # a larger p-value may be chance
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Counts of the same images: which of two networks, A and B, is right."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def images(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def difference(self) -> float:
        """Top-1 of B less that of A, from -1 to 1."""
        return (self.only_b - self.only_a) / self.images

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar test: if A and B were equally good, each image that one of them alone gets right
        would be a fair coin."""
        tosses = self.only_a + self.only_b
        term = tail = 1  # ways to draw at most the rarer number of heads; whole numbers, so that none underflows
        for heads in range(min(self.only_a, self.only_b)):
            term = term * (tosses - heads) // (heads + 1)
            tail += term
        return min(1.0, 2 * tail / 2**tosses)

    @property
    def interval(self) -> tuple[float, float]:
        """Of ``difference``, at 95 %: the adjusted Wald interval for paired proportions (Bonett and Price, Journal of
        Educational and Behavioral Statistics 37, 2012), which stays right for small counts."""
        total = self.images + 2
        a, b = (self.only_a + 1) / total, (self.only_b + 1) / total
        half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt((a + b - (b - a) ** 2) / total)
        return max(-1.0, b - a - half), min(1.0, b - a + half)

    def table(self) -> Table:
        """The four counts, to print."""
        table = Table("", "B right", "B wrong")
        for column in table.columns[1:]:
            column.justify = "right"
        table.add_row("A right", f"{self.both:,}", f"{self.only_a:,}")
        table.add_row("A wrong", f"{self.only_b:,}", f"{self.neither:,}")
        return table

    def sentence(self) -> str:
        """The verdict, for people."""
        p = f"p = {self.p_value:.2g}" if self.p_value >= 1e-4 else "p < 0.0001"
        if self.difference == 0:
            return f"both runs are right on {self.both + self.only_a:,} of the same {self.images:,} images ({p})"
        better = "B" if self.difference > 0 else "A"
        verdict = "beyond chance" if self.p_value < SIGNIFICANT else "which may be chance"
        points = f"{abs(self.difference) * 100:.3g}"
        noun = "point" if points == "1" else "points"
        return f"run {better} is right on {points} {noun} more of the same {self.images:,} images, {verdict} ({p})"

    def as_json(self) -> dict[str, Any]:
        """All of it, shares from 0 to 1, for JSON."""
        counts = {name: getattr(self, name) for name in ("images", "both", "only_a", "only_b", "neither")}
        return {
            **counts,
            "top1_a": (self.both + self.only_a) / self.images,
            "top1_b": (self.both + self.only_b) / self.images,
            "difference": self.difference,
            "interval": list(self.interval),
            "p": self.p_value,
            "beyond_chance": self.p_value < SIGNIFICANT,
        }


def check_same_data(a: Description, b: Description, given: bool) -> None:
    """CommandError unless two networks know the same classes and, where no images are ``given``, are known to have
    held out the same."""
    if a.classes != b.classes:
        raise CommandError(
            f"the classes differ: {_differing(a.classes, b.classes)}; only runs of the same classes can be compared", 2
        )
    if given:
        return
    for description in (a, b):
        if not description.data:
            raise CommandError("DIR: these weights name no data of their own, expected a folder of images", 2)
    if _held_out(a) != _held_out(b):
        shown = " and ".join(path_text(d.data) for d in (a, b))
        raise CommandError(
            f"what the runs held out, of {shown}, is not known to be the same: one may have been trained on the "
            "other's; name a DIR that neither has seen",
            2,
        )


def _held_out(description: Description) -> object:
    """What is equal for the same held-out images. A folder may have moved: its listing tells."""
    if is_folder(description.data) and description.listing:
        return description.listing
    size = description.config.image_size if description.data == "synthetic" else None  # each size has its own images
    return description.data, description.val, description.held_out, size


def _differing(a: tuple[str, ...], b: tuple[str, ...]) -> str:
    if len(a) != len(b):
        return f"{len(a)} and {len(b)}"
    one, other = next((one, other) for one, other in zip(a, b, strict=True) if one != other)
    return f"{path_text(one)} and {path_text(other)}"


def compare(a: tuple[Evaluation, Dataset], b: tuple[Evaluation, Dataset]) -> Comparison:
    """Count, from an evaluation of each network and the images it was made on. CommandError if those differ."""
    (first, images), (second, others) = a, b
    same = getattr(images, "samples", None) == getattr(others, "samples", None)
    if not (same and torch.equal(first.indices, second.indices) and torch.equal(first.targets, second.targets)):
        raise CommandError(
            f"the images differ: {first.images:,} and {second.images:,} were read; were some changed just now?"
        )
    one, other = first.right, second.right
    counts = (one & other, one & ~other, ~one & other, ~one & ~other)
    return Comparison(*(int(count.sum()) for count in counts))
