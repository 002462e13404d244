"""conv2d_bias_relu by CUTLASS's products on tensor cores, where they were built and apply: a candidate of measured.py.

Groups are slices of the channels-last tensors as they lie. There are kernels for compute capability 8.0 and newer, and
others (sm90) for 9.0 alone, whose instructions no other has. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import CUTLASS, SM90
from .space_to_depth import SpaceToDepth, convolved_size, rewritten
from .triton_kernels import precision

LEAST_CAPABILITY = (8, 0)  # mma.sync of bf16 and TF32, cp.async
ACCESS = 16  # bytes: so many of a group's channels are read and written at a time
MOST_BYTES = 2**31  # a tensor's, as offsets are of 32 bits
MOST_TAPS = 32  # a side's, of which each is a bit in a mask
HOPPER = (9, 0)
MOST_PIXELS = 127  # sm90: how far taps reach, and of padding; 8 bits of a descriptor
NAMES = {False: "cutlass", True: "cutlass sm90"}


def capability(x: Tensor) -> tuple[int, int]:
    """Of x's device; (0, 0) where it is no GPU."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def applies(
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wanted: int | None = None,
    sm90: bool = False,
) -> bool:
    """Whether the kernels can compute the forward (wanted None), or the gradient of x (0) or weight (1).

    The last needs nothing more than the forward does; the gradient of x needs stride 1, which a first layer gets by
    its rewrite. Those of ``sm90`` need it in every direction, and have no gradients of TF32.
    """
    if sm90:
        pixels = max(*(dilation[i] * (weight.shape[2 + i] - 1) for i in (0, 1)), *padding)
        there = SM90.loaded and capability(x) == HOPPER and (wanted is None or x.element_size() == 2)
        return there and pixels <= MOST_PIXELS and applies(x, weight, stride, padding, dilation, groups, 0)
    if not CUTLASS.loaded or capability(x) < LEAST_CAPABILITY or weight.dtype != x.dtype:
        return False
    if x.dtype not in (torch.bfloat16, torch.float16) and precision(x.dtype) != "tf32":
        return False
    batch, channels, *image = x.shape
    filters, taps = weight.shape[0], list(weight.shape[2:])
    size = convolved_size(x, weight, stride, padding, dilation)
    if SpaceToDepth.helps(weight, stride, dilation, groups):
        taps = SpaceToDepth(x, weight, stride, padding, size).taps
        image, channels = [size[i] + taps[i] - 1 for i in (0, 1)], channels * stride[0] * stride[1]
        stride = [1, 1]
    elements = (
        batch * channels * image[0] * image[1],
        filters * channels // groups * taps[0] * taps[1],
        batch * filters * size[0] * size[1],
    )
    return (
        all(count // groups * x.element_size() % ACCESS == 0 for count in (channels, filters))
        and max(taps) <= MOST_TAPS
        and min(elements) > 0
        and max(elements) * x.element_size() < MOST_BYTES
        and (wanted != 0 or stride == [1, 1])
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool = True,
    sm90: bool = False,
) -> Tensor:
    """The result, channels-last."""
    _, x, weight, stride, padding = rewritten(x, weight, stride, padding, dilation, groups)
    ops = torch.ops.alexnet_ext
    run = ops.conv2d_bias_relu_sm90 if sm90 else ops.conv2d_bias_relu_cutlass
    return run(x, weight, bias, stride, padding, dilation, groups, relu)


def gradients(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wanted: int,
    sm90: bool = False,
) -> list[Tensor]:
    """[dx] (wanted 0) or [dweight] (wanted 1) for the masked gradient."""
    rewrite, x, weight, stride, padding = rewritten(x, weight, stride, padding, dilation, groups)
    ops, given = torch.ops.alexnet_ext, (dz, x, weight, stride, padding, dilation, groups)
    run = ops.conv2d_bias_relu_sm90_gradient if sm90 else ops.conv2d_bias_relu_cutlass_gradient
    found = run(*given, wanted)
    return [found if rewrite is None else rewrite.back(found, wanted)]
