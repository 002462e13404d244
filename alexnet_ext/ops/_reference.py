"""Gradients that are themselves differentiable: for the ops' references, through which double backward goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def first_gradient(outputs: Tensor, inputs: Sequence[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """d outputs / d inputs times dy; zeros for an input that the outputs do not depend on."""
    found = torch.autograd.grad(outputs, list(inputs), dy, create_graph=True, allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True))


def differentiable(x: Tensor) -> Tensor:
    """x where it requires a gradient already, else a detached alias of it that does."""
    return x if x.requires_grad else x.detach().requires_grad_()
