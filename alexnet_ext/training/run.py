"""A run from its options to its last picture: what ``alexnet train`` does."""

from __future__ import annotations

import contextlib
import dataclasses
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
from .._errors import CommandError, first_line, os_error, path_text
from .._optional import require
from ..data.dali import DaliFolder
from ..data.digits import Digits
from ..data.folder import ImageFolder
from ..data.packed_folder import PackedFolder
from ..data.preprocessing import IMAGENET
from ..data.sources import Split, is_folder, open_split
from ..models.weights import find_variant
from ..variants import VARIANTS
from . import checkpoint, pictures, runs
from .evaluate import DTYPES, Evaluation
from .files import check_folder, check_outside, locked, write_file
from .interrupt import Interrupted, stoppable
from .log import METRICS, has_events, json_text, read_metrics
from .process import prepare
from .progress import Reporter
from .proving import prove_kernels
from .recipe import CHANGEABLE, Recipe, growth
from .results import by_class
from .runs import RESULT
from .state import check_data, load
from .trainer import Means, Trainer

RUNS = "runs"  # where a run's folder is by default
NEEDED = ("matplotlib", "tensorboard")  # looked for before the first step, not after the last


@stoppable()
def auto(
    recipe: Recipe,
    given: dict[str, Any],
    out: Path | None,
    means: Means,
    console: Console,
    warn: Callable[[str], None],
) -> Evaluation | None:
    """Go on with the run of ``recipe`` that ``runs.of_recipe`` finds next to ``out``, or begin it there: the same call
    again and again ends with a finished run. ``given`` are the options that the user named. None, with a line, for a
    run that is finished. Raises CommandError for one that another process writes into."""

    def look() -> tuple[Path | None, str]:
        run = runs.of_recipe(recipe, Path(RUNS) if out is None else out.parent, out)
        if run is None:
            return None, "new"
        with locked(run):
            pass  # refused before time goes into it
        return run, "finished" if runs.finished(run, given) else "begun" if runs.begun(run) else "empty"

    run, state = means.ranks.first_does(look)
    if run is None:
        return start(recipe, out, means, console)
    if state == "finished":
        say(console, f"{path_text(run)}: this run is finished")
        return None
    if state == "empty":
        say(console, f"{path_text(run)}: begun anew, as it has no checkpoint yet")
        return start(recipe, run, means, console, anew=True)
    changes = {name: given[name] for name in CHANGEABLE if name in given}
    return resume(run, changes, means, console, warn)


@stoppable()
def start(
    recipe: Recipe,
    given: Path | None,
    means: Means,
    console: Console,
    anew: bool = False,
) -> Evaluation:
    """Train from the start into the new or empty folder ``given`` (None: a new one in ``RUNS``); ``anew``: into that of
    a run without a checkpoint."""
    began = time.monotonic()
    out = means.ranks.first_does(lambda: given or default_out(recipe))
    _check_needs()
    check_folder(out)
    for data in (recipe.data, recipe.val):
        if data is not None and is_folder(data):
            check_outside(out, Path(data))
    split = _split(recipe, means)
    trainer = _trainer(recipe, split, out, means, console)
    if recipe.weights is not None:
        say(console, f"Starting from {path_text(recipe.weights)}{trainer.start_from(Path(recipe.weights))}")
    made = means.ranks.first_does(lambda: _make_folder(out, anew))
    trainer.began = began
    try:
        return _train(trainer, console)
    finally:
        with contextlib.suppress(OSError):
            if made:
                out.rmdir()  # only where nothing has been written into it


