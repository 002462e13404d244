"""The format of packed images: memory-mapped shards of squares, and an index in JSON.

A folder holds, for each of ``SPLITS``, shards of two files: ``train-00000.npy``, uint8 (n, side, side, 3) of RGB, and
``train-00000.labels.npy``, int64 (n,). ``index.json`` describes them (``Index``); it is written last. In the store
``yuv420`` images are (n, 3 * side / 2, side) instead, I420 as ``ops.augment`` takes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import CommandError, first_line, os_error, path_text
from ..training.files import new_file, write_file

VERSION = 1
INDEX = "index.json"
SPLITS = ("train", "val")
STORES = ("rgb", "yuv420")


@dataclass(frozen=True)
class Shard:
    """The two files of a shard: names, sizes in bytes, checksums."""

    images: int
    file: str
    bytes: int
    sha256: str
    labels: str
    labels_bytes: int
    labels_sha256: str

    def fits(self, folder: Path) -> bool:
        """Whether both files are there in full length."""
        try:
            sizes = [(folder / name).stat().st_size for name in (self.file, self.labels)]
        except FileNotFoundError:
            return False
        return sizes == [self.bytes, self.labels_bytes]

    def damage(self, folder: Path) -> str | None:
        """The first file whose bytes are not those that were written, and why; None if both are whole."""
        for name, expected in ((self.file, self.sha256), (self.labels, self.labels_sha256)):
            try:
                if checksum(folder / name) != expected:
                    return f"{path_text(folder / name)}: not the bytes that were written (SHA-256 differs)"
            except OSError as error:
                return str(os_error(folder / name, error))
        return None


@dataclass(frozen=True)
class Index:
    """What ``index.json`` says.

    side: of the squares, in pixels. shard_size: images of the listing to a shard; those that cannot be read are left
    out of theirs. listing: a checksum of the names of classes and images. images, skipped, shards: by split.
    mean: of the training images' RGB in 0 to 1. eigenvalues (descending) and eigenvectors (in rows): of the covariance
    of their RGB (``colours.components``). store: of ``STORES``; "rgb" where the file does not say.
    """

    version: int
    side: int
    shard_size: int
    listing: str
    classes: tuple[str, ...]
    images: dict[str, int]
    skipped: dict[str, int]
    mean: list[float]
    eigenvalues: list[float]
    eigenvectors: list[list[float]]
    shards: dict[str, list[Shard]]
    store: str = STORES[0]

    def write(self, folder: Path) -> None:
        """Write the file, whole or not at all."""
        write_file(folder / INDEX, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a folder that ``alexnet prepare`` has finished. CommandError for any other."""
        path = folder / INDEX
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise CommandError(f"{path_text(path)}: no such file; `alexnet prepare` writes it when it ends") from error
        except OSError as error:
            raise os_error(path, error) from error
        except (ValueError, RecursionError) as error:
            raise CommandError(f"{path_text(path)}: no JSON ({first_line(error)})") from error
        version = values.get("version") if isinstance(values, dict) else None
        if version != VERSION:
            raise CommandError(f"{path_text(path)}: expected version {VERSION} of packed images, got {version!r}")
        try:
            shards = {split: [Shard(**shard) for shard in values["shards"][split]] for split in SPLITS}
            index = cls(**{**values, "shards": shards})
        except (KeyError, TypeError) as error:
            raise CommandError(f"{path_text(path)}: not the fields of an index of packed images ({error})") from error
        if index.store not in STORES:
            raise CommandError(f"{path_text(path)}: expected a store of {', '.join(STORES)}, got {index.store!r}")
        damaged = _damaged(index)
        if damaged is not None:
            raise CommandError(f"{path_text(path)}: {damaged} is not what `alexnet prepare` writes")
        return dataclasses.replace(index, classes=tuple(index.classes))


def _damaged(index: Index) -> str | None:
    """The name of a field that cannot be right: JSON may hold anything. None if there is none."""
    shards = [shard for split in SPLITS for shard in index.shards[split]]
    sound = {
        "side": _are_counts(index.side) and index.side > 0,
        "shard_size": _are_counts(index.shard_size),
        "listing": _are_names(index.listing),
        "classes": isinstance(index.classes, list) and _are_names(*index.classes) and _differ(index.classes),
        **{name: _by_split(getattr(index, name)) for name in ("images", "skipped")},
        **{name: _are_colours(getattr(index, name)) for name in ("mean", "eigenvalues")},
        "eigenvectors": _is_triple(index.eigenvectors) and all(map(_are_colours, index.eigenvectors)),
        "shards": all(map(_is_shard, shards)),
    }
    return next((name for name, right in sound.items() if not right), None)


def _are_counts(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _are_names(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _differ(values: list[str]) -> bool:
    return len(set(values)) == len(values)


def _by_split(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == set(SPLITS) and _are_counts(*value.values())


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3


def _are_colours(value: Any) -> bool:
    """Three numbers of colours in 0 to 1 or of a vector of length 1; NaN is less than nothing."""
    return _is_triple(value) and all(type(number) in (int, float) and abs(number) < 2 for number in value)


def _is_shard(shard: Shard) -> bool:
    """Files lie in the folder itself."""
    named = _are_names(shard.file, shard.labels, shard.sha256, shard.labels_sha256)
    plain = named and all(re.fullmatch(r"[\w.-]+\.npy", name) for name in (shard.file, shard.labels))
    return plain and _are_counts(shard.images, shard.bytes, shard.labels_bytes)


def checksum(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def image_shape(side: int, store: str) -> tuple[int, ...]:
    """Of an image's bytes in one of ``STORES``."""
    return (side, side, 3) if store == "rgb" else (side // 2 * 3, side)


def write_shard(folder: Path, name: str, side: int, rows: Iterable[tuple[Any, int]], store: str = STORES[0]) -> Shard:
    """Write the shard ``name`` of (uint8 of ``image_shape``, class) ``rows``, whose number need not be known before.

    Each file is written next to its place, flushed to the disk and renamed."""
    targets: list[int] = []
    image_file, label_file = folder / f"{name}.npy", folder / f"{name}.labels.npy"
    with new_file(image_file) as beside:
        with beside.open("wb") as stream:
            stream.write(_header(0, *image_shape(side, store)))
            for pixels, target in rows:
                stream.write(np.ascontiguousarray(pixels, dtype=np.uint8).data)
                targets.append(target)
            stream.seek(0)
            # As long as the first: NumPy leaves room for 20 digits.
            stream.write(_header(len(targets), *image_shape(side, store)))
        size, digest = beside.stat().st_size, checksum(beside)
    with new_file(label_file) as beside:
        np.save(beside, np.array(targets, dtype=np.int64))
        label_size, label_digest = beside.stat().st_size, checksum(beside)
    return Shard(len(targets), image_file.name, size, digest, label_file.name, label_size, label_digest)


def _header(*shape: int) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def verify(folder: Path, tell: Callable[[int], None] = lambda images: None) -> Iterator[str]:
    """A line for each damaged shard of ``folder``; every byte is read. ``tell`` gets the images read so far."""
    index, done = Index.read(folder), 0
    for split in SPLITS:
        for shard in index.shards[split]:
            damage = shard.damage(folder)
            if damage is not None:
                yield damage
            done += shard.images
            tell(done)
