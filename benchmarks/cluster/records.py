"""The published records, from their published hardware: what the model says of them, and which inputs it lacks."""

from __future__ import annotations

from typing import NamedTuple

from . import links, model
from .allreduce import Link
from .links import Cluster, Fact

NEAR = 0.25  # a record is reproduced if the prediction is this near


class Record(NamedTuple):
    """``rates``: images a second of one such GPU, by where the number is from."""

    name: str
    gpus: int
    images: int  # of one GPU
    epochs: int
    minutes: float
    cluster: Cluster
    rates: dict[str, Fact]
    missing: tuple[str, ...]


class Found(NamedTuple):
    record: Record
    source: str
    minutes: float

    @property
    def ratio(self) -> float:
        """Predicted over published minutes."""
        return self.minutes / self.record.minutes

    @property
    def near(self) -> bool:
        return 1 - NEAR <= self.ratio <= 1 + NEAR


def _nodes(inside: float, network: float) -> Cluster:
    steps = links.TREE_NVLINK.value, links.TREE_NET.value
    return Cluster(Link(links.NVLINK_LATENCY.value, inside), Link(links.NET_LATENCY.value, network), steps, cards=1)


RECORDS = (
    Record(
        "512 V100, Sun 2019 (arXiv 1902.06855)",
        512,
        128,
        95,
        1.5,
        _nodes(130e9, 0.9 * 56e9 / 8),
        {
            "its own speed-up of 410.2 on 512": Fact(3_297, "derived", "from the time that is to be predicted"),
            "TensorFlow, fp16, batch 3,072": Fact(9_319, "published", "Lambda Labs, a network without LRN and groups"),
        },
        (
            "the time of one V100's step at 128 images",
            "the share of gradients that its sparse exchange leaves out",
            "cards a node: the abstract has 56 Gb/s alone, one a node is assumed, as are 128 images a GPU",
        ),
    ),
    Record(
        "1,024 P40, Jia 2018 (arXiv 1807.11205)",
        1024,
        64,
        95,
        4.0,
        _nodes(10e9, 0.9 * 100e9 / 8),
        {"GTX 1080 Ti, TensorFlow, fp16": Fact(2_914, "published", "the same chip, with 1.4 times the bandwidth")},
        (
            "the time of one P40's step at 64 images",
            "its network: 100 Gb/s a node are assumed",
            "the exact time: the abstract says within 4 minutes, and not what it includes",
        ),
    ),
)
"""Of the batch of 65,536 that the second abstract names. Eight GPUs a node are assumed in both."""


def compare() -> list[Found]:
    """Each record with each known rate of its GPU. A step has the proportions that are predicted for an H100."""
    found = []
    for record in RECORDS:
        parts = model.predicted("h100", record.images)
        for source, rate in record.rates.items():
            compute = parts.scaled(record.images / rate.value, rate.known)
            step = model.train_step("data", record.gpus, record.images, compute, record.cluster, float("inf"))
            found.append(Found(record, source, step.minutes(record.epochs)))
    return found
