"""The command ``alexnet``: parses options; an error is one line on stderr and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import cli_data, cli_results, cli_train, layers
from ._errors import CommandError, is_out_of_memory, os_error, path_text
from ._version import __version__
from .cli_options import Device, Last, Precision, UsageError, Variant, device_of, path, warn
from .parallel import volume
from .training.interrupt import STOPPED, Interrupted, starting
from .training.process import huge_pages
from .variants import VARIANTS, AlexNetConfig, config_of

if TYPE_CHECKING:
    import torch

    from .models import AlexNet

app = typer.Typer(pretty_exceptions_enable=False)


Layout = StrEnum("Layout", list(volume.LAYOUTS))  # type: ignore[misc]
Border = StrEnum("Border", list(volume.BORDERS))  # type: ignore[misc]


class Format(StrEnum):
    """Files that other programs run or read."""

    onnx = "onnx"
    torch_export = "torch-export"
    aoti = "aoti"
    safetensors = "safetensors"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"alexnet_ext {__version__}")
        raise typer.Exit


@app.callback()
def _command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The 2012 AlexNet on fused kernels: train it, look at it, check it."""


app.command()(cli_train.train)
app.command()(cli_data.prepare)
app.command()(cli_data.data_bench)
app.command()(cli_results.evaluate)
app.command()(cli_results.compare)
app.command()(cli_results.figures)
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
    last: Last = False,
) -> None:
    """Write a network for other programs, for any batch size."""
    with starting():
        from .export import write

    with Console().status(Text(f"writing {path_text(out)}")):
        write(str(kind), out, None if variant is None else str(variant), weights, warn, last)
    print(f"{path_text(out)}: {out.stat().st_size / 1e6:,.1f} MB")


@app.command()
def summary(
    model: Annotated[Variant | None, typer.Option(help="Variant of the network.", show_default="paper")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, show_default="the variant's")] = None,
    classes: Annotated[int, typer.Option(min=1)] = 1000,
    parallel: Annotated[Layout | None, typer.Option(help="Also what a rank holds and sends.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes, with --parallel.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of all ranks together.")] = 128,
    precision: Annotated[Precision, typer.Option(help="Of activations and gradients.")] = Precision.fp32,
    lrn_border: Annotated[
        Border | None, typer.Option(help="LRN where two towers meet.", show_default="exchange")
    ] = None,
) -> None:
    """Print the layers of a network: shapes, parameters, multiply-adds."""
    config = _config(model, image_size, classes)
    if parallel is None:
        Console().print(layers.render(config, layers.layer_rows(config)))
        return
    border = str(lrn_border or "exchange")
    try:
        volume.check(str(parallel), config.variant, ranks, lrn_border=border)
    except ValueError as error:
        raise CommandError(str(error), 2) from error
    plan = volume.Plan(config, str(parallel), ranks, batch_size, *volume.ITEMSIZES[precision], border)
    Console().print(layers.render(config, layers.layer_rows(config)), volume.render(plan))


@app.command()
def info() -> None:
    """Say what is built and loaded, which backend each op uses, and why."""
    with starting():
        from .selfcheck.info import info

    print(info())


@app.command()
def check(
    device: Device = "auto",
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="An op or a variant; may be repeated.")] = None,
) -> None:
    """Compare every op and the network with float64 references on this machine; exit code 1 when one fails."""
    from rich.progress import Progress, SpinnerColumn, TextColumn

    with starting():
        from .ops._backend import OPS
        from .selfcheck import compare

    chosen = only or [*OPS, *VARIANTS]
    unknown = [name for name in chosen if name not in (*OPS, *VARIANTS)]
    if unknown:
        expected = ", ".join((*OPS, *VARIANTS))
        raise CommandError(f"--only {path_text(unknown[0])}: expected one of {expected}", 2)
    op_names, variants = ([name for name in known if name in chosen] for known in (OPS, VARIANTS))
    console = Console()
    rows = []
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("comparing")
        for row in compare.check(device_of(device), op_names=op_names, variants=variants):
            rows.append(row)
            progress.update(task, description=f"{len(rows)} compared, last {row.name} {row.dtype}")
    console.print(compare.check_table(rows))
    passed, _ = compare.verdict(rows)
    if not passed:
        raise typer.Exit(1)


