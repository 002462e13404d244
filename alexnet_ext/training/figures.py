"""The figures of finished runs, to print: the work of ``alexnet figures``."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from .. import models
from .._errors import CommandError, path_text
from .._optional import require
from ..data.batches import Dataset, Key
from ..data.preprocessing import Preprocessing
from ..data.readers import Readers
from ..data.sources import Split, is_folder
from ..variants import ACTIVATIONS, VARIANTS
from . import pictures, results
from .evaluate import BATCH, Evaluation, to_device
from .files import check_folder, check_outside
from .log import METRICS, read_metrics
from .progress import Counter
from .recipe import Recipe
from .trainer import first_kernels

QUERIES, NEAREST = 5, 6  # rows and columns of the paper's figure 4
# Training images that are compared with those. Of a larger set as many are drawn by chance: half a minute on a CPU.
COMPARED = 4000


class Run(NamedTuple):
    """A run folder: its name in legends, its metrics, and its recipe if this version can read that."""

    path: Path
    name: str
    lines: list[dict[str, Any]]
    recipe: Recipe | None


def figures(
    paths: Sequence[Path],
    out: Path,
    kinds: Sequence[str],
    device: torch.device,
    workers: int,
    console: Console,
    warn: Callable[[str], None],
    last: bool = False,
) -> list[Path]:
    """Draw the runs ``paths`` into the new or empty folder ``out``, each picture in every format of ``kinds``.

    One picture compares the curves, and one the activations if they differ. Of each run come kernels, guesses, nearest
    images and the confusion, in a folder of its own if there are several. ``warn`` is called with what is left out and
    why. Returns the files. Raises CommandError for a folder that is no run, and where nothing could be drawn.
    """
    require("matplotlib")
    runs = [_open(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    _check_out(out, runs)
    made: list[Path] = []

    def draw(folder: Path, name: str, picture: Callable[..., None], *arguments: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for kind in kinds:
            made.append(folder / f"{name}.{kind}")
            picture(made[-1], *arguments)

    measured = [run for run in runs if run.lines]
    for run in runs:
        if not run.lines:
            warn(f"{path_text(run.path)}: without its curves: no lines of training in {METRICS}")
        elif run.recipe is None and len(runs) > 1:
            warn(f"{path_text(run.path)}: not in figure 1: no recipe.json that this version can read")
    if measured:
        draw(out, "curves", pictures.several_curves, [(run.name, run.lines) for run in measured])
    compared = _by_activation(measured)
    if len(compared) > 1:
        draw(out, "figure-1-activations", pictures.activations, compared)
    for run in runs:
        folder = out if len(runs) == 1 else out / run.name
        for name, picture, arguments in _of_network(run, device, workers, console, warn, last):
            draw(folder, name, picture, *arguments)
    if not made:
        raise CommandError(f"{path_text(paths[0])}: neither {METRICS} nor weights in it, so nothing to draw")
    return made


def _names(paths: Sequence[Path]) -> list[str]:
    """The names of folders, with a number where two are the same."""
    names: list[str] = []
    for path in paths:
        plain, number = path.resolve().name or "run", 1
        name = plain
        while name in names:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names


def _open(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise CommandError(f"{path_text(path)}: {'not a folder' if path.exists() else 'no such folder'}", 2)
    try:
        recipe = Recipe.from_dict(json.loads((path / "recipe.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):  # pictures of the network need none
        recipe = None
    return Run(path, name, [line for line in read_metrics(path / METRICS) if _is_whole(line)], recipe)


def _is_whole(line: dict[str, Any]) -> bool:
    """Whether a line is drawn and has all for it: another version or program may have written it."""
    if line["kind"] == "train":
        epoch = line.get("epoch")
        whole = line["step"] >= 1 and type(epoch) is int and 0 <= epoch < 2**63
        return whole and _is_real(line.get("loss")) and _is_real(line.get("accuracy"))
    return line["kind"] == "evaluate" and _is_real(line.get("top1"))


def _is_real(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _check_out(out: Path, runs: Sequence[Run]) -> None:
    """CommandError where files in ``out`` might be replaced, or be taken for training images."""
    check_folder(out)
    for run in runs:
        for data in (run.recipe.data, run.recipe.val) if run.recipe is not None else ():
            if data is not None and is_folder(data):
                check_outside(out, Path(data))
    if out.is_dir() and any(out.iterdir()):
        raise CommandError(f"--out {path_text(out)}: not empty; remove it, or name another folder", 2)


def _by_activation(runs: Sequence[Run]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(activation, metrics) of each run, ReLU first; none unless there are two activations. The names
    of runs of the same one differ."""
    known = [(run, run.recipe.activation) for run in runs if run.recipe is not None]
    kinds = [kind for _, kind in known]
    if len(set(kinds)) < 2:
        return []
    known.sort(key=lambda pair: list(ACTIVATIONS).index(pair[1]))
    return [
        (ACTIVATIONS[kind] if kinds.count(kind) == 1 else f"{ACTIVATIONS[kind]}, {run.name}", run.lines)
        for run, kind in known
    ]


