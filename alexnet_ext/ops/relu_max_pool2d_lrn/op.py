"""Bias, ReLU, max pooling and local response normalization in one pass: CaffeNet's order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import by_functions
from .._checks import IntPair
from .._layout import empty_images
from .._register import Gradient, register
from ..relu_lrn_max_pool2d.op import autocast_bias, check_block, pool_fake
from ..relu_max_pool2d.reference import scatter_to_winners
from . import reference


def relu_max_pool2d_lrn(
    x: Tensor,
    bias: Tensor | None,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: IntPair,
    stride: IntPair,
    *,
    backend: str = "auto",
) -> Tensor:
    """``local_response_norm(max_pool2d(relu(x + bias)))``, the order of CaffeNet (bvlc_reference_caffenet).

    Equals ``F.local_response_norm(F.max_pool2d(F.relu(x + bias[:, None, None]), kernel_size, stride),
    lrn_size, alpha, beta, k)``. Arguments, result and errors as ``relu_lrn_max_pool2d``. Saves the pooled
    activation (a quarter of x at window 3, stride 2) and one byte an output element, not x.
    """
    if by_functions(backend, x, bias):
        return reference.relu_max_pool2d_lrn(x, bias, lrn_size, alpha, beta, k, kernel_size, stride)
    constants, op = check_block("relu_max_pool2d_lrn", backend, x, bias, lrn_size, alpha, beta, k, kernel_size, stride)
    if op is None:
        return reference.relu_max_pool2d_lrn(x, bias, *constants)
    y, _, _ = op(x, bias, *constants)
    return y


def _fake(
    x: Tensor,
    bias: Tensor | None,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: list[int],
    stride: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    pooled, winners = pool_fake(x, kernel_size, stride)
    return torch.empty_like(pooled), pooled, winners


def _fake_backward(
    dy: Tensor, pooled: Tensor, winners: Tensor, height: int, width: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return empty_images(pooled, height, width), pooled.new_empty(pooled.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _bias, *constants = inputs
    ctx.size, ctx.constants = (x.shape[2], x.shape[3]), constants
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(op: Any, ctx: Any, dy: Tensor | None, dpooled: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    dx: Any = None
    dbias: Any = None
    (height, width), (pooled, winners) = ctx.size, ctx.saved_tensors
    if dy is not None:
        dx, dbias = op(dy, pooled, winners, height, width, *ctx.constants)
    if dpooled is not None:  # only in double backward, where the saved pooled values are themselves differentiated
        kernel_size, stride = ctx.constants[-2:]
        more = scatter_to_winners(dpooled, winners, height, width, kernel_size, stride, [0, 0], [1, 1])
        dx, dbias = (more, more.sum((0, 2, 3))) if dx is None else (dx + more, dbias + more.sum((0, 2, 3)))
    return dx, dbias if ctx.needs_input_grad[1] else None, None, None, None, None, None, None


register(
    "relu_max_pool2d_lrn",
    stock=reference.relu_max_pool2d_lrn,
    schema="(Tensor x, Tensor? bias, int lrn_size, float alpha, float beta, float k, int[2] kernel_size, int[2] "
    "stride) -> (Tensor y, Tensor pooled, Tensor winners)",
    fake=_fake,
    gradient=Gradient(
        schema="(Tensor dy, Tensor pooled, Tensor winners, SymInt height, SymInt width, int lrn_size, float "
        "alpha, float beta, float k, int[2] kernel_size, int[2] stride) -> (Tensor dx, Tensor dbias)",
        fake=_fake_backward,
        setup_context=_setup_context,
        backward=_backward,
        reference=reference.relu_max_pool2d_lrn_backward,
    ),
    autocast=autocast_bias,
)
