"""The command ``alexnet``: options in, one line on stderr and an exit code where something is wrong.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import cli_results, diagnostics, models
from .cli_options import Device, Precision, Stock, Variant, Workers, path, warn, workers_of
from .data import images
from .data.errors import CommandError, os_error, path_text
from .training.interrupt import Interrupted

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The 2012 AlexNet on fused kernels: train it, look at it, check it.",
)

# What torch says, on the CPU and on a GPU.
OUT_OF_MEMORY = ("can't allocate memory", "CUDA out of memory")
# The name of its module differs by typer's version: it is the base of an exception that has always been exported.
UsageError: type[Any] = typer.BadParameter.__mro__[1]


class Data(StrEnum):
    """Data that is no folder."""

    digits = "digits"
    synthetic = "synthetic"


class Schedule(StrEnum):
    """Shapes of the learning rate."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    plateau = "plateau"


class Init(StrEnum):
    """Starts of the weights."""

    paper = "paper"
    kaiming = "kaiming"
    torch = "torch"


class Format(StrEnum):
    """Files that other programs run or read."""

    onnx = "onnx"
    torch_export = "torch-export"
    aoti = "aoti"
    safetensors = "safetensors"


@app.command()
def train(
    folder: Annotated[
        Path | None,
        typer.Argument(parser=path, metavar="[DIR]", help="Images, one folder a class (or train/ and val/ of such)."),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="DIR", help="Held-out images.", show_default="val/ or test/ in DIR"),
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Share of each class to hold out.", show_default="0.1 without such a folder")
    ] = None,
    data: Annotated[Data | None, typer.Option(help="Data that is no folder.", show_default="digits")] = None,
    model: Annotated[Variant | None, typer.Option(help="Variant of the network.", show_default="paper")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the network's input.", show_default="the variant's")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, show_default="by data")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, show_default="by data")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many steps.", show_default="by epochs")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Highest learning rate.", show_default="0.01")] = None,
    momentum: Annotated[float | None, typer.Option(min=0, max=1, show_default="0.9")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, show_default="0.0005")] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Steps of linear growth of the rate.", show_default="by data")
    ] = None,
    schedule: Annotated[
        Schedule | None, typer.Option(help="Learning rate after the warm-up.", show_default="by data")
    ] = None,
    init: Annotated[Init | None, typer.Option(help="Start of the weights.", show_default="by data")] = None,
    dropout: Annotated[float | None, typer.Option(min=0, max=1, show_default="by data")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Arithmetic of a step; weights stay fp32.", show_default="fp32")
    ] = None,
    stock: Stock = False,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, show_default="0")] = None,
    out: Annotated[
        Path | None, typer.Option(parser=path, help="Run folder.", show_default="runs/DATE-TIME-DATA-MODEL")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(parser=path, metavar="RUN", help="Go on with an interrupted run.")
    ] = None,
    device: Device = "auto",
    workers: Workers = None,
) -> None:
    """Train on digits (5,000 from a package, nothing to download), or on a folder of images.

    Ctrl-C saves a checkpoint; --resume goes on from it.
    """
    options = {
        "held_out": held_out,
        "model": model,
        "image_size": image_size,
        "batch_size": batch_size,
        "epochs": epochs,
        "steps": steps,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "schedule": schedule,
        "init": init,
        "dropout": dropout,
        "precision": precision,
        "stock": stock or None,
        "seed": seed,
    }
    given: dict[str, Any] = {
        name: str(value) if isinstance(value, StrEnum) else value
        for name, value in options.items()
        if value is not None
    }
    if folder is not None and data is not None:
        raise CommandError(f"{path_text(folder)} and --data {data.value}: give one of them", 2)
    for name, chosen_folder in (("data", folder), ("val", val)):
        if chosen_folder is not None:
            given[name] = os.path.abspath(chosen_folder)  # the run may be resumed from another folder
    if data is not None:
        given["data"] = data.value
    if folder is None and resume is None and (val is not None or held_out is not None):
        raise CommandError(f"--{'held-out' if val is None else 'val'}: only with DIR, a folder of images", 2)
    if val is not None and held_out is not None:
        raise CommandError(f"--val {path_text(val)} and --held-out {held_out}: give one of them", 2)
    if held_out is not None and not 0 < held_out < 1:
        raise CommandError(f"--held-out {held_out}: expected a share between 0 and 1", 2)

    from .training import run
    from .training.recipe import chosen

    where = run.device_of(device)
    count = workers_of(workers, where.type)
    console = Console()
    if resume is not None:
        if out is not None:
            raise CommandError("--out and --resume: a run goes on in its own folder", 2)
        run.resume(resume, given, where, count, console, warn)
        return
    recipe = chosen(given)
    run.start(recipe, out or run.default_out(recipe), where, count, console)


app.command()(cli_results.evaluate)
app.command()(cli_results.predict)


