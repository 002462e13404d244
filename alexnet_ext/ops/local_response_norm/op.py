"""Local response normalization across channels (section 3.3 of the 2012 paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import by_functions, operator
from .._checks import check_lrn, check_tensor
from .._register import Gradient, register
from . import reference


def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, backend: str = "auto"
) -> Tensor:
    r"""Divide each value by a power of the mean square of its neighbouring channels.

    ``y[n, c] = x[n, c] * (k + alpha / size * sum_j x[n, j]**2) ** -beta`` with j from ``c - size // 2`` to
    ``c + (size - 1) // 2``, cut off at the first and last channel; alpha is always divided by size.
    Equals ``torch.nn.functional.local_response_norm``. The paper does not divide alpha: its layer is
    ``local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)``.

    Args:
        x: (N, C, *), rank 3 to 6, fp64, fp32, bf16 or fp16. bf16 and fp16 are computed in fp32 and keep their
            dtype, under autocast too (stock returns fp32 there).
        size: channels in the window, at least 1; may exceed C.
        alpha, beta, k: the formula's constants, not checked for sense (as in PyTorch).
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"stock"``.

    Returns:
        A tensor of x's shape, dtype and memory format. Saves x for the backward, nothing else.

    Raises:
        ValueError: x has fewer than 3 dimensions, or the backend is unknown.
        RuntimeError: size is not positive, or the requested backend does not cover the call.
        TypeError: size is not an int, or a constant not a number.
    """
    if by_functions(backend, x):
        return reference.local_response_norm(x, size, alpha, beta, k)
    check_tensor("x", x)
    size, alpha, beta, k = check_lrn(size, alpha, beta, k)
    if x.dim() < 3:
        raise ValueError(f"x has {x.dim()} dimensions, expected 3D or higher dimensionality (N, C, ...)")
    unsupported = f"x of rank {x.dim()}" if x.dim() > 6 else ""
    op = operator("local_response_norm", backend, x, unsupported)
    if op is None:
        return reference.local_response_norm(x, size, alpha, beta, k)
    return op(x, size, alpha, beta, k)


def _fake(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.constants = inputs
    ctx.save_for_backward(x)


def _backward(op: Any, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    dx = op(dy, x, *ctx.constants)
    return dx, None, None, None, None


register(
    "local_response_norm",
    stock=reference.local_response_norm,
    schema="(Tensor x, int size, float alpha, float beta, float k) -> Tensor",
    fake=_fake,
    gradient=Gradient(
        schema="(Tensor dy, Tensor x, int size, float alpha, float beta, float k) -> Tensor",
        fake=_fake_backward,
        setup_context=_setup_context,
        backward=_backward,
        reference=reference.local_response_norm_backward,
        batched=(0, 1),
    ),
    batched=(0,),
)
