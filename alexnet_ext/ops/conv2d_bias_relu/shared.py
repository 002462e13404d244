"""What all ways to compute a convolution share: its constants and directions, empty results, the ReLU's mask."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import pooled_size
from .._layout import convolved_format, new_images


class Convolution(NamedTuple):
    """A convolution's constants, as in csrc/conv2d_bias_relu; each pair is [height, width]."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class Direction(IntEnum):
    """What is computed: the result, or the gradient of x or weight. C++ takes the gradients' numbers as ``wanted``."""

    INPUT = 0
    WEIGHT = 1
    FORWARD = 2


def precision(dtype: torch.dtype) -> str:
    """Of fp32 products: TF32 where PyTorch's flags allow it for cuDNN's convolutions at this moment, else IEEE."""
    flag = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # set by cudnn.allow_tf32 too
    return "tf32" if dtype == torch.float32 and flag == "tf32" else "ieee"


def convolved_size(x: Tensor, weight: Tensor, p: Convolution) -> list[int]:
    """[height, width] of the result."""
    return [
        pooled_size(x.shape[2 + i], weight.shape[2 + i], p.stride[i], p.padding[i], p.dilation[i], False)
        for i in (0, 1)
    ]


def empty_result(x: Tensor, weight: Tensor, p: Convolution) -> Tensor:
    """A result of these arguments, its values not yet written."""
    return new_images(x, (x.shape[0], weight.shape[0], *convolved_size(x, weight, p)), convolved_format(x, weight))


def empty_gradients(x: Tensor, weight: Tensor, output_mask: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), their values not yet written; what ``output_mask`` leaves out has no elements."""
    layout, (for_x, for_weight, for_bias) = convolved_format(x, weight), output_mask
    return (
        new_images(x, x.shape, layout) if for_x else x.new_empty(0),
        new_images(x, weight.shape, layout) if for_weight else x.new_empty(0),
        x.new_empty(weight.shape[0]) if for_bias else x.new_empty(0),
    )


def zero_gradients(x: Tensor, weight: Tensor, output_mask: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of a result without elements."""
    dx, dweight, dbias = empty_gradients(x, weight, output_mask)
    return dx.zero_(), dweight.zero_(), dbias.zero_()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def before_relu(dy: Tensor, y: Tensor, for_bias: bool, relu: bool) -> tuple[Tensor, Tensor]:
    """(dz, dbias): the gradient of what is before the ReLU, channels-last, and with ``for_bias`` its sums by channel.

    With ``relu`` dz is dy where y is positive or NaN, and 0 elsewhere; without it dz is dy.
    ``triton_kernels.before_relu`` does the same in one pass.
    """
    # Written as !(y <= 0) so that a NaN keeps its gradient, as in torch.relu.
    dz = channels_last(torch.where(y <= 0, 0, dy) if relu else dy)
    return dz, dz.sum((0, 2, 3)) if for_bias else dy.new_empty(0)
