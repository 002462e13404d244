"""Rates of a folder's images and of a training step, each alone: the work of ``alexnet data-bench``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console

from .. import models
from .._errors import CommandError
from ..data.batches import Batch, Dataset, Drawn, batches
from ..data.dali import DaliFolder
from ..data.folder import ImageFolder
from ..data.packed_folder import PackedFolder
from ..data.readers import Readers
from ..data.sources import Split, open_split
from ..variants import VARIANTS
from .evaluate import DTYPES
from .process import prepare
from .proving import prove_kernels
from .recipe import Recipe
from .step import TrainingStep


class Rates(NamedTuple):
    """Images a second: of a packed folder, of a folder of images (None for what the data are not), of a step, and of
    the same folder by DALI (None where it is not installed)."""

    packed: float | None
    folder: float | None
    step: float
    dali: float | None = None

    @property
    def read(self) -> float:
        """That of the data."""
        return next(rate for rate in (self.packed, self.folder) if rate is not None)

    def sentence(self, place: str) -> str:
        """Whether data or compute limits."""
        limit = "The data limit" if self.read < self.step else "Compute limits"
        kind = "images of a folder" if self.packed is None else "packed images"
        dali = "" if self.dali is None else f"; by --loader dali images come at {self.dali:,.0f} a second"
        return (
            f"{limit} training on {place}: {kind} come at {self.read:,.0f} a second, and steps alone take "
            f"{self.step:,.0f} a second{dali}"
        )


def measure(recipe: Recipe, device: torch.device, workers: int, seconds: float, console: Console) -> Rates:
    """The rates of a recipe's data and of its steps, each over ``seconds`` once half of that has passed."""
    side = recipe.image_size or VARIANTS[recipe.model].image_size
    split = open_split(recipe.data, side, recipe.seed)
    for note in split.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    prepare(device, recipe.seed)
    try:
        model = models.alexnet(recipe.model, num_classes=len(split.train.classes), image_size=recipe.image_size)
    except ValueError as error:  # an image too small for the variant, by the message
        raise CommandError(str(error), 2) from error
    with console.status("reading images"):
        read = data_rate(split.train, recipe.batch_size, device, workers, seconds)
        other = by_dali(split.train, device)
        dali = None if other is None else data_rate(other, recipe.batch_size, device, workers, seconds)
    model.to(device).to(memory_format=torch.channels_last)
    shape = (recipe.batch_size, 3, side, side)
    prove_kernels(model, shape, DTYPES[recipe.precision], device, console)
    step, batch = TrainingStep(model, recipe, device), synthetic_batch(split, recipe.batch_size, device)
    with console.status("training steps"):
        steps = _rate(lambda: step([batch], split.preprocessing, recipe.lr).images, device, seconds)
    packed = isinstance(split.train, PackedFolder)
    return Rates(read if packed else None, None if packed else read, steps, dali)


def by_dali(data: Dataset, device: torch.device) -> DaliFolder | None:
    """A folder of images read by DALI; None where it is not installed, there is no GPU, or the data are packed."""
    if not isinstance(data, ImageFolder):
        return None
    try:
        return DaliFolder(data, device)
    except CommandError:
        return None


def data_rate(data: Dataset, batch_size: int, device: torch.device, workers: int, seconds: float) -> float:
    """Images a second that ``data`` gives in random order, ready to be copied to ``device``."""
    pin = device.type == "cuda"
    with Readers(data, workers, pin_memory=pin) as read:
        endless = (
            len(batch.targets)
            for epoch in itertools.count()
            for batch in batches(data, batch_size, seed=0, epoch=epoch, read=read, pin_memory=pin)
        )
        return _rate(lambda: next(endless), device, seconds)


def synthetic_batch(split: Split, images: int, device: torch.device) -> Batch:
    """Random images of the bytes that those of ``split`` have, and crops of them, on ``device``."""
    side = split.preprocessing.resize
    shape = split.train.shape if isinstance(split.train, PackedFolder) else (side, side, 3)
    pixels = torch.randint(256, (images, *shape), dtype=torch.uint8, device=device)
    pixels = pixels if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    targets = torch.randint(len(split.train.classes), (images,), device=device)
    offsets = torch.zeros(images, 2, dtype=torch.int64, device=device)
    flips = torch.rand(images, device=device) < 0.5
    return Batch(pixels, targets, targets, [], Drawn(offsets, flips, torch.zeros(images, 3, device=device)))


def _rate(work: Callable[[], int], device: torch.device, seconds: float) -> float:
    """Images a second of ``work``, which returns their number; what it does in the first half of ``seconds``, and the
    first time, is not counted."""
    work()
    _timed(work, device, seconds / 2)
    images, spent = _timed(work, device, seconds)
    return images / spent


def _timed(work: Callable[[], int], device: torch.device, seconds: float) -> tuple[int, float]:
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or not images:
        images += work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return images, time.perf_counter() - began
