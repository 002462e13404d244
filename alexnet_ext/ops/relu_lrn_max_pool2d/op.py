"""Bias, ReLU, local response normalization and max pooling in one pass: what follows conv1 and conv2 in the paper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import by_functions, operator
from .._checks import (
    IntPair,
    autocast_enabled,
    check_bias,
    check_lrn,
    check_pool,
    check_same,
    check_tensor,
    pair,
    pooled_size,
)
from .._layout import empty_images
from .._register import Gradient, register
from ..relu_max_pool2d.op import MAX_TAPS, empty_pooled
from . import reference


def relu_lrn_max_pool2d(
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
    """``max_pool2d(local_response_norm(relu(x + bias)))``, the order of the 2012 paper (sections 3.3 to 3.5).

    Equals ``F.max_pool2d(F.local_response_norm(F.relu(x + bias[:, None, None]), lrn_size, alpha, beta, k),
    kernel_size, stride)``: windows inside the image, sizes rounded down.

    Args:
        x: (N, C, H, W), a convolution's output before its bias; fp64, fp32, bf16 or fp16. An unbatched (C, H, W) runs
            stock PyTorch, whose normalization takes it for (N, C, L) and goes over H.
        bias: (C,) or None.
        lrn_size, alpha, beta, k: as ``size``, ``alpha``, ``beta`` and ``k`` of ``local_response_norm``.
        kernel_size, stride: the pooling window, an int or (height, width).
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"stock"``.

    Returns:
        The pooled tensor in x's dtype (under autocast too) and memory format. Saves x, a copy of bias and one byte an
        output element for the backward.

    Raises:
        RuntimeError, TypeError: as ``local_response_norm`` and ``relu_max_pool2d``; or a bias that does not fit x.
    """
    if by_functions(backend, x, bias):
        return reference.relu_lrn_max_pool2d(x, bias, lrn_size, alpha, beta, k, kernel_size, stride)
    constants, op = check_block("relu_lrn_max_pool2d", backend, x, bias, lrn_size, alpha, beta, k, kernel_size, stride)
    if op is None:
        return reference.relu_lrn_max_pool2d(x, bias, *constants)
    if bias is not None and not torch.jit.is_tracing() and (x.requires_grad or bias.requires_grad):
        # The backward adds it again: an optimizer may have changed the caller's meanwhile. (torch.jit.trace compares
        # the graphs with and without gradients.)
        bias = bias.clone()
    y, _ = op(x, bias, *constants)
    return y


def check_block(
    op: str,
    backend: str,
    x: Tensor,
    bias: Tensor | None,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: IntPair,
    stride: IntPair,
) -> tuple[tuple[Any, ...], Any]:
    """Check a fused block's arguments, in either order.

    Returns (the arguments after the bias, the operator that runs the call or None).
    """
    check_tensor("x", x)
    norm = check_lrn(lrn_size, alpha, beta, k, "lrn_size")
    kernel, step = pair("kernel_size", kernel_size, 1), pair("stride", stride, 1)
    check_pool(x, kernel, step, [0, 0], [1, 1], False)
    check_bias(bias, x.shape[-3], x)
    if bias is not None and not autocast_enabled(x):
        check_same("bias", bias, x)
    unsupported = f"a window of {kernel}" if kernel[0] * kernel[1] > MAX_TAPS else ""
    if x.dim() == 3:
        unsupported = f"an unbatched x of shape {list(x.shape)}"
    return (*norm, kernel, step), operator(op, backend, x, unsupported)


def pool_fake(x: Tensor, kernel_size: list[int], stride: list[int]) -> tuple[Tensor, Tensor]:
    height, width = (pooled_size(x.shape[2 + i], kernel_size[i], stride[i], 0, 1, False) for i in (0, 1))
    return empty_pooled(x, height, width)


def autocast_bias(dtype: torch.dtype, x: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    """x keeps its dtype under autocast; a bias, kept in fp32, follows it."""
    return x, bias if bias is None else bias.to(x.dtype), *rest


def _fake(
    x: Tensor,
    bias: Tensor | None,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel_size: list[int],
    stride: list[int],
) -> tuple[Tensor, Tensor]:
    return pool_fake(x, kernel_size, stride)


def _fake_backward(dy: Tensor, x: Tensor, bias: Tensor | None, winners: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_images(x, x.shape[2], x.shape[3]), x.new_empty(x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, *ctx.constants = inputs
    ctx.save_for_backward(x, bias, output[1])
    ctx.set_materialize_grads(False)


def _backward(op: Any, ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    dx = dbias = None
    if dy is not None:
        x, bias, winners = ctx.saved_tensors
        dx, dbias = op(dy, x, bias, winners, *ctx.constants)
    return dx, dbias if ctx.needs_input_grad[1] else None, None, None, None, None, None, None


register(
    "relu_lrn_max_pool2d",
    stock=reference.relu_lrn_max_pool2d,
    schema="(Tensor x, Tensor? bias, int lrn_size, float alpha, float beta, float k, int[2] kernel_size, int[2] "
    "stride) -> (Tensor y, Tensor winners)",
    fake=_fake,
    gradient=Gradient(
        schema="(Tensor dy, Tensor x, Tensor? bias, Tensor winners, int lrn_size, float alpha, float beta, float "
        "k, int[2] kernel_size, int[2] stride) -> (Tensor dx, Tensor dbias)",
        fake=_fake_backward,
        setup_context=_setup_context,
        backward=_backward,
        reference=reference.relu_lrn_max_pool2d_backward,
    ),
    autocast=autocast_bias,
)
