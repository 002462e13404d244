"""Packed folders: random numbers, batches and whole runs are those of the folder, however they are read."""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import pickle
import shutil
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alexnet_ext.data import CommandError, ImageFolder, PackedFolder, Readers, Split, batches, open_split
from alexnet_ext.data import packed_folder as module
from alexnet_ext.data.archives import open_source
from alexnet_ext.data.batches import Batch, read_batch
from alexnet_ext.data.chance import COMPONENTS, EIGENVALUES, draw
from alexnet_ext.data.packed import Index
from alexnet_ext.data.packed_folder import free_memory, packed_preprocessing
from alexnet_ext.data.prepare import PLAN, PROGRESS, Preparation
from alexnet_ext.data.preprocessing import IMAGENET
from alexnet_ext.data.sources import open_held_out
from alexnet_ext.training.data_bench import Rates
from alexnet_ext.training.interrupt import Interrupted
from tests.training.test_data import picture
from tests.training.test_prepare import contents
from tests.training.test_training import SIZE, TINY, reporter, resumed, same, trainer

SIDE, SHARD = 76, 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, seven images to train on and three held out."""
    root = tmp_path_factory.mktemp("packed") / "photos"
    for number in range(10):
        path = root / ("val" if number >= 7 else "train") / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(90 + number, 100 - number, seed=number).save(path)
    return root


@pytest.fixture(scope="module")
def packed(photos: Path) -> Path:
    out = photos.parent / "packed"
    Preparation(open_source(photos), out, SIDE, SHARD).run(0)
    return out


def opened(root: Path, seed: int = 3) -> Split:
    return open_split(str(root), SIZE, seed)


def train_part(root: Path) -> PackedFolder:
    found = opened(root).train
    assert isinstance(found, PackedFolder)
    return found


def equal(one: Batch, other: Batch) -> bool:
    assert one.drawn is not None
    assert other.drawn is not None
    pairs = zip((*one[:3], *one.drawn), (*other[:3], *other.drawn), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_random_numbers_depend_on_seed_epoch_and_index_alone() -> None:
    of_all = draw(7, 3, np.arange(500), 500, 29)
    order = np.random.default_rng(0).permutation(500)
    for chosen, images in ((order, 500), (order[:1], 500), (order[:13], 10_000)):
        found = draw(7, 3, chosen, images, 29)
        assert all(torch.equal(a, b[chosen]) for a, b in zip(found, of_all, strict=True))
    seeds = (0, 1, 7, 2**32 + 7, 2**64 - 1)
    places = [(seed, epoch) for seed in seeds for epoch in (0, 3)]
    shifts = {tuple(draw(*place, np.array([4]), 500, 29).shifts[0].tolist()) for place in places}
    assert len(shifts) == len(places)


def test_random_numbers_are_spread_as_the_paper_says() -> None:
    images, room = 40_000, 9
    found = draw(0, 0, np.arange(images), images, room)
    counts = torch.stack([found.offsets[:, axis].bincount(minlength=room + 1) for axis in range(2)])
    assert counts.shape == (2, room + 1)
    # Four standard deviations, each.
    assert (counts - images / (room + 1)).abs().max() < 4 * math.sqrt(images / (room + 1))
    assert abs(int(found.flips.sum()) - images / 2) < 4 * math.sqrt(images) / 2
    alphas = (found.shifts / 255) @ torch.linalg.inv(COMPONENTS).T / EIGENVALUES
    torch.testing.assert_close(alphas.std(0), torch.full((3,), 0.1), rtol=4 / math.sqrt(2 * images), atol=0)
    assert alphas.mean(0).abs().max() < 4 * 0.1 / math.sqrt(images)
    assert alphas.T.corrcoef().triu(1).abs().max() < 4 / math.sqrt(images)
    assert 0.35 < float(alphas.abs().max()) < 0.6, "the tails are there, and finite"


def test_the_stream_of_random_numbers_never_changes() -> None:
    """A resumed run draws what its first part would have drawn, with any version of NumPy."""
    found = draw(5, 2, np.array([0, 6]), 7, 9)
    assert found.offsets.tolist() == [[9, 8], [4, 0]]
    assert found.flips.tolist() == [False, False]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("cache", [None, "ram"])
def test_batches_are_the_same_by_any_threads_and_from_memory(packed: Path, workers: int, cache: str | None) -> None:
    expected = [read_batch(train_part(packed), [(4, index) for index in range(at, min(at + 2, 7))]) for at in (0, 2)]
    data = train_part(packed)
    if cache is not None:
        data.keep(torch.device("cpu"), cache)
    with Readers(data, workers) as readers:
        for start in (0, 1):
            found = list(batches(data, 2, epoch=4, start=start, read=readers))
            assert [len(batch.targets) for batch in found] == [2, 2, 2, 1][start:]
            assert all(map(equal, found, expected[start:]))
        assert readers.processes == []
    shuffled = torch.cat([batch.indices for batch in batches(data, 2, seed=1, epoch=4)])
    assert sorted(shuffled.tolist()) == list(range(7))


def test_a_batch_has_the_bytes_of_the_file_in_their_order(packed: Path) -> None:
    data = train_part(packed)
    images = read_batch(data, [(0, index) for index in (6, 0, 3)]).images
    assert images.shape == (3, 3, SIDE, SIDE)
    assert images.permute(0, 2, 3, 1).is_contiguous()
    rows = np.concatenate([np.load(packed / shard.file) for shard in data.shards])
    assert np.array_equal(images.permute(0, 2, 3, 1), rows[[6, 0, 3]])


def test_few_shards_stay_mapped(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN_SHARDS", 1)
    data = train_part(packed)
    whole = [read_batch(train_part(packed), [(0, index)]) for index in range(7)]
    for index in (0, 6, 3, 1):
        assert equal(read_batch(data, [(0, index)]), whole[index])
    assert data.pixels.cache_info().currsize == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [2, 5])
def test_a_run_on_packed_images_is_that_on_the_folder_however_it_is_cut(
    tmp_path: Path, photos: Path, packed: Path, workers: int, stop: int
) -> None:
    # 7 images in batches of 2: epochs of 4 steps.
    folder, split = opened(photos), opened(packed)
    assert isinstance(folder.train, ImageFolder)
    assert isinstance(split.train, PackedFolder)
    folder = folder.brought_as(split.preprocessing)
    folder.train.components, folder.train.eigenvalues = split.train.components, split.train.eigenvalues
    expected = trainer(tmp_path / "folder", TINY, folder)
    result = expected.run(reporter())
    cut = trainer(tmp_path / "packed", TINY, split, workers)
    with pytest.raises(Interrupted):
        cut.run(reporter(), stop_at=stop)
    again = resumed(tmp_path / "packed", TINY, opened(packed), workers)
    found = again.run(reporter())
    assert same(again, expected)
    assert found.loss == result.loss


def test_mean_and_components_are_the_folders_own(packed: Path) -> None:
    split = opened(packed)
    index = Index.read(packed)
    assert isinstance(split.train, PackedFolder)
    assert (split.preprocessing.mean, split.preprocessing.std) == (tuple(index.mean), IMAGENET["std"])
    assert (split.preprocessing.size, split.preprocessing.resize) == (SIZE, SIDE)
    assert split.train.components.T.tolist() == torch.tensor(index.eigenvectors).tolist()
    brought = split.brought_as(replace(split.preprocessing, resize=70, mean=IMAGENET["mean"]))
    assert brought.train.preprocessing == brought.held_out.preprocessing == brought.preprocessing
    assert (brought.preprocessing.resize, brought.preprocessing.mean) == (SIDE, IMAGENET["mean"])


def test_the_listing_tells_other_pixels_of_the_same_names(tmp_path: Path, photos: Path, packed: Path) -> None:
    changed = tmp_path / "photos"
    shutil.copytree(photos, changed)
    listings = {opened(packed).listing}
    for side in (SIDE, SIDE + 1):
        picture(91, 99, seed=77).save(changed / "train" / "a" / "0.png")
        Preparation(open_source(changed), tmp_path / str(side), side, SHARD).run(0)
        listings.add(opened(tmp_path / str(side)).listing)
    listings.add(open_split(str(packed), SIZE, 0, val=str(photos / "val")).listing)
    listings.add(open_split(str(packed), SIZE, 0, val=str(tmp_path / str(SIDE))).listing)
    assert len(listings) == 5


def test_held_out_images_come_from_either_kind(photos: Path, packed: Path) -> None:
    preprocessing = packed_preprocessing(packed, SIZE)
    mine, _ = open_held_out(packed, preprocessing, ("z", "c", "b", "a"))
    its, notes = open_held_out(photos, preprocessing, ("z", "c", "b", "a"))
    assert mine.classes == its.classes
    assert [mine[0, i].target for i in range(3)] == [its[0, i].target for i in range(3)]
    assert all(torch.equal(mine[0, i].image, its[0, i].image) for i in range(3))
    assert notes == (f"{photos}: the images are those of val",)
    with pytest.raises(CommandError, match="c is not one of the 2 classes"):
        open_held_out(packed, preprocessing, ("a", "b"))
    with pytest.raises(CommandError, match="images have a side of 76, where 80 is needed"):
        open_held_out(packed, replace(preprocessing, resize=80), ("a", "b", "c"))


def test_a_folder_is_trained_on_with_packed_images_held_out(tmp_path: Path, photos: Path, packed: Path) -> None:
    alone = open_split(str(photos), SIZE, 3)
    for train in (photos, photos / "train"):
        found = open_split(str(train), SIZE, 3, val=str(packed))
        assert isinstance(found.train, ImageFolder)
        assert isinstance(found.held_out, PackedFolder)
        assert found.preprocessing == alone.preprocessing
        for mine, its in ((found.train, alone.train), (found.held_out, alone.held_out)):
            assert all(torch.equal(mine[1, i].image, its[1, i].image) for i in range(len(its)))
            assert [mine[1, i].target for i in range(len(mine))] == [its[1, i].target for i in range(len(its))]
        assert found.listing != alone.listing
    given = replace(found.preprocessing, resize=90, std=(0.5,) * 3)
    assert found.brought_as(given).preprocessing == replace(given, resize=SIDE), "packed squares keep their side"
    Preparation(open_source(photos), tmp_path / "wide", 80, SHARD).run(0)
    with pytest.raises(CommandError, match="its images have a side of 80, where 76 is needed"):
        open_split(str(photos), SIZE, 3, val=str(tmp_path / "wide"))


def test_what_no_packed_folder_can_do_is_refused(tmp_path: Path, photos: Path, packed: Path) -> None:
    with pytest.raises(CommandError, match=r"--held-out 0\.2: .* is packed, with the images held out already"):
        open_split(str(packed), SIZE, 0, held_out=0.2)
    with pytest.raises(CommandError, match="side of 76, and the network takes 227; prepare them anew with --side"):
        open_split(str(packed), 227, 0)
    unfinished = tmp_path / "unfinished"
    (unfinished / PROGRESS).mkdir(parents=True)
    (unfinished / PROGRESS / PLAN).touch()
    with pytest.raises(CommandError, match="unfinished: not finished; the `alexnet prepare` that began it goes on"):
        opened(unfinished)
    empty = tmp_path / "empty"
    shutil.copytree(packed, empty)
    index = json.loads((empty / "index.json").read_text())
    index["shards"]["val"] = []
    (empty / "index.json").write_text(json.dumps(index))
    for opening in (
        lambda: opened(empty),
        lambda: open_split(str(packed), SIZE, 0, val=str(empty)),
        lambda: open_held_out(empty, packed_preprocessing(empty, SIZE), ("a", "b", "c")),
    ):
        with pytest.raises(CommandError, match="/empty: no images held out"):
            opening()
    index["shards"]["train"] = []
    (empty / "index.json").write_text(json.dumps(index))
    with pytest.raises(CommandError, match="/empty: no images to train on"):
        opened(empty)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("side", "76"),
        ("side", 76.0),
        ("side", 0),
        ("side", True),
        ("shard_size", None),
        ("listing", []),
        ("mean", None),
        ("mean", [0.5]),
        ("mean", [0.5, 0.5, float("nan")]),
        ("mean", [0.5, 0.5, 10**400]),
        ("eigenvalues", ["0.1", "0.1", "0.1"]),
        ("eigenvalues", [0.1, 0.1, float("inf")]),
        ("eigenvectors", [[1, 0, 0]]),
        ("eigenvectors", [[1, 0], [0, 1], [0, 0]]),
        ("images", "20"),
        ("images", {"train": -1, "val": 0}),
        ("skipped", [1]),
        ("skipped", {"train": "x", "val": 0}),
        ("skipped", {"train": 0}),
        ("classes", "ab"),
        ("classes", [1, 2]),
        ("classes", ["a", "a"]),
        ("classes", None),
    ],
)
def test_an_index_with_a_damaged_field_is_one_line(tmp_path: Path, packed: Path, field: str, value: Any) -> None:
    index = json.loads((packed / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {field: value}))
    with pytest.raises(CommandError, match=rf"index\.json: {field} is not what `alexnet prepare` writes"):
        Index.read(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("file", 5),
        ("file", "../rgb/train-00000.npy"),
        ("labels", "/tmp/train-00000.labels.npy"),
        ("labels", ".."),
        ("labels", "a\0.npy"),
        ("images", "3"),
        ("bytes", -1),
        ("labels_bytes", 1.5),
        ("sha256", None),
    ],
)
def test_an_index_with_a_damaged_shard_is_one_line(tmp_path: Path, packed: Path, field: str, value: Any) -> None:
    index = json.loads((packed / "index.json").read_text())
    index["shards"]["val"][0][field] = value
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CommandError, match=r"index\.json: shards is not what `alexnet prepare` writes"):
        Index.read(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "\xff", '{"version": ' + "1" * 5000 + "}"])
def test_an_index_that_is_no_json_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text, encoding="latin-1")
    with pytest.raises(CommandError, match=r"index\.json: no JSON \(.*\)$"):
        Index.read(tmp_path)


def test_a_packed_folder_can_be_sent_to_a_process_and_goes_when_nobody_uses_it(packed: Path) -> None:
    data = train_part(packed)
    expected = read_batch(data, [(0, 3)])
    assert equal(read_batch(pickle.loads(pickle.dumps(data)), [(0, 3)]), expected)
    gone = weakref.ref(data)
    gc.disable()
    try:
        del data
        assert gone() is None, "without a wait for the garbage collector: it may hold a GPU's memory"
    finally:
        gc.enable()


def test_an_index_json_of_somebody_else_makes_no_packed_folder(tmp_path: Path, photos: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "index.json").write_text("{}")
    assert isinstance(opened(tmp_path / "photos").train, ImageFolder)


def gone(path: Path) -> None:
    path.unlink()


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def fewer(path: Path) -> None:
    """Another shape, in as many bytes."""
    path.write_bytes(path.read_bytes().replace(b"(3,", b"(1,"))


def unknown_class(path: Path) -> None:
    np.save(path, np.full(3, 3))


@pytest.mark.parametrize(
    ("damage", "told"), [(gone, "No such file"), (zeros, "not a file of NumPy's"), (fewer, "not the 3 images of the")]
)
def test_a_shard_that_is_damaged_later_is_one_line(
    tmp_path: Path, packed: Path, damage: Callable[[Path], None], told: str
) -> None:
    shutil.copytree(packed, tmp_path / "out")
    data = train_part(tmp_path / "out")
    damage(tmp_path / "out" / "train-00001.npy")
    with pytest.raises(CommandError, match=rf"train-00001\.npy: {told}"):
        data.batch([(0, 3)])


def test_a_shard_cut_short_once_it_is_mapped_is_one_line_before_the_next_epoch(tmp_path: Path, packed: Path) -> None:
    shutil.copytree(packed, tmp_path / "out")
    data = train_part(tmp_path / "out")
    assert len(list(batches(data, 2, seed=0))) == 4
    kept = train_part(tmp_path / "out")
    kept.keep(torch.device("cpu"), "ram")
    os.truncate(tmp_path / "out" / "train-00001.npy", 4096)
    with pytest.raises(CommandError, match=r"train-00001\.npy: missing or cut short"):
        batches(data, 2, seed=0, epoch=1)
    assert len(list(batches(kept, 2, seed=0, epoch=1))) == 4, "a copy in memory needs no file"


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (gone, r"train-00001\.npy: missing or cut short, or its labels"),
        (zeros, r"labels\.npy: not a file of NumPy's"),
        (fewer, r"labels\.npy: not the 3 labels of the index"),
        (unknown_class, r"labels\.npy: not the 3 labels of the index"),
    ],
)
def test_labels_are_checked_at_once(tmp_path: Path, packed: Path, damage: Callable[[Path], None], told: str) -> None:
    shutil.copytree(packed, tmp_path / "out")
    damage(tmp_path / "out" / "train-00001.labels.npy")
    with pytest.raises(CommandError, match=told):
        train_part(tmp_path / "out")


def test_what_a_thread_raises_is_raised_where_the_batch_is_wanted(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = train_part(packed)
    gathered = data._gathered

    def fail(indices: np.ndarray, pin_memory: bool) -> torch.Tensor:
        if 4 in indices:
            raise OSError(5, "Input/output error")
        return gathered(indices, pin_memory)

    with Readers(data, 3) as readers:
        monkeypatch.setattr(data, "_gathered", fail)
        found = batches(data, 2, read=readers)
        assert [next(found).indices.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
        with pytest.raises(OSError, match="Input/output error"):
            next(found)
        monkeypatch.setattr(data, "_gathered", gathered)
        assert len(list(batches(data, 2, read=readers))) == 4, "and the threads go on"
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("reader")] == []


def test_a_signal_is_heard_while_a_thread_is_waited_for(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, slow = train_part(packed), threading.Event()

    def look() -> None:
        raise Interrupted

    with Readers(data, 1, look) as readers:
        monkeypatch.setattr(data, "_gathered", lambda *_: slow.wait(60))
        with pytest.raises(Interrupted):
            next(batches(data, 2, read=readers))
        slow.set()


def test_the_system_is_told_what_is_wanted_next(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("alexnet_ext.data.batches"), "AHEAD", 4)
    data, told = train_part(packed), []
    plain = data.will_need
    monkeypatch.setattr(data, "will_need", lambda keys: (told.append([index for _, index in keys]), plain(keys)))
    found = batches(data, 2)
    for wanted in ([[0, 1], [2, 3], [4, 5]], [[6]], [], []):
        next(found)
        assert told == wanted
        told.clear()


def test_images_that_do_not_fit_into_memory_are_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, needed = train_part(packed), 7 * SIDE**2 * 3
    free = free_memory(torch.device("cpu"))
    assert 10**6 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(module, "free_memory", lambda device: needed - 1)
    with pytest.raises(CommandError, match=f"--cache ram: {needed:,} bytes needed for .*, {needed - 1:,} free"):
        data.keep(torch.device("cpu"), "ram")
    assert data.kept is None
    monkeypatch.setattr(module, "free_memory", lambda device: needed)
    data.keep(torch.device("cpu"), "device")
    (packed / "train-00000.npy").rename(packed / "moved")
    try:
        assert len(data.batch([(0, index) for index in range(7)]).images) == 7
    finally:
        (packed / "moved").rename(packed / "train-00000.npy")
    assert contents(packed)


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        (
            Rates(20_000.4, None, 61.2),
            "Compute limits training on 2 threads: packed images come at 20,000 a second, and steps alone take 61",
        ),
        (
            Rates(None, 300, 9000),
            "The data limit training on 2 threads: images of a folder come at 300 a second, and steps alone take 9,000",
        ),
    ],
)
def test_the_slower_limits(rates: Rates, sentence: str) -> None:
    assert rates.sentence("2 threads") == f"{sentence} a second"
