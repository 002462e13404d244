"""The linear layer with bias and ReLU: fc6 and fc7 of the 2012 paper (section 3.5)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._backend import by_functions, operator, wrapper
from .._checks import check_bias, check_operands, check_tensor, computed_in, expands
from .._layout import new_images, outline
from .._register import Gradient, all_but_fp64, register
from . import reference


def linear_bias_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``max(0, x @ weight.T + bias)``. Equals ``F.relu(F.linear(x, weight, bias))``, NaN kept.

    On the CPU the weight passes through the caches once forward and once for each gradient, which is what a batch
    of up to a few hundred rows costs. On CUDA the products are PyTorch's. One kernel applies ReLU, one applies its mask
    and sums the bias gradient.

    Args:
        x: (*, inputs), rank 1 or more, fp64, fp32, bf16 or fp16 (computed in fp32).
        weight: (outputs, inputs), in x's dtype.
        bias: (outputs,) or None. As in stock also a single value, or any other shape that expands to the result or
            to its rows, for which stock PyTorch runs.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"stock"``.

    Returns:
        (*, outputs), contiguous. Under autocast x, weight and bias are cast to the autocast dtype, as in stock.
        Saves for the backward the result, x where weight requires a gradient, and weight where x does.

    Raises:
        RuntimeError: rank, size, dtype or device that do not fit together.
        TypeError: x, weight or bias is not a Tensor.
    """
    if by_functions(backend, x, weight, bias):
        return reference.linear_bias_relu(x, weight, bias)
    for name, value in (("x", x), ("weight", weight)):
        check_tensor(name, value)
    if weight.dim() != 2:
        raise RuntimeError(f"weight has shape {list(weight.shape)}, expected 2D (outputs, inputs)")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"x has shape {list(x.shape)}, expected (*, {weight.shape[1]}) for weight of shape {list(weight.shape)}"
        )
    outputs, rows, unsupported = weight.shape[0], x.shape[:-1], ""
    if isinstance(bias, Tensor):
        if bias.shape in ((), (1,)):
            bias = bias.expand(outputs)
        elif bias.dim() > 1 and (expands(bias, (*rows, outputs)) or expands(bias, (rows.numel(), outputs))):
            unsupported = f"a bias of shape {list(bias.shape)}"
    if not unsupported:
        check_bias(bias, outputs, x)
    check_operands(x, weight, bias)
    op = operator("linear_bias_relu", backend, x, unsupported or wrapper(weight, bias), computed_in(x))
    if op is None:
        return reference.linear_bias_relu(x, weight, bias)
    if x.dim() == 2:
        return op(x, weight, bias)
    flat = x.flatten(0, -2) if x.dim() > 2 else x[None]  # to torch.jit.trace rows.numel() is a constant
    return op(flat, weight, bias).view(*rows, outputs)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, y: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dweight, dbias = (x.new_empty(s if wanted else (0,)) for s, wanted in zip(shapes, output_mask, strict=True))
    return dx, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias = inputs
    ctx.outlines = outline(x), outline(weight)
    for_x, for_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if for_weight else None, weight if for_x else None, output)


def _backward(op: Any, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad)
    *operands, y = ctx.saved_tensors
    x, weight = (new_images(dy, *o) if t is None else t for t, o in zip(operands, ctx.outlines, strict=True))
    gradients = op(dy, x, weight, y, wanted)
    return tuple(g if w else None for g, w in zip(gradients, wanted, strict=True))


register(
    "linear_bias_relu",
    stock=reference.linear_bias_relu,
    fake=_fake,
    gradient=Gradient(
        fake=_fake_backward,
        setup_context=_setup_context,
        backward=_backward,
        reference=reference.linear_bias_relu_backward,
    ),
    autocast=all_but_fp64,
    batched=(0,),
    product=True,
)
