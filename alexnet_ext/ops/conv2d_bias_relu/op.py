"""Convolution with bias and ReLU; the 2012 paper's two towers are groups=2 (section 3.5)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import by_functions, operator, wrapper
from .._checks import IntPair, check_bias, check_operands, check_tensor, computed_in, integer, pair
from .._layout import convolved_format, new_images, outline
from .._register import Gradient, all_but_fp64, register
from . import reference
from .shared import Convolution, empty_gradients, empty_result
from .space_to_depth import SpaceToDepth, rewritten


def conv2d_bias_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    relu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """``max(0, conv2d(x, weight) + bias)``. Equals ``F.relu(F.conv2d(x, weight, bias, ...))``, NaN kept.

    On a CPU without AVX-512 some fp32 layers and their gradients are computed by Winograd's F(2 x 2, 3 x 3) (Lavin and
    Gray, 2015). They have 3 x 3 taps, stride 1, at least 384 tiles of 2 x 2 results and, in and out, at least 96
    channels a group, a multiple of 16. All others are computed by PyTorch's convolution, and so is such a layer again
    where one of its results is not finite. Winograd's error is relative to the values of a tile and its neighbours, not
    to each result.

    Args:
        x: (N, C_in, H, W) or (C_in, H, W), fp64, fp32, bf16 or fp16.
        weight: (C_out, C_in / groups, kernel height, kernel width), in x's dtype.
        bias: (C_out,) or None.
        stride, dilation: an int or (height, width).
        padding: an int, (height, width), ``"valid"``, or ``"same"`` with stride 1.
        groups: divides C_in and C_out; group g of the output sees only group g of the input.
        relu: False leaves ``max(0, .)`` out, for a block of other ops after the convolution.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"stock"``.

    Returns:
        (N, C_out, H_out, W_out) in the memory format that ``F.conv2d`` gives. Under autocast x, weight and
        bias are cast to the autocast dtype, as in stock. Saves for the backward x where weight requires a gradient,
        weight where x does, and, with relu, the result. On a GPU, of a first layer in bf16 or fp16, channels-last and
        without a gradient of x, it saves instead of x what it convolves: x with each stride x stride pixels as one.

    Raises:
        RuntimeError: rank, channels, groups, dtype, device or size that do not fit together.
        ValueError: groups below 1. TypeError: a size that is neither an int nor a pair.
    """
    if by_functions(backend, x, weight, bias):
        return reference.conv2d_bias_relu(x, weight, bias, stride, padding, dilation, groups, relu)
    for name, value in (("x", x), ("weight", weight)):
        check_tensor(name, value)
    step, dilate = pair("stride", stride, 1), pair("dilation", dilation, 1)
    pad = _padding(padding, step)
    groups = _check_shapes(x, weight, groups)
    check_bias(bias, weight.shape[0], x)
    check_operands(x, weight, bias)
    unsupported = wrapper(weight, bias)
    if 0 in weight.shape[1:]:
        unsupported = f"a weight of shape {list(weight.shape)}"
    if 0 not in weight.shape[2:]:
        if pad == "same":
            x, pad = _pad_same(x, weight, dilate)
        _check_reach(x, weight, pad, dilate)
    op = operator("conv2d_bias_relu", backend, x, unsupported, computed_in(x))
    if op is None:
        return reference.conv2d_bias_relu(x, weight, bias, step, pad, dilate, groups, relu)
    batch, p = x if x.dim() == 4 else x.unsqueeze(0), Convolution(step, pad, dilate, groups)
    if _is_kept_rewritten(op, batch, weight, p):
        _, batch, weight, p = rewritten(batch, weight, p, computed_in(x))
    y = op(batch, weight, bias, *p, relu)
    return y if x.dim() == 4 else y.squeeze(0)


def _is_kept_rewritten(op: Any, x: Tensor, weight: Tensor, p: Convolution) -> bool:
    """Whether images in 2 bytes are rewritten here, before the op, so that its backward has them rewritten already.

    Elsewhere what runs the op rewrites them or not. The compiled op is PyTorch's convolution, which needs no rewrite.
    """
    return (
        SpaceToDepth.helps(weight, p)
        and op.__name__ != "conv2d_bias_relu"
        and torch.is_grad_enabled()
        and weight.requires_grad
        and not x.requires_grad
        and computed_in(x).itemsize == 2
        and convolved_format(x, weight) == torch.channels_last
    )


def _padding(padding: IntPair | str, stride: list[int]) -> Any:
    if padding == "valid":
        return [0, 0]
    if padding == "same":
        if stride != [1, 1]:
            raise RuntimeError(f"padding='same' needs stride 1, got stride {stride}")
        return padding
    if isinstance(padding, str):
        raise RuntimeError(f"padding must be 'valid', 'same', an int or a pair of ints, got {padding!r}")
    return pair("padding", padding, 0)


def _pad_same(x: Tensor, weight: Tensor, dilation: list[int]) -> tuple[Tensor, list[int]]:
    """Padding for an output of x's size; the odd one out goes right and below (even kernels), as in PyTorch."""
    total = [dilation[i] * (weight.shape[2 + i] - 1) for i in (0, 1)]
    before = [t // 2 for t in total]
    if total[0] % 2 or total[1] % 2:
        x = F.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    return x, before


def _check_shapes(x: Tensor, weight: Tensor, given: Any) -> int:
    """The number of groups, which x and weight fit."""
    groups: int = integer(given)
    if groups is None:
        raise TypeError(f"groups must be an int, got {given!r}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if x.dim() not in (3, 4):
        raise RuntimeError(f"x has shape {list(x.shape)}, expected 3D (unbatched) or 4D (batched)")
    if weight.dim() != 4:
        raise RuntimeError(f"weight has shape {list(weight.shape)}, expected 4D (C_out, C_in / groups, height, width)")
    if weight.shape[0] % groups:
        raise RuntimeError(f"groups={groups} does not divide the {weight.shape[0]} output channels of weight")
    if x.shape[-3] != weight.shape[1] * groups:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {list(weight.shape)}, expected x of shape {list(x.shape)} "
            f"to have {weight.shape[1] * groups} channels, but got {x.shape[-3]}"
        )
    _check_not_empty(x, weight, groups)
    return groups


def _check_not_empty(x: Tensor, weight: Tensor, groups: int) -> None:
    """Raise where stock does: its convolution has no kernel for empty operands. Without channels it gives zeros."""
    if weight.shape[0] == 0:
        raise RuntimeError(f"weight has shape {list(weight.shape)}, expected at least {groups} output channels")
    if weight.shape[1] == 0:
        return
    if 0 in weight.shape[2:]:
        raise RuntimeError(f"weight has shape {list(weight.shape)}, expected a kernel of at least 1 x 1")
    if 0 in x.shape[-2:] and (x.dim() == 3 or x.shape[0]):
        raise RuntimeError(f"x has shape {list(x.shape)}, expected non-empty H and W")


def _check_reach(x: Tensor, weight: Tensor, padding: list[int], dilation: list[int]) -> None:
    for i in (0, 1):
        reach, room = dilation[i] * (weight.shape[2 + i] - 1) + 1, x.shape[-2 + i] + 2 * padding[i]
        if reach > room:
            raise RuntimeError(
                f"weight reaches over {reach} values of dimension {i - 2}, expected at most {room}, "
                f"the padded size of x"
            )


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool = True,
) -> Tensor:
    return empty_result(x, weight, Convolution(stride, padding, dilation, groups))


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_mask: list[bool],
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(x, weight, output_mask)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, *ctx.constants, ctx.relu = inputs
    ctx.outlines = outline(x), outline(weight)
    for_x, for_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if for_weight else None, weight if for_x else None, output if ctx.relu else None)


def _backward(op: Any, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    *operands, y = ctx.saved_tensors
    x, weight = (new_images(dy, *o) if t is None else t for t, o in zip(operands, ctx.outlines, strict=True))
    y = dy if y is None else y  # without a ReLU to mask only its shape counts
    gradients = op(dy, x, weight, y, *ctx.constants, wanted, ctx.relu)
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None, None, None


register(
    "conv2d_bias_relu",
    stock=reference.conv2d_bias_relu,
    schema="(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "bool relu=True) -> Tensor",
    fake=_fake,
    gradient=Gradient(
        schema="(Tensor dy, Tensor x, Tensor weight, Tensor y, int[2] stride, int[2] padding, int[2] dilation, "
        "int groups, bool[3] output_mask, bool relu=True) -> (Tensor dx, Tensor dweight, Tensor dbias)",
        fake=_fake_backward,
        setup_context=_setup_context,
        backward=_backward,
        reference=reference.conv2d_bias_relu_backward,
    ),
    autocast=all_but_fp64,
    product=True,
)
