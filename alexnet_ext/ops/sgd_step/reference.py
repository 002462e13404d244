"""A step of SGD in plain PyTorch: the operations of ``torch.optim.SGD(foreach=True)``, on widened gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def sgd_step(
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    updated = [*parameters, *momenta, *weights]
    before = [] if found_inf is None else [tensor.clone() for tensor in updated]
    steps = [g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
    if grad_scale is not None:
        steps = [g / grad_scale.reshape(()) for g in steps]
    if maximize:
        steps = list(torch._foreach_neg(steps))
    if weight_decay != 0:
        steps = list(torch._foreach_add(steps, list(parameters), alpha=weight_decay))
    if momentum != 0:
        buffers = list(momenta)
        if first_step:
            torch._foreach_copy_(buffers, steps)
        else:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, steps, alpha=1 - dampening)
        steps = list(torch._foreach_add(steps, buffers, alpha=momentum)) if nesterov else buffers
    if lr_tensor is None:
        torch._foreach_add_(list(parameters), steps, alpha=-lr)
    else:
        torch._foreach_sub_(list(parameters), [step * lr_tensor.reshape(()) for step in steps])
    for weight, parameter in zip(weights, parameters, strict=False):  # there may be no weights
        weight.copy_(parameter)
    if found_inf is not None:
        for tensor, old in zip(updated, before, strict=True):
            tensor.copy_(torch.where(found_inf.reshape(()) != 0, old, tensor))
