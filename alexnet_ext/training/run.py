"""A run from its options to its last picture: what ``alexnet train`` does."""

from __future__ import annotations

import io
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import _library, models
from ..data.digits import Digits
from ..data.errors import CommandError, os_error, path_text, require
from ..data.sources import Split, is_folder, open_split
from ..ops import _backend
from . import checkpoint, pictures
from .evaluate import Evaluation
from .files import check_outside, write_file
from .log import METRICS, read_metrics
from .progress import Reporter
from .recipe import Recipe
from .results import by_class
from .trainer import Trainer, first_kernels

NEEDED = ("matplotlib", "tensorboard")  # asked for before the first step, not after the last


def start(recipe: Recipe, out: Path, device: torch.device, workers: int, console: Console) -> Evaluation:
    """Train from the start into the new or empty folder ``out``."""
    began = time.monotonic()
    for name in NEEDED:
        require(name)
    for data in (recipe.data, recipe.val):
        if data is not None and is_folder(data):
            check_outside(out, Path(data))
    split = _split(recipe)
    trainer = _trainer(recipe, split, out, device, workers)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise CommandError(f"{path_text(out)}: not empty; name another --out, or go on with --resume", 2)
    except OSError as error:
        raise os_error(out, error) from error
    return _train(trainer, console, began)


def resume(
    run: Path,
    given: dict[str, Any],
    device: torch.device,
    workers: int,
    console: Console,
    warn: Callable[[str], None],
) -> Evaluation:
    """Go on from a run's newest whole checkpoint. ``given`` are the options that the user named: ``steps`` and
    ``epochs`` may lengthen the run, ``data`` and ``val`` say where its images are now, the others must be its own."""
    began = time.monotonic()
    for name in NEEDED:
        require(name)
    path = checkpoint.newest(run, warn)
    state = checkpoint.read_state(path / checkpoint.STATE)
    try:
        recipe = Recipe.from_dict(state["recipe"])
    except (KeyError, TypeError) as error:
        raise CommandError(f"{path_text(path / checkpoint.STATE)}: not of this version ({error})") from error
    moved: dict[str, Any] = {name: given[name] for name in ("data", "val") if name in given}
    if "data" in moved and not (is_folder(recipe.data) and is_folder(moved["data"])):
        raise CommandError(f"{path_text(moved['data'])}: the run in {path_text(run)} has {path_text(recipe.data)}", 2)
    recipe = recipe.changed(moved)
    for name in recipe.differences(given):
        if name == "model":
            raise CommandError(f"{path_text(path)}: a run of variant {recipe.model!r}, not {given['model']!r}")
        if name not in ("steps", "epochs"):
            option = name.replace("_", "-")
            raise CommandError(f"--{option} {given[name]}: the run in {path_text(run)} has {getattr(recipe, name)}", 2)
    recipe = recipe.changed({k: given[k] for k in ("steps", "epochs") if k in given})
    split = _split(recipe)
    trainer = _trainer(recipe, split, run, device, workers)
    description, weights = checkpoint.read_weights(path / checkpoint.WEIGHTS)
    if description.config != trainer.model.config:
        raise CommandError(f"{path_text(path)}: weights of {description.config}, expected {trainer.model.config}")
    if description.listing != split.listing:
        raise CommandError(
            f"{path_text(recipe.data)}: not the images that the run in {path_text(run)} began with: files were added, "
            "renamed or removed; bring them back, or train anew"
        )
    trainer.load(path, state, weights)
    if trainer.step > trainer.total:
        raise CommandError(f"{path_text(run)}: is at step {trainer.step}, beyond the {trainer.total} asked for", 2)
    console.print(f"going on from step {trainer.step}", highlight=False)
    return _train(trainer, console, began)


def _split(recipe: Recipe) -> Split:
    size = recipe.image_size or models.VARIANTS[recipe.model].image_size
    return open_split(recipe.data, size, recipe.seed, recipe.val, recipe.held_out)


def _trainer(recipe: Recipe, split: Split, out: Path, device: torch.device, workers: int) -> Trainer:
    try:
        return Trainer(recipe, split, out, device, workers)
    except ValueError as error:  # an image too small for the variant: the message says it
        raise CommandError(str(error), 2) from error


