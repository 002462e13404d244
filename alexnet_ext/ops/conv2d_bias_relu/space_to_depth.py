"""A first layer, of few channels and with a stride, as one of more channels at stride 1, which products like better."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .shared import Convolution, Direction, convolved_size


class SpaceToDepth:
    """The exact rewrite of a strided convolution over few channels to stride 1 over stride x stride x channels.

    Taps are padded with zeros to whole strides: 11 x 11 at stride 4 over 3 channels becomes 3 x 3 over 48.
    """

    def __init__(self, x: Tensor, weight: Tensor, p: Convolution) -> None:
        self.stride, self.kernel, size = p.stride, weight.shape[2:], convolved_size(x, weight, p)
        self.taps = [-(-self.kernel[i] // p.stride[i]) for i in (0, 1)]
        after = [(size[i] + self.taps[i] - 1) * p.stride[i] - x.shape[2 + i] - p.padding[i] for i in (0, 1)]
        self.margins = [p.padding[1], after[1], p.padding[0], after[0]]

    @staticmethod
    def helps(weight: Tensor, p: Convolution) -> bool:
        return p.groups == 1 and weight.shape[1] < 16 and min(p.stride) > 1 and p.dilation == [1, 1]

    def fold(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, stride * stride * C, H / stride, W / stride)."""
        x = x.unflatten(3, (-1, self.stride[1])).unflatten(2, (-1, self.stride[0]))
        return x.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)

    def unfold(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (*self.stride, -1)).permute(0, 3, 4, 1, 5, 2)
        return x.flatten(4, 5).flatten(2, 3)

    def images(self, x: Tensor) -> Tensor:
        return self.fold(F.pad(x, self.margins))

    def weights(self, weight: Tensor) -> Tensor:
        more = [self.taps[i] * self.stride[i] - self.kernel[i] for i in (0, 1)]
        return self.fold(F.pad(weight, (0, more[1], 0, more[0])))

    def back(self, gradient: Tensor, direction: Direction) -> Tensor:
        """The gradient of x or weight from that of its rewritten form."""
        if direction == Direction.INPUT:
            return F.pad(self.unfold(gradient), [-margin for margin in self.margins])
        return self.unfold(gradient)[:, :, : self.kernel[0], : self.kernel[1]]


def rewritten(x: Tensor, weight: Tensor, p: Convolution) -> tuple[SpaceToDepth | None, Tensor, Tensor, Convolution]:
    """(rewrite or None, x, weight, constants): as they are to be convolved."""
    if not SpaceToDepth.helps(weight, p):
        return None, x, weight, p
    rewrite = SpaceToDepth(x, weight, p)
    return rewrite, rewrite.images(x), rewrite.weights(weight), Convolution([1, 1], [0, 0], p.dilation, p.groups)