@app.command()
def tune(
    model: Annotated[Variant | None, typer.Option(help="Variant of the network.", show_default="paper")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    image_size: Annotated[int | None, typer.Option(min=1, show_default="the variant's")] = None,
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = Precision.bf16,
    device: Device = "auto",
    forget: Annotated[
        bool, typer.Option("--forget", help="Remove all that is known of kernels; prove nothing.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option("--export", parser=path, metavar="FILE", help="Write what is known; prove nothing.")
    ] = None,
    taken: Annotated[
        Path | None,
        typer.Option("--import", parser=path, metavar="FILE", help="Take the choices of such a file; prove them anew."),
    ] = None,
) -> None:
    """Prove the kernels on this GPU, race them with PyTorch, and remember what is right and fastest."""
    if forget + (export is not None) + (taken is not None) > 1:
        raise CommandError("--forget, --export and --import: give one of them", 2)
    with starting():
        import torch

        from .ops import _backend, _known
        from .selfcheck import prove, tables
        from .training.evaluate import DTYPES
        from .training.files import write_file

    if forget:
        print(f"removed {len(_known.forget())} files of {path_text(_known.folder() or 'no folder')}")
        return
    if export is not None:
        write_file(export, tables.exported().encode())
        print(path_text(export))
        return
    config, where = _config(model, image_size), device_of(device)
    if not _backend.proves(where):
        raise CommandError(f"--device {device}: kernels are proven and raced on a GPU, and torch sees none here")
    console = Console()
    if taken is not None:
        _import(taken, where)
    shape, dtype = (batch_size, 3, config.image_size, config.image_size), DTYPES[precision.value]
    with console.status(Text("proving kernels")) as status:
        proved = prove.prove(
            where,
            _shapes(config),
            shape,
            dtype=dtype,
            layout=torch.channels_last,
            again=taken is None,
            tell=lambda line: status.update(Text(line)),
        )
    table = Table("layer or op", "direction", "choice", "microseconds")
    for row in proved.races:
        times = ", ".join(f"{name} {time:.0f}" for name, time in sorted(row.microseconds.items(), key=lambda t: t[1]))
        table.add_row(row.layer, row.direction, row.choice, times)
    console.print(table)
    console.print(str(proved), highlight=False, markup=False)
    console.print(f"Kept in {path_text(_known.on(where).path or 'memory alone')}", highlight=False, markup=False)


def _import(file: Path, device: torch.device) -> None:
    from .selfcheck import tables

    try:
        count = tables.import_races(file, device)
    except OSError as error:
        raise os_error(file, error) from error
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path_text(file)}: {error}") from error
    print(f"{count} choices taken from {path_text(file)}")


def _config(model: Variant | None, image_size: int | None, classes: int = 1000) -> AlexNetConfig:
    try:
        config = config_of(str(model or "paper"), classes, image_size, dropout=0.5)
        layers.layer_rows(config)
    except ValueError as error:
        raise CommandError(str(error), 2) from error
    return config


def _shapes(config: AlexNetConfig) -> AlexNet:
    """A network without values."""
    import torch

    from . import models

    with torch.device("meta"):
        return models.AlexNet(config)


def run_command(arguments: list[str]) -> int:
    """Run ``alexnet`` with these arguments; the exit code."""
    try:
        code = app(arguments or ["--help"], prog_name="alexnet", standalone_mode=False, obj=arguments)
        print(end="", flush=True)  # a failed write is reported here, not by the interpreter at exit
    except CommandError as error:
        if str(error):  # else another rank says it
            warn(str(error))
        return error.code
    except UsageError as error:
        warn(_wrong_usage(error, arguments))
        return 2
    except Interrupted as stop:
        warn(stop.told())
        return STOPPED
    except (KeyboardInterrupt, typer.Abort):
        warn("stopped")
        return STOPPED
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        warn("out of memory; try a smaller --batch-size")
        return 1
    except OSError as error:
        if error.filename is not None:
            warn(str(os_error(error.filename, error)))
        elif error.errno in (errno.EPIPE, errno.ENOSPC):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python writes nothing more at exit
            if error.errno == errno.ENOSPC:
                warn(str(os_error("standard output", error)))
        elif _of_the_system(error):
            warn(f"{error.strerror}; try fewer --workers")
        else:
            raise
        return 1
    if code == STOPPED:  # typer's exit code for Ctrl-C, which prints nothing
        warn("stopped")
    return code if isinstance(code, int) else 0


def _wrong_usage(error: Any, arguments: list[str]) -> str:
    """One line for what typer refuses, with the option's value, which some of its versions leave out."""
    for name in getattr(getattr(error, "param", None), "opts", ()):
        for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
            option, _, own = option.partition("=")
            if option == name:
                expected = error.message.removeprefix("Value error, ").replace("Input should be", "expected")
                return f"{name} {path_text(own or value)}: {' '.join(expected.split()).rstrip('.')}"
    return " ".join(error.format_message().split())


def _of_the_system(error: OSError) -> bool:
    from .data.images import NOT_ITS_FAULT

    return error.errno in NOT_ITS_FAULT


def main() -> None:
    """Entry point of the console script."""
    huge_pages()
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started the process
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 (open to the end)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for names and bars that the terminal cannot show
    sys.exit(run_command(sys.argv[1:]))
