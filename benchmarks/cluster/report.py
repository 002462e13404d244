"""The model's results as a dictionary, tables and a picture. Every number is called predicted or measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from alexnet_ext.parallel import volume

from ..predict.report import table
from . import links, model, records
from .links import Fact
from .model import Compute, Result

GPUS = tuple(2**n for n in range(10))


def results(compute: Compute, images: int, gpu: str, network: str) -> list[Result]:
    """Each layout at 1 to 512 GPUs, where it can train."""
    cluster, rate = links.cluster(gpu, network), links.loader_rate()
    return [
        model.train_step(layout, gpus, images, compute, cluster, rate)
        for layout in volume.LAYOUTS
        for gpus in GPUS
        if layout == "data" or gpus > 1
    ]


def facts(gpu: str, network: str) -> dict[str, Fact]:
    """The facts in force, by name."""
    named = {name: value for name, value in vars(links).items() if isinstance(value, Fact)}
    return named | {"NVLINK": links.NVLINK[gpu], "NIC": links.NIC[network]}


def as_dictionary(found: list[Result], compared: list[records.Found], gpu: str, network: str) -> dict[str, Any]:
    return {
        "gpu": gpu,
        "network": network,
        "results": [
            row._asdict()
            | {"seconds": row.seconds, "images_per_second": round(row.images_per_second), "minutes": row.minutes()}
            for row in found
        ],
        "records": [
            {
                "name": row.record.name,
                "rate": row.source,
                "published_minutes": row.record.minutes,
                "predicted_minutes": row.minutes,
                "reproduced": row.near,
                "missing": row.record.missing,
            }
            for row in compared
        ],
        "facts": {name: fact._asdict() for name, fact in facts(gpu, network).items()},
        "not seen": links.BLIND,
    }


def show(found: list[Result], compared: list[records.Found], gpu: str, network: str) -> None:
    console = Console(width=130)
    one = found[0]
    shown = table(
        f"Predicted: nodes of {links.GPUS_A_NODE} {gpu} over {network}, {one.images} images a GPU, bf16; "
        f"one GPU's step is {one.how}",
        "layout", "GPUs", "images/s", "of ideal", f"{links.EPOCHS} epochs, min", "step, us", "computing", "exchanges",
        "gradients", "loader", "MB sent",
    )  # fmt: skip
    for row in found:
        shown.add_row(
            row.layout, str(row.gpus), f"{row.images_per_second:,.0f}",
            f"{row.images_per_second / one.images_per_second / row.gpus:.0%}", f"{row.minutes():.2f}",
            *(f"{t * 1e6:,.0f}" for t in (row.seconds, row.compute, row.exchanges, row.exposed, row.waiting)),
            f"{row.megabytes_sent:,.0f}",
        )  # fmt: skip
    console.print(shown)
    shown = table("Records, from their hardware", "record", "rate of one GPU from", "published, min",
                  "predicted, min", f"within {records.NEAR:.0%}")  # fmt: skip
    for compare in compared:
        near = "yes" if compare.near else "no"
        minutes = f"{compare.record.minutes:g}", f"{compare.minutes:.2f}"
        shown.add_row(compare.record.name, compare.source, *minutes, near)
    console.print(shown)
    for record in records.RECORDS:
        console.print(f"{record.name} lacks: {'; '.join(record.missing)}.", highlight=False)
    shown = table("What is assumed", "name", "value", "known from", "reason")
    for name, fact in facts(gpu, network).items():
        shown.add_row(name, f"{fact.value:.4g}", fact.known, fact.reason)
    console.print(shown)
    console.print(f"The model does not see: {'; '.join(links.BLIND)}.", highlight=False)


def draw(found: list[Result], compared: list[records.Found], gpu: str, network: str, path: Path) -> None:
    """Images a second by GPUs, with the records; and where a step's time goes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    one = found[0]
    left.plot(GPUS, [n * one.images_per_second for n in GPUS], ":", color="gray", label="ideal")
    for layout in volume.LAYOUTS:
        rows = [row for row in found if row.layout == layout]
        left.plot([r.gpus for r in rows], [r.images_per_second for r in rows], "o-", label=f"{layout}, predicted")
    for record, marker in zip(records.RECORDS, "*^", strict=True):
        rate = record.epochs * links.IMAGES / record.minutes / 60
        left.plot(record.gpus, rate, marker, ms=11, color="black", label=f"published: {record.name.split(' (')[0]}")
    left.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="images/s")
    ticks = (*GPUS, 2 * GPUS[-1])
    left.set_xticks(ticks, [str(n) for n in ticks])
    left.minorticks_off()
    left.legend(fontsize=8)
    names = {
        "compute": "computing",
        "exchanges": "exchanges of activations",
        "exposed": "gradients",
        "waiting": "loader",
    }
    shown = [row for row in found if row.gpus in (8, 64, 512)]
    base = [0.0] * len(shown)
    for field, label in names.items():
        parts = [100 * getattr(row, field) / row.seconds for row in shown]
        right.bar(range(len(shown)), parts, 0.6, base, label=label)
        base = [b + part for b, part in zip(base, parts, strict=True)]
    names_of = [f"{row.layout}\n{row.gpus} GPUs\n{row.seconds * 1e3:.1f} ms" for row in shown]
    right.set_xticks(range(len(shown)), names_of, fontsize=7)
    right.set(ylabel="% of a step", ylim=(0, 100))
    right.legend(fontsize=8, loc="lower center", ncols=4, bbox_to_anchor=(0.5, 1))
    figure.suptitle(f"Predicted: nodes of {links.GPUS_A_NODE} {gpu} over {network}, {one.images} images a GPU, bf16")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
