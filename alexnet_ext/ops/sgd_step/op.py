"""A step of stochastic gradient descent for all of a network's weights, in one pass (``alexnet_ext.optim.SGD``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._backend import DTYPES, operator
from .._checks import check_tensor, real
from .._layout import is_dense, same_strides
from .._register import register
from . import reference


def sgd_step(
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Update parameters, their momenta and their copies in a lower precision, in place: SGD with momentum.

    Equals ``torch.optim.SGD(parameters, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize).step()``
    with ``gradients`` in the parameters' dtype, and then ``weight.copy_(parameter)`` for each weight. On a GPU that is
    one launch for up to 64 tensors, which reads and writes everything once. With bf16 gradients it moves 20 bytes a
    parameter: gradient 2, weight 2, parameter and momentum 8 each.

    Each product is added with one rounding (a fused multiply-add), and so every compiled kernel gives the same bits,
    but on a CPU without such an instruction. PyTorch's own kernels round some products before the addition, so they may
    differ by that rounding. They do not where decay, momentum and rate are powers of two.

    Args:
        parameters: of fp32, or fp64 where the gradients are.
        momenta: one for each parameter, in its dtype; none where ``momentum`` is 0.
        gradients: one for each parameter, all of one dtype: fp64, fp32, bf16 or fp16. They are only read.
        weights: a copy of each parameter in the gradients' dtype, or none. It is written: rounded to nearest even.
        lr: the rate. A Tensor of one number, on the parameters' device, is read by the kernel, so that a CUDA graph is
            replayed with the rate that it then has.
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        first_step: momenta are written, not read: each becomes the gradient, as at ``torch.optim.SGD``'s first step.
        grad_scale: one number, that the gradients are divided by (``torch.amp.GradScaler``'s).
        found_inf: one number; unless it is 0, nothing is written.
        backend: ``"auto"``, ``"native"`` or ``"stock"``.

    Raises:
        RuntimeError: lists of other lengths, tensors whose shapes, dtypes or devices do not fit together, sparse or
            complex ones.
        TypeError: an argument that is no list of Tensors; a constant that is no number, or no bool.
    """
    lists = {"parameters": parameters, "momenta": momenta, "gradients": gradients, "weights": weights}
    given = {name: _checked(name, tensors) for name, tensors in lists.items()}
    parameters, momenta, gradients, weights = given.values()
    _check_constants(lr, nesterov=nesterov, maximize=maximize, first_step=first_step)
    floats = (("momentum", momentum), ("dampening", dampening), ("weight_decay", weight_decay))
    momentum, dampening, weight_decay = (real(name, value) for name, value in floats)
    _check_lengths(given, momentum)
    if not parameters:
        return
    for name, tensors in given.items():
        for i, tensor in enumerate(tensors):
            _check(f"{name}[{i}]", tensor, parameters[i], _dtype_of(name, gradients[0].dtype))
    numbers = [
        _number(name, value, parameters[0])
        for name, value in (("lr", lr), ("grad_scale", grad_scale), ("found_inf", found_inf))
    ]
    rate = 0.0 if numbers[0] is not None else float(lr)
    constants: tuple[Any, ...] = (rate, momentum, dampening, weight_decay, nesterov, maximize, first_step, *numbers)
    unsupported = _unsupported(parameters, momenta, weights)
    alike = gradients[0].new_empty(0)  # what is known of the kernel depends on no layout or shape
    op = operator("sgd_step", backend, alike, unsupported) or reference.sgd_step
    op(parameters, momenta, gradients, weights, *constants)
    if not torch.compiler.is_compiling():
        # So that autograd notices a backward that needs the weights of before. No fused kernel does so itself.
        torch.autograd.graph.increment_version([*parameters, *momenta, *weights])


def _checked(name: str, tensors: Any) -> list[Tensor]:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name} must be a list of Tensors, got {type(tensors).__name__}")
    for i, tensor in enumerate(tensors):
        check_tensor(f"{name}[{i}]", tensor)
    return list(tensors)


def _check_lengths(given: dict[str, list[Tensor]], momentum: float) -> None:
    count = len(given["parameters"])
    allowed = {"momenta": (count if momentum else 0,), "gradients": (count,), "weights": (0, count)}
    for name, lengths in allowed.items():
        if len(given[name]) not in lengths:
            expected = " or ".join(map(str, lengths))
            raise RuntimeError(f"{name} has {len(given[name])} tensors, expected {expected} for {count} parameters")


def _dtype_of(name: str, gradient: torch.dtype) -> torch.dtype:
    """What the tensors of this list have, where the gradients have that."""
    if gradient not in DTYPES:
        raise RuntimeError(f"gradients must be of {', '.join(map(str, DTYPES))}, got {gradient}")
    wide = torch.float64 if gradient == torch.float64 else torch.float32
    return gradient if name in ("gradients", "weights") else wide


def _check(name: str, tensor: Tensor, parameter: Tensor, dtype: torch.dtype) -> None:
    if tensor.layout != torch.strided:
        raise RuntimeError(f"{name} has layout {tensor.layout}, expected torch.strided")
    if tensor.dtype != dtype:
        raise RuntimeError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.shape != parameter.shape:
        raise RuntimeError(f"{name} has shape {list(tensor.shape)}, expected {list(parameter.shape)}")
    if tensor.device != parameter.device:
        raise RuntimeError(f"{name} is on device {tensor.device}, expected {parameter.device}")


def _check_constants(lr: Any, **flags: Any) -> None:
    if not isinstance(lr, Tensor):
        real("lr", lr)
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__} {flag!r}")


def _number(name: str, value: Any, parameter: Tensor) -> Tensor | None:
    """A number that the kernel is to read, in fp32; None for one that the host knows, or for none."""
    if value is None or (name == "lr" and not isinstance(value, Tensor)):
        return None
    check_tensor(name, value)
    if value.is_complex():
        raise TypeError(f"{name} must be a real number, got {value.dtype}")
    if value.numel() != 1:
        raise RuntimeError(f"{name} has shape {list(value.shape)}, expected one number")
    if name == "lr" and value.device.type == "cpu" and (parameter.device.type != "cpu" or value.dtype != torch.float32):
        return None
    return value.to(parameter.device, torch.float32)


def _unsupported(parameters: list[Tensor], momenta: list[Tensor], weights: list[Tensor]) -> str:
    """What about the tensors that are written no kernel covers: memory with gaps, or in different orders."""
    odd = [parameter for parameter in parameters if not is_dense(parameter)]
    for tensors in (momenta, weights):
        odd += [t for t, parameter in zip(tensors, parameters, strict=False) if not same_strides(t, parameter)]
    return f"tensors of strides {list(odd[0].stride())}" if odd else ""


def _fake(*_: Any) -> None:
    return None


register(
    "sgd_step",
    stock=reference.sgd_step,
    schema="(Tensor(a!)[] parameters, Tensor(b!)[] momenta, Tensor[] gradients, Tensor(c!)[] weights, float lr, "
    "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first_step, "
    "Tensor? lr_tensor, Tensor? grad_scale, Tensor? found_inf) -> ()",
    fake=_fake,
    gradient=None,
)
