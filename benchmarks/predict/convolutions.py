"""The predicted time of each way to convolve: steps of a block's product, bound by tensor cores, shared memory or L2.

The tiles are those of the kernels: csrc/conv2d_bias_relu/sm90 and cutlass, ops/conv2d_bias_relu/configs.py for Triton.
cuDNN's are not known, so it is left out. bf16, channels-last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tests.support import specs
from tests.support.spec import Case, pair

from .gpus import LIKELY, SHARED_RATE, Assumed, Gpu

BF16, FP32 = 2, 4  # bytes
DIRECTIONS = ("forward", "input gradient", "weight gradient")
DEPTH_LIMIT = 8  # channels of a first layer, which goes by space to depth
WGMMA_DEPTH = 16


@dataclass(frozen=True)
class Layer:
    """A convolution as the kernels see it: a first layer with its space turned to depth."""

    batch: int
    channels: int  # of a group
    filters: int  # of a group
    taps: int
    groups: int
    inputs: int  # pixels of an image, in and out
    outputs: int
    operations: float  # of the layer as it is defined, in one direction

    @property
    def pixels(self) -> int:
        return self.batch * self.outputs

    @staticmethod
    def of(case: Case) -> Layer:
        batch, channels, height, width = case.shapes["x"]
        filters, depth, tall, wide = case.shapes["weight"]
        groups, step = case.constants["groups"], pair(case.constants["stride"])[0]
        padding = pair(case.constants["padding"])[0]
        rows, columns = ((n + 2 * padding - k) // step + 1 for n, k in ((height, tall), (width, wide)))
        operations = 2.0 * batch * filters * rows * columns * depth * tall * wide
        if channels < DEPTH_LIMIT and step > 1:
            depth, tall, wide = depth * step * step, -(-tall // step), -(-wide // step)
            height = width = rows + tall - 1
        return Layer(batch, depth, filters // groups, tall * wide, groups, height * width, rows * columns, operations)


@dataclass(frozen=True)
class Step:
    """What a block does between two loads: (rows x depth) times (depth x columns)."""

    rows: int
    columns: int
    depth: int
    loaded: float  # bytes that it takes from L2
    by_wgmma: bool = True
    other: float = 0  # clocks of what else may bind: a thread that loads, instructions

    def shared_bytes(self) -> float:
        written = (self.rows + self.columns) * self.depth * BF16
        if self.by_wgmma:  # m64nNk16 reads both operands whole
            reads = self.depth / WGMMA_DEPTH * self.rows / 64 * (64 + self.columns) * WGMMA_DEPTH * BF16
        else:  # each warp of 64 x 64 results reads its own
            warps = self.rows * self.columns / 64**2
            reads = warps * 2 * 64 * self.depth * BF16
        return written + reads

    def clocks(self, gpu: Gpu, assumed: Assumed) -> float:
        rate = gpu.products * assumed.tensor * (1 if self.by_wgmma or gpu.capability < 90 else assumed.mma_sync)
        products = self.rows * self.columns * self.depth / rate
        return max(products, self.shared_bytes() / SHARED_RATE, self.loaded / assumed.l2, self.other)


@dataclass(frozen=True)
class Work:
    """Blocks of equal work: ``steps`` each, and clocks before and after that no other block hides."""

    step: Step
    steps: int
    blocks: int
    resident: int  # blocks on a multiprocessor
    around: float
    products: int = 1  # launches of as many blocks each
    summed_bytes: float = 0  # of partial sums, written, and read by a launch of its own

    @property
    def launches(self) -> int:
        return self.products + (self.summed_bytes > 0)

    def seconds(self, gpu: Gpu, assumed: Assumed) -> float:
        waves = math.ceil(self.blocks / (self.resident * gpu.multiprocessors))
        clocks = waves * self.resident * (self.steps * self.step.clocks(gpu, assumed) + self.around)
        return self.products * clocks / gpu.clock + self.summed_bytes / gpu.copy


def up(a: float, b: float) -> int:
    return math.ceil(a / b)


def sm90(layer: Layer, direction: str, producers: dict[str, float]) -> Work:
    """One tap of 64 channels a step, by TMA; the loads of the filters go to both blocks of a cluster."""
    if direction == "weight gradient":
        columns = up(layer.taps * up(layer.channels, 64), 4)  # of four times 64 channels of a tap
        tiles = columns * up(layer.filters, 128) * layer.groups
        steps = up(layer.pixels, 64)
        splits = max(min(132 // tiles, steps // 16), 1)
        steps = up(steps, splits)
        splits = up(up(layer.pixels, 64), steps)
        loaded = (128 + 4 * 64) * 64 * BF16
        sums = 2 * splits * layer.groups * layer.filters * layer.taps * layer.channels * FP32
        step = Step(128, 256, 64, loaded, other=producers["weight_gradient_sm90"])
        return Work(step, steps, tiles * splits, 1, 4000, 1, sums)
    into, out, columns, around, resident = layer.channels, layer.filters, 128, 3500, 1
    pixels = layer.pixels
    if direction == "input gradient":
        into, out, columns, around, resident = layer.filters, layer.channels, 96, 1000, 2
        pixels = layer.batch * layer.inputs
    step = Step(128, columns, 64, (128 + columns / 2) * 64 * BF16)
    blocks = 2 * up(pixels, 2 * 128) * up(out, columns) * layer.groups
    return Work(step, layer.taps * up(into, 64), blocks, resident, around)


def mma_sync(layer: Layer, direction: str, producers: dict[str, float]) -> Work:
    """CUTLASS for 8.0, a launch for each group: 256 x 64 results of 32 channels a step, or 128 x 128 of weights."""
    if direction == "weight gradient":
        taps = layer.taps * layer.channels
        tiles = up(layer.filters, 128) * up(taps, 128)
        splits = max(min(264 // tiles, up(layer.pixels, 1024)), 1)
        step = Step(128, 128, 32, 2 * 128 * 32 * BF16, by_wgmma=False)
        sums = 2 * splits * layer.groups * layer.filters * taps * FP32
        return Work(step, up(layer.pixels, splits * 32), tiles * splits, 2, 1500, layer.groups, sums)
    into, out, pixels = layer.channels, layer.filters, layer.pixels
    if direction == "input gradient":
        into, out, pixels = layer.filters, layer.channels, layer.batch * layer.inputs
    step = Step(256, 64, 32, (256 + 64) * 32 * BF16, by_wgmma=False)
    blocks = up(pixels, 256) * up(out, 64)
    return Work(step, layer.taps * up(into, 32), blocks, 2, 1500, layer.groups)


# Clocks in which 8 warps on 4 schedulers issue a step of Triton's loops, at 0.9 of the slots: 220 instructions forward
# (191 with 64 columns), 388 of the weight gradient, which divides for each row.
TRITON_ISSUE = {128: 220 * 8 / 4 / 0.9, 64: 191 * 8 / 4 / 0.9, 0: 388 * 8 / 4 / 0.9}


def triton(layer: Layer, direction: str, producers: dict[str, float]) -> Work:
    """128 x 128 (or 64) results of 64 values of taps and channels together; no load is shared by two blocks."""
    if direction == "weight gradient":
        taps = layer.taps * layer.channels
        tiles = up(layer.filters, 128) * up(taps, 128) * layer.groups
        parts = max(1, min(up(512, tiles), up(layer.pixels, 1024)))
        step = Step(128, 128, 64, 2 * 128 * 64 * BF16, other=TRITON_ISSUE[0])
        sums = 2 * parts * layer.groups * layer.filters * taps * FP32
        return Work(step, up(up(layer.pixels, parts), 64), tiles * parts, 2, 1000, 1, sums)
    into, out, pixels = layer.channels, layer.filters, layer.pixels
    if direction == "input gradient":
        into, out, pixels = layer.filters, layer.channels, layer.batch * layer.inputs
    columns = 64 if out <= 64 else 128
    step = Step(128, columns, 64, (128 + columns) * 64 * BF16, other=TRITON_ISSUE[columns])
    return Work(step, up(layer.taps * into, 64), up(pixels, 128) * up(out, columns) * layer.groups, 2, 1000)


CANDIDATES: dict[str, Callable[[Layer, str, float], Work]] = {
    "cutlass sm90": sm90,
    "cutlass": mma_sync,
    "triton": triton,
}
# On 9.0 bf16 has the kernels of wgmma in place of those of mma.sync.
RUNS: dict[str, Callable[[int], bool]] = {"cutlass sm90": lambda c: c == 90, "cutlass": lambda c: c != 90}


def layers(batch: int) -> list[tuple[str, Layer]]:
    """AlexNet's convolutions, by name."""
    cases = specs.alexnet_cases("conv2d_bias_relu", batch)
    return [(f"conv{n}", Layer.of(case)) for n, case in enumerate(cases, 1)]


def candidates(
    layer: Layer, direction: str, gpu: Gpu, producers: dict[str, float], assumed: Assumed = LIKELY
) -> dict[str, float]:
    """Seconds of each candidate that runs on this GPU."""
    return {
        name: work(layer, direction, producers).seconds(gpu, assumed)
        for name, work in CANDIDATES.items()
        if name not in RUNS or RUNS[name](gpu.capability)
    }
