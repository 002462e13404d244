"""Predictions as a dictionary, tables and a picture. Every number is called predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from . import convolutions, step
from .gpus import BLIND, CONSTANTS, FAST, GPUS, LIKELY, SLOW, Gpu
from .kernels import copy_time, counts, producers, row_times, total


def predictions(gpu_name: str, batches: list[int]) -> dict[str, Any]:
    gpu = GPUS[gpu_name]
    found: dict[str, Any] = {"predicted": "not measured on a GPU", "gpu": gpu.name}
    for kind in step.KINDS:
        found[kind] = {str(batch): of_step(kind, batch, gpu) for batch in batches}
    found["kernels"] = [of_kernel(name, row, gpu) for name, row in counts().items()]
    found["convolutions"] = [row for batch in batches for row in of_convolutions(batch, gpu)]
    found["constants"] = {name: vars(constant) for name, constant in CONSTANTS.items()}
    found["not seen"] = list(BLIND)
    return found


def of_step(kind: str, batch: int, gpu: Gpu) -> dict[str, Any]:
    seconds = {
        name: step.predicted(kind, batch, gpu, producers(), assumed)
        for name, assumed in (("likely", LIKELY), ("slow", SLOW), ("fast", FAST))
    }
    parts, likely = seconds["likely"]
    return {
        "images_per_second": round(batch / likely),
        "low": round(batch / seconds["slow"][1]),
        "high": round(batch / seconds["fast"][1]),
        "microseconds": round(likely * 1e6, 1),
        "launches": sum(part.launches for part in parts),
        "parts": [{"part": p.what, "microseconds": round(p.seconds * 1e6, 1), "launches": p.launches} for p in parts],
    }


def of_kernel(name: str, row: dict[str, Any], gpu: Gpu) -> dict[str, Any]:
    times, floor = row_times(row, gpu), copy_time(row["floor_bytes"], gpu)
    return {
        "kernel": name,
        "megabytes": round(row["floor_bytes"] / 1e6, 1),
        "floor_microseconds": round(floor * 1e6, 1),
        "instructions": sum(launch["instructions"] for launch in row["launches"]),
        "limit": times[0].binds,
        "microseconds": round(total(times) * 1e6, 1),
        "copies": round(total(times) / floor, 2),
    }


def of_convolutions(batch: int, gpu: Gpu) -> list[dict[str, Any]]:
    found = []
    for name, layer in convolutions.layers(batch):
        for direction in convolutions.DIRECTIONS:
            if name == "conv1" and direction == "input gradient":
                continue  # images need none
            seconds = convolutions.candidates(layer, direction, gpu, producers())
            found.append(
                {
                    "layer": name,
                    "direction": direction,
                    "batch": batch,
                    "microseconds": {candidate: round(s * 1e6, 1) for candidate, s in seconds.items()},
                    "teraflops": round(layer.operations / min(seconds.values()) / 1e12),
                }
            )
    return found


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for n, column in enumerate(columns):
        made.add_column(column, justify="left" if n == 0 else "right", overflow="fold")
    return made


def show(found: dict[str, Any]) -> None:
    console = Console(width=150)
    kernels = table(
        f"Predicted for {found['gpu']}, batch 128: kernels bound by memory", "kernel", "MB", "copy, us", "instructions",
        "limit", "predicted, us", "copies",
    )  # fmt: skip
    for k in found["kernels"]:
        kernels.add_row(
            k["kernel"], f"{k['megabytes']:.1f}", f"{k['floor_microseconds']:.1f}", f"{k['instructions']:.3g}",
            k["limit"], f"{k['microseconds']:.1f}", f"{k['copies']:.2f}",
        )  # fmt: skip
    console.print(kernels)
    ways = list(found["convolutions"][0]["microseconds"]) if found["convolutions"] else []
    products = table("Predicted: each way to convolve, us", "layer", "batch", *ways, "best, TFLOP/s")
    for c in found["convolutions"]:
        micros = (f"{c['microseconds'][way]:.0f}" for way in ways)
        products.add_row(f"{c['layer']} {c['direction']}", str(c["batch"]), *micros, str(c["teraflops"]))
    console.print(products)
    for kind in step.KINDS:
        show_steps(console, kind, found[kind])
    console.print(f"Not measured. The model does not see: {'; '.join(found['not seen'])}.", highlight=False)


def show_steps(console: Console, kind: str, by_batch: dict[str, Any]) -> None:
    parts = table(f"Predicted: {kind}, a CUDA graph, us", "part", *(f"batch {batch}" for batch in by_batch), "launches")
    columns = [{part["part"]: part for part in found["parts"]} for found in by_batch.values()]
    for name in dict.fromkeys(name for column in columns for name in column):
        micros = (f"{column[name]['microseconds']:.1f}" if name in column else "" for column in columns)
        launches = dict.fromkeys(str(column[name]["launches"]) for column in columns if name in column)
        parts.add_row(name, *micros, ", ".join(launches))
    totals = (f"{found['microseconds']:,.0f}" for found in by_batch.values())
    launches = dict.fromkeys(str(found["launches"]) for found in by_batch.values())
    parts.add_row("all", *totals, ", ".join(launches), style="bold")
    console.print(parts)
    for batch, found in by_batch.items():
        console.print(
            f"{kind}, batch {batch}: {found['images_per_second']:,} images/s predicted, "
            f"between {found['low']:,} and {found['high']:,}\n",
            highlight=False,
        )


def draw(found: dict[str, Any], path: Path) -> None:
    """A bar for each step, of its parts; those under 3 % are one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(step.KINDS), figsize=(13, 5.5), layout="constrained")
    for axis, kind in zip(axes, step.KINDS, strict=True):
        steps = found[kind]
        names = {
            part["part"]
            for one in steps.values()
            for part in one["parts"]
            if part["microseconds"] > 0.03 * one["microseconds"]
        }
        every = (part["part"] for one in steps.values() for part in one["parts"])
        ordered = [name for name in dict.fromkeys(every) if name in names]
        base = [0.0] * len(steps)
        colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
        for n, name in enumerate([*ordered, "others"]):
            shares = []
            for one in steps.values():
                named = ((p["part"] if p["part"] in names else "others", p["microseconds"]) for p in one["parts"])
                shares.append(100 * sum(micros for part, micros in named if part == name) / one["microseconds"])
            axis.bar(list(steps), shares, 0.6, base, label=name, color=colours[n % len(colours)])
            base = [b + s for b, s in zip(base, shares, strict=True)]
        axis.set_title(f"{kind}: " + ", ".join(f"{one['images_per_second']:,} images/s" for one in steps.values()))
        axis.set_xlabel("batch")
        axis.set_ylabel("% of the predicted step")
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.suptitle(f"Predicted for {found['gpu']}; not measured")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
