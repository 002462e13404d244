"""The commands that use a trained network: ``alexnet evaluate``, ``compare``, ``figures`` and ``predict``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ._errors import BadImage, CommandError, path_text
from .cli_options import Device, Last, Model, Precision, Stock, Weights, Workers, device_of, path, warn, workers_of
from .training.interrupt import starting

if TYPE_CHECKING:
    from .training.predict import Prediction

PREDICTIONS = Path("predictions")
IMAGES = "Images, packed or one folder a class."


class FigureFormat(StrEnum):
    """Formats of ``alexnet figures``."""

    png = "png"
    svg = "svg"
    both = "both"


def evaluate(
    weights: Weights,
    folder: Annotated[
        Path | None,
        typer.Argument(parser=path, metavar="[DIR]", help=IMAGES, show_default="what the run held out"),
    ] = None,
    last: Last = False,
    model: Model = None,
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = Precision.fp32,
    ten_crop: Annotated[
        bool, typer.Option("--ten-crop", help="Mean softmax of corners, centre and their mirror images, as the paper.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    confusion: Annotated[
        Path | None, typer.Option(parser=path, metavar="PICTURE", help="Draw which class is taken for which.")
    ] = None,
    wrong: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="Write a CSV of the images guessed wrong.")
    ] = None,
    stock: Stock = False,
    device: Device = "auto",
    workers: Workers = None,
) -> None:
    """Count how often a trained network is right, on held-out images or on a folder."""
    with starting():
        from .training import results, run
        from .training.files import check_target, write_file
        from .training.pictures import check_format
        from .training.pictures import confusion as draw_confusion

    where = device_of(device)
    for option, file in (("--confusion", confusion), ("--wrong", wrong)):
        if file is not None:
            check_target(file, option=option)
    if confusion is not None:
        check_format(confusion)
    console = Console(stderr=json)
    network, description = results.load(weights, model, stock, where, warn, last)
    result, dataset = results.evaluate_weights(
        network, description, folder, where, precision, workers_of(workers, where.type), console, warn, ten_crop
    )
    for error in result.errors:
        warn(f"skipped {error}")
    if confusion is not None:
        draw_confusion(confusion, result, description.classes)
    if wrong is not None:
        write_file(wrong, results.wrong_images(result, dataset))
    if json:
        _print_json(results.as_json(result, description.classes))
        return
    table = results.by_class(result, description.classes)
    if table is not None:
        console.print(table)
    run.say(
        console,
        f"top-1 {result.top1:.2%}, top-5 {result.top5:.2%}, loss {result.loss:.4f} on {result.images:,} images "
        f"({result.images / result.seconds:.0f} a second)",
        style="bold",
    )


def compare(
    a: Annotated[Path, typer.Argument(parser=path, metavar="RUN", help="A: a run, a checkpoint or a weights file.")],
    b: Annotated[Path, typer.Argument(parser=path, metavar="RUN", help="B: another one, of the same classes.")],
    folder: Annotated[
        Path | None,
        typer.Argument(parser=path, metavar="[DIR]", help=IMAGES, show_default="what both held out"),
    ] = None,
    last: Last = False,
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = Precision.fp32,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    stock: Stock = False,
    device: Device = "auto",
    workers: Workers = None,
) -> None:
    """Say whether two trained networks differ beyond chance on the same held-out images."""
    with starting():
        from .training import compare as comparing
        from .training import results, run

    where = device_of(device)
    console = Console(stderr=json)
    count = workers_of(workers, where.type)
    networks = [results.load(weights, None, stock, where, warn, last) for weights in (a, b)]
    comparing.check_same_data(networks[0][1], networks[1][1], folder is not None)
    found = [
        results.evaluate_weights(network, description, folder, where, precision, count, console, tell)
        for (network, description), tell in zip(networks, (warn, lambda _: None), strict=True)  # the notes are the same
    ]
    for error in found[0][0].errors:
        warn(f"skipped {error}")
    comparison = comparing.compare(*found)
    if json:
        _print_json({"a": str(a), "b": str(b), **comparison.as_json()})
        return
    console.print(comparison.table())
    for name, weights, (result, _) in zip("AB", (a, b), found, strict=True):
        run.say(console, f"{name} is {path_text(weights)}: top-1 {result.top1:.2%}")
    low, high = comparison.interval
    run.say(
        console,
        f"B less A: {comparison.difference * 100:+.2f} points, 95 % interval {low * 100:+.2f} to {high * 100:+.2f}",
    )
    run.say(console, comparison.sentence(), style="bold")


def figures(
    runs: Annotated[
        list[Path], typer.Argument(parser=path, metavar="RUN...", help="Run folders; their curves share a picture.")
    ],
    out: Annotated[
        Path | None, typer.Option(parser=path, help="New or empty folder.", show_default="figures/ in the first RUN")
    ] = None,
    kind: Annotated[FigureFormat, typer.Option("--format", help="png, svg or both.")] = FigureFormat.both,
    last: Last = False,
    device: Device = "auto",
    workers: Workers = None,
) -> None:
    """Draw the paper's figures 1, 3 and 4, the confusion and the curves of finished runs, to print."""
    with starting():
        from .training import figures as drawing
        from .training import run

    where, console = device_of(device), Console()
    kinds = ("png", "svg") if kind is FigureFormat.both else (kind.value,)
    target = out or runs[0] / "figures"
    made = drawing.figures(runs, target, kinds, where, workers_of(workers, where.type), console, warn, last)
    for file in made:
        run.say(console, path_text(file))


