"""The images to prepare: a folder of classes, ILSVRC's tar files or WebDataset's, as places of files and in files."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from .._errors import BadImage, CommandError, os_error, path_text
from .._optional import require
from .folder import ImageFolder
from .images import EXTENSIONS, NOT_ITS_FAULT, decode, read_image
from .listing import HELD_OUT, HELD_OUT_NAMES, TRAINING_NAMES, digest, find_parts, hold_out, relative
from .packed import SPLITS

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES = 1 << 28  # of an image in a tar file: it is read as a whole
ILSVRC_TRAIN, ILSVRC_VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
ILSVRC_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SYNSET_LIST, SYNSETS_OF_DEVKIT = "map_clsloc.txt", "meta.mat"
WEBDATASET_IMAGES = (".jpg", ".jpeg", ".png")


class Entry(NamedTuple):
    """An image: its name in reports, its class, and its file, or the ``size`` bytes at ``offset`` of a tar file."""

    name: str
    target: int
    file: str
    offset: int = 0
    size: int | None = None

    def read(self) -> Image:
        """The image in RGB, as ``read_image`` reads files, with its errors."""
        if self.size is None:
            return read_image(self.file)
        if self.size > MOST_BYTES:
            raise BadImage(self.name, f"{self.size:,} bytes are more than an image has")
        try:
            with open(self.file, "rb") as stream:
                stream.seek(self.offset)
                content = stream.read(self.size)
        except OSError as error:
            if error.errno in NOT_ITS_FAULT:
                raise
            raise BadImage(self.name, error.strerror or str(error)) from error
        return decode(io.BytesIO(content), self.name)


class Source(NamedTuple):
    """The images of each of ``SPLITS``, their classes, notes on what was left out, and a checksum of all names."""

    classes: tuple[str, ...]
    entries: dict[str, list[Entry]]
    notes: tuple[str, ...]
    listing: str


def open_source(root: Path) -> Source:
    """The images of the folder ``root``: folders ``train`` and ``val``, ILSVRC's tar files, WebDataset's, or classes.

    Raises CommandError where a file that is needed is missing, cannot be read, or contradicts another.
    """
    try:
        parts = find_parts(root) if root.is_dir() else None
        if parts is not None and parts.train is not None and parts.held_out is not None:
            return _folder(root)  # even with the tar files beside them that they came from
        if (root / ILSVRC_TRAIN).exists():
            return _ilsvrc(root)
        tars = _shards_of(root)
        return _webdataset(root, tars) if tars else _folder(root)
    except OSError as error:
        raise os_error(error.filename or root, error) from error


def _folder(root: Path) -> Source:
    """The same images and the same split as ``alexnet train`` takes."""
    found = ImageFolder.split(root, 1, 0)
    entries = {
        split: [Entry(relative(root, path), target, path) for path, target in part.samples]
        for split, part in zip(SPLITS, (found.train, found.held_out), strict=True)
    }
    return Source(found.train.classes, entries, found.notes, found.listing)


def _source(root: Path, classes: tuple[str, ...], train: list[Entry], val: list[Entry], notes: list[str]) -> Source:
    """Of the entries of tar files. Without held-out images, a tenth of each class is held out, chosen by names."""
    require("PIL.Image")  # a missing package is reported here, not by a process
    empty = sorted(set(range(len(classes))) - {entry.target for entry in train})
    if empty:
        raise CommandError(f"{path_text(root)}: no images of class {path_text(classes[empty[0]])} to train on", 2)
    if not val:
        samples, _ = hold_out(root, [(os.path.join(root, e.name), e.target) for e in train], HELD_OUT)
        kept = {path for path, _ in samples}
        val = [entry for entry in train if os.path.join(root, entry.name) not in kept]
        train = [entry for entry in train if os.path.join(root, entry.name) in kept]
    names = [(root, [(os.path.join(root, e.name), e.target) for e in part]) for part in (train, val)]
    return Source(classes, dict(zip(SPLITS, (train, val), strict=True)), tuple(notes), digest(names, classes))


def _members(path: Path, stream: IO[bytes] | None = None) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The regular files of an uncompressed tar file, or of one inside of it, which is the ``stream``."""
    try:
        with tarfile.open(path, "r:", fileobj=stream) as archive:
            members: list[Any] = archive.members  # type: ignore[attr-defined]
            while (member := archive.next()) is not None:
                members.clear()  # else a million of them stay in memory
                if member.size < 0:  # the next header would be this one again
                    raise tarfile.ReadError("a member of negative size")
                if member.isreg() and not member.issparse():
                    yield archive, member
            # A damaged header ends the walk as the end does, which is a block of zeros.
            file: Any = archive.fileobj
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged or cut at byte {archive.offset:,}")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise CommandError(f"{path_text(path)}: no whole tar file without compression ({error})") from error