def _of_network(
    run: Run, device: torch.device, workers: int, console: Console, warn: Callable[[str], None], last: bool
) -> Iterator[tuple[str, Callable[..., None], tuple[Any, ...]]]:
    """Name, function and arguments of each picture that shows what a run has learnt."""
    shown = path_text(run.path)
    try:
        model, description = results.load(run.path, None, False, device, warn, last)
    except CommandError as error:
        warn(f"{shown}: without the figures of its network: {error}")
        return
    towers = VARIANTS[description.config.variant].convs[1].groups
    yield "figure-3-kernels", pictures.kernels, (first_kernels(model), None, towers)
    try:
        split = results.own_split(description, warn)
        result = results.evaluate_images(model, description, split.held_out, device, "fp32", workers, console)
    except CommandError as error:
        warn(f"{shown}: without figure 4 and the confusion, which need the images: {error}")
        return
    seed = 0 if run.recipe is None else run.recipe.seed
    classes = description.classes
    yield "confusion", pictures.confusion, (result, classes)
    yield "figure-4-guesses", pictures.guesses, (split.held_out, result, classes, seed)
    rows, compared = nearest(model, split, result, device, workers, console, seed)
    if rows:
        yield "figure-4-nearest", pictures.nearest, (rows, classes, compared, len(split.train))


@torch.no_grad()
def fc7(model: models.AlexNet, images: Tensor, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """The last hidden layer of a network in evaluation mode: uint8 images to fp32 (N, 4096)."""
    hidden = torch.flatten(model.features(to_device(images, preprocessing, device)), 1)
    return model.classifier[:-1](hidden).float()


def nearest(
    model: models.AlexNet,
    split: Split,
    result: Evaluation,
    device: torch.device,
    workers: int,
    console: Console,
    seed: int,
) -> tuple[list[pictures.Row], int]:
    """Some of the held-out images that ``result`` is of, each with the training images whose fc7 vectors have the least
    Euclidean distance to its own; and the number of training images compared.

    Of more than ``COMPARED`` training images as many are drawn by ``seed``. They are read in batches, and no more
    vectors are kept than are shown.
    """
    places = pictures.of_all_classes(result.targets.tolist(), QUERIES, seed)
    queries = [split.held_out[0, int(result.indices[place])] for place in places]
    readable = [sample for sample in queries if sample.image is not None]
    train = _as_evaluated(split.train)
    keys: list[Key] = [(0, i) for i in sorted(random.Random(seed).sample(range(len(train)), min(COMPARED, len(train))))]
    if not readable or not keys:
        return [], 0
    own = torch.cat([fc7(model, s.image[None], split.preprocessing, device) for s in readable if s.image is not None])
    best, found, compared = torch.empty(len(own), 0, device=device), torch.empty(len(own), 0, dtype=torch.int64), 0
    with Counter("nearest", len(keys), console) as counter, Readers(train, workers) as readers:
        groups = [keys[at : at + BATCH] for at in range(0, len(keys), BATCH)]
        for number, batch in enumerate(readers(groups), 1):
            if len(batch.targets):
                vectors = fc7(model, batch.images, split.preprocessing, device)
                # By differences: through a product of matrices, near vectors would lose their small distances.
                apart = torch.cdist(own, vectors, compute_mode="donot_use_mm_for_euclid_dist")
                pairs = torch.cat([best, apart], 1)
                best, order = pairs.topk(min(NEAREST, pairs.shape[1]), largest=False)
                indices = batch.indices.expand(len(own), -1)
                found = torch.cat([found, indices], 1).gather(1, order.cpu())
                compared += len(batch.targets)
            counter(min(number * BATCH, len(keys)))
    rows = []
    for sample, indices, distances in zip(readable, found.tolist(), best.tolist(), strict=True):
        near = [(train[0, index], distance) for index, distance in zip(indices, distances, strict=True)]
        shown = [(other.image, other.target, distance) for other, distance in near if other.image is not None]
        if sample.image is not None:
            rows.append(pictures.Row(sample.image, sample.target, shown))
    return rows, compared


def _as_evaluated(dataset: Dataset) -> Dataset:
    """Training images without random crops."""
    plain: Any = copy.copy(dataset)
    if getattr(plain, "augment", False):
        plain.augment = False
    return plain
