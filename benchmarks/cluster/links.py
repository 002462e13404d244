"""What the scaling model assumes of links, nodes and loaders: each number with its source, and how well it is known.

Nothing here was measured by this project, except where a fact says so.
"""

from __future__ import annotations

from typing import NamedTuple

from .allreduce import Link


class Fact(NamedTuple):
    """``known``: "source code", "vendor" (its engineers in public), "data sheet", "measured here", or "assumed"."""

    value: float
    known: str
    reason: str


NVLINK_LATENCY = Fact(3.4e-6, "source code", "NCCL's tuning.cc: a ring's step over NVLink, protocol Simple")
NET_LATENCY = Fact(9.6e-6, "source code", "NCCL's tuning.cc: a ring's step over the network, protocol Simple")
TREE_NVLINK = Fact(28e-6, "source code", "NCCL's tuning.cc: a tree's step over NVLink, with its chunk of 256 KB")
TREE_NET = Fact(50e-6, "source code", "NCCL's tuning.cc: a tree's step over the network, with its chunk of 256 KB")
START = Fact(8.4e-6, "source code", "NCCL's tuning.cc: what any ring costs, protocol Simple")
TCP_LATENCY = Fact(30e-6, "assumed", "a step over TCP through the kernels of two hosts: 20 to 50 us")

NVLINK = {
    "h100": Fact(370e9, "vendor", "NVIDIA/nccl-tests#212: what NCCL reaches of 450 GB/s, without NVLink SHARP"),
    "h200": Fact(370e9, "vendor", "as an H100: the same links"),
    "a100": Fact(235e9, "source code", "NCCL's tuning.cc: its bound for compute capability 8.0"),
    "b200": Fact(740e9, "assumed", "twice an H100's, as the data sheets' 900 GB/s are twice its 450"),
}
"""Bytes a second of one GPU to the others of its node, each way, by GPU."""

NIC = {
    "infiniband": Fact(46e9, "vendor", "NVIDIA/nccl-tests#290: 46 to 48 GB/s of a 400 Gb/s card"),
    "ethernet": Fact(11e9, "assumed", "100 Gb/s less a tenth for TCP"),
}
"""Bytes a second of a network card, each way."""

NICS = {"infiniband": 8, "ethernet": 1}  # of a node: one a GPU, as in a DGX; one for all
GPUS_A_NODE = 8
CORES_A_GPU = Fact(14, "data sheet", "a DGX H100 has 112 cores for 8 GPUs")
LOADER = Fact(25_000, "measured here", "packed images a second and core from the page cache, on 2 cores (docs/data.md)")
PCIE = Fact(55e9, "vendor", "bytes a second to a GPU over PCIe 5.0 x16; images are copied as bytes")
IMAGE_BYTES = 256 * 256 * 3

BUCKETS = (2**20, 25 * 2**20)
"""Bytes at which DistributedDataParallel closes its first bucket of gradients, and the others."""

IMAGES = 1_281_167  # of ImageNet's training set
EPOCHS = 90

BLIND = (
    "multiprocessors and memory bandwidth that NCCL's kernels take from the backward",
    "other jobs' traffic, and switches with fewer links up than down",
    "stragglers: every step is as slow as its slowest GPU",
    "NCCL's protocols for small messages, and trees within a node",
    "NVLink SHARP and reductions in switches",
    "evaluation, checkpoints, and the start of the processes",
    "kernels on half of the channels, taken to be as efficient as on all",
    "exchanges of activations and of gradients that share a link at one time",
    "whether a batch that large still learns",
)
"""What the model does not see."""


class Cluster(NamedTuple):
    """``inside``: a GPU's link in its node; ``between``: a network card. A node has ``node`` GPUs, ``cards`` cards."""

    inside: Link
    between: Link
    tree: tuple[float, float]  # seconds of a tree's step inside a node, between nodes
    node: int = GPUS_A_NODE
    cards: int = 8


def cluster(gpu: str, network: str) -> Cluster:
    """Nodes of eight ``gpu`` (of NVLINK) over ``network`` (of NIC)."""
    step, tree = (NET_LATENCY, TREE_NET) if network == "infiniband" else (TCP_LATENCY, TREE_NET)
    return Cluster(
        Link(NVLINK_LATENCY.value, NVLINK[gpu].value),
        Link(step.value, NIC[network].value),
        (TREE_NVLINK.value, tree.value),
        cards=NICS[network],
    )


def loader_rate() -> float:
    """Images a second that reach one GPU."""
    return min(CORES_A_GPU.value * LOADER.value, PCIE.value / IMAGE_BYTES)
