"""Counts what each memory-bound kernel does at AlexNet's shapes: compiled for 9.0, executed by the PTX machine.

nvcc compiles the CUDA kernels, Triton its own. Nothing here is a time. A sample of blocks is executed at batch 128, and
one image as a whole.

    python -m benchmarks.predict.count WORDS...    # the rows whose names have all words, each a line of JSON
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gpu_on_cpu import machine_code
from tests.gpu_on_cpu.cuda_adapter import NAME, CompiledOps
from tests.gpu_on_cpu.ptx.counts import SAMPLE, Counting, CountingHopperMachine, CountingMachine, Counts
from tests.gpu_on_cpu.ptx.machine import Launch
from tests.gpu_on_cpu.ptx.program import Kernel
from tests.support import ROOT, specs
from tests.support.spec import BF16, FP32, Case, Spec
from tests.tools.cuda_budget import FLAGS, cutlass_folders, plain, run

from ..harness import layer_name
from .kernels import BATCH

CODE = ("arch=compute_90,code=sm_90", "-lineinfo")
LAYOUTS = ("channels_last", "contiguous")
MOST = 1 << 30  # blocks: all of them
# A grid of no more blocks is made for the slots of a GPU (four a multiprocessor of an H100), not for the work. Some
# more, so that a grid a little too large is taken for one.
MOST_PERSISTENT = 4 * 132 + 32
WHOLE = 15  # the side of planes that are executed as a whole


@dataclass(frozen=True)
class Work:
    """An op's forward or backward in AlexNet; its calls differ by ``case``, dtype and the layout of images."""

    op: str
    direction: str
    shape: str
    dtype: str
    layout: str
    backend: str = "native"

    @property
    def name(self) -> str:
        return " ".join((self.op, self.direction, self.shape, self.dtype, self.layout, self.backend))


Row = dict[str, Any]
"""``floor_bytes``, what must be read and written at least, and ``launches``. Of each launch at batch 128:

``kernel``, ``blocks``, ``persistent`` (whether the batch leaves the grid as it is), ``threads``, ``registers``,
``shared`` (bytes a block), and of all of its warps ``instructions`` of machine code, ``clocks_alone`` (if each had a
scheduler of its own), ``kinds`` (shares of the instructions), ``turns`` of shared memory and ``ideal_turns``,
``dram_bytes`` (distinct ones of the launch) and ``block_bytes`` (distinct ones of each block, summed up).
"""


@dataclass(frozen=True)
class Job:
    """A work, its least bytes at batch 128, and what makes its call: of one small image, or of the batch."""

    work: Work
    floor_bytes: int
    made: Callable[[Work, bool], Callable[[], Any]]

    def call(self, small: bool) -> Callable[[], Any]:
        return self.made(self.work, small)


def jobs() -> Iterator[Job]:
    """Those of the CUDA kernels, each followed by its twin in Triton, if there is one that is counted."""
    for job in native_jobs():
        yield job
        if has_twin(job.work):
            yield replace(job, work=replace(job.work, backend="triton"))


def has_twin(work: Work) -> bool:
    """In bf16 and channels-last, where the op has that layout. In Triton a product adds the bias itself."""
    spec = specs.SPECS[work.op]
    layout = LAYOUTS[0] if spec.gradient else LAYOUTS[1]
    return spec.in_triton and (work.dtype, work.layout) == (name_of(BF16), layout) and work.direction != "bias and relu"


