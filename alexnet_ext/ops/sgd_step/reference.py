"""A step of SGD in plain PyTorch, on widened gradients: by ``torch.optim.SGD``'s fused kernel, or its operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._backend import wrapper
from .._layout import is_dense, same_strides, with_strides_of


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
    # PyTorch's kernel writes the gradients that it divides.
    steps = [g.to(p.dtype, copy=grad_scale is not None) for g, p in zip(gradients, parameters, strict=True)]
    step: Callable[..., None] = torch._fused_sgd_
    if _kernel_covers(parameters, momenta):
        steps = list(map(with_strides_of, parameters, steps))
    else:
        step = _by_operations
    step(
        list(parameters),
        steps,
        list(momenta),
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr if lr_tensor is None else lr_tensor,
        dampening=dampening,
        nesterov=nesterov,
        maximize=maximize,
        is_first_step=first_step,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    for weight, parameter in zip(weights, parameters, strict=False):  # there may be no weights
        weight.copy_(parameter if found_inf is None else torch.where(found_inf.reshape(()) != 0, weight, parameter))


def _kernel_covers(parameters: Sequence[Tensor], momenta: Sequence[Tensor]) -> bool:
    """Whether PyTorch's kernel takes the call: it knows no strides, and torch.compile does not know it."""
    if torch.compiler.is_compiling() or wrapper(*parameters) or parameters[0].device.type not in ("cpu", "cuda"):
        return False
    return all(map(is_dense, parameters)) and all(map(same_strides, momenta, parameters))


def _by_operations(
    parameters: list[Tensor],
    steps: list[Tensor],
    momenta: list[Tensor],
    *,
    weight_decay: float,
    momentum: float,
    lr: float | Tensor,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    updated = [*parameters, *momenta]
    before = [] if found_inf is None else [tensor.clone() for tensor in updated]
    if grad_scale is not None:
        steps = [step / grad_scale.reshape(()) for step in steps]
    if maximize:
        steps = list(torch._foreach_neg(steps))
    if weight_decay != 0:
        steps = list(torch._foreach_add(steps, parameters, alpha=weight_decay))
    if momentum != 0:
        if is_first_step:
            torch._foreach_copy_(momenta, steps)
        else:
            torch._foreach_mul_(momenta, momentum)
            torch._foreach_add_(momenta, steps, alpha=1 - dampening)
        steps = list(torch._foreach_add(steps, momenta, alpha=momentum)) if nesterov else momenta
    if isinstance(lr, Tensor):
        torch._foreach_sub_(parameters, [step * lr.reshape(()) for step in steps])
    else:
        torch._foreach_add_(parameters, steps, alpha=-lr)
    if found_inf is not None:
        for tensor, old in zip(updated, before, strict=True):
            tensor.copy_(torch.where(found_inf.reshape(()) != 0, old, tensor))
