"""A machine for PTX: one block of threads at a time, each register an array over its threads.

Threads at one instruction do it together; otherwise the threads furthest behind go on. In the orders "forward" and
"backward" each warp runs alone until it waits, which shows the effect of a missing barrier. Shared memory and registers
begin as NaN. Every address must be inside a named buffer, and a multiple of the access. Data copied by cp.async arrive
when they are waited for, and until then read as NaN. An unknown instruction is an error.
(PTX ISA 8.x, sections 9.7.1 to 9.7.14; fragments of matrices as in 9.7.14.5.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import approximate, calls, fields, matrices, packed
from .arithmetic import BINARY, COMPARE, UNARY, convert, dtype_of, fused
from .program import Instruction, Kernel, PtxError

Array = np.ndarray[Any, Any]
# A set of threads: all of a block, or their indices.
Some = Any
ALL = slice(None)
WARP = 32
# Modifiers that no instruction here supports.
CHANGES = {"sat", "satfinite", "relu", "xorsign", "cc"}


@dataclass(frozen=True)
class Launch:
    """A kernel, the memory that it may touch, its arguments, threads of a block, and bytes of its shared memory.

    ``order`` is "together", "forward" or "backward"; ``cluster`` is the number of blocks along x in a cluster.
    """

    kernel: Kernel
    buffers: Sequence[Array]
    arguments: Sequence[bytes]
    threads: int
    shared: int
    order: str = "together"
    cluster: int = 1


class Machine:
    """Runs a kernel's blocks."""

    def __init__(self, launch: Launch) -> None:
        kernel, threads, shared = launch.kernel, launch.threads, launch.shared
        self.kernel, self.threads = kernel, threads
        everyone = np.arange(threads)
        warps = np.split(everyone, range(WARP, threads, WARP))
        self.turns = {"together": [everyone], "forward": warps, "backward": warps[::-1]}[launch.order]
        self.buffers = [(b.ctypes.data, b.view(np.uint8).reshape(-1)) for b in launch.buffers]
        self.addresses, parameters = {}, b""
        for (name, size), value in zip(kernel.parameters, launch.arguments, strict=True):
            parameters += bytes(-len(parameters) % min(size & -size, 8))
            self.addresses[name] = len(parameters)
            parameters += value
        self.parameters = np.frombuffer(parameters, np.uint8)
        for name, size in kernel.shared.items():
            self.addresses[name] = 0 if size == 0 else shared
            shared += size
        self.shared = np.empty(shared, np.uint8)
        self.registers: dict[str, Array] = {}
        for prefix, (kind, count) in kernel.registers.items():
            block = np.empty((count, threads), dtype_of(kind, "u"))
            block.view(np.uint8).fill(1 if kind == "pred" else 0xFF)
            self.registers |= {f"{prefix}{i}": block[i] for i in range(count)}
        self.special = self.special_registers(threads)
        # Copies on their way: (threads that began them, the number of each's group, destinations, values).
        self.turn, self.pending = 0, list[tuple[Array, Array, Array, Array]]()
        self.groups_begun = np.zeros(threads, int)
        self.steps = [self.known(instruction) for instruction in kernel.code]
        self.end = len(self.steps)

    def special_registers(self, threads: int) -> dict[str, Any]:
        lane = np.arange(threads, dtype=np.uint32)
        special: dict[str, Any] = {"%tid.x": lane, "%tid.y": np.uint32(0), "%tid.z": np.uint32(0)}
        special |= {"%laneid": lane % WARP, "%warpid": lane // WARP}
        return special | {f"%ntid.{axis}": np.uint32(threads if axis == "x" else 1) for axis in "xyz"}

    def run(self, grid: tuple[int, int, int]) -> None:
        self.grid = grid
        with np.errstate(all="ignore"):
            for z, y, x in np.ndindex(grid[::-1]):
                self.block = (x, y, z)
                self.run_block()

    def run_block(self) -> None:
        self.shared.fill(0xFF)
        self.pending.clear()
        # Each thread's next instruction: the end if it is done, the one after its barrier if it waits.
        self.at, self.waits = np.zeros(self.threads, int), np.zeros(self.threads, bool)
        while (self.at < self.end).any():
            runs = ~self.waits & (self.at < self.end)
            if not runs.any():
                if len(set(self.at[self.waits])) > 1:
                    raise PtxError("threads wait for each other at different barriers")
                self.waits[:] = False
                continue
            self.turn = next(n for n, turn in enumerate(self.turns) if runs[turn].any())
            those = self.turns[self.turn][runs[self.turns[self.turn]]]
            pc = int(self.at[those].min())
            others = self.at[those][self.at[those] > pc]
            self.go(pc, int(others.min()) if len(others) else self.end, those[self.at[those] == pc])

    def go(self, pc: int, limit: int, here: Array) -> None:
        """Run these threads until they diverge, wait, end, or reach others."""
        everyone: Some = ALL if len(here) == self.threads else here
        alone = len(here) == int((self.at < self.end).sum())
        while pc < limit:
            instruction, step = self.kernel.code[pc], self.steps[pc]
            kind = instruction.op[0]
            self.issued(pc, here)
            chosen = self.guarded(instruction, here)
            if kind in ("bra", "ret", "exit"):
                target = self.kernel.labels[instruction.operands[0]] if kind == "bra" else self.end
                if 0 < len(chosen) < len(here):
                    self.at[here], self.at[chosen] = pc + 1, target
                    return
                pc = target if len(chosen) else pc + 1
                continue
            if kind == "bar" and instruction.op[1] != "warp" and not alone:
                if step is not None:
                    raise PtxError(f"threads part before {instruction.text}")
                self.at[here], self.waits[here] = pc + 1, True
                return
            if step is not None and len(chosen):
                try:
                    step(everyone if len(chosen) == len(here) else chosen)
                except PtxError as error:
                    raise PtxError(f"{error}: {instruction.text}") from None
            pc += 1
        self.at[here] = pc

    # ---- what counts.py counts

    def issued(self, pc: int, here: Array) -> None:
        """Called before these threads do an instruction."""

    def accessed(self, what: str, space: str, some: Some, addresses: Array, size: int) -> None:
        """Called before each of these threads loads or stores ``size`` bytes."""

    def copied(self, what: str, size: int) -> None:
        """Called when TMA loads or stores these bytes."""

    def multiplied(self, products: int) -> None:
        """Called when tensor cores begin this many multiplications."""

    # ---- control

    def guarded(self, instruction: Instruction, here: Array) -> Array:
        if not instruction.guard:
            return here
        value = self.registers[instruction.guard.lstrip("!")][here]
        return here[~value if instruction.guard.startswith("!") else value]

    # ---- operands

    def source(self, text: str, kind: str) -> Callable[[Some], Any]:
        """A function that reads an operand as numbers of this type."""
        if text.startswith("!"):
            inner = self.source(text[1:], kind)
            return lambda some: ~inner(some)
        dtype = dtype_of(kind)
        if text in self.registers:
            register = self.registers[text]
            if register.dtype == bool:
                return lambda some: register[some]
            if register.itemsize == dtype.itemsize:
                view = register.view(dtype)
                return lambda some: view[some]
            return lambda some: register[some].astype(dtype_of(kind, "u")).view(dtype)
        if text in self.special:
            value = self.special[text]
            return lambda some: value if value.ndim == 0 else value[some]
        if found := re.fullmatch(r"%(n?)ctaid\.([xyz])", text):
            axis = "xyz".index(found[2])
            return lambda some: np.uint32((self.grid if found[1] else self.block)[axis])
        if found := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", text):
            bits = int(found[2], 16)
        else:
            bits = self.addresses[text] if text in self.addresses else int(text.rstrip("U"), 0)
        number = np.array(bits & (2 ** (8 * dtype.itemsize) - 1), dtype_of(kind, "u")).view(dtype)[()]
        return lambda some: number

    def target(self, text: str) -> Callable[[Some, Any], None]:
        """A function that writes a register: bits unchanged, narrower numbers extended."""
        if text == "_":
            return lambda some, value: None
        register = self.registers[text]

        def write(some: Some, value: Any) -> None:
            value = np.asarray(value)
            if register.dtype == bool:
                register[some] = value
            elif value.dtype.itemsize == register.itemsize:
                register[some] = value.view(register.dtype)
            else:
                wide = np.dtype(f"{value.dtype.kind}{register.itemsize}")
                register[some] = value.astype(wide).view(register.dtype)

        return write

    def vector(self, text: str) -> list[str]:
        return re.findall(r"[^{},\s]+", text)

    def address(self, text: str) -> Callable[[Some], Array]:
        name, _, rest = text.strip("[] ").partition("+")
        base, offset = self.source(name.strip(), "u64"), np.uint64(int(rest or "0", 0) & (2**64 - 1))
        if name.strip() in self.registers and self.registers[name.strip()].itemsize == 4:
            narrow = self.source(name.strip(), "u32")
            base = lambda some: narrow(some).astype(np.uint64)  # noqa: E731

        def find(some: Some) -> Array:
            count = self.threads if isinstance(some, slice) else len(some)
            return np.broadcast_to(np.asarray(base(some) + offset), (count,))

        return find

    # ---- memory

    def bytes_at(self, space: str, addresses: Array, size: int) -> list[tuple[Some, Array, Array]]:
        """(the addresses concerned, their memory, the indices [count, size] of their bytes)."""
        if (addresses % np.uint64(size)).any():
            raise PtxError(f"an address is no multiple of {size}")
        if space != "global":
            memory = self.parameters if space == "param" else self.shared
            if len(addresses) and int(addresses.max()) + size > len(memory):
                raise PtxError(f"an address is beyond the {len(memory)} bytes of {space} memory")
            return [(ALL, memory, addresses.astype(np.int64)[:, None] + np.arange(size))]
        found, left = [], np.ones(len(addresses), bool)
        for base, memory in self.buffers:
            inside = left & (addresses >= base) & (addresses + np.uint64(size) <= base + len(memory))
            if inside.any():
                which = np.nonzero(inside)[0]
                found.append(
                    (which, memory, (addresses[which] - np.uint64(base)).astype(np.int64)[:, None] + np.arange(size))
                )
                left &= ~inside
        if left.any():
            raise PtxError(f"address {int(addresses[left][0]):#x} is in no buffer")
        return found

    def fetch(self, space: str, addresses: Array, size: int) -> Array:
        values = np.empty((len(addresses), size), np.uint8)
        for which, memory, indices in self.bytes_at(space, addresses, size):
            values[which] = memory[indices]
        return values

    def put(self, space: str, addresses: Array, values: Array) -> None:
        for which, memory, indices in self.bytes_at(space, addresses, values.shape[1]):
            memory[indices] = values[which]

    def load(self, i: Instruction) -> Callable[[Some], None]:
        space = next((part for part in i.op if part in ("global", "shared", "shared::cta", "param")), "global")
        targets = [self.target(name) for name in self.vector(i.operands[0])]
        dtype, address = dtype_of(i.op[-1]), self.address(i.operands[1])
        size = dtype.itemsize * len(targets)

        def run(some: Some) -> None:
            addresses = address(some)
            self.accessed("load", space, some, addresses, size)
            values = self.fetch(space, addresses, size).view(dtype)
            for n, write in enumerate(targets):
                write(some, np.ascontiguousarray(values[:, n]))

        return run

    def store(self, i: Instruction) -> Callable[[Some], None]:
        space = "shared" if "shared" in i.op or "shared::cta" in i.op else "global"
        dtype, address = dtype_of(i.op[-1]), self.address(i.operands[0])
        sources = [self.source(name, i.op[-1]) for name in self.vector(i.operands[1])]

        def run(some: Some) -> None:
            addresses = address(some)
            values = np.empty((len(addresses), len(sources)), dtype)
            for n, read in enumerate(sources):
                values[:, n] = read(some)
            self.accessed("store", space, some, addresses, values[:1].nbytes)
            self.put(space, addresses, values.view(np.uint8))

        return run

    def copy_async(self, i: Instruction) -> Callable[[Some], None]:
        if i.op[2] == "commit_group":

            def commit(some: Some) -> None:
                self.groups_begun[some] += 1

            return commit
        if i.op[2] in ("wait_group", "wait_all"):
            left = -1 if i.op[2] == "wait_all" else int(i.operands[0])

            def wait(some: Some) -> None:
                until = np.zeros(self.threads, int)
                until[some] = self.groups_begun[some] - left
                waiting = self.pending.copy()
                self.pending.clear()
                for copy in waiting:
                    threads, groups, addresses, values = copy
                    arrived = groups < until[threads]
                    self.put("shared", addresses[arrived], values[arrived])
                    if not arrived.all():
                        self.pending.append(tuple(part[~arrived] for part in copy))  # type: ignore[arg-type]

            return wait
        to, source, size = self.address(i.operands[0]), self.address(i.operands[1]), int(i.operands[2], 0)
        filled = self.source(i.operands[3], "u32") if len(i.operands) > 3 else lambda some: np.uint32(size)

        def run(some: Some) -> None:
            addresses, sources = to(some), source(some)
            counts = np.broadcast_to(filled(some), addresses.shape)
            values = np.zeros((len(addresses), size), np.uint8)
            whole = counts == size
            self.accessed("load", "global", np.arange(self.threads)[some][whole], sources[whole], size)
            self.accessed("store", "shared", some, addresses, size)
            if not (whole | (counts == 0)).all():
                raise PtxError("a part of 16 bytes is copied")
            values[whole] = self.fetch("global", sources[whole], size)
            # Until the copy arrives, neither its data nor the old data may be read.
            self.put("shared", addresses, np.full_like(values, 0xFF))
            threads = np.arange(self.threads)[some]
            self.pending.append((threads, self.groups_begun[threads], addresses.copy(), values))

        return run

    # ---- instructions

    def known(self, i: Instruction) -> Callable[[Some], None] | None:
        try:
            return self.step(i)
        except (KeyError, ValueError, IndexError):
            raise PtxError(f"not known: {i.text}") from None

    def step(self, i: Instruction) -> Callable[[Some], None] | None:
        """A function that does an instruction; None for one without effect here, and for jumps and barriers."""
        name = i.op[0]
        if CHANGES & set(i.op[1:]):
            raise PtxError(f"not known: {i.text}")
        if name in ("bra", "ret", "exit", "pragma", "membar", "fence") or i.op[:2] == ["bar", "sync"]:
            return None
        if calls.is_of_call(i):
            return calls.step(self, i)
        if name == "ld":
            return self.load(i)
        if name == "st":
            return self.store(i)
        if i.op[:2] == ["cp", "async"]:
            return self.copy_async(i)
        if name in ("mma", "ldmatrix", "shfl"):
            return getattr(matrices, name)(self, i)  # type: ignore[no-any-return]
        if i.op[:2] == ["bar", "red"]:
            every, value, result = (
                np.all if i.op[2] == "and" else np.any,
                self.source(i.operands[2], "pred"),
                self.target(i.operands[0]),
            )
            return lambda some: result(some, every(value(some)))
        if i.op[:2] == ["bar", "warp"]:
            return matrices.barrier(self, i)
        if name in ("bfe", "bfi", "prmt"):
            return getattr(fields, name)(self, i)
        if approximate.is_approximate(i):
            return approximate.step(self, i)
        if name == "mov" and "{" in i.text:
            return self.packing(i)
        return self.arithmetic(i)

    def arithmetic(self, i: Instruction) -> Callable[[Some], None]:
        """A function that writes one result for each thread, out of the registers of that thread alone."""
        name, kind = i.op[0], i.op[-1]
        write = self.target(i.operands[0].split("|")[0])
        if name == "cvt":
            return convert(i.op, write, lambda at, kind: self.source(i.operands[1 + at], kind))
        if name in ("mov", "cvta"):
            read = self.source(i.operands[1], kind)
            return lambda some: write(some, read(some))
        if name == "set" or (kind in packed.KINDS and name in packed.STEPS):
            return packed.STEPS[name](self, i)
        if name == "setp" and "|" not in i.operands[0]:
            compare, (a, b) = COMPARE[i.op[1]], (self.source(text, kind) for text in i.operands[1:3])
            if len(i.operands) == 3:
                return lambda some: write(some, compare(a(some), b(some)))
            both, c = BINARY[i.op[2]], self.source(i.operands[3], "pred")
            return lambda some: write(some, both(compare(a(some), b(some)), c(some)))
        if name == "selp":
            a, b = (self.source(text, kind) for text in i.operands[1:3])
            c = self.source(i.operands[3], "pred")
            return lambda some: write(some, np.where(c(some), a(some), b(some)))
        if name in ("mul", "mad") and i.op[1] in ("wide", "hi"):
            return self.product(i, write)
        if name in ("mad", "fma"):
            a, b, c = (self.source(text, kind) for text in i.operands[1:])
            if kind == "f64":
                return lambda some: write(some, fused(a(some), b(some), c(some)))
            wide = np.float64 if kind == "f32" else dtype_of(kind)  # a product rounded once
            return lambda some: write(some, (np.asarray(a(some), wide) * b(some) + c(some)).astype(dtype_of(kind)))
        if len(i.operands) == 2 and name in UNARY:
            one, a = UNARY[name], self.source(i.operands[1], kind)
            return lambda some: write(some, one(a(some)))
        if len(i.operands) == 3 and name in BINARY:
            two = {"max": np.maximum, "min": np.minimum}[name] if "NaN" in i.op else BINARY[name]
            a = self.source(i.operands[1], kind)
            b = self.source(i.operands[2], "u32" if name in ("shl", "shr") else kind)
            return lambda some: write(some, two(a(some), b(some)))
        raise PtxError(f"not known: {i.text}")

    def packing(self, i: Instruction) -> Callable[[Some], None]:
        """``mov`` of a register from its parts, or into them."""
        kind, (to, of) = i.op[-1], i.operands
        parts = self.vector(to if to.startswith("{") else of)
        part = f"b{int(kind[1:]) // len(parts)}"
        if of.startswith("{"):
            reads, write = [self.source(name, part) for name in parts], self.target(to)

            def join(some: Some) -> None:
                values = np.stack(np.broadcast_arrays(*(read(some) for read in reads)), -1)
                write(some, values.view(dtype_of(kind))[..., 0])

            return join
        read, writes = self.source(of, kind), [self.target(name) for name in parts]

        def split(some: Some) -> None:
            values = np.atleast_1d(read(some)).view(dtype_of(part)).reshape(-1, len(parts))
            for n, put in enumerate(writes):
                put(some, np.ascontiguousarray(values[:, n]))

        return split

    def product(self, i: Instruction, write: Callable[[Some, Any], None]) -> Callable[[Some], None]:
        kind = i.op[-1]
        a, b = (self.source(text, kind) for text in i.operands[1:3])
        bits = int(kind[1:])
        if bits == 64 and i.op[1] == "hi":
            return lambda some: write(some, fields.high(a(some), b(some), dtype_of(kind)))
        wide = dtype_of(f"{kind[0]}{2 * bits}")
        if i.op[1] == "hi":
            shift = wide.type(bits)
            return lambda some: write(
                some, ((np.asarray(a(some)).astype(wide) * b(some)) >> shift).astype(dtype_of(kind))
            )
        c = self.source(i.operands[3], f"{kind[0]}{2 * bits}") if len(i.operands) > 3 else lambda some: wide.type(0)
        return lambda some: write(some, np.asarray(a(some)).astype(wide) * b(some) + c(some))
