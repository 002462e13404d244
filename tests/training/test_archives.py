"""Tar files as a source: ILSVRC's two, WebDataset's; the same images as in a folder, and one line for what is wrong."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from alexnet_ext.data import BadImage, CommandError, ImageFolder, archives
from alexnet_ext.data.archives import ILSVRC_TRAIN, ILSVRC_TRUTH, ILSVRC_VAL, Entry, Source, open_source
from alexnet_ext.data.images import decode, read_image, square
from alexnet_ext.data.packed import verify
from alexnet_ext.data.prepare import Preparation
from tests.training.test_data import picture

SYNSETS = ("n01440764", "n02100735", "n02119789")
DEVKIT = {1: "n02119789", 2: "n02100735", 3: "n01440764"}  # the numbers of ILSVRC's development kit are not sorted


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    picture(40, 30, seed).save(stream, "JPEG")
    return stream.getvalue()


def tar(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def ilsvrc(tmp_path: Path) -> Path:
    """Two training images a synset, in no order, and five held-out ones."""
    root = tmp_path / "ilsvrc"
    root.mkdir()
    inner = [
        (f"{synset}.tar", tar([(f"{synset}_{number}.JPEG", jpeg(10 * place + number)) for number in (2, 1)]))
        for place, synset in reversed(list(enumerate(SYNSETS)))
    ]
    (root / ILSVRC_TRAIN).write_bytes(tar(inner))
    val = [(f"ILSVRC2012_val_{number:08}.JPEG", jpeg(100 + number)) for number in (3, 1, 2, 5, 4)]
    (root / ILSVRC_VAL).write_bytes(tar(val))
    (root / ILSVRC_TRUTH).write_text("3\n1\n1\n2\n3\n")
    (root / "map_clsloc.txt").write_text("".join(f"{synset} {number} name\n" for number, synset in DEVKIT.items()))
    return root


def same(entry: Entry, content: bytes, tmp_path: Path) -> bool:
    path = tmp_path / "one.jpg"
    path.write_bytes(content)
    return np.array_equal(np.asarray(entry.read()), np.asarray(read_image(path)))


def check_ilsvrc(found: Source, tmp_path: Path) -> None:
    assert found.classes == SYNSETS
    train, val = found.entries["train"], found.entries["val"]
    assert [(e.name, e.target) for e in train] == [
        (f"train/{synset}/{synset}_{number}.JPEG", target) for target, synset in enumerate(SYNSETS) for number in (1, 2)
    ]
    assert all(same(e, jpeg(10 * e.target + int(e.name[-6])), tmp_path) for e in train)
    assert [e.name for e in val] == [f"val/ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 6)]
    assert [e.target for e in val] == [0, 2, 2, 1, 0]
    assert all(same(e, jpeg(100 + number), tmp_path) for number, e in enumerate(val, 1))


def test_ilsvrcs_own_tar_files(tmp_path: Path, ilsvrc: Path) -> None:
    check_ilsvrc(open_source(ilsvrc), tmp_path)


def test_tar_files_are_packed_as_they_are(tmp_path: Path, ilsvrc: Path) -> None:
    """A broken image in one is named by the tar file's member."""
    out, wds = (
        tmp_path / "ilsvrc-out",
        webdataset(tmp_path / "wds", train_0=[*some(0, 39), ("x.cls", b"0"), ("x.jpg", b"")]),
    )
    assert Preparation(open_source(ilsvrc), out, 24, 4).run(2).images == {"train": 6, "val": 5}
    labels = [np.load(out / name).tolist() for name in ("train-00000.labels.npy", "val-00000.labels.npy")]
    assert labels == [[0, 0, 1, 1], [0, 2, 2, 1]]
    expected = np.asarray(square(decode(io.BytesIO(jpeg(11)), "a JPEG"), 24))
    assert np.array_equal(np.load(out / "train-00000.npy", mmap_mode="r")[2], expected)
    index = Preparation(open_source(wds), tmp_path / "wds-out", 24, 16).run(0)
    assert sum(index.images.values()) == 39
    assert (tmp_path / "wds-out" / "skipped.txt").read_text().startswith("train-0.tar/x.jpg: not an image")
    assert list(verify(out)) == list(verify(tmp_path / "wds-out")) == []