def predict(
    images: Annotated[
        list[Path],
        typer.Argument(parser=path, metavar="IMAGE...", help="JPEG, PNG, BMP, WEBP or GIF files, or folders of such."),
    ],
    weights: Weights,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Picture, or the folder of several images' pictures.",
            show_default="predictions/IMAGE.png",
        ),
    ] = None,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Draw nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    last: Last = False,
    model: Model = None,
    stock: Stock = False,
    device: Device = "auto",
) -> None:
    """Show the five best classes of each image, and save them as a picture."""
    for one, other, given in (("--json", "--csv", json and csv), ("--out", "--no-picture", out and no_picture)):
        if given:
            raise CommandError(f"{one} and {other}: give one of them", 2)
    with starting():
        from .training import predict as predicting
        from .training import results
        from .training.files import check_folder

    where = device_of(device)
    network, description = results.load(weights, model, stock, where, warn, last)
    single = len(images) == 1 and not images[0].is_dir()
    if single:
        picture = None if no_picture else out or predicting.picture_of(images[0], PREDICTIONS)
        found: list[Any] = [predicting.predict_file(network, description, images[0], picture, where)]
    else:
        folder = None if no_picture else out or PREDICTIONS
        if folder is not None:
            check_folder(folder)
        found = predicting.predict_files(network, description, predicting.find_files(images), folder, where)
    good = [prediction for prediction in found if isinstance(prediction, predicting.Prediction)]
    if json:
        _print_json([predicting.prediction_json(prediction) for prediction in good])
    elif csv:
        rows = [(p.image, rank, *best) for p in good for rank, best in enumerate(p.best, 1)]
        _print_bytes(results.as_csv([("image", "rank", "class", "probability"), *rows]))
    else:
        _print_bars(good, Console())
    broken = [error for error in found if isinstance(error, BadImage)]
    for error in broken:
        warn(f"skipped {error}")
    if broken:
        raise typer.Exit(1)


def _print_bars(found: Sequence[Prediction], console: Console) -> None:
    """Print the guesses of one image as bars, or the best guess of each of several."""
    from .training.run import say

    if len(found) != 1:
        for one in found:
            name, probability = one.best[0]
            say(console, f"{path_text(one.image)}  {path_text(name)}  {probability:.1%}")
    else:
        width = max(len(path_text(name)) for name, _ in found[0].best)
        for name, probability in found[0].best:
            say(console, f"{path_text(name):>{width}}  {probability:6.1%}  {'█' * round(probability * 40)}")
    pictures = [one.picture for one in found if one.picture is not None]
    if len(pictures) == 1:
        say(console, f"Picture: {path_text(pictures[0])}")
    elif pictures:
        say(console, f"{len(pictures):,} pictures in {path_text(pictures[0].parent)}")


def _print_json(value: Any) -> None:
    print(dumps(value, indent=1, allow_nan=False))


def _print_bytes(content: bytes) -> None:
    """Print names as the bytes that they have on the disk, whatever the terminal's encoding."""
    sys.stdout.flush()
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
