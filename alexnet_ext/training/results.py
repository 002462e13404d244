"""A trained network's guesses for images: the work of ``alexnet evaluate`` and ``predict``."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import models
from .._errors import BadImage, CommandError, os_error, path_text
from .._optional import require
from ..data.batches import Dataset
from ..data.folder import ImageFolder
from ..data.images import crop, read_image
from ..data.listing import find_images
from ..data.readers import Readers
from ..data.sources import is_folder, open_split
from . import checkpoint, pictures
from .evaluate import Evaluation, evaluate, predict
from .files import check_outside, check_target
from .progress import Reporter

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
) -> tuple[Evaluation, Dataset]:
    """Evaluate on the images of ``folder``, or on those that the run held out. Returns the images too."""
    if folder is not None:
        dataset: Dataset
        dataset, notes = ImageFolder.held_out(folder, description.preprocessing, description.classes)
    elif not description.data:
        raise CommandError("DIR: these weights name no data of their own, expected a folder of images", 2)
    else:
        split = open_split(description.data, description.preprocessing.size, 0, description.val, description.held_out)
        dataset, notes = split.brought_as(description.preprocessing).held_out, split.notes
        shown = path_text(description.data)
        if tuple(dataset.classes) != description.classes:
            raise CommandError(f"{shown}: its classes are not those trained on", 2)
        if split.listing != description.listing:
            warn(f"{shown}: not the images that the run began with; among the held out may be some it was trained on")
    for note in notes:
        warn(note)
    with Reporter(0, 0, console) as reporter, Readers(dataset, workers) as readers:
        reporter.bar.remove_task(reporter.training)
        result = evaluate(
            model,
            dataset,
            description.preprocessing,
            device=device,
            precision=precision,
            read=readers,
            on_batch=reporter.evaluating,
        )
    if not math.isfinite(result.loss):
        raise CommandError(f"the network's outputs are no finite numbers in {precision}: the loss is {result.loss}")
    return result, dataset


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


class Prediction(NamedTuple):
    """An image, the (class, probability) of its five best guesses, best first, and their picture, if drawn."""

    image: Path
    best: list[tuple[str, float]]
    picture: Path | None


def prediction_json(found: Prediction) -> dict[str, Any]:
    """A prediction for JSON."""
    return {
        "image": str(found.image),
        "best": [{"class": name, "probability": probability} for name, probability in found.best],
        "picture": None if found.picture is None else str(found.picture),
    }


def find_files(given: Sequence[Path]) -> list[Path]:
    """The images of these paths: a file itself, a folder's images."""
    found = [Path(path) for one in given for path in (find_images(one) if one.is_dir() else [one])]
    if not found:
        raise CommandError(f"{path_text(given[0])}: no images in it", 2)
    return found


def predict_file(
    model: models.AlexNet,
    description: checkpoint.Description,
    path: Path,
    picture: Path | None,
    device: torch.device,
) -> Prediction:
    """Classify an image file, and draw it with its best five classes as ``picture``."""
    if picture is not None:
        check_target(picture, path)
        pictures.check_format(picture)
        if is_folder(description.data) and description.data:
            check_outside(picture, Path(description.data))
    image = read_image(path)
    if description.data == "digits":
        image = light_on_dark(image)
    preprocessing = description.preprocessing
    probabilities = predict(model, crop(image, preprocessing.resize, preprocessing.size), preprocessing, device)
    if not probabilities.isfinite().all():
        raise CommandError(f"{path_text(path)}: the network's outputs are no finite numbers")
    if picture is not None:
        try:
            picture.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise os_error(picture.parent, error) from error
        pictures.prediction(picture, image, probabilities, description.classes, path.name, path)
    best = probabilities.topk(min(5, len(probabilities)))
    named = [(description.classes[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return Prediction(path, named, picture)


def predict_files(
    model: models.AlexNet,
    description: checkpoint.Description,
    paths: Sequence[Path],
    folder: Path | None,
    device: torch.device,
) -> list[Prediction | BadImage]:
    """Classify image files and draw each into ``folder``; an unreadable file gives its error."""
    found: list[Prediction | BadImage] = []
    for path in paths:
        try:
            picture = None if folder is None else picture_of(path, folder)
            found.append(predict_file(model, description, path, picture, device))
        except BadImage as error:
            found.append(error)
    return found


def picture_of(image: Path, folder: Path) -> Path:
    """The path of an image's picture: ``STEM.png``, with a number if that is the picture of another image."""
    plain = folder / f"{_cut(image.stem, 250)}.png"
    is_itself = image.exists() and plain.exists() and plain.samefile(image)
    if not plain.exists() or is_itself or pictures.drawn_of(plain) == pictures.source(image):
        return plain
    number = hashlib.sha256(os.fsencode(os.path.abspath(image))).hexdigest()[:8]
    return folder / f"{_cut(image.stem, 240)}-{number}.png"


def _cut(name: str, length: int) -> str:
    return os.fsdecode(os.fsencode(name)[:length])


def light_on_dark(image: Any) -> Any:
    """A digit as in MNIST, grey and light on dark: inverted if its rim is light."""
    grey = image.convert("L")
    width, height = grey.size
    rim = [grey.getpixel((x, y)) for x in range(width) for y in {0, height - 1}]
    rim += [grey.getpixel((x, y)) for y in range(height) for x in {0, width - 1}]
    if sum(rim) > 127 * len(rim):
        grey = require("PIL.ImageOps").invert(grey)
    return grey.convert("RGB")