def native_jobs() -> Iterator[Job]:
    """Every op that memory bounds, each of its calls in AlexNet, in bf16 and fp32; and what goes with products."""
    for dtype in (BF16, FP32):
        for op in specs.named("on_gpu", "not product"):
            spec = specs.SPECS[op]
            for case in specs.alexnet_cases(op, BATCH):
                if len(case.shapes.get("images", ())) == 3:
                    continue  # I420 is not counted
                typed = specs.in_dtype(case, dtype)
                for layout in LAYOUTS if spec.gradient else LAYOUTS[1:]:
                    for direction in ("forward", "backward") if spec.gradient else ("forward",):
                        work = Work(op, direction, layer_name(typed), name_of(dtype), layout)
                        floor = spec.moved(typed, dtype.itemsize)[direction == "backward"]
                        yield Job(work, floor, partial(call_of, typed, dtype))
        yield from around_products(dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def around_products(dtype: torch.dtype) -> Iterator[Job]:
    """Bias and ReLU after a convolution, in place, and before its gradients: the mask, and the sums of each channel.
    The mask of a linear layer, whose rows are pixels.
    """
    for case in specs.alexnet_cases("conv2d_bias_relu", BATCH)[2:]:
        _, _, height, width = case.shapes["x"]
        channels = case.shapes["weight"][0]
        elements = BATCH * channels * height * width * dtype.itemsize
        shape = f"{BATCH}x{channels}x{height}x{width}"
        for direction, floor in (("bias and relu", 2 * elements), ("mask", 3 * elements)):
            work = Work("conv2d_bias_relu", direction, shape, name_of(dtype), "channels_last")
            yield Job(work, floor, partial(call_around, channels, height, dtype))
    outputs, _ = specs.ALEXNET["linear_bias_relu"][0].shapes["weight"]
    work = Work("linear_bias_relu", "mask", f"{BATCH}x{outputs}", name_of(dtype), "channels_last")
    yield Job(work, 3 * BATCH * outputs * dtype.itemsize, partial(call_linear_mask, outputs, dtype))


def operator(work: Work, direction: str) -> Callable[..., Any]:
    """The op's raw forward or backward."""
    if work.backend == "triton":
        kernels = importlib.import_module(f"alexnet_ext.ops.{work.op}.triton_kernels")
        return getattr(kernels, direction)  # type: ignore[no-any-return]
    name = work.op if direction == "forward" else f"{work.op}_backward"
    return getattr(torch.ops.alexnet_ext, name)  # type: ignore[no-any-return]


def call_around(channels: int, side: int, dtype: torch.dtype, work: Work, small: bool) -> Callable[[], Any]:
    """With a product of eight channels and one tap, which PyTorch computes quickly on a CPU."""
    batch = 1 if small else BATCH
    x = torch.randn(batch, 8, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(channels, 8, 1, 1).to(dtype), torch.randn(channels).to(dtype)
    constants = ([1, 1], [0, 0], [1, 1], 1)
    if work.direction != "mask":
        return partial(operator(work, "forward"), x, weight, bias, *constants, True)
    y = torch.randn(batch, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
    dy, wanted = y.clone(), [False, False, True]
    return partial(operator(work, "backward"), dy, x, weight, y, *constants, wanted, True)


def call_linear_mask(outputs: int, dtype: torch.dtype, work: Work, small: bool) -> Callable[[], Any]:
    dy, y = torch.randn(2, 1 if small else BATCH, outputs).to(dtype)
    arguments = dy, dy[:, :8], dy.new_empty(outputs, 8), y, [False, False, True]
    return partial(operator(work, "backward"), *arguments)


def repeated(value: Any, batch: int) -> Any:
    """A tensor of one image, for a batch of them; what is not of images stays."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != 1:
        return value
    out = value.repeat(batch, *(1 for _ in value.shape[1:]))
    last = value.dim() == 4 and value.shape[1] > 1 and value.is_contiguous(memory_format=torch.channels_last)
    return out.contiguous(memory_format=torch.channels_last) if last else out


def call_of(case: Case, dtype: torch.dtype, work: Work, small: bool) -> Callable[[], Any]:
    """The call, for one small image or a whole batch of one image's values, which the CPU's kernels computed."""
    spec: Spec = specs.SPECS[case.op]
    if spec.in_place:
        return in_place_call(case, small)
    shapes = {n: (1, *s[1:]) if s and s[0] == BATCH else s for n, s in case.items()}
    if small and spec.gradient:
        shapes["x"] = (*shapes["x"][:2], WHOLE, WHOLE)
    one = replace(case, shapes=shapes)
    tensors = specs.make(one, dtype if spec.gradient else torch.float32, work.layout, requires_grad=False)
    arguments = specs.raw_forward(one, tensors) if work.direction == "forward" else specs.raw_backward(one, tensors)
    given = arguments if small else [repeated(value, BATCH) for value in arguments]
    return partial(operator(work, work.direction), *given)


def in_place_call(case: Case, small: bool) -> Callable[[], Any]:
    """An op that updates lists of tensors in place, at the case's sizes or small ones."""
    if small:
        sizes = tuple(min(size, 20_000) for size in case.constants["sizes"])
        shapes = {name: (sum(sizes),) for name in case.shapes}
        case = replace(case, shapes=shapes, constants=case.constants | {"sizes": sizes})
    tensors = specs.make(case, requires_grad=False)
    return specs.repeated(case, tensors, "native")


@dataclass(frozen=True)
class Counted:
    """What a launch did, and its kernel: its name, PTX and machine code, registers a thread.

    ``persistent``: whether the batch leaves the grid as it is.
    """

    counts: Counts
    persistent: bool
    name: str
    program: Kernel
    code: machine_code.Code
    registers: int


class Counter(ABC):
    """Counts calls."""

    def __init__(self, machine: type[Counting]) -> None:
        self.machine = machine

    @abstractmethod
    def run(self, call: Callable[[], Any], most: int) -> list[Counted]:
        """The call's launches, of each at most this many blocks."""

    def counting(self, most: int, found: list[Counting]) -> Callable[[Launch], Counting]:
        """Makes the machine of a launch, which it adds to ``found``."""

        def machine(launch: Launch) -> Counting:
            made = self.machine(launch)
            made.most = most
            found.append(made)
            return made

        return machine

    def row(self, job: Job) -> Row:
        whole, sampled = self.run(job.call(True), MOST), self.run(job.call(False), SAMPLE)
        launches = [described(counted, small.counts) for counted, small in zip(sampled, whole, strict=True)]
        return {"floor_bytes": job.floor_bytes, "launches": launches}


class NativeCounter(Counter):
    """Of the CUDA kernels, compiled into a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(CountingMachine)
        self.ops = CompiledOps(folder, CODE)
        self.code: dict[str, machine_code.Code] = {}
        self.registers: dict[str, int] = {}
        for cubin in sorted(folder.glob("*_cuda.cubin")):
            self.code |= machine_code.disassemble(cubin)
            self.registers |= machine_code.registers(cubin)
        self.names = {k: v.replace(f"{NAME}::", "") for k, v in plain(list(self.ops.by_name), Path()).items()}

    def run(self, call: Callable[[], Any], most: int) -> list[Counted]:
        found: list[Counting] = []
        with self.ops.in_place(machine=self.counting(most, found)):
            call()
        return [self.counted(machine.counts) for machine in found]

    def counted(self, counts: Counts) -> Counted:
        name = counts.kernel
        compiled = (self.ops.by_name[name], self.code[name], self.registers[name])
        return Counted(counts, counts.blocks <= MOST_PERSISTENT, self.names[name], *compiled)


class TritonCounter(Counter):
    """Of Triton's kernels. TRITON_INTERPRET must not be set: its interpreter compiles nothing."""

    def __init__(self) -> None:
        super().__init__(CountingHopperMachine)

    def run(self, call: Callable[[], Any], most: int) -> list[Counted]:
        from alexnet_ext.ops._triton import sharing
        from tests.gpu_on_cpu.triton_adapter import compiled_kernels

        found: list[Counting] = []
        counted = []
        with compiled_kernels(90, machine=self.counting(most, found)) as launched:
            call()
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            cubin = Path(file.name)
            for machine, (name, program, code) in zip(found, launched, strict=True):
                cubin.write_bytes(code)
                compiled = (machine_code.disassemble(cubin)[program.name], machine_code.registers(cubin)[program.name])
                programs, channel_blocks, _ = machine.grid
                persistent = programs == sharing(MOST, channel_blocks)
                counted.append(Counted(machine.counts, persistent, name, program, *compiled))
        return counted


def described(counted: Counted, whole: Counts) -> dict[str, Any]:
    """A launch of a row."""
    counts, code = counted.counts, counted.code
    lines = {i.line: int(n) for i, n in zip(counted.program.code, counts.issued, strict=True)}
    executed = machine_code.executed(code, lines)
    kinds = machine_code.totals(code, executed)
    instructions, scale = sum(kinds.values()), counts.scale
    shares = zip(counts.buffers, whole.buffers, strict=True)
    return {
        "kernel": counted.name,
        "blocks": counts.blocks,
        "persistent": counted.persistent,
        "threads": counts.threads,
        "registers": counted.registers,
        "shared": counts.shared,
        "instructions": round(instructions * scale),
        "clocks_alone": round(machine_code.clocks_alone(code, executed, counts.cold) * scale),
        "kinds": {kind: round(n / instructions, 3) for kind, n in kinds.most_common() if n},
        "turns": round(counts.turns * scale),
        "ideal_turns": round(counts.ideal_turns * scale),
        "dram_bytes": round(sum(size * (load + store) for (size, _, _), (_, load, store) in shares)),
        "block_bytes": round(counts.block_bytes * scale),
    }


def count(words: list[str]) -> Iterator[tuple[str, Row]]:
    """The rows whose names have all these words, as they are counted; nvcc takes a minute first."""
    with tempfile.TemporaryDirectory(prefix="predict-") as folder:
        counters: dict[str, Counter] = {}
        for job in jobs():
            backend, name = job.work.backend, job.work.name
            if all(word in name for word in words):
                if backend not in counters:
                    counters[backend] = TritonCounter() if backend == "triton" else NativeCounter(Path(folder))
                yield name, counters[backend].row(job)


def producers() -> dict[str, float]:
    """Clocks of a step of the thread that loads for a block's product, from machine code for 9.0 (needs CUTLASS)."""
    with tempfile.TemporaryDirectory(prefix="predict-") as folder:
        cubin = Path(folder) / "kernel.cubin"
        source = ROOT / "csrc/conv2d_bias_relu/sm90/weight_gradient_bf16_sm90.cu"
        run("nvcc", *FLAGS, *cutlass_folders(), "-lineinfo", "-arch=sm_90a", "-cubin", "-o", str(cubin), str(source))
        (code,) = (code for name, code in machine_code.disassemble(cubin).items() if "weight_gradient" in name)
    loop = machine_code.loop_around(code, "UTMALDG")
    latencies = machine_code.LATENCY | {"SYNCS": 0, "UTMALDG": 0}  # it waits for none of its own loads
    return {"weight_gradient_sm90": sum(machine_code.latency(block, latencies) for block in loop)}


if __name__ == "__main__":
    for name, row in count(sys.argv[1:]):
        print(json.dumps({"name": name, "row": row}), flush=True)
