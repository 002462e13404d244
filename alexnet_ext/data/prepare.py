"""Images prepared once for training: squares of one size in shards, by processes, to be stopped and gone on at will.

A shard is a pure function of the listing, the side, the shard size and the store. Whatever is unfinished lies in
``progress``: the plan, and a record of each finished shard. The index is written last; then ``progress`` is removed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._errors import BadImage, CommandError, os_error, path_text
from ..training.files import locked, unfinished, write_file
from .archives import Entry, Source
from .batches import MAX_SKIPPED
from .colours import Sums, components
from .images import square, yuv420
from .packed import INDEX, SPLITS, STORES, VERSION, Index, Shard, image_shape, write_shard
from .readers import Processes

PROGRESS, PLAN, SKIPPED = "progress", "plan.json", "skipped.txt"


class Part(NamedTuple):
    """A shard to be: its name, split and entries."""

    name: str
    split: str
    entries: list[Entry]


@dataclass(frozen=True)
class Record:
    """A finished shard, its images that cannot be read (name and reason), and the sums of its colours."""

    shard: Shard
    skipped: list[tuple[str, str]]
    sums: Sums

    @classmethod
    def read(cls, path: Path, folder: Path) -> Record | None:
        """The record of a file if its shard in ``folder`` is there in full length."""
        try:
            values = json.loads(path.read_bytes())
            skipped = [(name, reason) for name, reason in values["skipped"]]
            record = cls(Shard(**values["shard"]), skipped, Sums(**values["sums"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return record if record.shard.fits(folder) else None

    def write(self, path: Path) -> None:
        write_file(path, json.dumps(dataclasses.asdict(self)).encode())


class Preparation:
    """Packs a ``source`` into the folder ``out``: squares of ``side`` pixels, ``shard_size`` of the listing a shard.

    ``store`` is one of ``STORES``; "yuv420" needs an even side.

    ``tell`` is called often with the number of images done. Raises CommandError if ``out`` holds anything else, if the
    disk is too small, or if more than ``MAX_SKIPPED`` of a split's images cannot be read.
    """

    def __init__(
        self,
        source: Source,
        out: Path,
        side: int,
        shard_size: int,
        tell: Callable[[int], None] = lambda done: None,
        store: str = STORES[0],
    ) -> None:
        self.store = store
        self.source, self.out, self.side, self.shard_size, self.tell = source, out, side, shard_size, tell
        self.parts = [
            Part(f"{split}-{at // shard_size:05}", split, entries[at : at + shard_size])
            for split, entries in source.entries.items()
            for at in range(0, len(entries), shard_size)
        ]
        # Images that are done, by shard: shared with the processes that are forked.
        self.done = np.frombuffer(mmap.mmap(-1, 8 * len(self.parts)), dtype=np.int64)
        self.process = 0  # that of ``run``

    @property
    def plan(self) -> dict[str, Any]:
        """All that the shards depend on."""
        own = {name: getattr(self, name) for name in ("side", "shard_size", "store")}
        return {"version": VERSION, "listing": self.source.listing, **own}

    def run(self, workers: int) -> Index:
        """Write what is missing, by ``workers`` processes (0: by this one)."""
        self.process = os.getpid()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with locked(self.out):
                index = self._finished()
                try:
                    if index is None:
                        self._write_missing(workers)
                    else:
                        self._write_lost(index, workers)
                finally:
                    self._remove_unfinished()
                shutil.rmtree(self._progress, ignore_errors=True)
                return Index.read(self.out)
        except OSError as error:
            raise os_error(error.filename or self.out, error) from error

    @property
    def _progress(self) -> Path:
        return self.out / PROGRESS

    def _remove_unfinished(self) -> None:
        for path in (*unfinished(self.out), *unfinished(self._progress)):
            path.unlink(missing_ok=True)

    def _finished(self) -> Index | None:
        """The index, if it is there. CommandError if ``out`` holds anything but shards of the same plan."""
        plan = self._progress / PLAN
        if (self.out / INDEX).exists():
            index = Index.read(self.out)
            self._refuse_other({name: getattr(index, name) for name in self.plan})
            return index
        if plan.exists():
            try:
                self._refuse_other(json.loads(plan.read_bytes()))
            except ValueError as error:
                raise CommandError(f"{path_text(plan)}: no JSON ({error})") from error
            return None
        own = {PROGRESS, *(path.name for path in unfinished(self.out))}
        others = [path for path in self.out.iterdir() if path.name not in own]
        if self._progress.exists():
            others += set(self._progress.iterdir()) - set(unfinished(self._progress))
        if others:
            held = path_text(min(others).relative_to(self.out))
            raise CommandError(f"{path_text(self.out)}: holds {held} already; name a new or an empty folder", 2)
        return None

    def _refuse_other(self, found: Any) -> None:
        for name, wanted in self.plan.items():
            there = {"store": STORES[0], **found}.get(name) if isinstance(found, dict) else None
            if there != wanted:
                differs = "other images" if name == "listing" else f"{name.replace('_', ' ')} {there}, not {wanted}"
                shown = path_text(self.out)
                raise CommandError(f"{shown}: holds shards of {differs}; name another folder, or remove it", 2)

    def _check_space(self, parts: list[Part]) -> None:
        image = math.prod(image_shape(self.side, self.store))
        needed = sum(len(part.entries) * (image + 8) + 256 for part in parts)
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise CommandError(
                f"{path_text(self.out)}: {_gigabytes(needed)} needed, {_gigabytes(free)} free on its disk"
            )

    def _record(self, part: Part) -> Path:
        return self._progress / f"{part.name}.json"

    def _write_missing(self, workers: int) -> None:
        records = {number: Record.read(self._record(part), self.out) for number, part in enumerate(self.parts)}
        self._check_skipped(records)
        missing = [number for number, record in records.items() if record is None]
        with closing(self._written(missing, workers)) as written:
            for number, record in written:
                records[number] = record
                self._check_skipped(records)
        self._finish([record for record in records.values() if record is not None])

    def _write_lost(self, index: Index, workers: int) -> None:
        """Write anew the shards that were finished, and have been removed or cut short since."""
        shards = [shard for split in SPLITS for shard in index.shards[split]]
        lost = [number for number, shard in enumerate(shards) if not shard.fits(self.out)]
        with closing(self._written(lost, workers)) as written:
            for number, record in written:
                if record.shard != shards[number]:
                    name = path_text(self.out / record.shard.file)
                    raise CommandError(f"{name}: its images are no longer those of {INDEX}; name another folder")

    def _written(self, numbers: list[int], workers: int) -> Generator[tuple[int, Record], None, None]:
        """Write the shards of these ``numbers``; to be closed, which ends the processes."""
        wanted = set(numbers)
        for number, part in enumerate(self.parts):
            self.done[number] = 0 if number in wanted else len(part.entries)
        self._remove_unfinished()
        self._check_space([self.parts[number] for number in numbers])
        self._progress.mkdir(exist_ok=True)
        write_file(self._progress / PLAN, json.dumps(self.plan).encode())
        self._look()
        with Processes(self._pack, min(workers, len(numbers)), self._look) as processes:
            yield from zip(numbers, processes(numbers), strict=True)
        self._look()

    def _look(self) -> None:
        self.tell(int(self.done.sum()))

    def _pack(self, number: int) -> Record:
        """Write a shard, then its record; in one of the processes."""
        part, skipped, sums = self.parts[number], [], [Sums()]

        def rows() -> Iterator[tuple[np.ndarray, int]]:
            for at, entry in enumerate(part.entries):
                if os.getpid() == self.process:
                    self._look()
                elif os.getppid() != self.process:
                    raise SystemExit  # killed without a chance to say so
                try:
                    pixels = np.asarray(square(entry.read(), self.side))
                    if part.split == SPLITS[0]:
                        sums[0] += Sums.of(pixels)
                    yield yuv420(pixels) if self.store == "yuv420" else pixels, entry.target
                except BadImage as error:
                    skipped.append((entry.name, error.reason))
                self.done[number] = at + 1

        self.done[number] = 0
        record = Record(write_shard(self.out, part.name, self.side, rows(), self.store), skipped, sums[0])
        record.write(self._record(part))
        return record

    def _check_skipped(self, records: dict[int, Record | None]) -> None:
        for split, entries in self.source.entries.items():
            skipped = [
                line
                for number, record in records.items()
                if record is not None and self.parts[number].split == split
                for line in record.skipped
            ]
            if len(skipped) > max(1, MAX_SKIPPED * len(entries)):
                name, reason = skipped[-1]
                raise CommandError(
                    f"{path_text(name)}: {reason}; with it {len(skipped)} of {len(entries):,} images of {split} are "
                    f"unreadable, more than {MAX_SKIPPED:.0%}"
                )

    def _finish(self, records: list[Record]) -> None:
        by_split = {
            split: [record for part, record in zip(self.parts, records, strict=True) if part.split == split]
            for split in SPLITS
        }
        lines = [f"{path_text(name)}: {reason}\n" for record in records for name, reason in record.skipped]
        if lines:
            write_file(self.out / SKIPPED, "".join(lines).encode())
        mean, eigenvalues, eigenvectors = components(sum((record.sums for record in by_split[SPLITS[0]]), Sums()))
        Index(
            **self.plan,
            classes=self.source.classes,
            images={split: sum(record.shard.images for record in some) for split, some in by_split.items()},
            skipped={split: sum(len(record.skipped) for record in some) for split, some in by_split.items()},
            mean=mean,
            eigenvalues=eigenvalues,
            eigenvectors=eigenvectors,
            shards={split: [record.shard for record in some] for split, some in by_split.items()},
        ).write(self.out)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