def _make_folder(out: Path, anew: bool) -> bool:
    """Make the folder of a run; whether it is new. Raises CommandError unless it is empty or its run is begun anew."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not anew and any(out.iterdir()):
            raise CommandError(f"{path_text(out)}: not empty; name another --out, or go on with --resume", 2)
    except OSError as error:
        raise os_error(out, error) from error
    return made


def from_weights(path: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """The fields of a recipe that the weights of ``path`` decide: file, variant and input."""
    file = path if path.is_file() else checkpoint.find_weights(path, warn)
    found: dict[str, Any] = {"weights": os.path.abspath(file)}
    description = checkpoint.read_description(file) if file.suffix == ".safetensors" else None
    if description is not None:
        config = description.config
        return found | {"model": config.variant, "image_size": config.image_size, "activation": config.activation}
    try:
        return found | {"model": find_variant(file)}
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise os_error(file, error) from error


@stoppable()
def resume(
    run: Path,
    given: dict[str, Any],
    means: Means,
    console: Console,
    warn: Callable[[str], None],
) -> Evaluation:
    """Go on from a run's newest whole checkpoint, or from the checkpoint folder ``run``. ``given`` are the options that
    the user named. Those of ``CHANGEABLE`` may differ from the run's, ``data`` and ``val`` say where its images are
    now, the others must equal the run's."""
    began = time.monotonic()
    given_run = run
    run, path = means.ranks.first_does(lambda: checkpoint.to_resume(given_run, warn))
    _check_needs()
    saved = checkpoint.read_state(path / checkpoint.STATE)
    try:
        recipe = Recipe.from_dict(saved["recipe"])
    except (KeyError, TypeError, ValueError) as error:
        text = f"{path_text(path / checkpoint.STATE)}: not of this version ({first_line(error)})"
        raise CommandError(text) from error
    moved: dict[str, Any] = {name: given[name] for name in ("data", "val") if name in given}
    if "data" in moved and not (is_folder(recipe.data) and is_folder(moved["data"])):
        raise CommandError(f"{path_text(moved['data'])}: the run in {path_text(run)} has {path_text(recipe.data)}", 2)
    recipe = recipe.changed(moved)
    for name in recipe.differences(given):
        if name == "model":
            raise CommandError(f"{path_text(path)}: a run of variant {recipe.model!r}, not {given['model']!r}")
        if name not in CHANGEABLE:
            raise CommandError(_refusal(name, given[name], getattr(recipe, name), path_text(run)), 2)
    recipe = recipe.changed({name: given[name] for name in CHANGEABLE if name in given})
    description, weights = checkpoint.read_weights(path / checkpoint.WEIGHTS)
    split = _split(recipe, means).brought_as(description.preprocessing)
    trainer = _trainer(recipe, split, run, means, console)
    check_data(trainer, path, saved)
    for name, value in dataclasses.asdict(trainer.model.config).items():
        if getattr(description.config, name) != value:
            found = getattr(description.config, name)
            raise CommandError(f"{path_text(path)}: its weights have {name} {found}, and its recipe {value}")
    if description.listing and description.listing != split.listing:
        raise CommandError(
            f"{path_text(recipe.data)}: not the images that the run in {path_text(run)} began with: files were added, "
            "renamed or removed; bring them back, or train anew"
        )
    load(trainer, path, saved, weights)
    if trainer.step > trainer.total:
        raise CommandError(f"{path_text(run)}: is at step {trainer.step}, beyond the {trainer.total} asked for", 2)
    say(console, f"going on from step {trainer.step}")
    trainer.began, trainer.before = began, max(trainer.before, _seconds(run / RESULT))
    return _train(trainer, console)


def _check_needs() -> None:
    """CommandError for a package that is missing."""
    for name in NEEDED:
        require(name)


