"""``alexnet prepare``: images packed once, for training from mapped memory. ``alexnet data-bench``: their rate."""

from __future__ import annotations

import os
from enum import StrEnum
from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ._errors import path_text
from .cli_options import (
    MOST_WORKERS,
    Device,
    Precision,
    UsageError,
    Variant,
    device_of,
    path,
    warn,
    workers_of,
)
from .cli_options import Workers as Readers
from .training.interrupt import starting, stoppable
from .training.recipe import PRECISION, chosen

Given = Annotated[
    Path,
    typer.Argument(
        parser=path,
        metavar="SRC",
        help="Folder of images, or of ILSVRC's or WebDataset's tar files; with --verify alone, of shards.",
    ),
]
Target = Annotated[Path | None, typer.Argument(parser=path, metavar="[DST]", help="Folder of shards to write.")]
Side = Annotated[int, typer.Option(min=1, max=4096, help="Pixels that the shorter side is scaled to.")]
ShardSize = Annotated[int, typer.Option(min=1, max=1_000_000, help="Images in a shard.")]
Store = StrEnum("Store", ["rgb", "yuv420"])
StoreOption = Annotated[Store, typer.Option(help="Bytes of an image; yuv420 takes half of them.")]
Workers = Annotated[
    int | None, typer.Option(min=0, max=MOST_WORKERS, help="Processes that read images.", show_default="cores")
]
Verify = Annotated[bool, typer.Option("--verify", help="Read all shards and compare their checksums.")]

StepPrecision = Annotated[
    Precision | None, typer.Option(help="Arithmetic of the step.", show_default="bf16 on a GPU, else fp32")
]


def prepare(
    source: Given,
    target: Target = None,
    side: Side = 256,
    shard_size: ShardSize = 4096,
    store: StoreOption = Store.rgb,
    workers: Workers = None,
    verify: Verify = False,
) -> None:
    """Pack images into shards of squares: the shorter side scaled, the middle cut out.

    Ctrl-C stops it, and the same command goes on.
    """
    if target is None and not verify:
        raise UsageError(f"{path_text(source)}: name also DST, the folder to write, or --verify")
    if store == Store.yuv420 and side % 2:
        raise UsageError(f"--side must be even with --store yuv420, got {side}")
    with starting():
        from .data import prepare as _  # noqa: F401 (the slow imports, all at once)
        from .training.progress import lasting_console

    console = lasting_console()
    with stoppable():
        if target is not None:
            count = len(os.sched_getaffinity(0)) if workers is None else workers
            _pack(source, target, side, shard_size, store, count, console)
        if verify:
            _verify(target or source, console)


def _pack(source: Path, target: Path, side: int, shard_size: int, store: str, workers: int, console: Console) -> None:
    """Prepare, and say what is there."""
    from .data.archives import open_source
    from .data.packed import SPLITS
    from .data.prepare import SKIPPED, Preparation
    from .training.files import check_folder, check_outside
    from .training.progress import Counter

    check_folder(target, "DST")
    check_outside(target, source, "DST")
    with console.status(Text(f"listing {path_text(source)}")):
        found = open_source(source)
    for note in found.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    total = sum(map(len, found.entries.values()))
    with Counter("prepare", total, console) as counter:
        index = Preparation(found, target, side, shard_size, counter, str(store)).run(workers)
    train, val = (index.images[split] for split in SPLITS)
    shards = [shard for split in SPLITS for shard in index.shards[split]]
    size = sum(shard.bytes + shard.labels_bytes for shard in shards) / 1e6
    skipped = sum(index.skipped.values())
    print(
        f"{path_text(target)}: {train:,} images to train on and {val:,} held out, {side} x {side}, of "
        f"{len(index.classes):,} classes; {len(shards):,} shards, {size:,.1f} MB"
        + (f"; {skipped:,} images could not be read, {SKIPPED} names them" if skipped else "")
    )


def _verify(folder: Path, console: Console) -> None:
    from .data.packed import Index, verify
    from .training.progress import Counter

    total, damaged = sum(Index.read(folder).images.values()), []
    with Counter("verify", total, console) as counter:
        for line in verify(folder, counter):
            damaged.append(line)
    for line in damaged:
        warn(line)
    if damaged:
        raise typer.Exit(1)
    print(f"{path_text(folder)}: {total:,} images, all as written")


def data_bench(
    folder: Annotated[Path, typer.Argument(parser=path, metavar="DIR", help="Packed images, or folders of classes.")],
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="Time of each measurement.")] = 5.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 128,
    model: Annotated[Variant, typer.Option(help="Variant of the network.")] = Variant.paper,  # type: ignore[attr-defined]
    image_size: Annotated[int | None, typer.Option(help="Side of its input.", show_default="the variant's")] = None,
    precision: StepPrecision = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = "auto",
    workers: Readers = None,
) -> None:
    """Measure how fast images come, and how fast training takes them; say which of them limits."""
    with starting():
        import torch

        from .training import data_bench as bench
        from .training.run import count

    where = device_of(device)
    given = {
        "data": os.path.abspath(folder),  # a folder may be named digits
        "model": model.value,
        "precision": str(precision or PRECISION[where.type]),
        "batch_size": batch_size,
    }
    recipe = chosen(given | ({} if image_size is None else {"image_size": image_size}))
    rates = bench.measure(recipe, where, workers_of(workers, where.type), seconds, Console(stderr=True))
    if json:
        print(dumps(rates._asdict(), indent=1))
        return
    place = count(torch.get_num_threads(), "thread") if where.type == "cpu" else torch.cuda.get_device_name(where)
    print(rates.sentence(place))
