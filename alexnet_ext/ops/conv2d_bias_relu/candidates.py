"""conv2d_bias_relu by what is fastest for the call, each direction for itself: products by Triton, cuDNN or CUTLASS.

cuDNN runs contiguous, channels-last, or one group at a time, with our epilogue (bias and ReLU in one pass) behind it
and our masked gradient before it. On the CPU its place is taken by PyTorch's convolution there, which is for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._choices import Candidate, fastest
from .._layout import convolved_format
from .._triton import accumulator, is_wide, offset, place, tile, tile_at, wrap_triton
from . import configs, cutlass, triton_kernels
from .triton_kernels import before_relu, precision

NO_OUTPUT_PADDING = [0, 0]
FORWARD = {True: "forward", False: "forward without relu"}


@triton.jit
def _epilogue_kernel(
    y_ptr,
    bias_ptr,
    pixels,
    channels,
    height,
    width,
    y_batch,
    y_channel,
    y_row,
    y_column,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    pixel, channel, inside, _ = tile_at(tl.program_id(0), pixels, channels, HALO, BLOCK_P, BLOCK_C, WIDE)
    at = offset(place(pixel, height, width), channel, (y_batch, y_channel, y_row, y_column))
    y = accumulator(tl.load(y_ptr + at, inside, 0.0))
    if BIAS:
        y += accumulator(tl.load(bias_ptr + channel, channel < channels, 0.0))
    if RELU:
        y = tl.where(y <= 0, 0.0, y)  # written so that NaN stays
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


def epilogue(y: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """y + bias, with relu max(0, .) of it, in place."""
    batch, channels, height, width = y.shape
    if y.numel() == 0 or (bias is None and not relu):
        return y
    blocks, channel_blocks = tile(channels, y.stride(1), None, y.dtype)
    pixels = batch * height * width
    wrap_triton(_epilogue_kernel)[(triton.cdiv(pixels, blocks["BLOCK_P"]), channel_blocks)](
        y,
        y if bias is None else bias.contiguous(),
        pixels,
        channels,
        height,
        width,
        *y.stride(),
        BIAS=bias is not None,
        RELU=relu,
        **blocks,
        WIDE=is_wide(y),
    )
    return y


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    layout: torch.memory_format,
    towers: bool,
) -> list[Tensor]:
    """[y] by PyTorch's convolution of tensors in ``layout``, with ``towers`` one group at a time."""

    def run(x: Tensor, weight: Tensor, groups: int) -> Tensor:
        return torch.conv2d(
            x.contiguous(memory_format=layout),
            weight.contiguous(memory_format=layout),
            None,
            stride,
            padding,
            dilation,
            groups,
        )

    if towers:
        parts = zip(x.tensor_split(groups, 1), weight.tensor_split(groups), strict=True)
        return [epilogue(torch.cat([run(*part, 1) for part in parts], 1), bias, relu)]
    return [epilogue(run(x, weight, groups), bias, relu)]


def differentiate(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wanted: int,
    layout: torch.memory_format,
    towers: bool,
) -> list[Tensor]:
    """[dx] (wanted 0) or [dweight] (wanted 1) by PyTorch's convolution, as ``convolve``."""
    mask = [wanted == 0, wanted == 1, False]

    def run(dz: Tensor, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        given = (tensor.contiguous(memory_format=layout) for tensor in (dz, x, weight))
        return torch.ops.aten.convolution_backward(
            *given, None, stride, padding, dilation, False, NO_OUTPUT_PADDING, groups, mask
        )[wanted]

    if towers:
        parts = zip(dz.tensor_split(groups, 1), x.tensor_split(groups, 1), weight.tensor_split(groups), strict=True)
        return [torch.cat([run(*part, 1) for part in parts], 1 - wanted)]
    return [run(dz, x, weight, groups)]


def candidates(
    triton_run: Callable[[], Sequence[Tensor]],
    stock_run: Callable[..., Sequence[Tensor]],
    layout: torch.memory_format,
    groups: int,
) -> list[Candidate]:
    """Every way, in the static order: cuDNN in the layout that is there, Triton, cuDNN in the other, by towers."""
    last, first = torch.channels_last, torch.contiguous_format
    cudnn = {
        form: Candidate(f"cudnn {name}", partial(stock_run, layout=form, towers=False))
        for form, name in ((first, "contiguous"), (last, "channels_last"))
    }
    found = [cudnn.pop(layout), Candidate("triton", triton_run), *cudnn.values()]
    if groups > 1:
        found.append(Candidate("cudnn per tower", partial(stock_run, layout=layout, towers=True)))
    return found


def describe(direction: str, x: Tensor, weight: Tensor, *constants: object) -> str:
    """The call in words: what its speed hangs on."""
    layouts = "channels_last" if convolved_format(x, weight) == torch.channels_last else "contiguous"
    return (
        f"conv2d_bias_relu {direction} x {list(x.shape)} weight {list(weight.shape)} "
        f"stride, padding, dilation, groups {list(constants)} {x.dtype} {precision(x.dtype)} {layouts}"
    )


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool = True,
) -> Tensor:
    given = (x, weight, bias, stride, padding, dilation, groups, relu)
    if x.numel() == 0 or weight.numel() == 0:
        return triton_kernels.forward(*given)
    layout = convolved_format(x, weight)
    found = candidates(lambda: [triton_kernels.forward(*given)], partial(convolve, *given), layout, groups)
    if configs.has_persistent(x, precision(x.dtype)):
        found.append(Candidate("triton persistent", lambda: [triton_kernels.forward(*given, persistent=True)]))

    def by_cutlass(sm90: bool) -> list[Tensor]:
        return [cutlass.forward(*given, sm90=sm90)]

    for sm90, name in cutlass.NAMES.items():
        if cutlass.applies(x, weight, stride, padding, dilation, groups, sm90=sm90):
            found.append(Candidate(name, partial(by_cutlass, sm90)))
    (y,) = fastest(describe(FORWARD[relu], x, weight, stride, padding, dilation, groups), x.device, found).run()
    return y.contiguous(memory_format=layout)


def backward(
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
    constants = (stride, padding, dilation, groups)
    if y.numel() == 0 or weight.numel() == 0:
        return triton_kernels.backward(dy, x, weight, y, *constants, output_mask, relu)
    layout, gradients = convolved_format(x, weight), [x.new_empty(0) for _ in range(3)]
    dz, dbias = before_relu(dy, y, output_mask[2], relu)
    for wanted, direction in ((0, "input gradient"), (1, "weight gradient")):
        if not output_mask[wanted]:
            continue
        found = candidates(
            partial(triton_kernels.gradients, dz, x, weight, *constants, wanted=wanted),
            partial(differentiate, dz, x, weight, *constants, wanted),
            layout,
            groups,
        )
        for sm90, name in cutlass.NAMES.items():
            if cutlass.applies(x, weight, *constants, wanted, sm90):
                found.append(Candidate(name, partial(cutlass.gradients, dz, x, weight, *constants, wanted, sm90)))
        (gradient,) = fastest(describe(direction, x, weight, *constants), x.device, found).run()
        gradients[wanted] = gradient.contiguous(memory_format=layout)
    if output_mask[2]:
        gradients[2] = dbias
    return gradients[0], gradients[1], gradients[2]
