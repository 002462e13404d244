"""A training step on many GPUs: computing, exchanges that it waits for, gradients that overlap the backward.

The network is the paper's, in bf16. Each GPU has the same number of images, so the batch grows with the GPUs. In
layouts ``towers`` and ``weird-trick`` a GPU computes as many multiply-adds as in ``data``, at the same rate; in
``towers`` twice as many of fc8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from alexnet_ext.layers import LayerRow, layer_rows
from alexnet_ext.parallel import volume
from alexnet_ext.variants import config_of

from ..predict import step
from ..predict.gpus import GPUS
from ..predict.kernels import producers
from . import links
from .allreduce import in_turn
from .links import Cluster

CONFIG = config_of("paper", 1000, None, 0.5)
LINEAR = ("fc6", "fc7", "fc8")
BEFORE = {"norm1": "conv1", "norm2": "conv2"}  # its backward comes before this layer's
ITEMSIZE = 2
FORWARD_SHARE = 1 / 3  # of a linear layer's time: one of its three products


class Compute(NamedTuple):
    """Seconds of one GPU's step by part; ``backward`` by layer, last layer first. ``how``: predicted or measured."""

    forward: float
    backward: dict[str, float]
    optimizer: float
    how: str

    @property
    def seconds(self) -> float:
        return self.forward + sum(self.backward.values()) + self.optimizer

    def scaled(self, seconds: float, how: str) -> Compute:
        """With these seconds in all, in the same proportions."""
        by = seconds / self.seconds
        return Compute(self.forward * by, {k: t * by for k, t in self.backward.items()}, self.optimizer * by, how)


class Result(NamedTuple):
    """Seconds of one step. ``exposed``: of gradients' exchange, after the backward; ``waiting``: for the loader."""

    layout: str
    gpus: int
    images: int
    compute: float
    exchanges: float
    exposed: float
    waiting: float
    megabytes_sent: float
    how: str

    @property
    def seconds(self) -> float:
        return self.compute + self.exchanges + self.exposed + self.waiting

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def minutes(self, epochs: int = links.EPOCHS) -> float:
        return epochs * links.IMAGES / self.images_per_second / 60


def rows() -> dict[str, LayerRow]:
    return {row.layer: row for row in layer_rows(CONFIG) if row.parameters}


def predicted(gpu: str, images: int) -> Compute:
    """By benchmarks.predict, for ``images`` on one GPU."""
    parts, seconds = step.predicted("training", images, GPUS[gpu], producers())
    times = {part.what: part.seconds for part in parts}
    optimizer, linear = times.pop("sgd_step"), times.pop("linear layers")
    back = sum(t for name, t in times.items() if name.split()[-1] in ("gradient", "backward", "mask"))
    front = sum(t for name, t in times.items() if name.endswith("forward") or name == "augment")
    back_linear, front = (1 - FORWARD_SHARE) * linear, front + FORWARD_SHARE * linear
    # The small kernels, copies and gaps belong to all of them alike.
    stretch = (seconds - optimizer) / (front + back + back_linear)
    backward: dict[str, float] = {}
    for names, share in ((LINEAR, back_linear), (tuple(n for n in rows() if n not in LINEAR), back)):
        work = {name: rows()[name].multiply_adds for name in names}
        backward |= {name: stretch * share * work[name] / sum(work.values()) for name in reversed(names)}
    return Compute(stretch * front, backward, optimizer, "predicted")


def buckets(sizes: dict[str, float]) -> list[tuple[str, float]]:
    """(the layer whose gradient completes it, bytes) of each bucket, as DistributedDataParallel fills them: last layer
    first. A weight and its bias are together."""
    found: list[tuple[str, float]] = []
    size, name = 0.0, ""
    for name in reversed(sizes):
        size += sizes[name]
        if size >= links.BUCKETS[min(len(found), 1)]:
            found.append((name, size))
            size = 0.0
    return [*found, (name, size)] if size else found


