"""Images packed as YUV 4:2:0: half the bytes, how far their colours are off, and all that holds for RGB."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from alexnet_ext.data import CommandError, Preprocessing, open_split
from alexnet_ext.data.archives import open_source
from alexnet_ext.data.batches import Drawn, read_batch
from alexnet_ext.data.images import square, yuv420
from alexnet_ext.data.packed import SPLITS, Index, verify
from alexnet_ext.data.prepare import PLAN, PROGRESS, Preparation
from alexnet_ext.ops.augment.reference import yuv420_to_rgb
from alexnet_ext.training.data_bench import synthetic_batch
from alexnet_ext.training.evaluate import to_device
from tests.training.test_data import picture

SIDE, SHARD = 30, 4  # planes of 15 lines: V begins within a row


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of ten images."""
    root = tmp_path_factory.mktemp("yuv420") / "photos"
    for number in range(20):
        path = root / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(60 + number, 90 - number, seed=number).save(path, quality=95)
    return root


def pack(photos: Path, out: Path, store: str, side: int = SIDE) -> Index:
    return Preparation(open_source(photos), out, side, SHARD, store=store).run(0)


@pytest.fixture(scope="module")
def folders(photos: Path) -> dict[str, Path]:
    """The same images in each store."""
    found = {store: photos.parent / store for store in ("rgb", "yuv420")}
    for store, out in found.items():
        assert pack(photos, out, store).store == store
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_images_are_those_of_rgb_in_half_the_bytes(folders: dict[str, Path]) -> None:
    rgb, yuv = (Index.read(folder) for folder in folders.values())
    for name in ("classes", "images", "mean", "eigenvalues", "eigenvectors"):
        assert getattr(rgb, name) == getattr(yuv, name)
    for split in SPLITS:
        for one, other in zip(rgb.shards[split], yuv.shards[split], strict=True):
            pixels, planes = (np.load(folders[i.store] / s.file) for i, s in ((rgb, one), (yuv, other)))
            assert planes.shape == (one.images, SIDE * 3 // 2, SIDE)
            assert 2 * planes.nbytes == pixels.nbytes
            assert all(np.array_equal(yuv420(image), found) for image, found in zip(pixels, planes, strict=True))
            assert one.labels_sha256 == other.labels_sha256


def test_data_bench_steps_on_the_bytes_that_the_folder_has(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        split = open_split(str(folder), SIDE - 4, 0)
        found, expected = (synthetic_batch(split, 3, torch.device("cpu")), read_batch(split.train, [(0, 0)] * 3))
        assert found.images.shape == expected.images.shape
        assert found.images.stride() == expected.images.stride()


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_the_error_on_photographs_is_what_the_docs_say(name: str) -> None:
    """scikit-learn's two photographs, of 640 x 427; hardly more than that of a JPEG of quality 100."""
    photographs = load_sample_images()
    (pixels,) = (p for p, path in zip(photographs.images, photographs.filenames, strict=True) if path.endswith(name))
    rgb = np.asarray(square(Image.fromarray(pixels), 256))
    back = yuv420_to_rgb(torch.from_numpy(yuv420(rgb))[None])[0].numpy()
    error = back.astype(float) - rgb
    assert np.abs(error).mean() < 1.85
    assert np.abs(error).max() <= 50
    assert 10 * np.log10(255**2 / (error**2).mean()) > 36.9
    Image.fromarray(rgb).save(stream := io.BytesIO(), "JPEG", quality=100, subsampling="4:2:0")
    assert np.abs(error).mean() < 1.1 * np.abs(np.asarray(Image.open(stream)).astype(float) - rgb).mean()


def test_chroma_of_one_colour_is_exact_up_to_rounding() -> None:
    """A grey stays itself; each of 27 colours comes back within 1."""
    levels = np.array([0, 128, 255], np.uint8)
    for colour in np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3):
        rgb = np.broadcast_to(colour, (4, 6, 3))
        back = yuv420_to_rgb(torch.from_numpy(yuv420(rgb))[None])[0].numpy()
        off = np.abs(back.astype(int) - rgb).max()
        assert off <= (0 if len(set(colour)) == 1 else 1), colour


def test_a_batch_becomes_the_networks_input() -> None:
    """As that of the RGB that it holds."""
    images = torch.randint(0, 256, (5, 3 * SIDE // 2, SIDE), dtype=torch.uint8)
    drawn = Drawn(torch.randint(0, 3, (5, 2)), torch.arange(5) % 2 == 0, 20 * torch.randn(5, 3))
    preprocessing = Preprocessing(28, SIDE, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    found = to_device(images, preprocessing, torch.device("cpu"), drawn, space_to_depth=4)
    rgb = yuv420_to_rgb(images).permute(0, 3, 1, 2)
    assert torch.equal(found, to_device(rgb, preprocessing, torch.device("cpu"), drawn, space_to_depth=4))


def test_it_goes_on_after_a_stop(tmp_path: Path, photos: Path, folders: dict[str, Path]) -> None:
    def stop(done: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        Preparation(open_source(photos), out, SIDE, SHARD, stop, "yuv420").run(0)
    pack(photos, out, "yuv420")
    assert contents(out) == contents(folders["yuv420"])
    (out / "train-00001.npy").unlink()
    assert [line.startswith(str(out / "train-00001.npy")) for line in verify(out)] == [True]
    pack(photos, out, "yuv420")
    assert contents(out) == contents(folders["yuv420"])


def test_the_disk_needs_half_the_room(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    images = 20 * SIDE * SIDE * 3 // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=images + 4000))
    pack(photos, tmp_path / "yuv420", "yuv420")
    with pytest.raises(CommandError, match=r"0\.1 MB needed"):
        pack(photos, tmp_path / "rgb", "rgb")


@pytest.mark.parametrize("finished", [False, True])
def test_another_store_is_refused_and_old_folders_are_rgb(
    tmp_path: Path, photos: Path, folders: dict[str, Path], finished: bool
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folders["rgb"], out)
    path = out / "index.json"
    values = json.loads(path.read_bytes())
    del values["store"]
    path.write_text(json.dumps(values))
    assert Index.read(out) == Index.read(folders["rgb"])
    if not finished:
        path.unlink()
        plan = Preparation(open_source(photos), out, SIDE, SHARD).plan
        del plan["store"]
        (out / PROGRESS).mkdir()
        (out / PROGRESS / PLAN).write_text(json.dumps(plan))
    before = contents(out)
    with pytest.raises(CommandError, match="holds shards of store rgb, not yuv420"):
        pack(photos, out, "yuv420")
    assert contents(out) == before
    assert pack(photos, out, "rgb") == Index.read(folders["rgb"])


def test_an_unknown_store_is_an_error(tmp_path: Path, folders: dict[str, Path]) -> None:
    values = json.loads((folders["rgb"] / "index.json").read_bytes())
    (tmp_path / "index.json").write_text(json.dumps(values | {"store": "yuv444"}))
    with pytest.raises(CommandError, match=r"index\.json: expected a store of rgb, yuv420, got 'yuv444'"):
        Index.read(tmp_path)
