"""The commands that look at what a training run made: ``alexnet evaluate`` and ``alexnet predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .cli_options import Device, Last, Model, Precision, Stock, Weights, Workers, path, warn, workers_of
from .data.errors import path_text
from .training.interrupt import starting


def evaluate(
    weights: Weights,
    folder: Annotated[
        Path | None,
        typer.Argument(
            parser=path, metavar="[DIR]", help="Images, one folder a class.", show_default="what the run held out"
        ),
    ] = None,
    last: Last = False,
    model: Model = None,
    precision: Annotated[Precision, typer.Option()] = Precision.fp32,
    stock: Stock = False,
    device: Device = "auto",
    workers: Workers = None,
) -> None:
    """Count how often a trained network is right, on held-out images or on a folder."""
    with starting():
        from .training import results, run

    where = run.device_of(device)
    console = Console()
    network, description = results.load(weights, model, stock, where, warn, last)
    result = results.evaluate_weights(
        network, description, folder, where, precision, workers_of(workers, where.type), console, warn
    )
    for error in result.errors:
        warn(f"skipped {error}")
    if len(description.classes) <= 20:
        table = Table("class", "right", "images", "accuracy")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, (right, images) in zip(description.classes, result.by_class(len(description.classes)), strict=True):
            table.add_row(Text(path_text(name)), f"{right:,}", f"{images:,}", f"{right / images:.1%}" if images else "")
        console.print(table)
    run.say(
        console,
        f"top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f} on {result.images:,} images "
        f"({result.images / result.seconds:.0f} a second)",
        style="bold",
    )


def predict(
    image: Annotated[Path, typer.Argument(parser=path, help="A JPEG, PNG, BMP, WEBP or GIF file.")],
    weights: Weights,
    out: Annotated[
        Path | None, typer.Option(parser=path, help="Picture.", show_default="predictions/IMAGE.png")
    ] = None,
    last: Last = False,
    model: Model = None,
    stock: Stock = False,
    device: Device = "auto",
) -> None:
    """Show the five best classes of an image, and save them as a picture."""
    with starting():
        from .training import results, run

    where = run.device_of(device)
    network, description = results.load(weights, model, stock, where, warn, last)
    picture = out or Path("predictions") / f"{image.stem}.png"
    best = results.predict_file(network, description, image, picture, where)
    console = Console()
    width = max(len(path_text(name)) for name, _ in best)
    for name, probability in best:
        bar = "█" * round(probability * 40)
        run.say(console, f"{path_text(name):>{width}}  {probability:6.1%}  {bar}")
    run.say(console, f"Picture: {path_text(picture)}")
