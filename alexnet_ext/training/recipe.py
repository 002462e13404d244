"""Recipes: all settings of a run, and the defaults for each kind of data."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any

from .._errors import CommandError, path_text
from ..variants import ACTIVATIONS, INIT_NAMES, VARIANTS

SCHEDULES = ("cosine", "linear", "constant", "plateau")
PRECISIONS = ("fp32", "bf16", "fp16")
OPTIMIZERS = ("sgd", "lars")
CHOICES: dict[str, tuple[str, ...]] = {
    "model": tuple(VARIANTS),
    "init": INIT_NAMES,
    "activation": tuple(ACTIVATIONS),
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "optimizer": OPTIMIZERS,
}
# The smallest value of a number, and the bound that it must stay below.
RANGES = {
    "held_out": (0, 1),
    "image_size": (1, math.inf),
    "dropout": (0, 1),
    "batch_size": (1, math.inf),
    "accumulate": (1, math.inf),
    "epochs": (1, math.inf),
    "steps": (1, math.inf),
    "lr": (0, math.inf),
    "momentum": (0, 1),
    "weight_decay": (0, math.inf),
    "warmup": (0, math.inf),
    "label_smoothing": (0, 1),
    "ema": (0, 1),
    "clip_norm": (1e-9, math.inf),  # by 0 nothing would be learnt
    "seed": (0, 2**64),
    "evaluate_every": (0, math.inf),
    "evaluate_limit": (1, math.inf),
    "patience": (1, math.inf),
    "save_every": (0, math.inf),
    "keep": (1, math.inf),
}
TYPES: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool, "None": type(None)}
PRECISION = {"cuda": "bf16", "cpu": "fp32"}  # by device, unless the user says otherwise
# Fields that a resumed run may change: how long it goes on and what it keeps, not how it learns.
CHANGEABLE = ("epochs", "steps", "patience", "save_every", "keep")


GROWTH = "SIDE:SHARE,..., whole sides of at least 1 and shares that add up to less than 1"


@functools.cache
def growth(text: str | None) -> tuple[tuple[int, float], ...]:
    """The (side, share of the steps) pairs of a recipe's ``grow``; none for "". Raises ValueError for other text."""
    pairs = [part.split(":") for part in text.split(",")] if text else []
    found = tuple((int(side), float(share)) for side, share in pairs)
    if not (all(side >= 1 and share > 0 for side, share in found) and sum(share for _, share in found) < 1):
        raise ValueError(f"grow must be {GROWTH}, got {text!r}")
    return found


def _expected(name: str, kinds: str, value: Any) -> str:
    """What the field ``name`` of a Recipe expects instead of ``value``; "" if the value is allowed."""
    allowed = kinds.split(" | ")
    if value is None and "None" in allowed:
        return ""
    if name == "grow":
        try:
            growth(value)
        except (ValueError, AttributeError):
            return GROWTH
    if name in CHOICES and value not in CHOICES[name]:
        return f"one of {', '.join(CHOICES[name])}"
    right = isinstance(value, TYPES[allowed[0]]) and (allowed[0] == "bool" or not isinstance(value, bool))
    if name not in RANGES:
        return "" if right else f"of type {allowed[0]}"
    low, high = RANGES[name]
    if right and low <= value < high:
        return ""
    number = "a whole number" if allowed[0] == "int" else "a finite number"
    return f"{number} of at least {low}{f' and below {high}' if high < math.inf else ''}"


