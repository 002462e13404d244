"""``python -m benchmarks.ratios``: how many times faster than stock PyTorch, fp32, on this machine's CPU.

Ours and stock take turns, so that other load on the machine slows both; a time is the median of its rounds. Prints
the table and writes it to benchmarks/results/DEVICE-DATE.md and .json.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import alexnet_ext as ax
from alexnet_ext import _library
from tests.support.specs import SPECS, alexnet_cases

from . import harness, worker
from .harness import Run, device_name

RESULTS = Path(__file__).parent / "results"
TARGETS = {"training step": 1.8, "inference": 1.3}


@dataclass(frozen=True)
class Row:
    """One comparison. ``floor_ms`` is the time to copy the bytes that must move; ``target`` is a ratio."""

    name: str
    layout: str
    shape: str
    stock_ms: float
    ours_ms: float
    floor_ms: float | None
    target: float | None
    rounds: int

    @property
    def ratio(self) -> float:
        return self.stock_ms / self.ours_ms

    def cells(self) -> list[str]:
        floor, target = self.floor_ms, self.target
        return [
            self.name,
            self.layout,
            self.shape,
            f"{self.stock_ms:.2f}",
            f"{self.ours_ms:.2f}",
            "" if floor is None else f"{floor:.2f}",
            f"{self.ratio:.2f}",
            "" if target is None else f"{target:g}",
            "" if target is None else ("yes" if self.ratio >= target else "no"),
        ]


HEADINGS = ("forward + backward", "layout", "shape", "stock ms", "ours ms", "floor ms", "ratio", "target", "reached")


def milliseconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def contest(ours: Run, stock: Run, seconds: float) -> tuple[float, float, int]:
    """Medians of both and the number of rounds: as many as fit into ``seconds``, 5 at least and 100 at most."""
    milliseconds(ours), milliseconds(stock)
    once = milliseconds(ours) + milliseconds(stock)
    rounds = max(5, min(100, int(seconds * 1e3 / once)))
    pairs = [(milliseconds(ours), milliseconds(stock)) for _ in range(rounds)]
    return statistics.median(o for o, _ in pairs), statistics.median(s for _, s in pairs), rounds


def copy_rate() -> float:
    """Bytes a millisecond, read and written, of a large copy: the best of ten."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(milliseconds(lambda: target.copy_(source)) for _ in range(10))


def op_rows(batch: int, seconds: float, rate: float) -> Iterator[Row]:
    """A row for each of an op's layers, then their sum, which the target is for."""
    for op, layout in [(name, layout) for name in SPECS for layout in harness.layouts(name)]:
        rows = []
        for case in alexnet_cases(op, batch):
            runs = (
                harness.op_run(case, harness.directions(op)[-1], backend, layout) for backend in ("native", "stock")
            )
            ours, stock, rounds = contest(*runs, seconds)
            moved = harness.floor_bytes(case)
            floor = None if moved is None else moved / rate
            rows.append(Row(op, layout, harness.layer_name(case), stock, ours, floor, None, rounds))
            yield rows[-1]
        floors = [row.floor_ms for row in rows if row.floor_ms is not None]
        yield Row(
            op,
            layout,
            "all layers",
            sum(row.stock_ms for row in rows),
            sum(row.ours_ms for row in rows),
            sum(floors) if floors else None,
            SPECS[op].target,
            min(row.rounds for row in rows),
        )


def network_rows(batch: int, seconds: float) -> Iterator[Row]:
    """The network in one loop with one optimizer, then `alexnet train` compared with a loop as in tutorials."""
    shape = f"{batch}x3x227x227"
    for kind, layout in itertools.product(harness.NETWORK, harness.LAYOUTS):
        runs = (harness.network_run(kind, fused, batch, layout) for fused in (True, False))
        ours, stock, rounds = contest(*runs, seconds)
        yield Row(f"AlexNet {kind}", layout, shape, stock, ours, None, TARGETS[kind], rounds)
    with worker.Worker("train", batch) as train, worker.Worker("plain", batch) as plain:
        ours, stock, rounds = contest(train.step, plain.step, seconds)
    yield Row("alexnet train, a step", "as it runs", shape, stock, ours, None, TARGETS["training step"], rounds)


def circumstances(batch: int, rate: float) -> dict[str, Any]:
    return {
        "device": device_name(),
        "instructions": str(torch.ops.alexnet_ext.cpu_capability()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "alexnet_ext": ax.__version__,
        "dtype": "float32",
        "batch": batch,
        "copy_gb_per_s": round(rate / 1e6, 2),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "benchmarks.ratios", *sys.argv[1:]]),
    }


NOTES = (
    "Times are medians of turns, forward and backward together; augment and inference are forward alone. Floor: the",
    'bytes that must move, at the rate of a large copy. "alexnet train, a step" is two processes taking turns: the',
    "settings of `alexnet train` (channels-last, fused SGD, malloc that keeps freed memory) beside stock layers in a",
    "plain loop with PyTorch's defaults; the rows above it differ in the layers alone.",
)


def markdown(facts: dict[str, Any], rows: list[Row]) -> str:
    lines = [f"# {facts['device']}, {facts['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", *NOTES, ""]
    table = [HEADINGS, ["---", "---", "---", *["---:"] * (len(HEADINGS) - 3)], *(row.cells() for row in rows)]
    lines += ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join(lines) + "\n"


def write(folder: Path, facts: dict[str, Any], rows: list[Row]) -> Path:
    """Write both files, named by device, date and, after the first run, number. Returns the path of the .md."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{facts['device']} {facts['threads']} threads".lower()).strip("-")
    names = (f"{slug}-{facts['date']}{f'-{run}' if run > 1 else ''}.md" for run in itertools.count(1))
    path = next(folder / name for name in names if not (folder / name).exists())
    path.write_text(markdown(facts, rows), encoding="utf-8")
    data = {**facts, "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return path


def main(
    batch: Annotated[int, typer.Option(help="Images in a batch.", min=1)] = harness.BATCH,
    threads: Annotated[int, typer.Option(help="Threads of both contestants.", min=1)] = 2,
    seconds: Annotated[
        float, typer.Option(help="Time for a row of an op; a row of the network has five times it.")
    ] = 4,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """How many times faster than stock PyTorch, in one run on this machine's CPU."""
    if not _library.LIBRARIES[0].loaded:
        typer.echo(f"the compiled CPU library is not loaded: {_library.LIBRARIES[0].reason}", err=True)
        raise typer.Exit(1)
    torch.set_num_threads(threads)
    rate = copy_rate()
    table = Table(*HEADINGS, title=f"{device_name()}, {threads} threads, batch {batch}, fp32")
    rows = []
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=None)
        for source in (op_rows(batch, seconds, rate), network_rows(batch, 5 * seconds)):
            for row in source:
                rows.append(row)
                table.add_row(*row.cells(), end_section=row.shape == "all layers")
                progress.update(task, advance=1, description=f"{row.name} {row.shape}")
    path = write(out, circumstances(batch, rate), rows)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    typer.echo(f"written to {path} and {path.with_suffix('.json').name}")


if __name__ == "__main__":
    typer.run(main)
