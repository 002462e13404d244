"""A trained network's guesses for image files, and their pictures: the work of ``alexnet predict``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import models
from .._errors import BadImage, CommandError, os_error, path_text
from .._optional import require
from ..data.images import crop, read_image
from ..data.listing import find_images
from ..data.preprocessing import Preprocessing
from ..data.sources import is_folder
from . import checkpoint, pictures
from .evaluate import to_device
from .files import check_outside, check_target


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


@torch.no_grad()
def predict(model: nn.Module, image: Tensor, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """Class probabilities (on the CPU) of one uint8 image (1 or 3, height, width)."""
    model.eval()
    return model(to_device(image[None], preprocessing, device)).float().softmax(1)[0].cpu()
