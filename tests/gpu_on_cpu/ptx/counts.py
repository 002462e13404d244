"""Counts what a kernel does: instructions that warps issue, bytes that blocks touch, turns of shared memory.

The counts are of PTX. ``../machine_code.py`` turns those of instructions into ones of machine code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .hopper import HopperMachine
from .machine import WARP, Launch, Machine

Array = np.ndarray[Any, Any]
SECTOR = 32  # bytes: what L2 and DRAM move at least
BANKS = 32  # of shared memory, each of 4 bytes a clock
WORD = 4
# Blocks that are run of a larger grid: enough for a mean of borders and middles, few enough for a second of work.
SAMPLE = 12
# Instructions of PTX by warps after which no further block is begun. A block of a persistent grid does many times more.
ENOUGH = 100_000


@dataclass
class Counts:
    """Of one launch; what is counted of ``sampled`` blocks is not yet scaled to the ``blocks`` of the grid."""

    kernel: str
    blocks: int
    threads: int
    shared: int  # bytes a block, static ones included
    sampled: int
    issued: Array  # by instruction of the kernel: warps that issued it
    # Distinct bytes (whole sectors) of global memory that each block touches, summed up. And of each buffer, in the
    # order of the launch, its bytes and the share that these blocks together load and store.
    block_bytes: int = 0
    block_loads: int = 0  # the loaded ones of them
    buffers: list[tuple[int, float, float]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)  # sectors that warps ask for: "load", "store"
    turns: int = 0  # of shared memory's banks
    ideal_turns: int = 0
    copied: Counter[str] = field(default_factory=Counter)  # bytes by TMA
    products: int = 0  # multiplications of tensor cores

    @property
    def cold(self) -> float:
        """The share of loaded sectors that their block had not loaded before."""
        return min(1.0, self.block_loads / max(SECTOR * self.asked["load"], 1))

    @property
    def scale(self) -> float:
        return self.blocks / self.sampled


def spread(blocks: int, wanted: int) -> Sequence[int]:
    """Numbers of this many blocks of a grid, in unequal steps: equal ones could meet the same place of every plane."""
    if wanted >= blocks:
        return range(blocks)
    return list(dict.fromkeys(int(blocks * (n * 2**0.5 % 1.0)) for n in range(wanted)))


class Counting(Machine):
    """A machine that counts, in ``counts``; of a large grid it runs a sample of ``most`` blocks."""

    most = SAMPLE

    def __init__(self, launch: Launch) -> None:
        super().__init__(launch)
        self.counts = Counts(
            launch.kernel.name, 0, self.threads, len(self.shared), 0, np.zeros(len(self.kernel.code), np.int64)
        )
        # By buffer and by "load" or "store": which sectors were touched, by this block and by any.
        self.by_block: dict[tuple[int, str], Array] = {}
        self.by_launch: dict[tuple[int, str], Array] = {}

    def run(self, grid: tuple[int, int, int]) -> None:
        blocks = grid[0] * grid[1] * grid[2]
        cluster = getattr(self, "cluster", 1)  # one run does a cluster's blocks, along x
        chosen = [cluster * n for n in spread(blocks // cluster, self.most)]
        self.grid, self.counts.blocks = grid, blocks
        whole = len(chosen) * cluster == blocks
        with np.errstate(all="ignore"):
            for n in chosen:
                if not whole and self.counts.issued.sum() > ENOUGH:
                    break
                self.counts.sampled += cluster
                self.block = (n % grid[0], n // grid[0] % grid[1], n // (grid[0] * grid[1]))
                self.by_block.clear()
                self.run_block()
                for (_, what), touched in self.by_block.items():
                    self.counts.block_bytes += SECTOR * int(touched.sum())
                    self.counts.block_loads += SECTOR * int(touched.sum()) * (what == "load")
        for n, (_, memory) in enumerate(self.buffers):
            parts = (self.by_launch[n, what].sum() if (n, what) in self.by_launch else 0 for what in ("load", "store"))
            load, store = (min(1.0, float(SECTOR * part / len(memory))) for part in parts)
            self.counts.buffers.append((len(memory), load, store))

    def issued(self, pc: int, here: Array) -> None:
        self.counts.issued[pc] += len(np.unique(here // WARP))

    def accessed(self, what: str, space: str, some: Any, addresses: Array, size: int) -> None:
        if len(addresses) == 0 or space == "param":
            return
        warps = np.arange(self.threads)[some] // WARP
        if space == "global":
            self.touch(what, warps, addresses.astype(np.int64), size)
        else:
            self.count_turns(np.arange(self.threads)[some], addresses.astype(np.int64) // WORD, size)

    def touch(self, what: str, warps: Array, addresses: Array, size: int) -> None:
        sectors = addresses // SECTOR  # an access is a multiple of its size, so it lies in one
        self.counts.asked[what] += len(np.unique(warps * (1 << 44) + sectors))
        left = np.ones(len(addresses), bool)  # buffers may overlap: views of one tensor
        for n, (base, memory) in enumerate(self.buffers):
            inside = left & (addresses >= base) & (addresses < base + len(memory))
            left &= ~inside
            if inside.any():
                count = len(memory) // SECTOR + 2
                for touched in (self.by_block, self.by_launch):
                    touched.setdefault((n, what), np.zeros(count, bool))[sectors[inside] - base // SECTOR] = True

    def count_turns(self, threads: Array, words: Array, size: int) -> None:
        """A warp's accesses go in phases of 128 bytes. A phase takes the turns of the bank asked for most words."""
        lanes = WARP if size <= WORD else WARP * WORD // size
        wide = max(size // WORD, 1)
        phase = threads // lanes
        asked = (phase[:, None] * (1 << 32) + words[:, None] + np.arange(wide)).ravel()
        asked = np.unique(asked)  # of one word all lanes read at once
        phases, number = np.unique(asked >> 32, return_inverse=True)
        banks = np.zeros((len(phases), BANKS), np.int64)
        np.add.at(banks, (number, asked % BANKS), 1)
        self.counts.turns += int(banks.max(1).sum())
        self.counts.ideal_turns += int(-(-banks.sum(1) // BANKS).sum())

    def copied(self, what: str, size: int) -> None:
        self.counts.copied[what] += size

    def multiplied(self, products: int) -> None:
        self.counts.products += products


class CountingMachine(Counting):
    """Of kernels for compute capability 8.0, and those for 9.0 that need no more."""


class CountingHopperMachine(Counting, HopperMachine):
    """Of kernels for compute capability 9.0."""
