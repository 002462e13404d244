"""Convolution, bias and ReLU in plain PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._reference import differentiable, first_gradient


def conv2d_bias_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    relu: bool = True,
) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return F.relu(y) if relu else y


def conv2d_bias_relu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_mask: list[bool],
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); what output_mask leaves out is an empty tensor."""
    bias = x.new_zeros(weight.shape[0], requires_grad=True)
    inputs = (differentiable(x), differentiable(weight), bias)
    z = F.conv2d(*inputs, stride, padding, dilation, groups)
    # Written as !(y <= 0) so that a NaN keeps its gradient, as in torch.relu.
    dx, dweight, dbias = first_gradient(z, inputs, torch.where(y <= 0, 0, dy) if relu else dy)
    empty, (for_x, for_weight, for_bias) = x.new_empty(0), output_mask
    return dx if for_x else empty, dweight if for_weight else empty, dbias if for_bias else empty
