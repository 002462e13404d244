"""A trained network's guesses for images: the work of ``alexnet evaluate`` and ``predict``."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import models
from .._errors import CommandError, path_text
from ..data.batches import Dataset
from ..data.folder import ImageFolder
from ..data.readers import Readers
from ..data.sources import Split, open_held_out, open_split
from . import checkpoint
from .evaluate import BATCH, DTYPES, Evaluation, evaluate, with_room
from .progress import Reporter
from .proving import prove_kernels

TABLE_CLASSES = 20  # more classes do not fit on a screen, and are not listed


def load(
    weights: Path,
    variant: str | None,
    stock: bool,
    device: torch.device,
    warn: Callable[[str], None],
    last: bool = False,
) -> tuple[models.AlexNet, checkpoint.Description]:
    """The network of a run, checkpoint folder or weights file, ready to evaluate. A run gives its best weights, or with
    ``last`` those of its newest checkpoint. Raises CommandError if a weight is not finite."""
    path = checkpoint.find_weights(weights, warn, last)
    model, description = checkpoint.load_model(path, variant and str(variant), fused=not stock)
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise CommandError(f"{path_text(path)}: {name} holds NaN or infinity, as a run that diverged leaves it")
    model.to(device).to(memory_format=torch.channels_last)
    return model.eval(), description


def evaluate_weights(
    model: models.AlexNet,
    description: checkpoint.Description,
    folder: Path | None,
    device: torch.device,
    precision: str,
    workers: int,
    console: Console,
    warn: Callable[[str], None],
    ten_crop: bool = False,
) -> tuple[Evaluation, Dataset]:
    """Evaluate on the images of ``folder``, or on those that the run held out. Returns the images too. ``ten_crop`` is
    that of ``evaluate``; CommandError for images that have no room for it."""
    dataset, notes = _held_out(description, folder, warn)
    if ten_crop:
        dataset = with_room(dataset, description.preprocessing)
    for note in notes:
        warn(note)
    return evaluate_images(model, description, dataset, device, precision, workers, console, ten_crop), dataset


def evaluate_images(
    model: models.AlexNet,
    description: checkpoint.Description,
    dataset: Dataset,
    device: torch.device,
    precision: str,
    workers: int,
    console: Console,
    ten_crop: bool = False,
) -> Evaluation:
    """Evaluate on all of ``dataset``, with a bar on ``console``. CommandError if the loss is no finite number."""
    if model.fused:
        size = description.preprocessing.size
        prove_kernels(model, (BATCH, 3, size, size), DTYPES[precision], device, console)
    pin = device.type == "cuda"
    with Reporter(0, 0, console) as reporter, Readers(dataset, workers, pin_memory=pin) as readers:
        reporter.bar.remove_task(reporter.training)
        result = evaluate(
            model,
            dataset,
            description.preprocessing,
            device=device,
            precision=precision,
            ten_crop=ten_crop,
            read=readers,
            on_batch=reporter.evaluating,
            note=reporter.note,
        )
    if not math.isfinite(result.loss):
        raise CommandError(f"the network's outputs are no finite numbers in {precision}: the loss is {result.loss}")
    return result


def _held_out(
    description: checkpoint.Description, folder: Path | None, warn: Callable[[str], None]
) -> tuple[Dataset, Sequence[str]]:
    """The images of ``folder``, or those that a run held out, and notes about them."""
    if folder is not None:
        return open_held_out(folder, description.preprocessing, description.classes)
    split = own_split(description, warn)
    return split.held_out, split.notes


def own_split(description: checkpoint.Description, warn: Callable[[str], None]) -> Split:
    """The images of a run, prepared as for its weights. CommandError where they cannot be found or have other classes;
    ``warn`` is called if they are not the very images that the run began with."""
    if not description.data:
        raise CommandError("DIR: these weights name no data of their own, expected a folder of images", 2)
    split = open_split(description.data, description.preprocessing.size, 0, description.val, description.held_out)
    shown = path_text(description.data)
    if tuple(split.held_out.classes) != description.classes:
        raise CommandError(f"{shown}: its classes are not those trained on", 2)
    if split.listing != description.listing:
        warn(f"{shown}: not the images that the run began with; among the held out may be some it was trained on")
    return split.brought_as(description.preprocessing)


def by_class(result: Evaluation, classes: Sequence[str]) -> Table | None:
    """A table of right images by class; None for more than ``TABLE_CLASSES``."""
    if len(classes) > TABLE_CLASSES:
        return None
    table = Table("class", "right", "images", "accuracy")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (right, images) in zip(classes, result.by_class(len(classes)), strict=True):
        table.add_row(Text(path_text(name)), f"{right:,}", f"{images:,}", f"{right / images:.1%}" if images else "")
    return table


def as_json(result: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    """An evaluation in numbers, shares from 0 to 1, for JSON."""
    counts = zip(classes, result.by_class(len(classes)), strict=True)
    return {
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "images": result.images,
        "seconds": result.seconds,
        "classes": [{"class": name, "right": right, "images": images} for name, (right, images) in counts],
        "skipped": [{"image": error.path, "reason": error.reason} for error in result.errors],
    }


def wrong_images(result: Evaluation, dataset: Dataset) -> bytes:
    """A CSV of the images whose best guess is wrong: the file, or the index of an image without one."""
    files = dataset.samples if isinstance(dataset, ImageFolder) else None
    rows = [["image", "class", "guess", "probability", "probability of class"]]
    for i in (~result.right).nonzero()[:, 0].tolist():
        index, target, guess = int(result.indices[i]), int(result.targets[i]), int(result.guesses[i, 0])
        name = str(index) if files is None else files[index][0]
        shares = [f"{float(value):.6g}" for value in (result.probabilities[i, 0], result.truth[i])]
        rows.append([name, dataset.classes[target], dataset.classes[guess], *shares])
    return as_csv(rows)


def as_csv(rows: Sequence[Sequence[object]]) -> bytes:
    """Rows as a CSV file; a name keeps the bytes that it has on the disk."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return os.fsencode(stream.getvalue())
