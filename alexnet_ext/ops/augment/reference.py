"""Crop, flip, shift of colour, normalization and space-to-depth in plain PyTorch; YUV 4:2:0 to RGB."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import COLOURS, sides
from .._layout import filled, new_images

OUT_OF_RANGE = "offsets reach out of the images: expected at least (0, 0) and at most (H - size, W - size)"

# JFIF's conversion with 16 bits behind the point, as in csrc/augment/augment.h: what U - 128 and V - 128 add to the Y
# of red, green and blue.
OF_U, OF_V = (0, -22554, 116130), (91881, -46802, 0)


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
    if images.dim() == 3:
        images = yuv420_to_rgb(images)
    inside = torch.stack([offsets[:, i].clamp(0, images.shape[1 + i] - size) for i in (0, 1)], 1)
    if not images.is_cuda:  # on a GPU a failed assertion makes every later call fail
        torch._assert_async((inside == offsets).all(), OUT_OF_RANGE)
    side = torch.arange(size, device=images.device)
    rows = inside[:, :1] + side
    columns = inside[:, 1:] + torch.where(flips[:, None], size - 1 - side, side)
    batch = torch.arange(images.shape[0], device=images.device)
    cropped = images[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    centre = filled([255 * value for value in mean], wide, images.device)
    scale = filled([1 / (255 * value) for value in std], wide, images.device)
    y = (cropped.to(wide) + (shifts - centre)[:, None, None]) * scale
    missing = -size % space_to_depth
    y = F.pad(y.to(dtype), (0, 0, 0, missing, 0, missing))
    # F.pixel_unshuffle, which leaves an empty batch as it is.
    y = y.unflatten(2, (-1, space_to_depth)).unflatten(1, (-1, space_to_depth)).permute(0, 5, 2, 4, 1, 3).flatten(1, 3)
    return y.contiguous(memory_format=torch.channels_last)


def yuv420_to_rgb(images: Tensor) -> Tensor:
    """uint8 (N, 3 H / 2, W), I420 in JFIF's full range, to uint8 (N, H, W, 3): chroma of the nearest, rounded."""
    batch, (height, width) = images.shape[0], sides(images)
    luma = images[:, :height].reshape(batch, height // 2, 2, width // 2, 2).int()
    chroma = images[:, height:].reshape(batch, 2, height // 2, 1, width // 2, 1).int() - 128
    u, v = chroma[:, 0], chroma[:, 1]
    colours = [luma + ((of_u * u + of_v * v + 32768) >> 16) for of_u, of_v in zip(OF_U, OF_V, strict=True)]
    return torch.stack(colours, -1).clamp(0, 255).to(torch.uint8).reshape(batch, height, width, COLOURS)


def as_planes(images: Tensor) -> Tensor:
    """The bytes with the dimensions by which layouts of images are named: (N, 3, H, W), or (N, 1, 3 H / 2, W)."""
    return images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)


def empty_result(images: Tensor, size: int, dtype: torch.dtype, space_to_depth: int) -> Tensor:
    """A result of these arguments, its values not yet written."""
    side = (size + space_to_depth - 1) // space_to_depth
    shape = (images.shape[0], COLOURS * space_to_depth**2, side, side)
    return new_images(images, shape, torch.channels_last, dtype)
