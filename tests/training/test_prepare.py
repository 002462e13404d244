"""Packed images: the same pixels as the folder's, whatever kills the process that packs them."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_ext.data import CommandError, ImageFolder, PackedFolder, Preprocessing, Readers, batches
from alexnet_ext.data.archives import Entry, open_source
from alexnet_ext.data.batches import collate
from alexnet_ext.data.colours import Sums, components
from alexnet_ext.data.packed import SPLITS, Index, verify, write_shard
from alexnet_ext.data.prepare import PLAN, PROGRESS, SKIPPED, Preparation
from alexnet_ext.training.files import locked
from tests.training.test_data import picture
from tests.training.test_readers import runs

SIDE, SHARD = 32, 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 30 images to train on and six held out: colour, grey, CMYK, turned by EXIF, transparent."""
    root = tmp_path_factory.mktemp("prepare") / "photos"
    turned = Image.Exif()
    turned[0x112] = 6
    for number in range(36):
        path = root / ("val" if number >= 30 else "train") / "abc"[number % 3] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = picture(60 + number, 90 - number, seed=number)
        mode = {4: "L", 7: "CMYK"}.get(number % 10, "RGB")
        options = {"exif": turned} if number % 10 == 2 else {}
        if number % 10 == 9:
            image.putalpha(128)
            image.save(path.with_suffix(".png"))
        else:
            image.convert(mode).save(path, quality=95, **options)
    return root


def pack(root: Path, out: Path, workers: int = 0, **changed: int) -> Index:
    options = {"side": SIDE, "shard_size": SHARD, **changed}
    return Preparation(open_source(root), out, **options).run(workers)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def packed(photos: Path) -> Path:
    out = photos.parent / "packed"
    pack(photos, out)
    return out


def test_the_images_are_those_that_a_folder_trains_on(photos: Path, packed: Path) -> None:
    folder = ImageFolder.split(photos, 28, seed=3)
    preprocessing = Preprocessing(28, SIDE, (0.5,) * 3, (0.5,) * 3)
    assert folder.train.preprocessing.resize == SIDE
    for split, part in zip(SPLITS, (folder.train, folder.held_out), strict=True):
        found = PackedFolder(packed, split, preprocessing, augment=True, seed=3)
        part.augment, part.seed = True, 3
        part.components, part.eigenvalues = found.components, found.eigenvalues
        assert found.classes == part.classes == ("a", "b", "c")
        assert len(found) == len(part) == {"train": 30, "val": 6}[split]
        for index in range(len(part)):
            mine, its = found[5, index], part[5, index]
            assert torch.equal(mine.image, its.image)
            assert (mine.target, mine.index) == (its.target, its.index)
            assert all(map(torch.equal, mine.drawn, its.drawn))
        found.augment = part.augment = False
        assert all(torch.equal(found[5, index].image, part[5, index].image) for index in range(len(part)))


def test_the_index_says_what_is_there(photos: Path, packed: Path) -> None:
    index = Index.read(packed)
    assert (index.side, index.shard_size, index.images) == (SIDE, SHARD, {"train": 30, "val": 6})
    assert [len(index.shards[split]) for split in SPLITS] == [8, 2]
    assert not (packed / PROGRESS).exists()
    rows = [np.load(packed / shard.file, mmap_mode="r") for shard in index.shards["train"]]
    assert all(isinstance(some, np.memmap) and some.shape[1:] == (SIDE, SIDE, 3) for some in rows)
    labels = np.concatenate([np.load(packed / shard.labels) for shard in index.shards["train"]])
    assert labels.dtype == np.int64
    assert labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    pixels = np.concatenate(rows).reshape(-1, 3) / 255.0
    np.testing.assert_allclose(index.mean, pixels.mean(0), rtol=1e-12)
    vectors, values = np.array(index.eigenvectors), index.eigenvalues
    covariance = np.cov(pixels.T, bias=True)
    np.testing.assert_allclose(vectors.T @ np.diag(values) @ vectors, covariance, atol=1e-12)
    assert values == sorted(values, reverse=True)
    assert all(row[np.abs(row).argmax()] > 0 for row in vectors)