def test_ilsvrcs_numbers_by_the_development_kit(tmp_path: Path, ilsvrc: Path) -> None:
    """Its meta.mat names groups of synsets, too, which have children."""
    written = pytest.importorskip("scipy.io", reason="scipy reads meta.mat")
    (ilsvrc / "map_clsloc.txt").unlink()
    rows = [(number, synset, "words", 0) for number, synset in DEVKIT.items()] + [(4, "n00001740", "entity", 3)]
    names = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    written.savemat(ilsvrc / "meta.mat", {"synsets": np.array(rows, dtype=names)})
    check_ilsvrc(open_source(ilsvrc), tmp_path)
    (ilsvrc / "meta.mat").write_bytes(b"no matrix" * 20)
    with pytest.raises(CommandError, match=r"meta\.mat: not the synsets of the development kit"):
        open_source(ilsvrc)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        (ILSVRC_VAL, None, f"no such file; {ILSVRC_TRAIN} needs it beside it"),
        (ILSVRC_TRUTH, None, f"no such file; {ILSVRC_TRAIN} needs it beside it"),
        (ILSVRC_TRUTH, "3\n1\n1\n4\n3\n", "the number of ILSVRC2012_val_00000004.JPEG .* is that of no class"),
        (ILSVRC_TRUTH, "3\n1\n", "the number of ILSVRC2012_val_00000003.JPEG .* is that of no class"),
        ("map_clsloc.txt", None, r"need meta\.mat of ILSVRC's development kit beside it, or map_clsloc\.txt"),
        ("map_clsloc.txt", "\n".join(SYNSETS), "expected lines as `n02119789 1 kit_fox`"),
    ],
)
def test_what_ilsvrc_lacks_is_told(ilsvrc: Path, name: str, content: str | None, told: str) -> None:
    (ilsvrc / name).unlink() if content is None else (ilsvrc / name).write_text(content)
    with pytest.raises(CommandError, match=told):
        open_source(ilsvrc)


