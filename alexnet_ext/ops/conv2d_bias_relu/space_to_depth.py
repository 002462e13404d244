"""A first layer, of few channels and with a stride, as one of more channels at stride 1, which products like better."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._checks import pooled_size


class SpaceToDepth:
    """The exact rewrite of a strided convolution over few channels to stride 1 over stride x stride x channels.

    Taps are padded with zeros to whole strides: 11 x 11 at stride 4 over 3 channels becomes 3 x 3 over 48.
    """

    def __init__(self, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], size: list[int]) -> None:
        self.stride, self.kernel = stride, weight.shape[2:]
        self.taps = [-(-self.kernel[i] // stride[i]) for i in (0, 1)]
        after = [(size[i] + self.taps[i] - 1) * stride[i] - x.shape[2 + i] - padding[i] for i in (0, 1)]
        self.margins = [padding[1], after[1], padding[0], after[0]]

    @staticmethod
    def helps(weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> bool:
        return groups == 1 and weight.shape[1] < 16 and min(stride) > 1 and dilation == [1, 1]

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

    def back(self, gradient: Tensor, wanted: int) -> Tensor:
        """The gradient of x (wanted 0) or weight (wanted 1) from that of its rewritten form."""
        if wanted == 0:
            return F.pad(self.unfold(gradient), [-margin for margin in self.margins])
        return self.unfold(gradient)[:, :, : self.kernel[0], : self.kernel[1]]


def convolved_size(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> list[int]:
    """[height, width] of the result."""
    return [pooled_size(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i], False) for i in (0, 1)]


def rewritten(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> tuple[SpaceToDepth | None, Tensor, Tensor, list[int], list[int]]:
    """(rewrite or None, x, weight, stride, padding): as they are to be convolved."""
    if not SpaceToDepth.helps(weight, stride, dilation, groups):
        return None, x, weight, stride, padding
    rewrite = SpaceToDepth(x, weight, stride, padding, convolved_size(x, weight, stride, padding, dilation))
    return rewrite, rewrite.images(x), rewrite.weights(weight), [1, 1], [0, 0]
