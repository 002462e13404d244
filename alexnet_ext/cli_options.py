"""Options that several commands of ``alexnet`` take."""

from __future__ import annotations

import contextlib
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import CommandError, path_text
from .variants import VARIANTS

if TYPE_CHECKING:
    import torch

# UsageError is in different modules in different versions of typer; it is the base of the exported BadParameter.
UsageError: type[Any] = typer.BadParameter.__mro__[1]

Variant = StrEnum("Variant", {name: name for name in VARIANTS})  # type: ignore[misc]


class Precision(StrEnum):
    """Number format of a step's arithmetic; weights stay fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def path(text: str) -> Path:
    """An argument as a path. An empty one, as from an unset variable, is refused: it would be the current folder."""
    if not text:
        raise typer.BadParameter("expected a path, got an empty one")
    return Path(text)


Weights = Annotated[Path, typer.Option(parser=path, help="A run folder, a checkpoint folder or a .safetensors file.")]
Model = Annotated[Variant | None, typer.Option(help="Variant that the weights must be of.")]
Last = Annotated[bool, typer.Option("--last", help="Of a run the newest checkpoint, not the best.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Stock = Annotated[bool, typer.Option("--stock", help="The reference network of stock PyTorch layers.")]
# Beyond any machine's cores: more threads crash torch, and more processes fill the system.
MOST_WORKERS, MOST_THREADS = 256, 1024
Workers = Annotated[
    int | None,
    typer.Option(min=0, max=MOST_WORKERS, help="Processes that read images.", show_default="by device"),
]


def workers_of(given: int | None, device: str) -> int:
    """The default by device: a GPU must not wait for JPEGs; on the CPU readers would take cores from training."""
    if given is not None:
        return given
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes on this machine share its cores
    return max(1, min(8, len(os.sched_getaffinity(0)) // ranks)) if device == "cuda" else 0


def device_of(name: str) -> torch.device:
    """``"auto"`` (a GPU that torch can use, else the CPU) or a name that torch knows. CommandError for others."""
    import torch

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


def warn(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal has closed
        print(f"alexnet: {text}", file=sys.stderr)
