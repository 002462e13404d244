"""``alexnet train``: its options are the fields of a Recipe, and the folders of a run."""

from __future__ import annotations

import dataclasses
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ._errors import path_text
from .cli_options import (
    MOST_THREADS,
    Device,
    Precision,
    Stock,
    UsageError,
    Variant,
    Workers,
    device_of,
    path,
    warn,
    workers_of,
)
from .training.interrupt import starting
from .training.recipe import INIT_NAMES, OPTIMIZERS, PRECISION, RECIPES, SCHEDULES, Recipe, chosen
from .variants import ACTIVATIONS

Data = StrEnum("Data", ["digits", "synthetic"])
Schedule = StrEnum("Schedule", list(SCHEDULES))  # type: ignore[misc]
Optimizer = StrEnum("Optimizer", list(OPTIMIZERS))  # type: ignore[misc]
Init = StrEnum("Init", list(INIT_NAMES))  # type: ignore[misc]
Cache = StrEnum("Cache", ["ram", "device"])
Loader = StrEnum("Loader", ["dali"])
Activation = StrEnum("Activation", list(ACTIVATIONS))  # type: ignore[misc]
RecipeName = StrEnum("RecipeName", list(RECIPES))  # type: ignore[misc]


def _option(help: str, panel: str, default: str | bool = True, name: str = "", **rest: Any) -> Any:
    names = [name] if name else []
    return typer.Option(*names, help=help, show_default=default, rich_help_panel=panel, **rest)


NETWORK, STEPS, LEARNING, RUN = "Network and data", "How long, and when to look", "How it learns", "The run"
BY_DATA = "by data"

Folder = Annotated[
    Path | None,
    typer.Argument(
        parser=path, metavar="[DIR]", help="Images, packed or one folder a class (or train/ and val/ of such)."
    ),
]
HeldOutFolder = Annotated[
    Path | None, _option("Held-out images.", NETWORK, "val/ or test/ in DIR", parser=path, metavar="DIR")
]
HeldOutShare = Annotated[
    float | None, _option("Share of each class to hold out.", NETWORK, "0.1 without such a folder")
]
Weights = Annotated[
    Path | None,
    _option(
        "Start from a run, a .safetensors, .pth, .caffemodel or .onnx file.", NETWORK, "a fresh start", parser=path
    ),
]
Warmup = Annotated[float | None, _option("Steps of linear growth of the rate, or their share.", LEARNING, BY_DATA)]
Grow = Annotated[
    str | None,
    _option("Smaller images for shares of the steps, as 131:0.5,163:0.3.", LEARNING, BY_DATA, metavar="SIDE:SHARE,..."),
]
Patience = Annotated[int | None, _option("Stop after this number of evaluations without a better one.", STEPS, "never")]

AUTO = Path("auto")  # this very object: a folder of that name is ./auto
Resume = Annotated[
    Path | None,
    _option(
        "Go on with an interrupted run; auto: with the newest run of the same options next to --out (in runs/), or "
        "begin it.",
        RUN,
        parser=lambda text: AUTO if text == "auto" else path(text),
        metavar="RUN|auto",
    ),
]


def train(
    context: typer.Context,
    folder: Folder = None,
    val: HeldOutFolder = None,
    held_out: HeldOutShare = None,
    data: Annotated[Data | None, _option("Data that is no folder.", NETWORK, "digits")] = None,
    recipe: Annotated[RecipeName | None, _option("Defaults to begin with.", NETWORK, BY_DATA)] = None,
    model: Annotated[Variant | None, _option("Variant of the network.", NETWORK, "paper, or that of --weights")] = None,
    image_size: Annotated[int | None, _option("Side of the network's input.", NETWORK, "the variant's")] = None,
    weights: Weights = None,
    freeze: Annotated[str | None, _option("Keep these weights: features, or a layer.", NETWORK, metavar="NAME")] = None,
    init: Annotated[Init | None, _option("Start of the weights.", NETWORK, BY_DATA)] = None,
    activation: Annotated[Activation | None, _option("Others than relu take stock layers.", NETWORK, "relu")] = None,
    dropout: Annotated[float | None, _option("Share of fc6 and fc7 left out.", NETWORK, BY_DATA)] = None,
    no_augment: Annotated[bool, _option("No random crops and colours.", NETWORK, name="--no-augment")] = False,
    stock: Stock = False,
    epochs: Annotated[int | None, _option("Times through the images.", STEPS, BY_DATA)] = None,
    steps: Annotated[int | None, _option("Stop after this number of steps.", STEPS, "by epochs")] = None,
    patience: Patience = None,
    evaluate_every: Annotated[int | None, _option("Steps between evaluations; 0: an epoch.", STEPS, BY_DATA)] = None,
    save_every: Annotated[int | None, _option("Steps between checkpoints; 0: ten minutes.", STEPS, "0")] = None,
    keep: Annotated[int | None, _option("Checkpoints that stay, beside the best weights.", STEPS, "2")] = None,
    batch_size: Annotated[int | None, _option("Images in a batch.", LEARNING, BY_DATA)] = None,
    accumulate: Annotated[int | None, _option("Batches in a step.", LEARNING, "1")] = None,
    lr: Annotated[float | None, _option("Highest learning rate.", LEARNING, "0.01; 0.001 with --weights")] = None,
    optimizer: Annotated[Optimizer | None, _option("LARS is for batches of thousands.", LEARNING, "sgd")] = None,
    momentum: Annotated[float | None, _option("Of the optimizer.", LEARNING, "0.9")] = None,
    weight_decay: Annotated[float | None, _option("Of the optimizer.", LEARNING, "0.0005")] = None,
    warmup: Warmup = None,
    schedule: Annotated[Schedule | None, _option("Rate after the warm-up.", LEARNING, BY_DATA)] = None,
    clip_norm: Annotated[float | None, _option("Largest norm of the gradients.", LEARNING, "any")] = None,
    label_smoothing: Annotated[float | None, _option("Share spread over all classes.", LEARNING, "0")] = None,
    ema: Annotated[float | None, _option("Decay of a moving average of the weights.", LEARNING, "none")] = None,
    grow: Grow = None,
    precision: Annotated[Precision | None, _option("Arithmetic.", LEARNING, "bf16 on a GPU, else fp32")] = None,
    compile: Annotated[bool, _option("The network as torch.compile makes it.", LEARNING, name="--compile")] = False,
    seed: Annotated[int | None, _option("Of everything random.", LEARNING, "0")] = None,
    out: Annotated[Path | None, _option("Run folder.", RUN, "runs/DATE-TIME-DATA-MODEL", parser=path)] = None,
    resume: Resume = None,
    device: Device = "auto",
    gpus: Annotated[int | None, _option("Processes, each on a GPU of its own.", RUN, "1", min=1)] = None,
    workers: Workers = None,
    cache: Annotated[Cache | None, _option("Keep packed images in memory, or the GPU's.", RUN, "on the disk")] = None,
    loader: Annotated[Loader | None, _option("Who decodes JPEGs: NVIDIA's DALI.", RUN, "Pillow")] = None,
    threads: Annotated[int | None, _option("Threads of torch on the CPU.", RUN, "all", min=1, max=MOST_THREADS)] = None,
    profile: Annotated[int, _option("Trace this number of steps into the run folder.", RUN, "0", min=0)] = 0,
    detect_nan: Annotated[bool, _option("Name what makes a NaN; slow.", RUN, name="--detect-nan")] = False,
    quiet: Annotated[bool, _option("Print warnings and errors alone.", RUN, name="--quiet")] = False,
) -> None:
    """Train on digits (5,000 from a package, nothing to download), or on a folder of images.

    Ctrl-C saves a checkpoint; --resume goes on from it. --resume auto goes on with the newest run, or begins it.
    """
    options = locals()
    arguments = options.pop("context").obj
    _refuse_contradictions(folder, val, held_out, data, recipe, weights, out, None if resume is AUTO else resume)
    given = _recipe_fields(options)
    chosen(given, recipe)  # a wrong option is reported before torch is imported

    _run(options, given, arguments)