def _ilsvrc(root: Path) -> Source:
    """The training images are a tar file of tar files, one a synset; the sorted synsets are the classes. The held-out
    images have the development kit's numbers, in an order of its own."""
    by_synset: dict[str, list[tuple[str, int, int]]] = {}
    for outer, member in _members(root / ILSVRC_TRAIN):
        synset, ending = os.path.splitext(os.path.basename(member.name))
        if ending != ".tar":
            continue
        stream = outer.extractfile(member)
        assert stream is not None  # a regular file
        by_synset[synset] = sorted(
            (os.path.basename(image.name), member.offset_data + image.offset_data, image.size)
            for _, image in _members(root / ILSVRC_TRAIN / os.path.basename(member.name), stream)
            if os.path.splitext(image.name)[1].lower() in EXTENSIONS
        )
    classes = tuple(sorted(by_synset))
    file = os.fspath(root / ILSVRC_TRAIN)
    train = [
        Entry(f"train/{synset}/{name}", target, file, offset, size)
        for target, synset in enumerate(classes)
        for name, offset, size in by_synset[synset]
    ]
    return _source(root, classes, train, _ilsvrc_val(root, classes), [])


def _ilsvrc_val(root: Path, classes: tuple[str, ...]) -> list[Entry]:
    for name in (ILSVRC_VAL, ILSVRC_TRUTH):
        if not (root / name).exists():
            raise CommandError(f"{path_text(root / name)}: no such file; {ILSVRC_TRAIN} needs it beside it", 2)
    targets = {synset: target for target, synset in enumerate(classes)}
    known = {number: targets.get(synset) for number, synset in _synsets(root).items()}
    numbers = (root / ILSVRC_TRUTH).read_text(encoding="utf-8").split()
    found = []
    for _, member in _members(root / ILSVRC_VAL):
        name = os.path.basename(member.name)
        place = re.search(r"_(\d+)\.\w+$", name)  # ILSVRC2012_val_00000001.JPEG has the first number
        if place is None:
            continue
        line = int(place[1])
        target = known.get(numbers[line - 1]) if 1 <= line <= len(numbers) else None
        if target is None:
            told = f"the number of {path_text(name)} in {ILSVRC_TRUTH} is that of no class in {ILSVRC_TRAIN}"
            raise CommandError(f"{path_text(root)}: {told}", 2)
        found.append(Entry(f"val/{name}", target, os.fspath(root / ILSVRC_VAL), member.offset_data, member.size))
    if not found:
        raise CommandError(f"{path_text(root / ILSVRC_VAL)}: no images named as ILSVRC2012_val_00000001.JPEG is", 2)
    return sorted(found)