def test_sums_of_colours_are_exact_at_the_largest_values() -> None:
    white = np.full((300, 500, 3), 255, np.uint8)
    total = Sums.of(white) + Sums.of(white[:7]) + Sums()
    assert (total.pixels, total.first, total.second[0][2]) == (153_500, [153_500 * 255] * 3, 153_500 * 255**2)
    mean, values, _ = components(total)
    assert (mean, values) == ([1.0] * 3, [0.0] * 3)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_processes_writes_the_same_bytes(
    tmp_path: Path, photos: Path, packed: Path, workers: int
) -> None:
    told: list[int] = []
    Preparation(open_source(photos), tmp_path / "out", SIDE, SHARD, told.append).run(workers)
    assert contents(tmp_path / "out") == contents(packed)
    assert (told[0], told[-1]) == (0, 36)
    assert told == sorted(told)


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_loses_and_doubles_nothing(tmp_path: Path, photos: Path, packed: Path, kills: int) -> None:
    out, chance, killed = tmp_path / "out", random.Random(kills), 0
    expected, source = contents(packed), open_source(photos)
    fork = multiprocessing.get_context("fork")
    began = time.monotonic()
    Preparation(source, tmp_path / "timed", SIDE, SHARD).run(0)
    wait = 0.5 * (time.monotonic() - began)  # longer and shorter as needed, where other work slows the processes
    met: set[int] = set()  # finished shards that a kill has met
    while killed < kills or len(met) < 3:
        assert killed < 20 * kills, f"the kills met {met} finished shards"
        process = fork.Process(target=Preparation(source, out, SIDE, SHARD).run, args=(chance.choice([0, 2]),))
        process.start()
        process.join(chance.uniform(0, wait))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            assert contents(out) == expected
            shutil.rmtree(out)
            wait *= 0.7
            continue
        killed += 1
        shards = len(list((out / PROGRESS).glob("*-*.json")))
        wait *= 1.5 if shards in met else 1
        met.add(shards)
    pack(photos, out)
    assert contents(out) == expected


def test_the_processes_of_a_killed_one_end_within_a_shard(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Entry.read

    def slowly(entry: Entry) -> Image.Image:
        time.sleep(1)
        return read(entry)

    preparation = Preparation(open_source(photos), tmp_path / "out", SIDE, 30)
    monkeypatch.setattr(Entry, "read", slowly)
    process = multiprocessing.get_context("fork").Process(target=preparation.run, args=(2,))
    process.start()
    listed, pids, deadline = Path(f"/proc/{process.pid}/task/{process.pid}/children"), [], time.monotonic() + 30
    while len(pids) < 2 and time.monotonic() < deadline:
        pids = [int(word) for word in listed.read_text().split()]
    assert len(pids) == 2
    time.sleep(0.5)
    process.kill()
    process.join()
    deadline = time.monotonic() + 5  # whole shards take 30 and 6 seconds
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if runs(pid)] == []


