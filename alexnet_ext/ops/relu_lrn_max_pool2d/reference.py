"""Bias, ReLU, local response normalization, max pooling in plain PyTorch: the paper's order."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import overrides
from .._reference import differentiable, first_gradient
from ..local_response_norm.reference import local_response_norm
from ..relu_max_pool2d.reference import scatter_to_winners


def add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and overrides(x):
        return torch.add(x, torch.reshape(bias, (-1, 1, 1)))
    if bias is not None and overrides(bias):  # ExpandedWeight knows a bias as a convolution's alone: one that copies x
        return F.conv2d(x, torch.ones(x.shape[-3], 1, 1, 1, dtype=x.dtype, device=x.device), bias, groups=x.shape[-3])
    return x if bias is None else x + bias.to(x.dtype)[:, None, None]


def relu_lrn_max_pool2d(
    x: Tensor,
    bias: Tensor | None,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: Any,
    stride: Any,
) -> Tensor:
    activation = F.relu(add_bias(x, bias))
    return F.max_pool2d(local_response_norm(activation, lrn_size, alpha, beta, k), kernel_size, stride)


def relu_lrn_max_pool2d_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    winners: Tensor,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: list[int],
    stride: list[int],
) -> tuple[Tensor, Tensor]:
    """(dx, dbias): through the pooling by its winners, then through LRN and ReLU."""
    z = differentiable(add_bias(x, bias))
    y = local_response_norm(F.relu(z), lrn_size, alpha, beta, k)
    dnorm = scatter_to_winners(dy, winners, x.shape[2], x.shape[3], kernel_size, stride, [0, 0], [1, 1])
    (dx,) = first_gradient(y, [z], dnorm)
    return dx, torch.sum(dx, (0, 2, 3))
