"""gloo's all-reduce here, with 2 and 4 processes: latency and bandwidth fitted to some sizes, the others predicted.

Sizes take turns; times are medians. Bucket sequences are AlexNet's, shrunk, each all-reduce started when its gradients
would be ready.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from ..predict.report import table
from . import allreduce, model
from .allreduce import Link

RANKS = (2, 4)
FITTED = (2**12, 2**16, 2**20, 2**23)
PREDICTED = (2**14, 2**18, 2**21, 2**22)
ROUNDS = 15
SHRUNK = 8  # by which buckets are smaller than AlexNet's in fp32
GAPS = (0.0, 0.01)  # seconds between two buckets that become ready


def sequence() -> list[int]:
    """Bytes of the buckets, in the order of the backward."""
    held = {name: 4.0 * row.parameters for name, row in model.rows().items()}
    return [int(size) // SHRUNK // 4 * 4 for _, size in model.buckets(held)]


def _all_reduce(buffer: torch.Tensor) -> float:
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(buffer)
    return time.perf_counter() - began


def _in_turn(buffers: list[torch.Tensor], gap: float) -> float:
    dist.barrier()
    began = time.perf_counter()
    for number, buffer in enumerate(buffers):
        time.sleep(max(0.0, began + number * gap - time.perf_counter()))
        dist.all_reduce(buffer)
    return time.perf_counter() - began


def _worker(rank: int, ranks: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{ranks}", rank=rank, world_size=ranks)
    buffers = {size: torch.ones(size // 4) for size in (*FITTED, *PREDICTED)}
    buckets = [torch.ones(size // 4) for size in sequence()]
    times: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for size, buffer in buffers.items():
            times.setdefault(str(size), []).append(_all_reduce(buffer.fill_(1)))
        for gap in GAPS:
            times.setdefault(f"gap {gap}", []).append(_in_turn([b.fill_(1) for b in buckets], gap))
    if rank == 0:  # the first round opens connections
        medians = {name: statistics.median(found[1:]) for name, found in times.items()}
        Path(folder, f"{ranks}.json").write_text(json.dumps(medians), encoding="utf-8")
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter (pytorch/pytorch#179291)


def fit(ranks: int, seconds: dict[int, float]) -> Link:
    """The latency and bandwidth with which a ring takes ``seconds`` by size, so that relative errors are small."""
    rounds = 2 * (ranks - 1)
    sizes, times = np.array(list(seconds)), np.array(list(seconds.values()))
    columns = np.stack([np.full(len(sizes), rounds), rounds * sizes / ranks], 1) / times[:, None]
    (latency, by_byte), *_ = np.linalg.lstsq(columns, np.ones(len(sizes)), rcond=None)
    return Link(max(float(latency), 0.0), 1 / max(float(by_byte), 1e-15))


def main(worlds: tuple[int, ...] = RANKS, rounds: int = ROUNDS) -> None:
    console = Console(width=100)
    with tempfile.TemporaryDirectory() as folder:
        for ranks in worlds:
            torch.multiprocessing.spawn(_worker, (ranks, folder, rounds), nprocs=ranks)
            medians = json.loads(Path(folder, f"{ranks}.json").read_text(encoding="utf-8"))
            link = fit(ranks, {size: medians[str(size)] for size in FITTED})
            shown = table(
                f"gloo, {ranks} processes: a ring of {link.latency * 1e6:.0f} us and {link.bandwidth / 1e9:.2f} GB/s",
                "all-reduce", "from", "measured, ms", "model, ms", "ratio",
            )  # fmt: skip

            def simulated(size: float, ranks: int = ranks, link: Link = link) -> float:
                return allreduce.simulate(allreduce.ring(ranks, size), lambda _source, _target: link)

            rows = [(f"{size:,} bytes", "fitted", medians[str(size)], simulated(size)) for size in FITTED]
            rows += [(f"{size:,} bytes", "predicted", medians[str(size)], simulated(size)) for size in PREDICTED]
            for gap in GAPS:
                ready = [(n * gap, simulated(size)) for n, size in enumerate(sequence())]
                name = f"{len(ready)} buckets, one each {gap * 1e3:g} ms"
                rows.append((name, "predicted", medians[f"gap {gap}"], allreduce.in_turn(ready)))
            for name, source, measured, modelled in rows:
                times = f"{measured * 1e3:.3f}", f"{modelled * 1e3:.3f}", f"{modelled / measured:.2f}"
                shown.add_row(name, source, *times)
            console.print(shown)
