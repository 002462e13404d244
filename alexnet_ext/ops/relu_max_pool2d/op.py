"""ReLU, then max pooling with overlapping windows (sections 3.1 and 3.4 of the 2012 paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import by_functions, operator
from .._checks import IntPair, check_pool, check_tensor, pair, pooled_size
from .._layout import empty_images
from .._register import Gradient, register
from . import reference

MAX_TAPS = 225
"""A winner is one byte and 255 is taken: windows to 15 x 15."""


def relu_max_pool2d(
    x: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """The maximum of each window of max(0, x).

    ``y[n, c, i, j] = max(0, max_{r, s} x[n, c, i * stride - padding + r * dilation, ...])``. Equals
    ``F.max_pool2d(F.relu(x), ...)``: NaN wins (the last one of a window), of equal values the first in
    row-major order, padding never wins, and a value that is not positive gets no gradient.

    Args:
        x: (N, C, H, W) or (C, H, W), fp64, fp32, bf16 or fp16. Other dtypes, windows of more than 225 values
            and a dilation above H or W run stock PyTorch.
        kernel_size, stride, padding, dilation: an int or (height, width); stride defaults to kernel_size.
        ceil_mode: round the output's size up.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"stock"``.

    Returns:
        The pooled tensor, in x's memory format. Saves one byte an output element for the backward.

    Raises:
        RuntimeError: wrong rank, empty C, H or W, padding above half the window, an empty output.
        TypeError: a size that is neither an int nor a pair of ints, or a ceil_mode that is no bool.
    """
    if by_functions(backend, x):
        return reference.relu_max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    check_tensor("x", x)
    kernel = pair("kernel_size", kernel_size, 1)
    step = kernel if stride is None or (isinstance(stride, (list, tuple)) and not stride) else pair("stride", stride, 1)
    pad, dilate = pair("padding", padding, 0), pair("dilation", dilation, 1)
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"ceil_mode must be a bool, got {ceil_mode!r}")
    check_pool(x, kernel, step, pad, dilate, ceil_mode)
    unsupported = f"a window of {kernel}" if kernel[0] * kernel[1] > MAX_TAPS else ""
    if reference.may_step_over(x, kernel, dilate):
        unsupported = f"dilation {dilate}, whose windows may step over an x of shape {list(x.shape)}"
    op = operator("relu_max_pool2d", backend, x, unsupported)
    if op is None:
        return reference.relu_max_pool2d(x, kernel, step, pad, dilate, ceil_mode)
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    y, _ = op(batch, kernel, step, pad, dilate, ceil_mode)
    return y if x.dim() == 4 else y.squeeze(0)


def empty_pooled(x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A pooled tensor and its winners, both in the memory format that pooling x gives."""
    return empty_images(x, height, width), empty_images(x, height, width, torch.uint8)


def _fake(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    height, width = (
        pooled_size(x.shape[2 + i], kernel_size[i], stride[i], padding[i], dilation[i], ceil_mode) for i in (0, 1)
    )
    return empty_pooled(x, height, width)


def _fake_backward(
    dy: Tensor,
    winners: Tensor,
    height: int,
    width: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    return empty_images(winners, height, width, dy.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *constants, _ceil_mode = inputs
    ctx.constants = [x.shape[2], x.shape[3], *constants]
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(op: Any, ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    dx = None
    if dy is not None:
        (winners,) = ctx.saved_tensors
        dx = op(dy, winners, *ctx.constants)
    return dx, None, None, None, None, None


register(
    "relu_max_pool2d",
    stock=reference.relu_max_pool2d,
    schema="(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode) -> "
    "(Tensor y, Tensor winners)",
    fake=_fake,
    gradient=Gradient(
        schema="(Tensor dy, Tensor winners, SymInt height, SymInt width, int[2] kernel_size, int[2] stride, "
        "int[2] padding, int[2] dilation) -> Tensor",
        fake=_fake_backward,
        setup_context=_setup_context,
        backward=_backward,
        reference=reference.scatter_to_winners,
        batched=(0, 1),
    ),
    batched=(0,),
)
