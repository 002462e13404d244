"""The predicted time of a training step and of inference: every operation that PyTorch dispatches, each with its cost.

The step is traced, not listed: harness.network_run runs on tensors without values, so a copy more or less in the code
shows here. Kernels of this package cost what counts.json says, convolutions what their best candidate costs. Weights
that are trained are bf16 with fp32 masters (``alexnet_ext.optim.SGD``), their images come from ``ops.augment`` with
conv1's depth. Inference is autocast's, of fp32 weights and images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alexnet_ext.ops import _backend
from alexnet_ext.ops.conv2d_bias_relu import space_to_depth
from alexnet_ext.ops.conv2d_bias_relu.shared import Convolution

from .. import harness
from . import convolutions
from .gpus import LIKELY, Assumed, Gpu
from .kernels import BATCH, counts, row_times, total

KINDS = ("training", "inference")
RUNS = {"training": "training step", "inference": "inference"}
# No kernel: they name memory anew, or ask of a tensor.
FREE = {"detach", "t", "view", "_unsafe_view", "expand", "as_strided", "transpose", "permute", "squeeze", "unsqueeze",
        "alias", "slice", "select", "split", "empty", "empty_like", "device", "lift_fresh", "empty_strided",
        "_record_function_enter_new", "_record_function_exit", "new_empty", "is_pinned"}  # fmt: skip
# Of dropout on a CPU. A GPU draws, scales and multiplies in one kernel.
IN_ONE = {"bernoulli_", "div_"}
AUGMENT = f"augment forward {BATCH}x256x256x3 to depth bfloat16 contiguous native"
PRODUCTS = {"mm", "addmm"}
COPIES = {"_to_copy", "clone", "copy_", "contiguous"}


@dataclass(frozen=True)
class Described:
    """A tensor of an operation, without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Operation:
    """What was dispatched: its name, its tensors, and whether the convolution is to compute each gradient."""

    name: str
    inputs: tuple[Described, ...]
    outputs: tuple[Described, ...]
    flags: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Part:
    """A line of a prediction: seconds, and launches."""

    what: str
    seconds: float
    launches: int


def described(values: Any) -> tuple[Described, ...]:
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return tuple(Described(tuple(t.shape), tuple(t.stride()), t.numel() * t.itemsize) for t in tensors)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0].replace("_auto", "")
        if name not in FREE | IN_ONE:
            flags = tuple(value for value in args if isinstance(value, (bool, list)))
            self.operations.append(Operation(name, described((args, kwargs)), described(result), flags))
        return result


@cache
def traced(kind: str, batch: int) -> tuple[Operation, ...]:
    """The operations of the second step, which finds the optimizer's state there, in bf16 and channels-last.

    They are a GPU's: the CPU stands in for it with the GPU's operators. Only their shapes count here.
    """
    on_cpu = {op: {**devices, "cpu": devices["cuda"]} for op, devices in _backend.KERNELS.items()}
    as_on_gpu = mock.patch.object(_backend, "KERNELS", on_cpu)
    with FakeTensorMode(), as_on_gpu, _backend.preferring(("auto", "native"), "cpu"):
        run = harness.network_run(RUNS[kind], True, batch, "channels_last", True, "cpu", torch.bfloat16)
        run()
        with Recorder() as recorder:
            run()
    return tuple(recorder.operations)


