"""Counts what each memory-bound kernel does at AlexNet's shapes: compiled by nvcc for 9.0, executed by the PTX machine.

Nothing here is a time. A sample of blocks is executed at batch 128, and one image as a whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gpu_on_cpu import machine_code
from tests.gpu_on_cpu.cuda_adapter import NAME, CompiledOps
from tests.gpu_on_cpu.ptx.counts import SAMPLE, Counting, CountingMachine, Counts
from tests.gpu_on_cpu.ptx.machine import Launch
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
    """A work, its least bytes at batch 128, and its call: of one small image, or of the batch."""

    work: Work
    floor_bytes: int
    call: Callable[[bool], Callable[[], Any]]


def jobs() -> Iterator[Job]:
    """Every op that memory bounds, each of its calls in AlexNet, in bf16 and fp32; and what goes with products."""
    for dtype in (BF16, FP32):
        for op in specs.named("on_gpu", "not product"):
            spec = specs.SPECS[op]
            for case in specs.alexnet_cases(op, BATCH):
                typed = specs.in_dtype(case, dtype)
                for layout in LAYOUTS if spec.gradient else LAYOUTS[1:]:
                    for direction in ("forward", "backward") if spec.gradient else ("forward",):
                        work = Work(op, direction, layer_name(typed), name_of(dtype), layout)
                        floor = spec.moved(typed, dtype.itemsize)[direction == "backward"]
                        yield Job(work, floor, partial(call_of, work, typed, dtype))
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
            yield Job(work, floor, partial(call_around, direction, channels, height, dtype))
    outputs, _ = specs.ALEXNET["linear_bias_relu"][0].shapes["weight"]
    work = Work("linear_bias_relu", "mask", f"{BATCH}x{outputs}", name_of(dtype), "channels_last")
    yield Job(work, 3 * BATCH * outputs * dtype.itemsize, partial(call_linear_mask, outputs, dtype))


def call_around(direction: str, channels: int, side: int, dtype: torch.dtype, small: bool) -> Callable[[], Any]:
    """With a product of eight channels and one tap, which PyTorch computes quickly on a CPU."""
    batch = 1 if small else BATCH
    x = torch.randn(batch, 8, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(channels, 8, 1, 1).to(dtype), torch.randn(channels).to(dtype)
    constants = ([1, 1], [0, 0], [1, 1], 1)
    if direction != "mask":
        return lambda: torch.ops.alexnet_ext.conv2d_bias_relu(x, weight, bias, *constants, True)
    y = torch.randn(batch, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
    dy, wanted = y.clone(), [False, False, True]
    return lambda: torch.ops.alexnet_ext.conv2d_bias_relu_backward(dy, x, weight, y, *constants, wanted, True)


def call_linear_mask(outputs: int, dtype: torch.dtype, small: bool) -> Callable[[], Any]:
    dy, y = torch.randn(2, 1 if small else BATCH, outputs).to(dtype)
    arguments = dy, dy[:, :8], dy.new_empty(outputs, 8), y, [False, False, True]
    return lambda: torch.ops.alexnet_ext.linear_bias_relu_backward(*arguments)


def repeated(value: Any, batch: int) -> Any:
    """A tensor of one image, for a batch of them; what is not of images stays."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != 1:
        return value
    out = value.repeat(batch, *(1 for _ in value.shape[1:]))
    last = value.dim() == 4 and value.shape[1] > 1 and value.is_contiguous(memory_format=torch.channels_last)
    return out.contiguous(memory_format=torch.channels_last) if last else out


