"""ReLU and max pooling in plain PyTorch, and what a one-byte winner means."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import overrides

NO_GRADIENT = 255
"""The winner of a window in which no value is positive: nothing flows back."""


def relu_max_pool2d(x: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Tensor:
    if overrides(x):
        return F.max_pool2d(F.relu(x), kernel_size, stride, padding, dilation, ceil_mode)
    x = F.relu(x)
    if may_step_over(x, kernel_size, dilation) and x.is_floating_point():
        return _stepping_over(x, kernel_size, stride, padding, dilation, ceil_mode)
    return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)


def may_step_over(x: Tensor, kernel_size: list[int], dilation: list[int]) -> bool:
    """Whether a window may contain no value of x: it starts in the padding, and its next tap is beyond x."""
    return any(kernel_size[i] > 1 and dilation[i] > x.shape[-2 + i] for i in (0, 1))


def _stepping_over(x: Tensor, *constants: Any) -> Tensor:
    """Max pooling of activations; -inf, as in stock, for a window that contains no value of x.

    For such a window stock's index is outside the plane, and its backward writes there: into another channel, or
    outside the gradient. Here the gradient is a gather's.
    """
    y, index = F.max_pool2d(x.detach(), *constants, return_indices=True)
    nothing = y.isneginf()
    taken = x.flatten(-2).gather(-1, index.masked_fill(nothing, 0).flatten(-2)).view_as(y)
    return torch.where(nothing, y, taken)


def scatter_to_winners(
    dy: Tensor,
    winners: Tensor,
    height: int,
    width: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """dx (N, C, height, width): each dy added at its window's winner.

    A winner is the tap ``row * kernel_width + column`` within the window, or 255 for no gradient.
    """
    tap = winners.long()
    rows = torch.arange(winners.shape[2], device=dy.device)[:, None] * stride[0] - padding[0]
    columns = torch.arange(winners.shape[3], device=dy.device) * stride[1] - padding[1]
    y = rows + tap.div(kernel_size[1], rounding_mode="floor") * dilation[0]
    x = columns + tap.remainder(kernel_size[1]) * dilation[1]
    flows = winners != NO_GRADIENT
    # reshape and view, not flatten and unflatten, which the vmap behind is_grads_batched cannot do.
    lines = (*dy.shape[:2], dy.shape[2] * dy.shape[3])
    position, source = torch.where(flows, y * width + x, 0).reshape(lines), torch.where(flows, dy, 0).reshape(lines)
    zeros = torch.zeros(*dy.shape[:2], height * width, dtype=dy.dtype, device=dy.device)
    return zeros.scatter_add(2, position, source).view(*dy.shape[:2], height, width)