def test_finished_shards_are_kept_if_their_size_fits(
    tmp_path: Path, photos: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def stop(done: int) -> None:
        if done == 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Preparation(open_source(photos), out, SIDE, SHARD, stop).run(0)
    names = {f"train-0000{number}{ending}" for number in range(3) for ending in (".npy", ".labels.npy")}
    assert {path.name for path in out.iterdir()} == {PROGRESS, *names}, "nothing half written"
    before = {name: (out / name).stat().st_mtime_ns for name in names}
    os.truncate(out / "train-00001.npy", 3000)
    (out / "train-00002.labels.npy").unlink()
    (out / ".0123abcd.tmp-77.npy").touch()
    pack(photos, out)
    assert contents(out) == contents(packed)
    kept = {name for name in names if (out / name).stat().st_mtime_ns == before[name]}
    assert kept == {"train-00000.npy", "train-00000.labels.npy"}
    monkeypatch.setattr(Preparation, "_pack", lambda *_: pytest.fail("all is there"))
    pack(photos, out)
    assert contents(out) == contents(packed)


def test_a_lost_shard_is_written_anew(tmp_path: Path, photos: Path, packed: Path) -> None:
    root, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, root)
    shutil.copytree(packed, out)
    (out / "train-00001.npy").unlink()
    os.truncate(out / "val-00000.labels.npy", 9)
    pack(root, out, workers=2)
    assert contents(out) == contents(packed)
    (out / "train-00000.npy").unlink()
    picture(seed=77).save(root / "train" / "a" / "00.jpg")
    with pytest.raises(CommandError, match=r"train-00000\.npy: its images are no longer those of index\.json"):
        pack(root, out)


@pytest.mark.parametrize("finished", [False, True])
def test_another_plan_is_refused(tmp_path: Path, photos: Path, packed: Path, finished: bool) -> None:
    out, other = tmp_path / "out", tmp_path / "photos"
    shutil.copytree(packed, out)
    if not finished:
        (out / "index.json").unlink()
        (out / PROGRESS).mkdir()
        (out / PROGRESS / PLAN).write_text(json.dumps(Preparation(open_source(photos), out, SIDE, SHARD).plan))
    before = contents(out)
    with pytest.raises(CommandError, match=r"holds shards of side 32, not 48"):
        pack(photos, out, side=48)
    with pytest.raises(CommandError, match=r"holds shards of shard size 4, not 5"):
        pack(photos, out, shard_size=5)
    shutil.copytree(photos, other)
    (other / "train" / "a" / "00.jpg").rename(other / "train" / "a" / "000.jpg")
    with pytest.raises(CommandError, match=r"holds shards of other images"):
        pack(other, out)
    assert contents(out) == before


def test_no_folder_of_other_files_is_written_into(tmp_path: Path, photos: Path) -> None:
    for name in ("train-00000.npy", "progress/notes.txt", ".0123abcd.tmp-my"):
        out = tmp_path / name.replace("/", "-") / "out"
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(CommandError, match=r"holds .+ already; name a new or an empty folder"):
            pack(photos, out)
        assert contents(out) == {name: b"mine"}


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with locked(out), pytest.raises(CommandError, match="another process writes into this folder"):
        pack(photos, out)


def spoil(root: Path, count: int, part: str = "train") -> list[Path]:
    broken = sorted((root / part).rglob("*.jpg"))[2 : 2 + count]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    return broken


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_left_out_and_named(tmp_path: Path, photos: Path, workers: int) -> None:
    root, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, root)
    (broken,) = spoil(root, 1)
    index = pack(root, out, workers)
    assert (index.images, index.skipped) == ({"train": 29, "val": 6}, {"train": 1, "val": 0})
    assert (out / SKIPPED).read_text().startswith(f"{broken.relative_to(root)}: a damaged image (")
    assert [shard.images for shard in index.shards["train"]] == [3, 4, 4, 4, 4, 4, 4, 2]
    data = PackedFolder(out, "train", Preprocessing(28, SIDE, (0.5,) * 3, (0.5,) * 3))
    assert data.targets.bincount().tolist() == [9, 10, 10]
    assert data[0, 3].image.shape == data[0, 28].image.shape == (3, 28, 28)


@pytest.mark.parametrize(("part", "total"), [("train", 30), ("val", 6)])
def test_many_broken_images_end_it_each_time(tmp_path: Path, photos: Path, part: str, total: int) -> None:
    root, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, root)
    spoil(root, 2, part)
    for _ in range(2):
        with pytest.raises(CommandError, match=f"with it 2 of {total} images of {part} are unreadable, more than 5%"):
            pack(root, out, workers=2, shard_size=6)
        assert multiprocessing.active_children() == []
        assert [path.name for path in out.rglob("*") if ".tmp-" in path.name] == []
    assert not (out / "index.json").exists()