def _run(options: dict[str, Any], given: dict[str, Any], arguments: list[str]) -> None:
    """Train by the options of ``train``, those ``arguments``; ``given`` are the fields of a Recipe among them."""
    with starting():
        import torch

        from .parallel import launch, ranks
        from .training import run
        from .training.progress import lasting_console
        from .training.trainer import Means

    where = device_of(options["device"])
    if not launch.started(options["gpus"]):
        launch.launch(options["gpus"], where, arguments)
        return
    where = ranks.own_device(where)
    if options["threads"] is not None:
        torch.set_num_threads(options["threads"])
    count, others = workers_of(options["workers"], where.type), ("cache", "loader", "profile", "detect_nan")
    with ranks.connected(where) as connected:
        means = Means(where, count, **{name: options[name] for name in others}, ranks=connected)
        console = lasting_console(options["quiet"] or not connected.first)
        resume, out = options["resume"], options["out"]
        tell = warn if connected.first else _not_tell
        if resume is not None and resume is not AUTO:
            run.resume(resume, given, means, console, tell)
            return
        begun = {"precision": PRECISION[where.type]} | given
        if options["weights"] is not None:
            begun = run.from_weights(options["weights"], tell) | begun
        whole = chosen(begun, options["recipe"])
        if resume is AUTO or connected.any(ranks.restarted())[0]:
            run.auto(whole, given, out, means, console, tell)
        else:
            run.start(whole, out, means, console)


def _not_tell(_text: str) -> None:
    """The first rank tells it."""


def _refuse_contradictions(
    folder: Path | None,
    val: Path | None,
    held_out: float | None,
    data: Data | None,
    recipe: RecipeName | None,
    weights: Path | None,
    out: Path | None,
    resume: Path | None,
) -> None:
    """UsageError for options of ``train`` that exclude each other."""
    if folder is not None and data is not None:
        raise UsageError(f"{path_text(folder)} and --data {data.value}: give one of them")
    if resume is not None and (out or recipe or weights):
        other = "--out" if out else "--recipe" if recipe else "--weights"
        raise UsageError(f"{other} and --resume: a run goes on in its own folder and by its own recipe")
    if folder is None and resume is None and (val is not None or held_out is not None):
        raise UsageError(f"--{'held-out' if val is None else 'val'}: only with DIR, a folder of images")
    if val is not None and held_out is not None:
        raise UsageError(f"--val {path_text(val)} and --held-out {held_out}: give one of them")
    if held_out is not None and not 0 < held_out < 1:
        raise UsageError(f"--held-out {held_out}: expected a share between 0 and 1")


def _recipe_fields(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Recipe that the options of ``train`` give; ``weights`` is a file, whose recipe is read later."""
    folders = {"data": options["folder"], "val": options["val"]}
    options = {**options, "stock": options["stock"] or None, "augment": False if options["no_augment"] else None}
    options["compile"] = options["compile"] or None
    # The run may be resumed from another folder.
    options |= {name: os.path.abspath(folder) for name, folder in folders.items() if folder is not None}
    options["weights"] = None
    return {
        field.name: str(value) if isinstance(value, StrEnum) else value
        for field in dataclasses.fields(Recipe)
        if (value := options.get(field.name)) is not None
    }
