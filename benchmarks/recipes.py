"""``python -m benchmarks.recipes``: accuracy and time of several recipes on the same images.

Runs of ``alexnet train``, each a process of its own, take turns: first the first seed of each recipe, then the next
seed. So other load on the machine slows all recipes. On digits the recipes are the default (200 steps of 32 images of
227) and one of growing images; on a folder those of ``alexnet train --recipe``. Seconds are what a run reports: from
its start to its last evaluation.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

GROWING = {"grow": "67:0.35,115:0.2", "steps": 145, "lr": 0.015, "dropout": 0.1, "evaluate-every": 100}
DIGITS = {"digits": [], "growing": [f"--{name}={value}" for name, value in GROWING.items()]}
FOLDER = {name: ["--recipe", name] for name in ("folder", "fast")}


@dataclass(frozen=True)
class Run:
    """One training: the share of held-out images guessed right at its end, and its seconds."""

    recipe: str
    seed: int
    fold: int | None
    top1: float
    seconds: float


def train(options: list[str], out: Path) -> dict[str, Any]:
    """The ``result.json`` of ``alexnet train`` with these options. CalledProcessError, with its words, if it fails."""
    command = [sys.executable, "-m", "alexnet_ext", "train", *options, "--out", str(out), "--quiet"]
    subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return found


def make_folds(data: Path, count: int, root: Path) -> list[list[str]]:
    """Options for each of ``count`` folds of a folder of classes: in each, another of the parts is held out. The parts
    are links to the images, in the order of their names."""
    images = sorted(path for path in data.glob("*/*") if path.is_file() and not path.name.startswith("."))
    seen: dict[str, int] = {}
    for path in images:
        number = seen[path.parent.name] = seen.get(path.parent.name, -1) + 1
        for fold in range(count):
            part = "val" if number % count == fold else "train"
            link = root / str(fold) / part / path.parent.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    return [[str(root / str(fold))] for fold in range(count)]


def compare(recipes: dict[str, list[str]], places: list[list[str]], seeds: list[int], common: list[str]) -> list[Run]:
    """The runs of every recipe, taking turns."""
    runs = []
    for seed in seeds:
        for fold, place in enumerate(places):
            for name, options in recipes.items():
                with tempfile.TemporaryDirectory() as folder:
                    given = [*place, *options, "--seed", str(seed), *common]
                    found = train(given, Path(folder) / "run")
                runs.append(Run(name, seed, fold if len(places) > 1 else None, found["top1"], found["seconds"]))
                print(json.dumps(asdict(runs[-1])), file=sys.stderr, flush=True)
    return runs


def summary(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Of each recipe: mean, least and largest accuracy, median seconds, and the median of the ratios to the first
    recipe's seconds in the same turn."""
    names = list(dict.fromkeys(run.recipe for run in runs))
    by_name = {name: [run for run in runs if run.recipe == name] for name in names}
    found = {}
    for name, own in by_name.items():
        top1 = [run.top1 for run in own]
        ratios = [run.seconds / first.seconds for run, first in zip(own, by_name[names[0]], strict=True)]
        found[name] = {
            "mean": statistics.mean(top1),
            "least": min(top1),
            "largest": max(top1),
            "seconds": statistics.median(run.seconds for run in own),
            "ratio": statistics.median(ratios),
        }
    return found


def main(
    folder: Annotated[Path | None, typer.Argument(help="One folder a class; digits if left out.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each recipe.", min=1)] = 3,
    folds: Annotated[int, typer.Option(help="Parts of a folder, each held out once.", min=1)] = 1,
    recipe: Annotated[list[str] | None, typer.Option(help="Recipes to compare in a folder.")] = None,
    options: Annotated[str, typer.Option(help="More options for each run, as '--epochs 5'.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train each recipe with each seed, in turns, and print accuracy and seconds."""
    named = {name: ["--recipe", name] for name in recipe} if recipe else DIGITS if folder is None else FOLDER
    with tempfile.TemporaryDirectory() as root:
        places = [[os.fspath(folder)] if folder else []]
        if folder is not None and folds > 1:
            places = make_folds(folder, folds, Path(root))
        runs = compare(named, places, list(range(seeds)), options.split())
    found = summary(runs)
    if as_json:
        print(json.dumps({"runs": [asdict(run) for run in runs], "recipes": found}, indent=1))
        return
    table = Table("recipe", "right", "least", "largest", "seconds", "ratio")
    for name, row in found.items():
        shares = (f"{row[key]:.2%}" for key in ("mean", "least", "largest"))
        table.add_row(name, *shares, f"{row['seconds']:.1f}", f"{row['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
