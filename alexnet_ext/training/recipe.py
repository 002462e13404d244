"""Recipes: everything that decides how a run goes, and the defaults for each kind of data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

SCHEDULES = ("cosine", "linear", "constant", "plateau")


@dataclass(frozen=True)
class Recipe:
    """One run. ``data`` is ``"digits"``, ``"synthetic"`` or a folder; ``steps`` ends a run before its epochs do.

    val: the folder of the held-out images, or held_out: their share of the folder's (None: as the folder says).
    schedule: the learning rate after ``warmup`` steps of linear growth: ``"cosine"`` and ``"linear"`` fall to
    zero at the last step, ``"plateau"`` divides by ten where the held-out error stops falling.
    evaluate_every: steps between evaluations on the first ``evaluate_limit`` held-out images (None: all of
    them); 0 evaluates after each epoch. The last evaluation is always on all.
    """

    data: str
    val: str | None = None
    held_out: float | None = None
    model: str = "paper"
    image_size: int | None = None
    init: str = "paper"
    dropout: float = 0.5
    stock: bool = False
    batch_size: int = 128
    epochs: int = 90
    steps: int | None = None
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: int = 0
    schedule: str = "plateau"
    precision: str = "fp32"
    seed: int = 0
    evaluate_every: int = 0
    evaluate_limit: int | None = None

    def total_steps(self, images: int) -> int:
        """Steps of the whole run; the last batch of an epoch may be smaller."""
        every = self.epochs * math.ceil(images / self.batch_size)
        return every if self.steps is None else self.steps

    def lr_at(self, step: int, total: int) -> float:
        """The learning rate of step number ``step`` (from 0) under every schedule but ``"plateau"``."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, total - self.warmup)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (1 - done) if self.schedule == "linear" else self.lr

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Raises TypeError for what another version of the package wrote."""
        return cls(**values)

    def changed(self, given: dict[str, Any]) -> Recipe:
        """This recipe with what is given; epochs take the place of a number of steps."""
        return replace(self, **({"steps": None} if "epochs" in given else {}) | given)

    def differences(self, given: dict[str, Any]) -> list[str]:
        """The names in ``given`` whose value is not this recipe's."""
        return [
            field.name
            for field in fields(self)
            if field.name in given and given[field.name] != getattr(self, field.name)
        ]


# The paper's start N(0, 0.01) learns nothing on digits in as few steps as five minutes on two cores allow; Kaiming's
# does. So little training does not overfit: dropout at 0.5 would only slow it down.
DIGITS = Recipe(
    data="digits",
    init="kaiming",
    dropout=0.2,
    batch_size=32,
    epochs=2,
    steps=200,
    lr=0.01,
    warmup=20,
    schedule="cosine",
    evaluate_every=50,
    evaluate_limit=200,
)
SYNTHETIC = replace(DIGITS, data="synthetic")
# Section 5 of the paper: "reduced three times prior to termination", "roughly 90 cycles".
IMAGENET = Recipe(data="")


def chosen(given: dict[str, Any]) -> Recipe:
    """The default for ``given["data"]`` (digits) with the rest of what is given."""
    return default(given.get("data", "digits")).changed(given)


def default(data: str) -> Recipe:
    """The recipe for ``"digits"``, ``"synthetic"`` or the path of a folder."""
    return {"digits": DIGITS, "synthetic": SYNTHETIC}.get(data) or replace(IMAGENET, data=data)