class Costs:
    """Parts of a step on a GPU."""

    def __init__(self, gpu: Gpu, batch: int, producers: dict[str, float], assumed: Assumed = LIKELY) -> None:
        self.gpu, self.batch, self.assumed, self.producers = gpu, batch, assumed, producers
        self.layers = convolutions.layers(batch)

    def moved(self, size: float, rate: float = 1.0) -> float:
        return max(size / (self.assumed.copy * self.gpu.copy * rate), self.assumed.small)

    def parts(self, operations: tuple[Operation, ...]) -> Iterator[Part]:
        forwards, backwards = iter(self.layers), iter(self.layers[::-1])
        for operation in operations:
            if operation.name == "conv2d_bias_relu":
                yield from self.convolution(*next(forwards), operation)
            elif operation.name == "conv2d_bias_relu_backward":
                yield from self.convolution_backward(*next(backwards), operation)
            elif operation.name.startswith("linear_bias_relu"):
                yield from self.linear(operation)
            elif (found := self.row(operation)) is not None:
                yield from self.brought(operation)
                yield found
            elif operation.name in PRODUCTS:
                yield self.products(operation)
            else:
                yield self.elementwise(operation)

    def row(self, operation: Operation) -> Part | None:
        """A kernel of ours that was counted; x is the largest of its tensors."""
        if operation.name == "sgd_step":
            return self.optimizer()
        name, direction = operation.name.removesuffix("_backward"), "forward"
        if name != operation.name:
            direction = "backward"
        images = max(operation.inputs + operation.outputs, key=lambda t: t.bytes, default=None)
        return self.counted(name, direction, images.shape) if images else None

    def brought(self, operation: Operation) -> Iterator[Part]:
        """A gradient that a binding copies, as it is not in the memory format of what the forward saved."""
        if operation.name.endswith("_backward"):
            dy, saved = operation.inputs[:2]
            if order(dy) != order(saved):
                yield self.elementwise(Operation("copy_", (dy,), (replace(dy, stride=saved.stride),)))

    def augment(self) -> Part:
        times = row_times(counts()[AUGMENT], self.gpu, self.assumed, self.batch / BATCH)
        return Part("augment", total(times), len(times))

    def optimizer(self) -> Part:
        """Of the paper's network, whatever the batch."""
        (row,) = (row for name, row in counts().items() if name.startswith("sgd_step ") and " bfloat16 " in name)
        times = row_times(row, self.gpu, self.assumed)
        return Part("sgd_step", total(times), len(times))

    def counted(self, op: str, direction: str, shape: tuple[int, ...]) -> Part | None:
        key = "x".join(map(str, (BATCH, *shape[1:])))
        row = counts().get(f"{op} {direction} {key} bfloat16 channels_last native")
        if row is None:
            return None
        times = row_times(row, self.gpu, self.assumed, self.batch / BATCH)
        return Part(f"{op} {direction}", sum(max(time.total, self.assumed.small) for time in times), len(times))

    def best(self, name: str, layer: convolutions.Layer, direction: str) -> Part:
        """By the fastest candidate."""
        seconds = convolutions.candidates(layer, direction, self.gpu, self.producers, self.assumed)
        fastest = min(seconds, key=seconds.__getitem__)
        launches = convolutions.CANDIDATES[fastest](layer, direction, self.producers).launches
        return Part(f"{name} {direction}", seconds[fastest], launches)

    def convolution(self, name: str, layer: convolutions.Layer, operation: Operation) -> Iterator[Part]:
        yield self.best(name, layer, "forward")
        if operation.inputs[0].shape[1] < convolutions.DEPTH_LIMIT:
            yield from self.rewrite(name, operation.inputs[0])  # in the op

    def convolution_backward(self, name: str, layer: convolutions.Layer, operation: Operation) -> Iterator[Part]:
        dy = operation.inputs[0]
        for_x, for_weight, for_bias = next(
            flag for flag in operation.flags if isinstance(flag, list) and len(flag) == 3
        )
        relu = False not in operation.flags  # the default is not dispatched
        if relu:
            yield self.counted("conv2d_bias_relu", "mask", dy.shape) or self.elementwise(operation)
        elif for_bias:
            yield self.elementwise(Operation("sum", (dy,), ()))
        if for_x:
            yield self.best(name, layer, "input gradient")
        if for_weight:
            yield self.best(name, layer, "weight gradient")

    def rewrite(self, name: str, x: Described) -> Iterator[Part]:
        """A first layer's space to depth."""
        for operation in rewriting(x.shape):
            part = self.elementwise(operation)
            yield Part(f"{name} space to depth", part.seconds, part.launches)

    def linear(self, operation: Operation) -> Iterator[Part]:
        """cuBLAS's products, and a pass of ours for the ReLU."""
        if operation.name.endswith("_backward"):
            dy, x, weight, _ = operation.inputs
            yield self.counted("linear_bias_relu", "mask", dy.shape) or self.elementwise(operation)
            yield self.products(Operation("mm", (dy, weight), (x,)))
            yield self.products(Operation("mm", (transposed(dy), x), (weight,)))
        else:
            x, weight, _ = operation.inputs
            yield self.products(Operation("mm", (x, transposed(weight)), operation.outputs))
            yield self.elementwise(Operation("relu", operation.outputs, operation.outputs))

    def products(self, operation: Operation) -> Part:
        """A product of matrices by cuBLAS: bound by its multiplications, or by the bytes of the weight."""
        (rows, depth), (_, columns) = [t.shape for t in operation.inputs if len(t.shape) == 2][-2:]
        size = sum(t.bytes for t in (*operation.inputs, *operation.outputs))
        peak = self.gpu.products * self.gpu.multiprocessors * self.gpu.clock
        multiplied = rows * depth * columns / (peak * self.assumed.linear)
        return Part("linear layers", max(multiplied, size / (self.gpu.copy * self.assumed.linear_bytes)), 1)

    def elementwise(self, operation: Operation) -> Part:
        tensors = (*operation.inputs, *operation.outputs)
        size = sum(t.bytes for t in tensors)
        permuted = operation.name in COPIES and operation.inputs and operation.outputs
        permuted = bool(permuted) and order(operation.inputs[0]) != order(operation.outputs[0])
        what = "copies and casts" if operation.name in COPIES else "small kernels"
        if operation.name in COPIES and size > 1 << 26:
            shape = operation.inputs[0].shape
            what = f"copies of {'x'.join(map(str, shape[shape[0] == self.batch :]))}"
        return Part(what, self.moved(size, self.assumed.permute if permuted else 1.0), 1)