def _train(trainer: Trainer, console: Console, began: float) -> Evaluation:
    """Run, then write the pictures and say how it went, reading the data (since ``began``) included."""
    recipe, split, out = trainer.recipe, trainer.split, trainer.out
    parameters = sum(p.numel() for p in trainer.model.parameters())
    kind = "stock layers" if recipe.stock else "fused layers"
    place = count(torch.get_num_threads(), "thread") if trainer.device.type == "cpu" else str(trainer.device)
    library = next((found for found in _library.LIBRARIES if found.device == trainer.device.type), None)
    say(console, f"AlexNet, variant {recipe.model}: {parameters / 1e6:.1f} M parameters, {kind}, {place}")
    if not recipe.stock and library is not None and not library.loaded:
        say(console, f"  the layers run on stock PyTorch, slower: {library.reason}; to mend it: {library.remedy}")
    elif not recipe.stock and _backend.is_untuned(trainer.device):
        say(console, "  the layers run on stock PyTorch until `alexnet tune` has proven the kernels on this GPU")
    say(
        console,
        f"{path_text(recipe.data)}: {len(split.train):,} images to train on and {len(split.held_out):,} held out, "
        f"{len(split.train.classes)} classes, {split.preprocessing.size} x {split.preprocessing.size}",
    )
    for note in split.notes:
        say(console, f"  {note}")
    say(console, f"Run folder: {path_text(out)}")
    with Reporter(trainer.total, trainer.step, console) as reporter:
        result = trainer.run(reporter)
    made = draw(trainer, result)
    spent = time.monotonic() - began
    right = int(result.right.sum())
    what = "digits" if recipe.data == "digits" else "images"
    summary = {
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "right": right,
        "images": result.images,
        "steps": trainer.step,
        "seconds": spent,
        "skipped": len(trainer.skipped),
    }
    write_file(out / "result.json", (json.dumps(summary, indent=1) + "\n").encode())
    table = by_class(result, split.train.classes)
    if table is not None:
        console.print(table)
    if trainer.skipped:
        say(console, f"{len(trainer.skipped)} of {len(split.train):,} training images were unreadable and left out")
    say(
        console,
        f"{result.top1:.1%} of the {result.images:,} held-out {what} right ({right:,}; top-5 {result.top5:.1%}) "
        f"after {count(trainer.step, 'step')}, {spent // 60:.0f}:{spent % 60:02.0f} minutes",
        style="bold",
    )
    say(console, f"Pictures in {path_text(out)}: {', '.join(made)}")
    if recipe.data == "digits":
        folder = path_text(out)
        say(console, f"Now try: alexnet predict {folder}/samples/7.png --weights {folder}")
    return result


def say(console: Console, text: str, style: str | None = None) -> None:
    """A line as it is: no markup in file names, no breaking at the terminal's width."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def count(number: int, noun: str) -> str:
    """A number and its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def draw(trainer: Trainer, result: Evaluation) -> list[str]:
    """Write a run's pictures; their names."""
    out, split = trainer.out, trainer.split
    classes = split.train.classes
    pictures.curves(out / "curves.png", read_metrics(out / METRICS))
    pictures.kernels(out / "conv1.png", first_kernels(trainer.model), trainer.start)
    pictures.guesses(out / "guesses.png", split.held_out, result, classes, trainer.recipe.seed)
    made = ["curves.png", "conv1.png", "guesses.png"]
    if isinstance(split.held_out, Digits):
        save_samples(out / "samples", split.held_out)
        made.append("samples/")
    return made


def save_samples(folder: Path, digits: Digits) -> None:
    """One held-out digit of each class as a PNG to try ``alexnet predict`` on."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise os_error(folder, error) from error
    for target, name in enumerate(digits.classes):
        at = int((digits.targets == target).nonzero()[0])
        buffer = io.BytesIO()
        require("PIL.Image").fromarray(digits.images[at, 0].numpy()).save(buffer, "PNG")
        write_file(folder / f"{name}.png", buffer.getvalue())


def device_of(name: str) -> torch.device:
    """``"auto"`` (a GPU that torch can use, else the CPU) or a name that torch knows."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {path_text(name)}: not a device; try auto, cpu, cuda or cuda:1", 2) from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device {name}: expected auto, cpu or cuda", 2)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs", 2)
    return device


def default_out(recipe: Recipe, root: Path = Path("runs")) -> Path:
    """A new name for a run: date, time, data and variant."""
    data = os.fsdecode(os.fsencode(Path(recipe.data).name)[:100]) or "data"  # a file system's names end at 255 bytes
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{data}-{recipe.model}"
    numbered = (root / (f"{name}-{number}" if number > 1 else name) for number in itertools.count(1))
    return next(path for path in numbered if not path.exists())
