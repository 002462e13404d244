"""The linear layer, bias and ReLU in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_bias_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.relu(F.linear(x, weight, bias))


def linear_bias_relu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, y: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); what output_mask leaves out is an empty tensor."""
    # Written as !(y <= 0) so that a NaN keeps its gradient, as in torch.relu.
    dz = torch.where(y <= 0, 0, dy)
    empty, (for_x, for_weight, for_bias) = x.new_empty(0), output_mask
    return (
        dz @ weight if for_x else empty,
        dz.mT @ x if for_weight else empty,
        dz.sum(0) if for_bias else empty,
    )
