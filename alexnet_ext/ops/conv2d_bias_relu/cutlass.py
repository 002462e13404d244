"""conv2d_bias_relu by CUTLASS's products on tensor cores, where they were built and apply; candidates.py offers them.

Groups are slices of the channels-last tensors, without a copy. There are kernels for compute capability 8.0 and newer,
and others (sm90) for 9.0 alone, whose instructions no other has. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import CUTLASS, SM90
from .shared import Convolution, Direction, convolved_size, precision
from .space_to_depth import SpaceToDepth, rewritten

LEAST_CAPABILITY = (8, 0)  # mma.sync of bf16 and TF32, cp.async
ACCESS = 16  # bytes of a group's channels that are read or written at a time
MOST_BYTES = 2**31  # of a tensor, as offsets have 32 bits
MOST_TAPS = 32  # of a side: each is a bit in a mask
HOPPER = (9, 0)
MOST_PIXELS = 127  # sm90: how far taps reach, and of padding; 8 bits of a descriptor


def capability(x: Tensor) -> tuple[int, int]:
    """Of x's device; (0, 0) where it is no GPU."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def applies(x: Tensor, weight: Tensor, p: Convolution, direction: Direction, sm90: bool = False) -> bool:
    """Whether the kernels can compute this direction of the convolution.

    The gradient of weight needs no more than the forward does. The gradient of x needs stride 1, which a first layer
    gets by its rewrite. The kernels of ``sm90`` need stride 1 in every direction, and have no gradients of TF32. Where
    they are, the others are compiled for TF32 alone: in bf16 and fp16 they are predicted to lose nearly everywhere.
    """
    on_hopper = SM90.loaded and capability(x) == HOPPER
    if sm90:
        pixels = max(*(p.dilation[i] * (weight.shape[2 + i] - 1) for i in (0, 1)), *p.padding)
        there = on_hopper and (direction == Direction.FORWARD or x.element_size() == 2)
        return there and pixels <= MOST_PIXELS and _fits(x, weight, p, Direction.INPUT)
    return not (on_hopper and x.element_size() == 2) and _fits(x, weight, p, direction)


def _fits(x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> bool:
    """Whether device, dtypes and shapes are what CUTLASS's products can do."""
    if not CUTLASS.loaded or capability(x) < LEAST_CAPABILITY or weight.dtype != x.dtype:
        return False
    if x.dtype not in (torch.bfloat16, torch.float16) and precision(x.dtype) != "tf32":
        return False
    return _shapes_fit(x, weight, p, direction)


def _shapes_fit(x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> bool:
    """Whether channels, taps, bytes and stride are what the kernels can do, after the rewrite of a first layer."""
    batch, channels, *image = x.shape
    filters, taps, stride = weight.shape[0], list(weight.shape[2:]), p.stride
    size = convolved_size(x, weight, p)
    if SpaceToDepth.helps(weight, p):
        taps = SpaceToDepth(x, weight, p).taps
        image, channels = [size[i] + taps[i] - 1 for i in (0, 1)], channels * stride[0] * stride[1]
        stride = [1, 1]
    elements = (
        batch * channels * image[0] * image[1],
        filters * channels // p.groups * taps[0] * taps[1],
        batch * filters * size[0] * size[1],
    )
    return (
        all(count // p.groups * x.element_size() % ACCESS == 0 for count in (channels, filters))
        and max(taps) <= MOST_TAPS
        and min(elements) > 0
        and max(elements) * x.element_size() < MOST_BYTES
        and (direction != Direction.INPUT or stride == [1, 1])
    )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, p: Convolution, relu: bool, sm90: bool = False) -> Tensor:
    """The result, channels-last."""
    _, x, weight, p = rewritten(x, weight, p)
    ops = torch.ops.alexnet_ext
    run = ops.conv2d_bias_relu_sm90 if sm90 else ops.conv2d_bias_relu_cutlass
    return run(x, weight, bias, *p, relu)


def gradient(dz: Tensor, x: Tensor, weight: Tensor, p: Convolution, direction: Direction, sm90: bool = False) -> Tensor:
    """The gradient of x or weight; ``dz`` is the gradient before the ReLU."""
    rewrite, x, weight, p = rewritten(x, weight, p)
    ops = torch.ops.alexnet_ext
    run = ops.conv2d_bias_relu_sm90_gradient if sm90 else ops.conv2d_bias_relu_cutlass_gradient
    found = run(dz, x, weight, *p, int(direction))
    return found if rewrite is None else rewrite.back(found, direction)