def test_a_shard_may_have_no_image(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, "train-00000", SIDE, [])
    assert shard.fits(tmp_path)
    assert shard.damage(tmp_path) is None
    assert np.load(tmp_path / shard.file).shape == (0, SIDE, SIDE, 3)
    assert np.load(tmp_path / shard.labels).shape == (0,)


def test_the_disk_must_have_the_room(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, left_over = shutil.disk_usage(tmp_path), tmp_path / "out" / ".0123abcd.tmp-77.npy"
    left_over.parent.mkdir()
    left_over.touch()

    def disk_usage(_: Path) -> object:
        assert not left_over.exists(), "its room counts as free"
        return usage._replace(free=100_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(CommandError, match=r"out: 0\.1 MB needed, 0\.1 MB free on its disk"):
        pack(photos, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flip, "not the bytes that were written"),
        (Path.unlink, "No such file"),
        (lambda p: os.truncate(p, 9), "not the"),
    ],
)
def test_verify_names_each_damaged_file(
    tmp_path: Path, packed: Path, damage: Callable[[Path], None], told: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    assert list(verify(out)) == []
    names = ["train-00002.npy", "val-00001.npy"]
    for name in names:
        damage(out / name)
    lines = list(verify(out))
    assert [line.startswith(f"{out / name}: {told}") for line, name in zip(lines, names, strict=True)] == [True] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_from_packed_images(packed: Path, workers: int) -> None:
    preprocessing = Preprocessing(28, SIDE, (0.5,) * 3, (0.5,) * 3)
    train = PackedFolder(packed, "train", preprocessing, augment=True, seed=3)
    with Readers(train, workers) as readers:
        found = list(batches(train, 8, seed=1, epoch=2, read=readers))
    assert [tuple(batch.images.shape) for batch in found] == [(8, 3, SIDE, SIDE)] * 3 + [(6, 3, SIDE, SIDE)]
    indices, targets = (torch.cat(column) for column in zip(*((b.indices, b.targets) for b in found), strict=True))
    assert sorted(indices.tolist()) == list(range(30))
    assert torch.equal(targets, train.targets[indices])
    drawn = collate([train[epoch, 4] for epoch in range(300)]).drawn
    values, vectors = (torch.tensor(numbers) for numbers in (train.index.eigenvalues, train.index.eigenvectors))
    expected = 25.5 * ((vectors.T * values) ** 2).sum(1).sqrt()
    torch.testing.assert_close(drawn.shifts.std(0), expected, rtol=0.15, atol=0)
    held_out, rows = PackedFolder(packed, "val", preprocessing), np.load(packed / "val-00000.npy")
    assert np.array_equal(held_out[0, 3].image.permute(1, 2, 0), rows[3, 2:30, 2:30])


def test_what_cannot_be_read_is_told(tmp_path: Path, packed: Path) -> None:
    out, preprocessing = tmp_path / "out", Preprocessing(28, SIDE, (0.5,) * 3, (0.5,) * 3)
    shutil.copytree(packed, out)
    with pytest.raises(CommandError, match="images have a side of 32, where 33 is needed"):
        PackedFolder(out, "train", Preprocessing(28, 33, (0.5,) * 3, (0.5,) * 3))
    os.truncate(out / "val-00001.npy", 500)
    assert len(PackedFolder(out, "train", preprocessing)) == 30
    with pytest.raises(CommandError, match=r"val-00001\.npy: missing or cut short"):
        PackedFolder(out, "val", preprocessing)
    for text, told in (("{", "no JSON"), ("[]", "expected version 1"), ('{"version": 1}', "not the fields")):
        (out / "index.json").write_text(text)
        with pytest.raises(CommandError, match=told):
            Index.read(out)
    with pytest.raises(CommandError, match="`alexnet prepare` writes it when it ends"):
        Index.read(tmp_path)
