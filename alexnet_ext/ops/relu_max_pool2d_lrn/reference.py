"""Bias, ReLU, max pooling, local response normalization in plain PyTorch: CaffeNet's order."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..local_response_norm.reference import local_response_norm, local_response_norm_backward
from ..relu_lrn_max_pool2d.reference import add_bias
from ..relu_max_pool2d.reference import scatter_to_winners


def relu_max_pool2d_lrn(
    x: Tensor,
    bias: Tensor | None,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: Any,
    stride: Any,
) -> Tensor:
    pooled = F.max_pool2d(F.relu(add_bias(x, bias)), kernel_size, stride)
    return local_response_norm(pooled, lrn_size, alpha, beta, k)


def relu_max_pool2d_lrn_backward(
    dy: Tensor,
    pooled: Tensor,
    winners: Tensor,
    height: int,
    width: int,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: list[int],
    stride: list[int],
) -> tuple[Tensor, Tensor]:
    """(dx, dbias): through LRN at the pooled values, then to the winners."""
    dpooled = local_response_norm_backward(dy, pooled, lrn_size, alpha, beta, k)
    dx = scatter_to_winners(dpooled, winners, height, width, kernel_size, stride, [0, 0], [1, 1])
    return dx, torch.sum(dx, (0, 2, 3))