def call_of(work: Work, case: Case, dtype: torch.dtype, small: bool) -> Callable[[], Any]:
    """The call, for one small image or a whole batch of one image's values, which the CPU's kernels computed."""
    spec: Spec = specs.SPECS[case.op]
    if spec.in_place:
        return in_place_call(case, small)
    shapes = {n: (1, *s[1:]) if s and s[0] == BATCH else s for n, s in case.items()}
    if small and spec.gradient:
        shapes["x"] = (*shapes["x"][:2], WHOLE, WHOLE)
    one = replace(case, shapes=shapes)
    tensors = specs.make(one, dtype if spec.gradient else torch.float32, work.layout, requires_grad=False)
    forward = work.direction == "forward"
    arguments = specs.raw_forward(one, tensors) if forward else specs.raw_backward(one, tensors)
    op = getattr(torch.ops.alexnet_ext, case.op if forward else f"{case.op}_backward")
    given = arguments if small else [repeated(value, BATCH) for value in arguments]
    return lambda: op(*given)


def in_place_call(case: Case, small: bool) -> Callable[[], Any]:
    """An op that updates lists of tensors in place, at the case's sizes or small ones."""
    if small:
        sizes = tuple(min(size, 20_000) for size in case.constants["sizes"])
        shapes = {name: (sum(sizes),) for name in case.shapes}
        case = replace(case, shapes=shapes, constants=case.constants | {"sizes": sizes})
    tensors = specs.make(case, requires_grad=False)
    return specs.repeated(case, tensors, "native")


class Counter:
    """Compiled kernels, and the counts of calls of them."""

    def __init__(self, folder: Path) -> None:
        self.ops = CompiledOps(folder, CODE)
        self.code: dict[str, machine_code.Code] = {}
        self.registers: dict[str, int] = {}
        for cubin in sorted(folder.glob("*_cuda.cubin")):
            self.code |= machine_code.disassemble(cubin)
            self.registers |= machine_code.registers(cubin)
        self.names = {k: v.replace(f"{NAME}::", "") for k, v in plain(list(self.ops.by_name), Path()).items()}

    def run(self, call: Callable[[], Any], most: int) -> list[Counts]:
        found: list[Counts] = []

        def machine(launch: Launch) -> Counting:
            made = CountingMachine(launch)
            made.most = most
            found.append(made.counts)
            return made

        with self.ops.in_place(machine=machine):
            call()
        return found

    def row(self, job: Job) -> Row:
        whole, sampled = self.run(job.call(True), MOST), self.run(job.call(False), SAMPLE)
        launches = [self.launch(counts, small) for counts, small in zip(sampled, whole, strict=True)]
        return {"floor_bytes": job.floor_bytes, "launches": launches}

    def launch(self, counts: Counts, whole: Counts) -> dict[str, Any]:
        code, kernel = self.code[counts.kernel], self.ops.by_name[counts.kernel]
        lines = {i.line: int(n) for i, n in zip(kernel.code, counts.issued, strict=True)}
        executed = machine_code.executed(code, lines)
        kinds = machine_code.totals(code, executed)
        instructions, scale = sum(kinds.values()), counts.scale
        shares = zip(counts.buffers, whole.buffers, strict=True)
        return {
            "kernel": self.names[counts.kernel],
            "blocks": counts.blocks,
            "persistent": counts.blocks <= MOST_PERSISTENT,
            "threads": counts.threads,
            "registers": self.registers[counts.kernel],
            "shared": counts.shared,
            "instructions": round(instructions * scale),
            "clocks_alone": round(machine_code.clocks_alone(code, executed, counts.cold) * scale),
            "kinds": {kind: round(n / instructions, 3) for kind, n in kinds.most_common() if n},
            "turns": round(counts.turns * scale),
            "ideal_turns": round(counts.ideal_turns * scale),
            "dram_bytes": round(sum(size * (load + store) for (size, _, _), (_, load, store) in shares)),
            "block_bytes": round(counts.block_bytes * scale),
        }


def count(chosen: Callable[[Work], bool], folder: Path | None = None) -> Iterator[tuple[Work, Row]]:
    """The rows of these works, as they are counted; compiling takes a minute first."""
    with tempfile.TemporaryDirectory(prefix="predict-") as made:
        counter = Counter(folder or Path(made))
        for job in jobs():
            if chosen(job.work):
                yield job.work, counter.row(job)


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
