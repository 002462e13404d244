"""``python -m benchmarks.curves``: the digits trained by the fused layers and by stock PyTorch's, from the same seed.

Both see the same images in the same order, with the same weights at the start and the same dropout. Their roundings
differ, and training amplifies that: the command says how far the losses drift apart. A third run, of the fused layers
with half of the threads, whose sums have other orders, shows how far equal computations do. ``--out DIR`` keeps the
runs: ``alexnet figures DIR/fused DIR/stock`` draws them.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from alexnet_ext.training import run
from alexnet_ext.training.log import METRICS, read_metrics
from alexnet_ext.training.recipe import DIGITS, Recipe
from alexnet_ext.training.trainer import Means

WINDOW = 10  # steps of the running mean: the losses of single batches of 32 scatter by tenths
RUNS = ("fused", "stock", "half of the threads")


def losses(recipe: Recipe, threads: int, folder: Path) -> tuple[np.ndarray, float]:
    """The loss of each step, and the share of the held-out images that were right at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = run.start(recipe, folder, Means(torch.device("cpu")), Console(quiet=True))
    finally:
        torch.set_num_threads(before)
    return read(folder), result.top1


def read(folder: Path) -> np.ndarray:
    """The loss of each step of a run."""
    return np.array([line["loss"] for line in read_metrics(folder / METRICS) if line["kind"] == "train"])


def smooth(values: np.ndarray) -> np.ndarray:
    """Means over ``WINDOW`` steps, or over all of a shorter run."""
    window = min(WINDOW, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid")


def drift(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference of two curves' running means."""
    return float(np.abs(smooth(one) - smooth(other)).max())


def main(
    steps: Annotated[int, typer.Option(min=2)] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="New folder that keeps the runs.")] = None,
) -> None:
    threads = torch.get_num_threads()
    recipe = replace(DIGITS, steps=steps, seed=seed)
    found: dict[str, tuple[np.ndarray, float]] = {}
    console = Console()
    with tempfile.TemporaryDirectory() as temporary, console.status("") as status:
        for name in RUNS:
            status.update(f"training: {name}")
            count = max(1, threads // 2) if name == RUNS[2] else threads
            folder = (out or Path(temporary)) / name
            found[name] = losses(replace(recipe, stock=name == "stock"), count, folder)
    table = Table("run", "loss at the end", "held-out images right", "largest distance from the fused run's loss")
    for name, (values, right) in found.items():
        apart = drift(values, found["fused"][0])
        table.add_row(name, f"{smooth(values)[-1]:.4f}", f"{right:.1%}", f"{apart:.4f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
