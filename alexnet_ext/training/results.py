"""What a trained network says of images: what ``alexnet evaluate`` and ``predict`` do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import models
from ..data.batches import Dataset
from ..data.errors import CommandError, os_error, path_text, require
from ..data.folder import ImageFolder
from ..data.images import crop, read_image
from ..data.readers import Readers
from ..data.sources import open_split
from . import checkpoint, pictures
from .evaluate import Evaluation, evaluate, predict
from .files import check_target
from .progress import Reporter


def load(
    weights: Path,
    variant: str | None,
    stock: bool,
    device: torch.device,
    warn: Callable[[str], None],
    last: bool = False,
) -> tuple[models.AlexNet, checkpoint.Description]:
    """The network of a run, checkpoint folder or weights file, ready to evaluate; of a run the best weights, or
    (``last``) those of its newest checkpoint."""
    path = checkpoint.find_weights(weights, warn, last)
    model, description = checkpoint.load_model(path, variant and str(variant), fused=not stock)
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
) -> Evaluation:
    """Evaluate on the images of ``folder``, or on those that the run held out."""
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
    return result


def predict_file(
    model: models.AlexNet, description: checkpoint.Description, path: Path, out: Path, device: torch.device
) -> list[tuple[str, float]]:
    """Classify an image file and save it with its best five classes as the picture ``out``; (class, probability)."""
    check_target(out, path)
    image = read_image(path)
    if description.data == "digits":
        image = light_on_dark(image)
    preprocessing = description.preprocessing
    probabilities = predict(model, crop(image, preprocessing.resize, preprocessing.size), preprocessing, device)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise os_error(out.parent, error) from error
    pictures.prediction(out, image, probabilities, description.classes, path_text(path.name))
    best = probabilities.topk(min(5, len(probabilities)))
    return [(description.classes[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def light_on_dark(image: Any) -> Any:
    """A digit as MNIST has it, grey and light on a dark ground: turned round where its rim is light."""
    grey = image.convert("L")
    width, height = grey.size
    rim = [grey.getpixel((x, y)) for x in range(width) for y in {0, height - 1}]
    rim += [grey.getpixel((x, y)) for y in range(height) for x in {0, width - 1}]
    if sum(rim) > 127 * len(rim):
        grey = require("PIL.ImageOps").invert(grey)
    return grey.convert("RGB")