@app.command()
def export(
    kind: Annotated[Format, typer.Option("--format", help="aoti is AOTInductor: a compiled package for this CPU.")],
    out: Annotated[Path, typer.Option(parser=path, help="File to write.")],
    variant: Annotated[Variant | None, typer.Option(help="Variant of the network.", show_default="by weights")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="A run, a checkpoint, or a .safetensors, .pth, .caffemodel or .onnx file.",
            show_default="a fresh start",
        ),
    ] = None,
) -> None:
    """Write a network for other programs, for any batch size."""
    from .export import write

    with Console().status(Text(f"writing {path_text(out)}")):
        write(str(kind), out, None if variant is None else str(variant), weights, warn)
    print(f"{path_text(out)}: {out.stat().st_size / 1e6:,.1f} MB")


@app.command()
def summary(
    model: Annotated[Variant | None, typer.Option(help="Variant of the network.", show_default="paper")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, show_default="the variant's")] = None,
    classes: Annotated[int, typer.Option(min=1)] = 1000,
) -> None:
    """Print the layers of a network: shapes, parameters, multiply-adds."""
    Console().print(models.summary.render(_shapes(model, image_size, classes)))


@app.command()
def info() -> None:
    """Say what is built and loaded, which backend each op uses, and why."""
    print(diagnostics.info())


@app.command()
def check(
    device: Device = "auto",
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="An op or a variant; may be repeated.")] = None,
) -> None:
    """Compare every op and the network with float64 references on this machine; exit code 1 when one fails."""
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from .ops._backend import OPS
    from .training.run import device_of

    chosen = only or [*OPS, *models.VARIANTS]
    unknown = [name for name in chosen if name not in (*OPS, *models.VARIANTS)]
    if unknown:
        expected = ", ".join((*OPS, *models.VARIANTS))
        raise CommandError(f"--only {path_text(unknown[0])}: expected one of {expected}", 2)
    op_names, variants = ([name for name in known if name in chosen] for known in (OPS, models.VARIANTS))
    console = Console()
    rows = []
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("comparing")
        for row in diagnostics.check(device_of(device), op_names=op_names, variants=variants):
            rows.append(row)
            progress.update(task, description=f"{len(rows)} compared, last {row.name} {row.dtype}")
    console.print(diagnostics.check_table(rows))
    passed, _ = diagnostics.verdict(rows)
    if not passed:
        raise typer.Exit(1)


@app.command()
def tune(
    model: Annotated[Variant | None, typer.Option(help="Variant of the network.", show_default="paper")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    image_size: Annotated[int | None, typer.Option(min=1, show_default="the variant's")] = None,
    precision: Annotated[Precision, typer.Option()] = Precision.bf16,
    device: Device = "auto",
) -> None:
    """Prove the kernels on this GPU, measure what is fastest for each op and convolution, and remember it."""
    import torch

    from .ops import _tuning
    from .training.evaluate import DTYPES
    from .training.run import device_of
    from .tuning import rows

    where = device_of(device)
    if where.type != "cuda":
        raise CommandError(f"--device {device}: choices are measured on a GPU, and torch sees none here")
    dtype = DTYPES[precision.value]
    network = _shapes(model, image_size)
    side = network.config.image_size
    console = Console()
    table = Table("layer or op", "direction", "choice", "microseconds")
    for row in rows(network, (batch_size, 3, side, side), where, dtype, torch.channels_last):
        times = ", ".join(f"{name} {time:.0f}" for name, time in sorted(row.microseconds.items(), key=lambda t: t[1]))
        table.add_row(row.layer, row.direction, row.choice, times)
    console.print(table)
    console.print(f"Kept in {path_text(_tuning.cache_file())}")


def _shapes(model: Variant | None, image_size: int | None, classes: int = 1000) -> models.AlexNet:
    """A network without values."""
    import torch

    try:
        with torch.device("meta"):
            return models.alexnet(str(model or "paper"), num_classes=classes, image_size=image_size, init="torch")
    except ValueError as error:
        raise CommandError(str(error), 2) from error


def run_command(arguments: list[str]) -> int:
    """Run ``alexnet`` with these arguments; the exit code."""
    try:
        code = app(arguments or ["--help"], prog_name="alexnet", standalone_mode=False)
        print(end="", flush=True)  # what it cannot take is told here, not by the interpreter at exit
    except CommandError as error:
        warn(str(error))
        return error.code
    except UsageError as error:
        warn(" ".join(error.format_message().split()))
        return 2
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        warn("stopped")
        return 130
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        warn("out of memory; try a smaller --batch-size")
        return 1
    except OSError as error:
        if error.filename is not None:
            warn(str(os_error(error.filename, error)))
        elif error.errno in (errno.EPIPE, errno.ENOSPC):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to write at exit
            if error.errno == errno.ENOSPC:
                warn(str(os_error("standard output", error)))
        elif error.errno in images.NOT_ITS_FAULT:
            warn(f"{error.strerror}; try fewer --workers")
        else:
            raise
        return 1
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the console script."""
    # Huge pages for large tensors: a step allocates its gradients and activations afresh, and page by page that
    # costs a tenth of it. torch reads the variable at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names and bars, where the terminal knows neither
    sys.exit(run_command(sys.argv[1:]))
