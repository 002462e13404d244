"""The machine for compute capability 9.0: a cluster of blocks at a time, whose threads wait for mbarriers.

A block's shared memory begins at its rank in the cluster << 24. An asynchronous copy is done as late as possible, the
newest first, and until then its destination reads as NaN. A thread whose mbarrier.try_wait fails goes on only when
no other one can, or when a phase is complete. An instruction of a whole warp or warp group waits for all its threads.
(PTX ISA, 9.7.9.27 for copies, 9.7.13.15 for mbarriers.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import matrices
from .arithmetic import dtype_of
from .machine import ALL, WARP, Array, Launch, Machine, Some
from .program import Instruction, PtxError
from .tensor_maps import MAP, Box
from .warp_groups import GROUP, WarpGroup, named, touching, wgmma

RANK = 24  # the bit of a shared address where the block's rank begins
MOST_SHARED = 227 * 1024  # bytes that a block may request
SPINS = 3  # rounds in which all threads may wait in vain
WIDTHS = {"wgmma": GROUP, **dict.fromkeys(("elect", "shfl", "stmatrix", "ldmatrix", "mma"), WARP)}
JUMPS = ("bra", "ret", "exit")


@dataclass
class Mbarrier:
    expected: int
    left: int  # arrivals
    bytes: int = 0
    phase: int = 0


class HopperMachine(Machine):
    """Runs a kernel's clusters, each as one block of all their threads."""

    def __init__(self, launch: Launch) -> None:
        self.cluster, self.block_threads = launch.cluster, launch.threads
        self.next_copy = 0 if launch.order == "forward" else -1
        self.in_products = named(launch.kernel)
        super().__init__(replace(launch, threads=launch.threads * launch.cluster))
        self.widths = [WARP if i.op[:2] == ["bar", "warp"] else WIDTHS.get(i.op[0], 0) for i in self.kernel.code]
        unit = GROUP if self.cluster > 1 else WARP  # otherwise groups would not begin with a block
        if self.block_threads % unit or len(self.shared) > MOST_SHARED:
            raise PtxError(f"a block of {self.block_threads} threads with {len(self.shared)} bytes of shared memory")
        self.block_shared = len(self.shared)
        self.shared = np.empty(self.cluster * self.block_shared, np.uint8)

    def special_registers(self, threads: int) -> dict[str, Any]:
        special = super().special_registers(self.block_threads)
        special |= {name: np.tile(v, self.cluster) for name, v in special.items() if v.ndim}
        self.rank = np.repeat(np.arange(self.cluster, dtype=np.uint32), self.block_threads)
        special |= {"%cluster_ctarank": self.rank, "%cluster_nctarank": np.uint32(self.cluster)}
        special |= {f"%cluster_ctaid.{axis}": self.rank if axis == "x" else np.uint32(0) for axis in "xyz"}
        return special | {f"%cluster_nctaid.{axis}": np.uint32(self.cluster if axis == "x" else 1) for axis in "xyz"}

    # ---- choosing the threads that go on

    def run(self, grid: tuple[int, int, int]) -> None:
        self.grid = grid
        with np.errstate(all="ignore"):
            for z, y, x in np.ndindex(grid[2], grid[1], grid[0] // self.cluster):
                self.block = (x * self.cluster, y, z)
                self.run_block()

    def run_block(self) -> None:
        self.shared.fill(0xFF)
        # Bytes written by instructions: asynchronous ones may not read them before a fence.
        self.written = np.zeros(len(self.shared), bool)
        self.pending.clear()
        self.mbarriers: dict[int, Mbarrier] = {}
        self.copies: list[Callable[[], None]] = []
        self.stores: dict[int, list[list[Callable[[], None]]]] = {}
        self.groups = {first: WarpGroup() for first in range(0, self.threads, GROUP)}
        self.touched = np.ones((len(self.in_products), self.threads), bool)
        self.barriers: dict[tuple[int, int], list[int]] = {}
        self.arrivals = np.zeros(self.threads, int)  # at the cluster's barrier
        self.at, self.end, spins = np.zeros(self.threads, int), len(self.steps), 0
        self.waits, self.joins, self.parked, self.yields = (np.zeros(self.threads, bool) for _ in range(4))
        while (self.at < self.end).any():
            ready = (self.at < self.end) & ~(self.waits | self.parked | self.yields)
            self.progress = True
            if ready.any():
                self.turn = next(n for n, turn in enumerate(self.turns) if ready[turn].any())
                those = self.turns[self.turn]
                pc = int(self.at[those][ready[those]].min())
                beyond = self.at[those][self.at[those] > pc]
                self.progress = False
                here = those[ready[those] & (self.at[those] == pc)]
                self.go(pc, int(beyond.min()) if len(beyond) else self.end, here)
            elif self.copies:
                self.copies.pop(self.next_copy)()
            elif self.yields.any() and spins < SPINS:
                self.yields[:], self.progress, spins = False, False, spins + 1
            else:
                stand = sorted({self.kernel.code[max(pc - 1, 0)].text for pc in self.at[self.at < self.end]})
                raise PtxError(f"all threads wait, after: {'; '.join(stand)}")
            spins = 0 if self.progress else spins
        unread = any(len(group) for groups in self.stores.values() for group in groups)
        if self.copies or unread or any(group.sums for group in self.groups.values()):
            raise PtxError("a block ends before what it began asynchronously")

    def go(self, pc: int, limit: int, here: Array) -> None:
        """Run these threads until they diverge, jump, wait, end, or reach others."""
        while pc < limit:
            instruction, step = self.kernel.code[pc], self.steps[pc]
            kind = instruction.op[0]
            if width := self.widths[pc]:
                self.at[here], self.parked[here] = pc, True
                here = np.nonzero(self.parked & (self.at == pc))[0]
                here = here[np.bincount(here // width, minlength=self.threads // width)[here // width] == width]
                self.parked[here] = False
                if not len(here):
                    return
            self.issued(pc, here)
            if kind in JUMPS:
                taken = self.guarded(instruction, here)
                self.at[here] = pc + 1
                self.at[taken] = self.kernel.labels[instruction.operands[0]] if kind == "bra" else self.end
                if len(taken):
                    return
            chosen = self.guarded(instruction, here)
            if step is not None and len(chosen):
                try:
                    step(ALL if len(chosen) == self.threads else chosen)
                except PtxError as error:
                    raise PtxError(f"{error}: {instruction.text[:200]}") from None
            pc += 1
            if (kind in ("bar", "barrier") and not self.widths[pc - 1]) or self.yields[here].any():
                break
        self.at[here] = pc

    def barrier(self, i: Instruction) -> Callable[[Some], None]:
        """``bar.sync`` and ``bar.arrive`` of a block's threads; the cluster's barrier."""
        if i.op[:2] == ["barrier", "cluster"] and i.op[2] == "arrive":
            return self.arrive_at_cluster
        if i.op[:2] == ["barrier", "cluster"] and i.op[2] == "wait":

            def wait(some: Some) -> None:
                self.waits[some] = self.joins[some] = True
                self.release_cluster()

            return wait
        if i.op[0] != "bar" or i.op[1] not in ("sync", "arrive"):
            raise PtxError(f"not known: {i.text}")
        name = self.source(i.operands[0], "u32")
        count = self.source(i.operands[1], "u32") if len(i.operands) > 1 else lambda some: np.uint32(self.block_threads)

        def run(some: Some) -> None:
            for thread, number, expected in self.each(some, name, count):
                key = (thread // self.block_threads, number)
                arrived = self.barriers.setdefault(key, [])
                arrived.append(thread)
                self.waits[thread] = i.op[1] == "sync"
                if len(arrived) == expected:
                    self.waits[self.barriers.pop(key)] = False
                    self.progress = True

        return run

    def arrive_at_cluster(self, some: Some) -> None:
        self.arrivals[some] += 1
        self.release_cluster()

    def release_cluster(self) -> None:
        released = self.joins & (self.arrivals <= self.arrivals.min())
        self.waits[released] = self.joins[released] = False
        self.progress = True

    # ---- operands and shared memory

    def each(self, some: Some, *reads: Callable[[Some], Any]) -> Iterator[tuple[int, ...]]:
        """Thread by thread: its index and its values."""
        threads = np.arange(self.threads)[some]
        values = [np.broadcast_to(read(some), threads.shape).tolist() for read in reads]
        yield from zip(threads.tolist(), *values, strict=True)

    def source(self, text: str, kind: str) -> Callable[[Some], Any]:
        if text in self.kernel.shared:
            own = (self.rank << np.uint32(RANK)) + np.uint32(self.addresses[text])
            wide = own.astype(dtype_of(kind, "u")).view(dtype_of(kind))
            return lambda some: wide[some]
        if text == "%ctaid.x":
            return lambda some: np.uint32(self.block[0]) + self.rank[some]
        return super().source(text, kind)

    def own(self, thread: int) -> np.uint64:
        """The beginning of the shared memory of this thread's block."""
        return np.uint64(int(self.rank[thread]) << RANK)

    def bytes_at(self, space: str, addresses: Array, size: int) -> list[tuple[Some, Array, Array]]:
        if space != "shared":
            return super().bytes_at(space, addresses, size)
        rank, offset = addresses >> np.uint64(RANK), addresses & np.uint64((1 << RANK) - 1)
        if (offset % np.uint64(size)).any():
            raise PtxError(f"an address is no multiple of {size}")
        if (rank >= self.cluster).any() or (offset + np.uint64(size) > self.block_shared).any():
            raise PtxError(f"an address is beyond the {self.block_shared} bytes of shared memory")
        first = (rank * np.uint64(self.block_shared) + offset).astype(np.int64)
        return [(ALL, self.shared, first[:, None] + np.arange(size))]

    def put(self, space: str, addresses: Array, values: Array, fenced: bool = False) -> None:
        super().put(space, addresses, values)
        if space == "shared":
            self.written[self.bytes_at(space, addresses, values.shape[1])[0][2]] = not fenced

    def fetch_fenced(self, indices: Array) -> Array:
        """These bytes of shared memory as an asynchronous instruction reads them."""
        if self.written[indices].any():
            raise PtxError("no fence.proxy.async stands before an asynchronous read")
        return self.shared[indices]

    # ---- mbarriers

    def mbarrier(self, i: Instruction) -> Callable[[Some], None]:
        kind = i.op[1]
        if kind == "init":
            at, count = self.address(i.operands[0]), self.source(i.operands[1], "u32")

            def init(some: Some) -> None:
                for _, address, n in self.each(some, at, count):
                    self.fetch("shared", np.array([address], np.uint64), 8)
                    self.mbarriers[address] = Mbarrier(n, n)

            return init
        if kind == "arrive" and i.operands[0] == "_" and i.op[2] != "noComplete":
            at = self.address(i.operands[1])
            expects = i.op[2] == "expect_tx"
            if len(i.operands) > 2 + expects or (not expects and not i.op[2].startswith("shared")):
                raise PtxError(f"not known: {i.text}")
            size = self.source(i.operands[2], "u32") if expects else lambda some: np.uint32(0)

            def arrive(some: Some) -> None:
                for _, address, n in self.each(some, at, size):
                    self.change(address, 1, n)

            return arrive
        if i.op[1:3] == ["try_wait", "parity"]:
            at, parity, write = (
                self.address(i.operands[1]),
                self.source(i.operands[2], "u32"),
                self.target(i.operands[0]),
            )

            def wait(some: Some) -> None:
                found = [self.find(address).phase & 1 != odd & 1 for _, address, odd in self.each(some, at, parity)]
                write(some, np.array(found))
                self.yields[np.arange(self.threads)[some][~np.array(found)]] = True

            return wait
        raise PtxError(f"not known: {i.text}")

    def find(self, address: int) -> Mbarrier:
        if address not in self.mbarriers:
            raise PtxError(f"no mbarrier is at {address:#x}")
        return self.mbarriers[address]

    def change(self, address: int, arrivals: int, expected: int) -> None:
        """Counts arrivals and expected bytes; the last of either completes a phase."""
        barrier = self.find(address)
        barrier.left -= arrivals
        barrier.bytes += expected
        self.progress = True
        if barrier.left < 0:
            raise PtxError("more arrive at an mbarrier than it expects")
        if barrier.left == 0 and barrier.bytes == 0:
            barrier.left = barrier.expected
            barrier.phase += 1
            self.yields[:] = False

    # ---- copies of boxes

    def box(self, at: int, where: Sequence[int], taps: Sequence[int], im2col: bool) -> Box:
        if at % 64 or at + MAP.itemsize > len(self.parameters):
            raise PtxError("no descriptor is there")
        return Box(self.parameters[at : at + MAP.itemsize].copy(), where, taps, im2col)

    def bulk(self, i: Instruction) -> Callable[[Some], None]:
        if i.op[3] == "commit_group":

            def commit(some: Some) -> None:
                for thread, *_ in self.each(some):
                    self.stores.setdefault(thread, [[]]).append([])

            return commit
        if i.op[3] == "wait_group":
            left = int(i.operands[0])

            def wait(some: Some) -> None:
                for thread, *_ in self.each(some):
                    groups = self.stores.setdefault(thread, [[]])
                    while len(groups) - 1 > left:
                        for store in groups.pop(0):
                            store()

            return wait
        known = {"im2col", "im2col_no_offs", "bulk_group", "mbarrier::complete_tx::bytes", "multicast::cluster"}
        if i.op[3:5] not in (["tensor", "2d"], ["tensor", "4d"]) or set(i.op[7:]) - known - {"L2::cache_hint"}:
            raise PtxError(f"not known: {i.text}")
        if i.op[5:7] == ["shared::cluster", "global"] and "mbarrier::complete_tx::bytes" in i.op:
            return self.load_box(i)
        if i.op[5:7] == ["global", "shared::cta"] and "bulk_group" in i.op:
            return self.store_box(i)
        raise PtxError(f"not known: {i.text}")

    def place(self, text: str) -> list[Callable[[Some], Any]]:
        """Functions that read ``[descriptor, {coordinates}]``."""
        name, _, coordinates = text.strip("[] ").partition(",")
        return [self.source(name.strip(), "u64"), *(self.source(c, "s32") for c in self.vector(coordinates))]

    def load_box(self, i: Instruction) -> Callable[[Some], None]:
        to, at, signal = self.address(i.operands[0]), self.place(i.operands[1]), self.address(i.operands[2])
        im2col, rest, rank = "im2col" in i.op, i.operands[3:], len(at)
        taps = [self.source(text, "u16") for text in self.vector(rest.pop(0))] if im2col else []
        one = np.uint64(1)
        aimed = lambda some: one << (to(some) >> np.uint64(RANK))  # noqa: E731
        blocks = self.source(rest[0], "u16") if "multicast::cluster" in i.op else aimed

        def issue(box: Box, address: int, barrier: int) -> None:
            addresses = box.shared(address)
            self.copied("load", box.size * len(addresses))
            self.put("shared", addresses, np.full((len(addresses), box.size), 0xFF, np.uint8), fenced=True)

            def arrive() -> None:
                self.put("shared", addresses, box.read(self), fenced=True)
                self.change(barrier, 0, -box.size * len(addresses))

            self.copies.append(arrive)

        def run(some: Some) -> None:
            for _, address, barrier, mask, *values in self.each(some, to, signal, blocks, *at, *taps):
                box = self.box(values[0], values[1:rank], values[rank:], im2col)
                if mask >> self.cluster:
                    raise PtxError("a copy goes to a block that the cluster has not")
                for block in (block for block in range(self.cluster) if mask >> block & 1):
                    base, low = block << RANK, (1 << RANK) - 1
                    issue(box, base | address & low, base | barrier & low)
            self.progress = True

        return run

    def store_box(self, i: Instruction) -> Callable[[Some], None]:
        at, source, im2col = self.place(i.operands[0]), self.address(i.operands[1]), "im2col_no_offs" in i.op

        def issue(box: Box, address: int) -> Callable[[], None]:
            indices = self.bytes_at("shared", box.shared(address), box.size)[0][2]
            given = self.fetch_fenced(indices)
            self.copied("store", indices.size)

            def store() -> None:
                if not np.array_equal(self.fetch_fenced(indices), given):
                    raise PtxError("what is copied changes on its way")
                box.write(self, given)

            return store

        def run(some: Some) -> None:
            for thread, address, *values in self.each(some, source, *at):
                store = issue(self.box(values[0], values[1:], (0, 0), im2col), address)
                self.stores.setdefault(thread, [[]])[-1].append(store)

        return run

    # ---- instructions

    def count(self, some: Some) -> int:
        return matrices.count(self, some)

    def step(self, i: Instruction) -> Callable[[Some], None] | None:
        step = self.hopper_step(i)
        return step if step is None or i.op[0] == "wgmma" else touching(self, i, step)

    def hopper_step(self, i: Instruction) -> Callable[[Some], None] | None:
        name = i.op[0]
        if name in ("bar", "barrier") and i.op[1] != "warp":
            return self.barrier(i)
        if name == "mbarrier":
            return self.mbarrier(i)
        if name == "wgmma":
            return wgmma(self, i)
        if i.op[:3] == ["cp", "async", "bulk"]:
            return self.bulk(i)
        if i.op[:3] == ["fence", "proxy", "async"]:
            return lambda some: self.written.fill(False)
        if i.op[:2] == ["prefetch", "tensormap"]:
            return None
        if name in ("elect", "stmatrix", "mapa"):
            return getattr(self, name)(i)  # type: ignore[no-any-return]
        return super().step(i)

    def elect(self, i: Instruction) -> Callable[[Some], None]:
        lane, leads = (self.target(text) for text in i.operands[0].split("|"))
        members = self.source(i.operands[1], "u32")

        def run(some: Some) -> None:
            if (np.asarray(members(some)) != 0xFFFFFFFF).any():
                raise PtxError("a part of a warp elects")
            first = matrices.whole_warps(self, some).reshape(-1) % WARP == 0
            lane(some, np.zeros(len(first), np.uint32))
            leads(some, first)

        return run

    def mapa(self, i: Instruction) -> Callable[[Some], None]:
        write, at, rank = self.target(i.operands[0]), *(self.source(text, "u32") for text in i.operands[1:])
        if i.op[1:] != ["shared::cluster", "u32"]:
            raise PtxError(f"not known: {i.text}")
        low = np.uint32((1 << RANK) - 1)
        return lambda some: write(some, at(some) & low | rank(some) << np.uint32(RANK))

    def stmatrix(self, i: Instruction) -> Callable[[Some], None]:
        """Matrices of 8 x 8 values of 16 bits from fragments, a row, or with trans a column, to each lane's address."""
        found = re.search(r"\.x([124])\.", i.text)
        if found is None or "m8n8" not in i.op or i.op[-1] != "b16":
            raise PtxError(f"not known: {i.text}")
        address, names = self.address(i.operands[0]), self.vector(i.operands[1])
        sources, number = [self.source(name, "u32") for name in names], int(found[1])

        def run(some: Some) -> None:
            warps = len(matrices.whole_warps(self, some))
            addresses = address(some).reshape(warps, WARP)[:, : 8 * number]
            rows = np.empty((warps, number, 8, 4), np.uint32)
            for n, read in enumerate(sources):
                rows[:, n] = np.broadcast_to(read(some), (warps * WARP,)).reshape(warps, 8, 4)
            values = rows.view(np.uint16)  # [warps, number, 8, 8]
            values = np.ascontiguousarray(values.swapaxes(2, 3)) if "trans" in i.op else values
            self.put("shared", addresses.reshape(-1), values.view(np.uint8).reshape(-1, 16))

        return run
