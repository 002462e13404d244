"""What training does to a batch of images before the first layer (section 4.1 of the 2012 paper), in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._backend import DTYPES, operator
from .._checks import check_crop, check_drawn, check_images, check_normalization
from .._register import register
from . import reference
from .reference import as_planes, empty_result


def augment(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    shifts: Tensor,
    size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    space_to_depth: int = 1,
    backend: str = "auto",
) -> Tensor:
    """A square of each image, mirrored or not, its colour shifted, normalized: bytes in, the network's input out.

    ``y[n, c, i, j] = (images[n, top + i, left + (size - 1 - j if flip else j), c] + shift[c] - 255 * mean[c])
    / (255 * std[c])`` with the image's own ``top, left = offsets[n]``, ``flip = flips[n]`` and ``shift = shifts[n]``.
    Nothing is clamped. All randomness is the caller's: the result depends on the arguments alone, and every backend
    gives the same bits. Equals ``(crops.permute(0, 3, 1, 2) + shifts[:, :, None, None] - 255 * mean) / (255 * std)``
    of the cropped and flipped images.

    With ``space_to_depth=4`` it equals ``F.pixel_unshuffle(F.pad(y, (0, p, 0, p)), 4)`` of the above, padded by
    ``p = -size % 4``. AlexNet's first convolution, of stride 4, is then one of stride 1 over 48 channels that keep a
    GPU's matrix units busy, and exactly the same:

    >>> y = augment(..., 227, space_to_depth=4)
    >>> conv2d_bias_relu(y, F.pixel_unshuffle(F.pad(weight, (0, 1, 0, 1)), 4), bias)  # 11 x 11, stride 4, on 227

    There is no gradient: images are bytes.

    Args:
        images: uint8, of any strides; none is copied. RGB is (N, H, W, 3) (``x.permute(0, 2, 3, 1)`` of (N, 3, H, W)).
            YUV 4:2:0 of even H and W is (N, 3 H / 2, W), the planes of I420: H rows of Y, then U and V of H / 2 x
            W / 2. Its values are in JPEG's full range (BT.601). It is turned to RGB by integers, as libjpeg does,
            rounded and clamped to bytes; each pixel takes the chroma of its square of 2 x 2.
        offsets: (N, 2), integers: the top and the left of each crop.
        flips: (N,), bool: whether the crop is mirrored, left to right.
        shifts: (N, 3), fp32: added to red, green and blue, which go from 0 to 255.
        size: side of the crop.
        mean, std: of each colour, in 0 to 1, as ``alexnet_ext.data.preprocessing`` has them.
        dtype: of the result: fp64, fp32, bf16 or fp16, computed in fp32 (fp64 for fp64) and rounded once.
        space_to_depth: 1, or 4.
        backend: ``"auto"``, ``"native"``, ``"triton"`` or ``"stock"``.

    Returns:
        (N, 3, size, size), or (N, 48, ceil(size / 4), ceil(size / 4)), channels-last. Autocast leaves it alone.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together, a crop larger than the images, shifts that
            require a gradient; on the CPU an offset that reaches out of its image. On a GPU such a crop is moved
            inside instead: looking at offsets would wait for the device.
        TypeError: an argument that is not a Tensor, or mean or std that are not three numbers.
    """
    check_images(images)
    check_drawn(images, offsets, flips, shifts)
    check_crop(size, images)
    if dtype not in DTYPES:
        raise RuntimeError(f"dtype must be of {', '.join(map(str, DTYPES))}, got {dtype}")
    if space_to_depth not in (1, 4):
        raise RuntimeError(f"space_to_depth must be 1 or 4, got {space_to_depth!r}")
    mean, std = check_normalization(mean, std)
    op = operator("augment", backend, as_planes(images), dtype=dtype) or reference.augment
    return op(images, offsets.long(), flips, shifts, size, mean, std, dtype, space_to_depth)


def _fake(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    shifts: Tensor,
    size: int,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    space_to_depth: int,
) -> Tensor:
    return empty_result(images, size, dtype, space_to_depth)


register(
    "augment",
    stock=reference.augment,
    schema="(Tensor images, Tensor offsets, Tensor flips, Tensor shifts, SymInt size, float[] mean, float[] std, "
    "ScalarType dtype, int space_to_depth) -> Tensor",
    fake=_fake,
    gradient=None,
    batched=(0, 1, 2, 3),
)