def test_a_tar_file_cut_short_is_told(ilsvrc: Path) -> None:
    whole = os.path.getsize(ilsvrc / ILSVRC_TRAIN)
    for size, told in ((whole // 2, "no whole tar file"), (100, "no whole tar file"), (0, "no whole tar file")):
        os.truncate(ilsvrc / ILSVRC_TRAIN, size)
        with pytest.raises(CommandError, match=told):
            open_source(ilsvrc)


def webdataset(root: Path, **shards: list[tuple[str, bytes]]) -> Path:
    root.mkdir(exist_ok=True)
    for name, members in shards.items():
        (root / f"{name.replace('_', '-')}.tar").write_bytes(tar(members))
    return root


def some(first: int, last: int, ending: str = "jpg") -> list[tuple[str, bytes]]:
    """Images numbered ``first`` to ``last``, of three classes."""
    return [
        member
        for number in range(first, last)
        for member in ((f"{number:04}.cls", b"%d\n" % (number % 3)), (f"{number:04}.{ending}", jpeg(number)))
    ]


@pytest.mark.parametrize("prefix", ["", "imagenet1k_"])
def test_webdatasets_tar_files(tmp_path: Path, prefix: str) -> None:
    train, more = [*some(0, 4), ("0000.json", b"{}"), ("lonely.cls", b"1")], some(4, 9, "seg.jpg") + some(9, 12, "JPEG")
    shards = {f"{prefix}train_000000": train, f"{prefix}train_000001": more, f"{prefix}validation_0": some(20, 22)}
    found = open_source(webdataset(tmp_path / "wds", **shards))
    assert found.classes == ("0", "1", "2")
    first = f"{prefix.replace('_', '-')}train-000000.tar"
    assert [e.name for e in found.entries["train"][:2]] == [f"{first}/0000.jpg", f"{first}/0001.jpg"]
    numbers = [0, 1, 2, 3, 9, 10, 11]
    assert [e.target for e in found.entries["train"]] == [number % 3 for number in numbers]
    assert all(same(e, jpeg(number), tmp_path) for number, e in zip(numbers, found.entries["train"], strict=True))
    assert [e.target for e in found.entries["val"]] == [2, 0]
    assert [note.rpartition("/")[2] for note in found.notes] == [
        f"{first}: left out 1 keys with an image and no .cls, or the reverse",
        f"{first[:-5]}1.tar: left out 5 keys with an image and no .cls, or the reverse",
    ]


def test_without_held_out_tar_files_a_tenth_is_held_out(tmp_path: Path) -> None:
    root = webdataset(tmp_path / "wds", train_0=some(0, 60))
    found = open_source(root)
    names = [{entry.name for entry in found.entries[split]} for split in ("train", "val")]
    assert len(names[0]) + len(names[1]) == len(names[0] | names[1]) == 60
    assert 3 <= len(names[1]) <= 15
    assert open_source(root) == found
    assert found.listing != open_source(webdataset(tmp_path / "wds", train_0=some(1, 61))).listing


@pytest.mark.parametrize(
    ("shards", "told"),
    [
        ({"val_0": some(0, 3)}, r"no train-\*\.tar beside val-0\.tar"),
        ({"train_0": [("a.txt", b"")]}, "no image with a .cls in its 1 train"),
        ({"train_0": [("a.cls", b"cat"), ("a.jpg", b"")]}, "a.cls holds 'cat', expected the number of a class"),
        ({"train_0": [("a.cls", b"-1"), ("a.jpg", b"")]}, "a.cls holds '-1', expected the number"),
        ({"train_0": [*some(0, 2), ("0001.png", jpeg(0))]}, "0001 has two .png or images"),
        ({"train_0": [*some(0, 9), ("z.cls", b"4"), ("z.jpg", jpeg(0))]}, "no images of class 3 to train on"),
        ({"train_0": [("z.cls", b"999999999"), ("z.jpg", jpeg(0))]}, "class 999999999 is more than its 1 images"),
    ],
)
def test_what_a_webdataset_lacks_is_told(tmp_path: Path, shards: dict[str, list[tuple[str, bytes]]], told: str) -> None:
    with pytest.raises(CommandError, match=told):
        open_source(webdataset(tmp_path / "wds", **shards))


def test_an_image_in_a_tar_file_may_be_broken_or_gone(tmp_path: Path) -> None:
    members = [*some(0, 8), ("x.cls", b"0"), ("x.jpg", jpeg(0)[:100]), ("y.cls", b"0"), ("y.jpg", b"")]
    entries = open_source(webdataset(tmp_path / "wds", train_0=members, val_0=some(0, 3))).entries["train"]
    for name in ("x", "y"):
        (broken,) = (entry for entry in entries if entry.name == f"train-0.tar/{name}.jpg")
        with pytest.raises(BadImage, match=rf"train-0\.tar/{name}\.jpg: "):
            broken.read()
    (tmp_path / "wds" / "train-0.tar").unlink()
    with pytest.raises(BadImage, match="No such file"):
        entries[0].read()


def test_a_folder_of_classes_is_listed_as_for_training(tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=number).save(path)
    found, split = open_source(tmp_path / "images"), ImageFolder.split(tmp_path / "images", 28, 0)
    assert [(e.file, e.target) for e in found.entries["train"]] == split.train.samples
    assert [(e.file, e.target) for e in found.entries["val"]] == split.held_out.samples
    assert (found.classes, found.listing) == (("a", "b"), split.listing)
    assert found.entries["train"][0].name == "a/0.png"
    (tmp_path / "images" / "train.tar").write_bytes(b"what the images came from")
    assert open_source(tmp_path / "images").entries == found.entries
    with pytest.raises(CommandError, match="no such folder"):
        open_source(tmp_path / "none")


def test_folders_come_before_the_tar_files_beside_them(tmp_path: Path, ilsvrc: Path) -> None:
    for number in range(8):
        path = ilsvrc / ("train" if number < 6 else "val") / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    found = open_source(ilsvrc)
    assert found.classes == ("a", "b")
    assert [entry.name for entry in found.entries["val"]] == ["val/a/6.jpg", "val/b/7.jpg"]


@pytest.mark.parametrize("where", ["in a header", "between two", "a negative size"])
def test_a_tar_file_that_is_damaged_anywhere_is_refused(where: str, tmp_path: Path) -> None:
    """tarfile ends its walk at a damaged header as at the end, and never behind a negative size."""
    path = tmp_path / "some.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(4):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = 512
            archive.addfile(member, io.BytesIO(bytes([number]) * 512))
    assert len(list(archives._members(path))) == 4
    content = bytearray(path.read_bytes())
    if where == "in a header":
        content[2 * 1024 + 3] ^= 1
    elif where == "between two":
        del content[2 * 1024 :]
    else:
        member = tarfile.TarInfo("2.jpg")
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[124:136] = b"\xff" * 10 + b"\xfe\x00"
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        content[2 * 1024 : 2 * 1024 + 512] = header
    path.write_bytes(content)
    with pytest.raises(CommandError, match="no whole tar file without compression"):
        list(archives._members(path))


def test_an_image_of_a_tar_file_is_not_read_beyond_reason(tmp_path: Path) -> None:
    path = tmp_path / "some.tar"
    path.write_bytes(b"")
    with pytest.raises(BadImage, match="268,435,457 bytes are more than an image has"):
        archives.Entry("x.jpg", 0, str(path), 512, archives.MOST_BYTES + 1).read()