def _synsets(root: Path) -> dict[str, str]:
    """The synset of each number of the development kit. They are not sorted: 1 is n02119789, a kit fox."""
    listed, devkit = root / SYNSET_LIST, root / SYNSETS_OF_DEVKIT
    if listed.exists():
        lines = [line.split() for line in listed.read_text(encoding="utf-8").splitlines()]
        if not all(len(words) >= 2 and words[1].isdigit() for words in lines):
            raise CommandError(f"{path_text(listed)}: expected lines as `n02119789 1 kit_fox`", 2)
        return {words[1]: words[0] for words in lines}
    if devkit.exists():
        try:
            rows = require("scipy.io").loadmat(os.fspath(devkit), squeeze_me=True)["synsets"]
            return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows if int(row["num_children"]) == 0}
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CommandError(f"{path_text(devkit)}: not the synsets of the development kit ({error})", 2) from error
    raise CommandError(
        f"{path_text(root)}: the numbers of {ILSVRC_TRUTH} need {SYNSETS_OF_DEVKIT} of ILSVRC's development kit beside "
        f"it, or {SYNSET_LIST} with lines as `n02119789 1 kit_fox`",
        2,
    )


def _shards_of(root: Path) -> dict[str, list[Path]]:
    """WebDataset's tar files by split: named train-000000.tar, or imagenet1k-train-0000.tar, and so on."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.glob("*.tar")):
        words = re.split(r"[-_.]", path.name.casefold())[:-2]  # not train.tar, which has no number
        for split, names in zip(SPLITS, (TRAINING_NAMES, HELD_OUT_NAMES), strict=True):
            if not set(words).isdisjoint(names):
                found.setdefault(split, []).append(path)
                break
    return found


def _webdataset(root: Path, tars: dict[str, list[Path]]) -> Source:
    """Classes are the numbers of the .cls files, from 0."""
    if SPLITS[0] not in tars:
        raise CommandError(f"{path_text(root)}: no train-*.tar beside {path_text(tars[SPLITS[1]][0].name)}", 2)
    notes: list[str] = []
    train, val = ([entry for path in tars.get(split, ()) for entry in _samples(path, notes)] for split in SPLITS)
    if not train:
        raise CommandError(f"{path_text(root)}: no image with a .cls in its {len(tars[SPLITS[0]])} train-*.tar", 2)
    count = 1 + max(entry.target for entry in (*train, *val))
    if count > len(train):
        raise CommandError(f"{path_text(root)}: class {count - 1} is more than its {len(train)} images to train on", 2)
    width = len(str(count - 1))
    return _source(root, tuple(f"{number:0{width}}" for number in range(count)), train, val, notes)


def _samples(path: Path, notes: list[str]) -> list[Entry]:
    """The images of a WebDataset's tar file that have a class: files of the same name up to its first dot."""
    images: dict[str, tuple[str, int, int]] = {}
    targets: dict[str, int] = {}
    for archive, member in _members(path):
        folder, base = os.path.split(member.name)
        stem, dot, ending = base.partition(".")
        key, ending = os.path.join(folder, stem), (dot + ending).lower()
        if (ending in WEBDATASET_IMAGES and key in images) or (ending == ".cls" and key in targets):
            raise CommandError(f"{path_text(path)}: {path_text(key)} has two {ending} or images", 2)
        if ending in WEBDATASET_IMAGES:
            images[key] = (f"{path.name}/{member.name}", member.offset_data, member.size)
        elif ending == ".cls":
            stream = archive.extractfile(member)
            text = stream.read(32).decode("ascii", "replace").strip() if stream is not None else ""
            if not re.fullmatch(r"\d{1,9}", text):
                told = f"{path_text(member.name)} holds {path_text(text)!r}, expected the number of a class"
                raise CommandError(f"{path_text(path)}: {told}", 2)
            targets[key] = int(text)
    alone = len(images.keys() ^ targets.keys())
    if alone:
        notes.append(f"{path_text(path)}: left out {alone:,} keys with an image and no .cls, or the reverse")
    return [
        Entry(name, targets[key], os.fspath(path), offset, size)
        for key, (name, offset, size) in images.items()
        if key in targets
    ]
