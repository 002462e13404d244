"""``python -m benchmarks.decoding``: an image's way from JPEG to a square of 256 pixels, by several decoders.

CPU time of one thread; the ways take turns, and a time is the median of its rounds. ``differs`` is the largest
difference of a value from what ``alexnet train`` and ``alexnet prepare`` read. Of the images one is grey, one CMYK, one
turned by EXIF.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import typer
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from alexnet_ext.data.archives import Entry, Source
from alexnet_ext.data.images import decode, square, to_rgb
from alexnet_ext.data.packed_folder import PackedFolder
from alexnet_ext.data.prepare import Preparation
from alexnet_ext.data.preprocessing import Preprocessing

SIDE = 256
SIZES = ((500, 375, 30), (1600, 1200, 6))  # width, height, images


def ours(content: bytes) -> np.ndarray:
    return np.asarray(square(decode(io.BytesIO(content), "a JPEG"), SIDE))


def draft(gap: int) -> Callable[[bytes], np.ndarray]:
    """Pillow, with libjpeg scaling to at least ``gap`` times the side while it decodes."""

    def read(content: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            image.draft("RGB", (SIDE * gap, SIDE * gap))
            image.load()
            return np.asarray(square(to_rgb(ImageOps.exif_transpose(image)), SIDE))

    return read


def by_torchvision(content: bytes) -> torch.Tensor:
    return decode_jpeg(
        torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB, apply_exif_orientation=True
    )


def then_pillow(content: bytes) -> np.ndarray:
    pixels = by_torchvision(content).permute(1, 2, 0).contiguous().numpy()
    return np.asarray(square(Image.fromarray(pixels), SIDE))


def then_torchvision(content: bytes) -> np.ndarray:
    pixels = by_torchvision(content)
    resized = F.resize(F.center_crop(pixels, [min(pixels.shape[1:])] * 2), [SIDE, SIDE], antialias=True)
    return resized.permute(1, 2, 0).contiguous().numpy()


WAYS: dict[str, Callable[[bytes], np.ndarray]] = {
    "Pillow, as alexnet_ext reads": ours,
    "Pillow with draft, side": draft(1),
    "Pillow with draft, twice the side": draft(2),
    "torchvision's decoder, Pillow's scaling": then_pillow,
    "torchvision's decoder and scaling": then_torchvision,
}


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Random structure of several sizes, some 40 KB at 500 x 375."""
    chance, total = np.random.default_rng(seed), np.full((height, width, 3), 128, np.float32)
    for count, weight in ((4, 0.6), (16, 0.3), (64, 0.15), (256, 0.06)):
        coarse = Image.fromarray(chance.integers(0, 256, (count, count, 3), dtype=np.uint8))
        total += weight * (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def jpegs(width: int, height: int, count: int) -> list[bytes]:
    """In colour, and of the first one also grey, CMYK, and turned by EXIF."""
    turned = Image.Exif()
    turned[0x112] = 6
    images = [(photograph(width, height, seed), {}) for seed in range(count)]
    first = images[0][0]
    found = []
    for image, options in (*images, (first.convert("L"), {}), (first.convert("CMYK"), {}), (first, {"exif": turned})):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=90, **options)
        found.append(stream.getvalue())
    return found


def seconds(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def whole(contents: list[bytes]) -> tuple[float, float]:
    """Seconds an image that ``alexnet prepare`` takes, with colours, checksums and files, and those of a packed one."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number, content in enumerate(contents):
            (root / f"{number}.jpg").write_bytes(content)
        entries = [Entry(f"{number}.jpg", 0, str(root / f"{number}.jpg")) for number in range(len(contents))]
        source = Source(("any",), {"train": entries, "val": entries[:1]}, (), "")
        preparing = seconds(lambda: Preparation(source, root / "out", SIDE, len(entries)).run(0))
        packed = PackedFolder(root / "out", "train", Preprocessing(227, SIDE, (0.5,) * 3, (0.5,) * 3), augment=True)
        reading = seconds(lambda: [packed[0, index] for index in range(len(packed))])
    return preparing / (len(entries) + 1), reading / len(packed)


def rows(contents: list[bytes], rounds: int) -> list[tuple[str, str, str, str]]:
    """The cells of the table for some images."""
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, read in WAYS.items():
            taken = seconds(lambda read=read: list(map(read, contents)))
            times.setdefault(name, []).append(taken / len(contents))
        for name, taken in zip(("alexnet prepare", "a packed image"), whole(contents * 8), strict=True):
            times.setdefault(name, []).append(taken)
    differs = {
        name: str(max(abs(read(content).astype(int) - ours(content)).max() for content in contents))
        for name, read in WAYS.items()
    }
    medians = {name: statistics.median(some) for name, some in times.items()}
    return [(name, f"{t * 1e3:.2f}", f"{1 / t:,.0f}", differs.get(name, "")) for name, t in medians.items()]


def main(rounds: int = 7) -> None:
    torch.set_num_threads(1)
    for width, height, count in SIZES:
        contents = jpegs(width, height, count)
        table = Table("way", "ms", "images/s", "differs", title=f"{width} x {height}, {len(contents[0]):,} bytes")
        for row in rows(contents, rounds):
            table.add_row(*row)
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