def _refusal(name: str, given: Any, own: Any, run: str) -> str:
    """The message for an option that differs from the run's."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(own, bool):
        return f"{option if given else f'--no-{name}'}: the run in {run} was begun without it"
    return f"{option} {path_text(str(given))}: the run in {run} has {'none' if own is None else path_text(str(own))}"


def _seconds(result: Path) -> float:
    """The seconds of a run by its result.json; 0 without one."""
    try:
        seconds = json.loads(result.read_text(encoding="utf-8"))["seconds"]
        return float(seconds) if 0 <= seconds < 1e12 else 0.0
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _split(recipe: Recipe, means: Means) -> Split:
    size = recipe.image_size or VARIANTS[recipe.model].image_size
    split = open_split(recipe.data, size, recipe.seed, recipe.val, recipe.held_out)
    if not recipe.normalize:  # values of 0 to 255 less their mean, as in the paper
        split = split.brought_as(dataclasses.replace(split.preprocessing, std=(1 / 255,) * 3))
    if not recipe.augment and isinstance(split.train, (ImageFolder, PackedFolder)):
        split.train.augment = False
    cache, loader = means.cache, means.loader
    if cache is not None and not isinstance(split.train, PackedFolder):
        data = path_text(recipe.data)
        raise CommandError(f"--cache {cache}: {data} is not packed; `alexnet prepare` packs a folder of images", 2)
    if loader is not None:
        if not isinstance(split.train, ImageFolder):
            raise CommandError(f"--loader {loader}: reads folders of images, and {path_text(recipe.data)} is none", 2)
        split = split._replace(train=DaliFolder(split.train, means.device))
    if recipe.weights is not None and isinstance(split.train, PackedFolder):
        # They were trained with ImageNet's mean, unless their file names another.
        split = split.brought_as(dataclasses.replace(split.preprocessing, mean=IMAGENET["mean"]))
    return split


def _trainer(recipe: Recipe, split: Split, out: Path, means: Means, console: Console) -> Trainer:
    try:
        with torch.device("meta"):
            network = models.alexnet(
                recipe.model, not recipe.stock, image_size=recipe.image_size, init="torch", activation=recipe.activation
            )
        size, sides = network.config.image_size, [side for side, _ in growth(recipe.grow)]
        network.take_sides(sides)
        for side in sides:
            if side >= size:
                raise CommandError(f"--grow {side}: expected sides below the network's {size}", 2)
        if network.fused:
            prepare(means.device, recipe.seed)  # races are run as the training will be
            for side in (*sides, size):
                shape = (recipe.batch_size, 3, side, side)
                prove_kernels(network, shape, DTYPES[recipe.precision], means.device, console)
        return Trainer(recipe, split, out, means)
    except ValueError as error:  # an image too small for the variant, by the message
        raise CommandError(str(error), 2) from error


def _train(trainer: Trainer, console: Console) -> Evaluation:
    """Run, then write the pictures and print the result."""
    cache, train = trainer.means.cache, trainer.split.train
    if cache is not None and isinstance(train, PackedFolder):
        train.keep(trainer.device if cache == "device" else torch.device("cpu"), cache)
    _introduce(trainer, console)
    with Reporter(trainer.total, trainer.step, console) as reporter:
        result = trainer.run(reporter)
    if not trainer.ranks.first:
        return result
    try:
        _conclude(trainer, result, console)
    except KeyboardInterrupt:  # the last checkpoint is written
        raise Interrupted(trainer.step, checkpoint.place(trainer.out, trainer.step)) from None
    return result


def _introduce(trainer: Trainer, console: Console) -> None:
    """Say what is trained, on what, and where to."""
    recipe, split, out = trainer.recipe, trainer.split, trainer.out
    parameters = sum(p.numel() for p in trainer.model.parameters())
    kind = "fused layers" if trainer.model.fused else "stock layers"
    place = count(torch.get_num_threads(), "thread") if trainer.device.type == "cpu" else str(trainer.device)
    if trainer.ranks.many:
        place = f"{trainer.ranks.size} ranks, each with {place}"
    library = next((found for found in _library.LIBRARIES if found.device == trainer.device.type), None)
    say(console, f"AlexNet, variant {recipe.model}: {parameters / 1e6:.1f} M parameters, {kind}, {place}")
    if recipe.activation != "relu" and not recipe.stock:
        say(console, f"  the fused layers contain ReLU: with {recipe.activation} they are stock PyTorch")
    if trainer.model.fused and library is not None and not library.loaded:
        say(console, f"  the layers run on stock PyTorch, slower: {library.reason}; to mend it: {library.remedy}")
    say(
        console,
        f"{path_text(recipe.data)}: {len(split.train):,} images to train on and {len(split.held_out):,} held out, "
        f"{len(split.train.classes)} classes, {split.preprocessing.size} x {split.preprocessing.size}",
    )
    for note in split.notes:
        say(console, f"  {note}")
    say(console, f"Run folder: {path_text(out)}")
    if not has_events(out):
        say(console, "  without TensorBoard's events, which need a name in UTF-8; metrics.jsonl has all numbers")


def _conclude(trainer: Trainer, result: Evaluation, console: Console) -> None:
    """Write the pictures and result.json, and print the result."""
    recipe, split, out = trainer.recipe, trainer.split, trainer.out
    made = draw(trainer, result)
    spent, best = trainer.elapsed, trainer.best
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
        "best_step": best.step,
        "best_top1": best.top1,
        "ends": runs.ends(recipe),
    }
    crops = trainer.ten_crops
    if crops is not None:
        summary |= {"ten_crop_top1": crops.top1, "ten_crop_top5": crops.top5}
    write_file(out / RESULT, f"{json_text(summary, indent=1)}\n".encode())
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
    if crops is not None:
        say(console, f"{crops.top1:.1%} by the mean of ten crops of each (top-5 {crops.top5:.1%}), as in the paper")
    if best.step != trainer.step:
        say(console, f"The best weights are those of step {best.step} ({best.top1:.1%}); --last takes the others")
    say(console, f"Pictures in {path_text(out)}: {', '.join(made)}")
    if recipe.data == "digits":
        folder = path_text(out)
        say(console, f"Now try: alexnet predict {folder}/samples/7.png --weights {folder}")


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: no markup in file names, no breaking at the terminal's width."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def count(number: int, noun: str) -> str:
    """A number and its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def draw(trainer: Trainer, result: Evaluation) -> list[str]:
    """Write a run's pictures and return their names."""
    out, split = trainer.out, trainer.split
    classes = split.train.classes
    pictures.curves(out / "curves.png", read_metrics(out / METRICS))
    pictures.kernels(out / "conv1.png", trainer.kernels, trainer.start)
    pictures.guesses(out / "guesses.png", split.held_out, result, classes, trainer.recipe.seed)
    made = ["curves.png", "conv1.png", "guesses.png"]
    if isinstance(split.held_out, Digits):
        save_samples(out / "samples", split.held_out)
        made.append("samples/")
    return made


def save_samples(folder: Path, digits: Digits) -> None:
    """Save one held-out digit of each class as a PNG, to try ``alexnet predict`` on."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise os_error(folder, error) from error
    for target, name in enumerate(digits.classes):
        at = int((digits.targets == target).nonzero()[0])
        buffer = io.BytesIO()
        require("PIL.Image").fromarray(digits.images[at, 0].numpy()).save(buffer, "PNG")
        write_file(folder / f"{name}.png", buffer.getvalue())


def default_out(recipe: Recipe, root: Path = Path(RUNS)) -> Path:
    """A new name for a run: date, time, data and variant."""
    data = path_text(os.fsencode(Path(recipe.data).name).decode(errors="replace"))[:50] or "data"
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{data}-{recipe.model}"
    numbered = (root / (f"{name}-{number}" if number > 1 else name) for number in itertools.count(1))
    return next(path for path in numbered if not path.exists())
