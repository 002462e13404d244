"""Finds the data in a folder: its parts, its classes, their images. Everything left out is counted and named."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from .._errors import CommandError, path_text
from .images import EXTENSIONS

TRAINING_NAMES = ("train", "training")
HELD_OUT_NAMES = ("val", "validation", "valid", "test", "testing")
# Folders made by archives, cameras and file systems; names that begin with a dot are left out too.
FOREIGN = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
HELD_OUT = 0.1  # of the images, by default
# Any salt holds out a tenth of a large class. This one was chosen to do so for small classes of numbered files.
SPLIT_SALT = b"32212"

Sample = tuple[str, int]
"""The path of an image and the number of its class."""


class Listing(NamedTuple):
    """The images of a folder in the order of their names, the names of the classes, and notes on files left out."""

    samples: list[Sample]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Parts(NamedTuple):
    """The folders of the images to train on and of those held out; None if a folder has no such part."""

    train: Path | None
    held_out: Path | None
    notes: tuple[str, ...]


def find_parts(root: Path, without: Path | None = None) -> Parts:
    """``train`` and ``val`` of ``root``, or folders of similar names, in capitals or not. ``without`` is not looked at.

    A ``train`` with neither a ``val`` nor other folders next to it is the training part, too."""
    left_out = None if without is None else _identity(without)
    found = [entry.name for entry in _visible(root) if entry.is_dir() and _identity(entry.path) != left_out]
    folders = {name: name.casefold() for name in found}
    train, held_out = (
        [name for known in names for name in sorted(folders) if folders[name] == known]
        for names in (TRAINING_NAMES, HELD_OUT_NAMES)
    )
    others = sorted(folders.keys() - {*train[:1], *held_out[:1]})
    notes = (f"{path_text(root)}: left out {_names(others)}, beside {_names([*train[:1], *held_out[:1]])}",)
    return Parts(
        root / train[0] if train and (held_out or not others) else None,
        root / held_out[0] if held_out else None,
        notes if others and train and held_out else (),
    )


def list_images(
    root: Path,
    classes: tuple[str, ...] | None = None,
    *,
    without: Path | None = None,
    seen: dict[tuple[int, int], str] | None = None,
) -> Listing:
    """Every image below ``root``, whose folders are the classes; those below the folder ``without`` left out.

    With ``classes`` given the folders must be among them, and may be empty. ``seen`` are the folders of an earlier
    listing; none may occur again. Raises CommandError for a folder that is missing, cannot be listed, has no classes or
    a class without images. So does a link to another folder of the data, or upwards.
    """
    shown = path_text(root)
    if not root.exists():
        raise CommandError(f"{shown}: no such folder", 2)
    if not root.is_dir():
        raise CommandError(f"{shown}: not a folder", 2)
    try:
        walk = _Walk(root, without, {} if seen is None else seen)
        found = walk.classes()
    except OSError as error:
        raise CommandError(f"{path_text(error.filename or root)}: {error.strerror or error}", 2) from error
    if not found:
        raise CommandError(f"{shown}: no folders in it; expected one a class, with the images inside", 2)
    if classes is None:
        if len(found) == 1:
            raise CommandError(f"{shown}: {path_text(next(iter(found)))} is its only folder; expected one a class", 2)
        classes = tuple(found)
        for name, images in found.items():
            if not images:
                raise CommandError(f"{path_text(root / name)}: no images in it{walk.instead(name)}; {EXPECTED}", 2)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise CommandError(f"{path_text(root / unknown[0])}: not one of the {len(classes)} classes trained on", 2)
    samples = [(path, classes.index(name)) for name, images in found.items() for path in images]
    if not samples:
        raise CommandError(f"{shown}: no images in its {len(found)} folders{walk.instead()}; {EXPECTED}", 2)
    empty = [name for name, images in found.items() if not images]
    hollow = [f"{shown}: no images in {_names(empty)}"] if empty else []
    return Listing(samples, classes, (*walk.notes(), *hollow, *_alike(root, found)))


def find_images(folder: Path) -> list[str]:
    """Every image below a folder, in the order of their names; it leaves out the same files as ``list_images``."""
    try:
        return _Walk(folder, None, {}).images(os.fspath(folder))
    except OSError as error:
        raise CommandError(f"{path_text(error.filename or folder)}: {error.strerror or error}", 2) from error


EXPECTED = f"expected {', '.join(EXTENSIONS)}"


class _Walk:
    """Looks through a folder once; each folder in it counts once, whichever way leads to it."""

    def __init__(self, root: Path, without: Path | None, seen: dict[tuple[int, int], str]) -> None:
        self.root, self.seen = os.fspath(root), seen
        self.without = None if without is None else _identity(without)
        for parent in (root.resolve(), *root.resolve().parents):
            self.seen.setdefault(_identity(parent), os.fspath(parent))
        self.left_out: dict[str, Counter[str]] = {}  # endings by class; "" for files next to the classes
        self.runs: list[str] = []

    def classes(self) -> dict[str, list[str]]:
        """The images below each folder."""
        found: dict[str, list[str]] = {}
        beside = self.left_out[""] = Counter()
        for entry in _visible(self.root):
            if not entry.is_dir():
                if not os.path.exists(entry.path):
                    raise CommandError(f"{path_text(entry.path)}: a link that leads nowhere", 2)
                beside[_ending(entry.name)] += 1
            elif _identity(entry.path) != self.without:
                runs = len(self.runs)
                images = self.images(entry.path)
                if images or len(self.runs) == runs:
                    found[entry.name] = images
        return found

    def images(self, top: str) -> list[str]:
        """The images below one folder."""
        found, folders = [], [top]
        left_out = self.left_out[os.path.basename(top)] = Counter()
        while folders:
            folder = folders.pop()
            if _identity(folder) == self.without:
                continue
            first = self.seen.setdefault(_identity(folder), folder)
            if first != folder and folder != self.root:  # its images would count twice or endlessly
                raise CommandError(f"{path_text(folder)}: is {path_text(first)} once more, by a link", 2)
            entries = _visible(folder)
            if _is_run({entry.name for entry in entries}):
                self.runs.append(folder)
                continue
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                elif _ending(entry.name) in EXTENSIONS:
                    found.append(entry.path)
                else:
                    left_out[_ending(entry.name)] += 1
        return sorted(found, key=os.path.split)

    def instead(self, name: str | None = None) -> str:
        """The other files in a class, or in all classes, for the message that it has no images."""
        counts = sum((count for key, count in self.left_out.items() if name is None or key == name), Counter[str]())
        return f", but {_counted(counts)}" if counts else ""

    def notes(self) -> list[str]:
        """A sentence for each kind of file that was left out."""
        shown = path_text(self.root)
        beside = self.left_out[""]
        inside = sum((count for name, count in self.left_out.items() if name), Counter[str]())
        notes = [f"{shown}: left out {_counted(inside)} in its folders"] if inside else []
        if beside:
            notes.append(f"{shown}: left out {_counted(beside)} beside its folders")
        if self.runs:
            notes.append(f"{shown}: left out the run folders {_names([relative(self.root, run) for run in self.runs])}")
        return notes


def _visible(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in FOREIGN]
    return sorted(kept, key=lambda entry: entry.name)


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_run(names: set[str]) -> bool:
    """Whether a folder of these names was written by ``alexnet train``."""
    return "recipe.json" in names and not names.isdisjoint(("metrics.jsonl", "checkpoints"))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _counted(counts: Counter[str]) -> str:
    """``12 .heic, 3 .txt`` and so on, the most frequent first."""
    shown = [f"{number:,} {path_text(ending) or 'without an ending'}" for ending, number in counts.most_common(6)]
    rest = counts.total() - sum(number for _, number in counts.most_common(6))
    return ", ".join(shown) + (f" and {rest:,} others" if rest else "")


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(map(path_text, names[:6]))
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _alike(root: Path, found: dict[str, list[str]]) -> list[str]:
    """A note if all classes hold the same folders and nothing else: they may be parts of the data."""
    inner = [
        {relative(root / name, path).rpartition(os.sep)[0].partition(os.sep)[0] for path in images}
        for name, images in found.items()
        if images
    ]
    if len(inner) < 2 or len(inner[0]) < 2 or "" in inner[0] or any(names != inner[0] for names in inner):
        return []
    first, second = list(found)[:2]
    return [
        f"{path_text(root)}: each of its folders {_names(list(found))}, taken for the classes, holds "
        f"{_names(sorted(inner[0]))}; if they are parts of the data, say so: "
        f"alexnet train {path_text(root / first)} --val {path_text(root / second)}"
    ]


def relative(root: str | os.PathLike[str], path: str) -> str:
    """A path that begins with ``root``, without it."""
    return path[len(os.path.join(root, "")) :]


def hold_out(root: Path, samples: list[Sample], fraction: float) -> tuple[list[Sample], list[Sample]]:
    """The images to train on, and about ``fraction`` of each class, at least one of two, that are held out.

    A hash of an image's path below ``root``, without its ending, decides: no image changes its part when others come
    or go (unless a class has too few for a part of its own). Raises CommandError where no class has two images.
    """
    classes: dict[int, list[tuple[float, str]]] = {}
    for path, target in samples:
        classes.setdefault(target, []).append((_place(relative(root, path)), path))
    held_out: set[str] = set()
    for places in classes.values():
        places.sort()
        if len(places) > 1:
            chosen = {path for place, path in places if place < fraction} | {places[0][1]}
            held_out |= chosen - {places[-1][1]}
    if not held_out:
        raise CommandError(f"{path_text(root)}: one image a class is not enough to train and to evaluate", 2)
    return [s for s in samples if s[0] not in held_out], [s for s in samples if s[0] in held_out]


def _place(name: str) -> float:
    """The hash of a name, as a number in 0 to 1."""
    stem = os.path.splitext(name)[0]  # a picture saved as .jpg and as .png is on one side
    return int.from_bytes(hashlib.sha256(SPLIT_SALT + os.fsencode(stem)).digest()[:8]) / 2**64


def digest(parts: Iterable[tuple[Path, list[Sample]]], classes: Sequence[str]) -> str:
    """A checksum of the names of classes and images, and of the part of each image."""
    found = hashlib.sha256()
    for root, samples in parts:
        for path, target in samples:
            found.update(os.fsencode(f"{classes[target]}\0{relative(root, path)}\0"))
        found.update(b"\0")
    return found.hexdigest()