def transposed(tensor: Described) -> Described:
    return Described(tensor.shape[::-1], tensor.stride[::-1], tensor.bytes)


def order(tensor: Described) -> list[int]:
    """Dimensions by falling stride: the memory format; a dimension of one element says nothing."""
    wide = [n for n, size in enumerate(tensor.shape) if size > 1]
    return sorted(wide, key=lambda n: -tensor.stride[n])


@cache
def rewriting(shape: tuple[int, ...]) -> tuple[Operation, ...]:
    """What is dispatched to turn the images of a first layer to depth, for the convolution and its weight gradient."""
    with FakeTensorMode():
        x = torch.empty(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        weight = torch.empty(96, shape[1], 11, 11, dtype=torch.bfloat16)
        constants = Convolution([4, 4], [0, 0], [1, 1], 1)
        with Recorder() as recorder:
            space_to_depth.rewritten(x, weight, constants)
    return tuple(recorder.operations)


def predicted(
    kind: str, batch: int, gpu: Gpu, producers: dict[str, float], assumed: Assumed = LIKELY
) -> tuple[list[Part], float]:
    """(parts, summed up by name; seconds of the step in a CUDA graph, gaps between launches included)."""
    summed: dict[str, tuple[float, int]] = {}
    costs = Costs(gpu, batch, producers, assumed)
    # The images of a training step come from augment, as conv1 takes them.
    first = [costs.augment()] if kind == "training" else []
    for part in (*first, *costs.parts(traced(kind, batch))):
        seconds, launches = summed.get(part.what, (0.0, 0))
        summed[part.what] = seconds + part.seconds, launches + part.launches
    launches = sum(count for _, count in summed.values())
    parts = [Part(what, seconds, count) for what, (seconds, count) in summed.items()]
    parts.append(Part("gaps between launches", launches * assumed.gap, 0))
    return parts, sum(part.seconds for part in parts)