def all_reduce(size: float, ranks: int, cluster: Cluster, sharing: int = 1) -> float:
    """Seconds of the faster of NCCL's ring and tree, as its own cost model has them; ``sharing`` groups of GPUs of a
    node exchange at a time and share its cards."""
    if ranks == 1:
        return 0.0
    local = min(ranks, max(1, cluster.node // sharing))
    nodes = -(-ranks // local)
    bandwidth = cluster.inside.bandwidth
    if nodes > 1:
        bandwidth = min(bandwidth, cluster.cards / sharing * cluster.between.bandwidth)
    hops = 2 * (ranks - 1) - 2 * (nodes - 1)
    ring = hops * cluster.inside.latency + 2 * (nodes - 1) * cluster.between.latency
    tree = 2 * ((local - 1) * cluster.tree[0] + (nodes - 1).bit_length() * cluster.tree[1])
    return links.START.value + min(ring + 2 * (ranks - 1) / ranks * size / bandwidth, tree + 2 * size / bandwidth)


def exchange(size: float, ranks: int, cluster: Cluster, all_to_all: bool = False) -> float:
    """Seconds in which each of ``ranks`` sends ``size`` bytes: to its neighbour in a ring, or to all others."""
    if size == 0:
        return 0.0
    nodes = -(-ranks // cluster.node)
    latency = (ranks - nodes) * cluster.inside.latency + (nodes - 1) * cluster.between.latency
    seconds = size / cluster.inside.bandwidth
    if nodes > 1 and all_to_all:
        own = cluster.cards / cluster.node * cluster.between.bandwidth
        seconds = max(seconds, size * (ranks - cluster.node) / (ranks - 1) / own)
    elif nodes > 1:
        seconds = max(seconds, size / (cluster.cards * cluster.between.bandwidth))
    return links.START.value + latency + seconds


def train_step(layout: str, gpus: int, images: int, compute: Compute, cluster: Cluster, rate: float) -> Result:
    """A step of ``gpus`` GPUs with ``images`` each, in a layout of volume.LAYOUTS. ``rate``: images a second that a
    loader brings to one GPU. Raises ValueError for a number of GPUs that the layout cannot train on."""
    volume.check(layout, CONFIG.variant, gpus)
    plan = volume.Plan(CONFIG, layout, gpus, gpus * images, ITEMSIZE, ITEMSIZE)
    sent = {row.layer: row for row in volume.exchanged(plan)}
    towers = volume.TOWERS if layout == "towers" else 1
    group = towers if layout == "towers" else gpus

    def waits(way: Callable[[volume.Sent], int]) -> dict[str, float]:
        activations = {name: way(row) for name, row in sent.items() if name != "weights"}
        to_all = layout == "weird-trick"
        return {
            BEFORE.get(name, name): exchange(size, group, cluster, to_all and name == "fc8")
            for name, size in activations.items()
        }

    forward, backward = waits(lambda row: row.forward), waits(lambda row: row.backward)
    held = {name: row.parameters / (towers if name != "fc8" else 1) for name, row in rows().items()}
    if layout == "weird-trick":
        held = {name: count for name, count in held.items() if name not in ("fc6", "fc7")}
    # fc8 is whole in each tower, which has the images of both.
    extra = compute.backward["fc8"] if layout == "towers" else 0.0
    ready: dict[str, float] = {}
    time = extra / (1 - FORWARD_SHARE) * FORWARD_SHARE + compute.forward + sum(forward.values())
    for name, seconds in compute.backward.items():
        time += seconds * (2 if layout == "towers" and name == "fc8" else 1)
        ready[name] = time
        time += backward.get(name, 0.0)
    exchanged = [
        (ready[name], all_reduce(size * ITEMSIZE, plan.shares, cluster, towers)) for name, size in buckets(held)
    ]
    ended = max(time, in_turn(exchanged))
    optimizer = compute.optimizer * volume.held(plan) / sum(row.parameters for row in rows().values())
    waited = sum(forward.values()) + sum(backward.values())
    total = ended + optimizer
    return Result(
        layout,
        gpus,
        gpus * images,
        time - waited + optimizer,
        waited,
        ended - time,
        max(0.0, images / rate - total),
        sum(row.forward + row.backward for row in sent.values()) / 1e6,
        compute.how,
    )
