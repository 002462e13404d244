"""Reads an image file, which may be broken or hostile, into a cropped tensor."""

from __future__ import annotations

import errno
import os
import stat
import warnings
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .._errors import BadImage
from .._optional import require

if TYPE_CHECKING:
    from PIL.Image import Image

# The formats of photographs. Pillow's other readers are rarely used, and had most of its security holes.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif")
# Pillow warns of a decompression bomb above this: 268 MB once decoded.
MAX_PIXELS = 89_478_485
NOT_ITS_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # errors of the system: the image may well be whole


def read_image(path: str | os.PathLike[str]) -> Image:
    """The image of a file in RGB, turned as its EXIF data says. An animation gives its first frame.

    Raises BadImage for a file that is no whole image of ``FORMATS`` with at most ``MAX_PIXELS`` pixels. Raises
    OSError or MemoryError if this process may open no more files or has no more memory.
    """
    try:
        # O_NONBLOCK: opening a named pipe called cat.jpg must not wait for somebody to write to it.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in NOT_ITS_FAULT:
            raise
        raise BadImage(path, error.strerror or str(error)) from error
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        os.close(file)
        raise BadImage(path, "an empty file" if stat.S_ISREG(status.st_mode) else "not a file")
    with open(file, "rb") as stream:
        return decode(stream, path)


def decode(stream: IO[bytes], path: str | os.PathLike[str]) -> Image:
    """``read_image`` of an open file; ``path`` names it in errors."""
    images, operations = require("PIL.Image"), require("PIL.ImageOps")
    with warnings.catch_warnings():
        warnings.simplefilter("error", images.DecompressionBombWarning)
        # Half-known EXIF blocks and odd palettes: only the pixels matter here.
        warnings.simplefilter("ignore", UserWarning)
        try:
            with images.open(stream, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImage(path, f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
                image.load()
                return to_rgb(operations.exif_transpose(image))
        except (BadImage, MemoryError):
            raise
        except (images.DecompressionBombWarning, images.DecompressionBombError) as error:
            raise BadImage(path, f"more than {MAX_PIXELS:,} pixels") from error
        except images.UnidentifiedImageError as error:
            raise BadImage(path, f"not an image ({', '.join(FORMATS)})") from error
        except Exception as error:  # Pillow's readers raise many kinds of exceptions for broken data
            raise BadImage(path, f"a damaged image ({str(error) or type(error).__name__})") from error


def to_rgb(image: Image) -> Image:
    """Any mode to RGB, on white where it is transparent.

    16-bit grey is scaled: Pillow's own conversion clips above 255. The stored colour of a transparent pixel is
    arbitrary."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        image = require("PIL.Image").fromarray((values / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = require("PIL.Image").new("RGBA", image.size, "white")
        image = require("PIL.Image").alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def crop(image: Image, resize: int, size: int) -> Tensor:
    """The middle ``size`` x ``size`` pixels of ``square``, uint8 (3, size, size): torchvision's CenterCrop."""
    start = middle(resize, size)
    pixels = np.asarray(square(image, resize))[start : start + size, start : start + size]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def yuv420(pixels: np.ndarray) -> np.ndarray:
    """RGB, uint8 (height, width, 3) of even sides, as I420, uint8 (3 * height / 2, width), in JPEG's full range.

    U and V are those of the mean of 2 x 2 pixels. All are rounded, where Pillow's conversion cuts off.
    """

    def luma(rgb: np.ndarray) -> np.ndarray:
        return rgb[..., 0] * np.float32(0.299) + rgb[..., 1] * np.float32(0.587) + rgb[..., 2] * np.float32(0.114)

    four = [pixels[i::2, j::2] for i in (0, 1) for j in (0, 1)]
    squares = (np.add(four[0], four[1], dtype=np.uint16) + four[2] + four[3]) / np.float32(4)
    u, v = (128 + (squares[..., c] - luma(squares)) / np.float32(by) for c, by in ((2, 1.772), (0, 1.402)))
    planes = np.concatenate([plane.ravel() for plane in (luma(pixels), u, v)])
    return planes.round().clip(0, 255).astype(np.uint8).reshape(-1, pixels.shape[1])


def middle(resize: int, size: int) -> int:
    """Where the middle ``size`` of ``resize`` pixels begin; torchvision rounds halves to even, too."""
    return round((resize - size) / 2)


def square(image: Image, side: int) -> Image:
    """The square in the middle of ``image``, scaled to ``side``.

    Cropping and scaling are one step, so that a strip of 30,000 x 1 pixels never becomes one of 7,680,000 x 256.
    """
    cut = min(image.size)
    left, top = (image.width - cut) / 2, (image.height - cut) / 2
    resampling = require("PIL.Image").Resampling.BILINEAR
    # reducing_gap: large photographs are first halved by averaging, several times faster and hardly visible.
    return image.resize((side, side), resampling, (left, top, left + cut, top + cut), reducing_gap=2.0)