@dataclass(frozen=True)
class Recipe:
    """One run. ``data`` is ``"digits"``, ``"synthetic"`` or a folder; ``steps`` ends a run before its epochs do.

    val: the folder of the held-out images, or held_out: their share of the folder's (None: as the folder says).
    accumulate: batches whose gradients are added up for one step.
    optimizer: ``"sgd"`` or ``"lars"``, whose ``lr`` is a step of each layer relative to its weights.
    schedule: the learning rate after ``warmup`` steps of linear growth, or their share if below 1: ``"cosine"``
    and ``"linear"`` fall to zero at the last step, ``"plateau"`` divides by ten where the held-out error stops falling.
    ema: decay of a moving average of the weights, which is evaluated and kept (None: the weights themselves).
    grow: smaller sides of the images for the first steps, as ``"131:0.5,163:0.3"``: half of all steps at 131, then 0.3
    of them at 163; the rest at ``image_size``.
    normalize: divide colours by their deviation; False only subtracts the mean from values of 0 to 255.
    ten_crop: also evaluate the last weights on ten crops of each image, where it has room around one.
    clip_norm: largest norm of all gradients together (None: any).
    compile: full batches go through the network as ``torch.compile`` makes it, whose sums may round otherwise.
    evaluate_every: steps between evaluations on the first ``evaluate_limit`` held-out images (None: all of
    them); 0 evaluates after each epoch. The last evaluation is always on all.
    patience: evaluations without a better one that end the run (None: it goes on).
    save_every: steps between checkpoints (0: some minutes); keep: how many of them stay.
    precision: of a step's arithmetic. ``alexnet train`` chooses it by the device where a run starts (``PRECISION``); a
    resumed run keeps its own, whatever the device.
    weights: the file that the weights start from; freeze: the module whose weights stay as they are.

    The defaults are the paper's. Raises ValueError for a value that no run can have.
    """

    data: str
    val: str | None = None
    held_out: float | None = None
    model: str = "paper"
    image_size: int | None = None
    init: str = "paper"
    activation: str = "relu"
    weights: str | None = None
    freeze: str | None = None
    dropout: float = 0.5
    stock: bool = False
    batch_size: int = 128
    accumulate: int = 1
    epochs: int = 90
    steps: int | None = None
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: str = "sgd"
    warmup: float = 0
    schedule: str = "plateau"
    label_smoothing: float = 0.0
    ema: float | None = None
    grow: str | None = None
    clip_norm: float | None = None
    augment: bool = True
    normalize: bool = True
    precision: str = "fp32"
    compile: bool = False
    seed: int = 0
    evaluate_every: int = 0
    evaluate_limit: int | None = None
    ten_crop: bool = False
    patience: int | None = None
    save_every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            expected = _expected(field.name, str(field.type), value)
            if expected:
                raise ValueError(f"{field.name} must be {expected}, got {value!r}")

    def epoch_steps(self, images: int) -> int:
        """Steps of one epoch; the last batch of it may be smaller."""
        return math.ceil(images / (self.batch_size * self.accumulate))

    def total_steps(self, images: int) -> int:
        """Steps of the whole run."""
        return self.epochs * self.epoch_steps(images) if self.steps is None else self.steps

    def warmup_steps(self, total: int) -> int:
        """Steps of linear growth of the rate, in a run of ``total`` steps."""
        return int(self.warmup) if self.warmup >= 1 else round(self.warmup * total)

    def side_at(self, step: int, total: int, image_size: int) -> int:
        """The side of the images of step number ``step`` (from 0), ``image_size`` after all growth."""
        until = 0.0
        for side, share in growth(self.grow):
            until += share
            if step < math.floor(until * total + 1e-9):  # so the last step is at image_size
                return side
        return image_size

    def lr_at(self, step: int, total: int) -> float:
        """The learning rate of step number ``step`` (from 0); for ``"plateau"`` before its first division."""
        warmup = self.warmup_steps(total)
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, total - warmup)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        return self.lr * (1 - done) if self.schedule == "linear" else self.lr

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Raises TypeError or ValueError for a dictionary that another version of the package wrote."""
        return cls(**values)

    def changed(self, given: dict[str, Any]) -> Recipe:
        """This recipe with the given fields; epochs replace a number of steps."""
        return replace(self, **({"steps": None} if "epochs" in given else {}) | given)

    def differences(self, given: dict[str, Any]) -> list[str]:
        """The names in ``given`` whose value is not this recipe's."""
        return [
            field.name
            for field in fields(self)
            if field.name in given and given[field.name] != getattr(self, field.name)
        ]


# On digits the paper's start N(0, 0.01) learns nothing in five minutes on two cores; Kaiming's does. So little training
# does not overfit: dropout at 0.5 would only slow it down.
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
# With a few hundred images the paper's start stays at chance for the whole run. The rate falls by itself, because the
# held-out error of 40 images is mostly chance.
FOLDER = Recipe(data="", init="kaiming", warmup=20, schedule="cosine")
# Section 5 of the paper: "reduced three times prior to termination", "roughly 90 cycles".
IMAGENET = Recipe(data="", normalize=False, ten_crop=True)
# The rate grows with the batch: four times the paper's. Of 40 epochs' steps the first four fifths see smaller images.
FAST = Recipe(
    data="",
    init="kaiming",
    batch_size=512,
    epochs=40,
    lr=0.04,
    warmup=0.1,
    schedule="cosine",
    label_smoothing=0.1,
    ema=0.999,
    grow="131:0.5,163:0.3",
)
FINE_TUNING_LR = 0.001
RECIPES = {"digits": DIGITS, "folder": FOLDER, "paper": IMAGENET, "fast": FAST}


def chosen(given: dict[str, Any], name: str | None = None) -> Recipe:
    """The recipe ``name`` of ``RECIPES``, or the default for ``given["data"]`` (digits), with the given fields.

    A recipe's own ``grow`` is left out where the images are no larger than its sides. Raises CommandError, naming the
    option, for a value that no run can have.
    """
    for field in fields(Recipe):
        expected = field.name in given and _expected(field.name, str(field.type), given[field.name])
        if expected:
            option, value = field.name.replace("_", "-"), path_text(str(given[field.name]))
            raise CommandError(f"--{option} {value}: expected {expected}", 2)
    data = given.get("data", "digits")
    if "weights" in given:  # trained ones must not be lost to the first steps
        given = {"lr": FINE_TUNING_LR} | given
    recipe = (replace(RECIPES[name], data=data) if name else default(data)).changed(given)
    size = recipe.image_size or VARIANTS[recipe.model].image_size
    grows = all(side < size for side, _ in growth(recipe.grow))
    return recipe if grows or "grow" in given else replace(recipe, grow=None)


def default(data: str) -> Recipe:
    """The recipe for ``"digits"``, ``"synthetic"`` or the path of a folder."""
    return {"digits": DIGITS, "synthetic": SYNTHETIC}.get(data) or replace(FOLDER, data=data)
