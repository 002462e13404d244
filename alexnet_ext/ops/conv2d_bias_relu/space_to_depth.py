"""A first layer, of few channels and with a stride, as one of more channels at stride 1, which products like better."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._library import LIBRARIES
from .._backend import decide, kernels
from .._register import _vmap_rule
from .shared import Convolution, Direction, channels_last, convolved_size


class SpaceToDepth:
    """The exact rewrite of a strided convolution over few channels to stride 1 over stride x stride x channels.

    Taps are padded with zeros to whole strides: 11 x 11 at stride 4 over 3 channels becomes 3 x 3 over 48.
    """

    def __init__(self, x: Tensor, weight: Tensor, p: Convolution) -> None:
        self.stride, self.padding, self.kernel = p.stride, p.padding, weight.shape[2:]
        size = convolved_size(x, weight, p)
        self.taps = [-(-self.kernel[i] // p.stride[i]) for i in (0, 1)]
        self.blocks = [size[i] + self.taps[i] - 1 for i in (0, 1)]
        after = [self.blocks[i] * p.stride[i] - x.shape[2 + i] - p.padding[i] for i in (0, 1)]
        self.margins = [p.padding[1], after[1], p.padding[0], after[0]]

    @staticmethod
    def helps(weight: Tensor, p: Convolution) -> bool:
        return p.groups == 1 and weight.shape[1] < 16 and min(p.stride) > 1 and p.dilation == [1, 1]

    def unfold(self, x: Tensor) -> Tensor:
        """(N, stride * stride * C, H, W) to (N, C, stride * H, stride * W)."""
        x = x.unflatten(1, (*self.stride, -1)).permute(0, 3, 4, 1, 5, 2)
        return x.flatten(4, 5).flatten(2, 3)

    def images(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(N, C, H, W) to (N, stride * stride * C, *blocks), channels-last, in ``dtype`` (default x's).

        Each value is moved once, padding and the change of dtype included. Blocks that lie in x only in part are copied
        by themselves.
        """
        folded = x.new_zeros((x.shape[0], *self.blocks, *self.stride, x.shape[1]), dtype=dtype)
        spans = (_spans(self.padding[i], x.shape[2 + i], self.blocks[i], self.stride[i]) for i in (0, 1))
        for (top, height, rows), (left, width, columns) in product(*spans):
            part = x[:, :, top : top + height, left : left + width].unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
            to = folded
            for i, first in enumerate((self.padding[0] + top, self.padding[1] + left)):
                to = to.narrow(1 + i, first // self.stride[i], part.shape[2 + 2 * i])
                to = to.narrow(3 + i, first % self.stride[i], part.shape[3 + 2 * i])
            to.copy_(part.permute(0, 2, 4, 3, 5, 1))
        return folded.flatten(3).permute(0, 3, 1, 2)

    def weights(self, weight: Tensor) -> Tensor:
        """(C_out, C, *kernel) to (C_out, stride * stride * C, *taps), channels-last. Padded first: they are few."""
        more = [self.taps[i] * self.stride[i] - self.kernel[i] for i in (0, 1)]
        padded = F.pad(weight, (0, more[1], 0, more[0]))
        padded = padded.unflatten(3, (-1, self.stride[1])).unflatten(2, (-1, self.stride[0]))
        return padded.permute(0, 2, 4, 3, 5, 1).flatten(3).permute(0, 3, 1, 2)

    def back(self, gradient: Tensor, direction: Direction) -> Tensor:
        """The gradient of x or weight from that of its rewritten form."""
        if direction == Direction.INPUT:
            return F.pad(self.unfold(gradient), [-margin for margin in self.margins])
        return self.unfold(gradient)[:, :, : self.kernel[0], : self.kernel[1]]


def _spans(before: int, size: int, blocks: int, stride: int) -> list[tuple[int, int, int]]:
    """(first pixel, pixels, pixels a block) of a side after ``before`` zeros: of a cut first block, the whole blocks, a
    cut last one. There are none beyond ``blocks``."""
    size = min(size, blocks * stride - before)
    head = min(size, -before % stride)
    whole = (size - head) // stride * stride
    tail = size - head - whole
    spans = ((0, head, head), (head, whole, stride), (head + whole, tail, tail))
    return [span for span in spans if span[1] > 0]


def rewritten(
    x: Tensor, weight: Tensor, p: Convolution, dtype: torch.dtype | None = None
) -> tuple[SpaceToDepth | None, Tensor, Tensor, Convolution]:
    """(rewrite or None, x in ``dtype`` (default its own), weight, constants): as they are to be convolved."""
    if not SpaceToDepth.helps(weight, p):
        return None, x, weight, p
    rewrite = SpaceToDepth(x, weight, p)
    return rewrite, rewrite.images(x, dtype), rewrite.weights(weight), Convolution([1, 1], [0, 0], p.dilation, p.groups)


def weight_to_depth(weight: Tensor, step: int) -> Tensor:
    """A weight for images of ``ops.augment(space_to_depth=step)``; by a kernel of one launch where there is one.

    Every proof of the convolution runs that kernel too, so it is trusted where one of them is.
    """
    there = kernels("conv2d_bias_relu", weight.device.type)
    if "native" in there and decide("conv2d_bias_relu", weight.device, weight.dtype, x=weight).backend != "stock":
        return torch.ops.alexnet_ext.conv2d_bias_relu_to_depth(weight, step)
    return to_depth(weight, step)


def to_depth(weight: Tensor, step: int) -> Tensor:
    height, width = weight.shape[2:]
    """The same in stock PyTorch."""
    return channels_last(F.pixel_unshuffle(F.pad(weight, (0, -width % step, 0, -height % step)), step))


def _from_depth(gradient: Tensor, step: int, height: int, width: int, last: bool) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return F.pixel_shuffle(gradient, step)[:, :, :height, :width].clone(memory_format=layout)


def _setup_to(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, ctx.step = inputs
    last = weight.is_contiguous(memory_format=torch.channels_last)
    ctx.others = ctx.step, *weight.shape[2:], last and not weight.is_contiguous()


def _setup_from(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.step = inputs[1]


def _backward_to(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return torch.ops.alexnet_ext.conv2d_bias_relu_from_depth(gradient, *ctx.others), None


def _backward_from(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return torch.ops.alexnet_ext.conv2d_bias_relu_to_depth(gradient, ctx.step), None, None, None, None


if LIBRARIES[0].loaded:
    for name, run, backward, setup in (
        ("to", to_depth, _backward_to, _setup_to),
        ("from", _from_depth, _backward_from, _setup_from),
    ):
        op = f"alexnet_ext::conv2d_bias_relu_{name}_depth"
        torch.library.register_kernel(op, "cpu", run)
        torch.library.register_fake(op, run)
        torch.library.register_autograd(op, backward, setup_context=setup)
        torch.library.register_vmap(op, _vmap_rule(op, ()))
