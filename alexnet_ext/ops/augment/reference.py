"""Crop, flip, shift of colour, normalization and space-to-depth in plain PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import COLOURS
from .._layout import new_images

OUT_OF_RANGE = "offsets reach out of the images: expected at least (0, 0) and at most (H - size, W - size)"


def augment(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    shifts: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    space_to_depth: int,
) -> Tensor:
    inside = torch.stack([offsets[:, i].clamp(0, images.shape[1 + i] - size) for i in (0, 1)], 1)
    if not images.is_cuda:  # on a GPU a failed assertion makes every later call fail
        torch._assert_async((inside == offsets).all(), OUT_OF_RANGE)
    side = torch.arange(size, device=images.device)
    rows = inside[:, :1] + side
    columns = inside[:, 1:] + torch.where(flips[:, None], size - 1 - side, side)
    batch = torch.arange(images.shape[0], device=images.device)
    cropped = images[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    centre = torch.tensor([255 * value for value in mean], dtype=wide, device=images.device)
    scale = torch.tensor([1 / (255 * value) for value in std], dtype=wide, device=images.device)
    y = (cropped.to(wide) + (shifts - centre)[:, None, None]) * scale
    missing = -size % space_to_depth
    y = F.pad(y.to(dtype), (0, 0, 0, missing, 0, missing))
    # F.pixel_unshuffle, which leaves an empty batch as it is.
    y = y.unflatten(2, (-1, space_to_depth)).unflatten(1, (-1, space_to_depth)).permute(0, 5, 2, 4, 1, 3).flatten(1, 3)
    return y.contiguous(memory_format=torch.channels_last)


def empty_result(images: Tensor, size: int, dtype: torch.dtype, space_to_depth: int) -> Tensor:
    """A result of these arguments, its values not yet written."""
    side = (size + space_to_depth - 1) // space_to_depth
    shape = (images.shape[0], COLOURS * space_to_depth**2, side, side)
    return new_images(images, shape, torch.channels_last, dtype)
