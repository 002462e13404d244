"""What is known of the kernels on a device: which are proven, which refused and why, which is fastest for a shape.

It is kept in memory and in one JSON file for each identity: the device, its driver, the versions and code of all that
takes part, and the settings in force. Where any of these differs, nothing is known. Any number of processes read and
write a file. A lock is taken where the file system has locks, and waited for some seconds; without one an entry may be
lost, and is then found anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import _library
from .._version import __version__

State = Literal["unknown", "proven", "refused"]
NOT_APPLICABLE = "it applies to no small case on this device"
"""Why a candidate is refused that is made for other GPUs, dtypes or layouts."""
MAX_RACES, MAX_FILES = 2000, 64
"""Races kept in a file, and files in the folder: the newest."""
LOCK_SECONDS = 10.0  # of waiting for a lock: its holder may be stuck, and calls of ops must not be
DAY = 86400.0
"""In seconds: the clocks of hosts that share a file may differ by less."""


class Unit(NamedTuple):
    """What is proven as one: a backend of an op, in one dtype and one class of layouts.

    ``backend`` is ``"native"``, ``"triton"``, ``"auto"``, or ``"auto NAME"`` for one of the candidates among which
    ``"auto"`` chooses. ``dtype`` is PyTorch's name without ``torch.``, ``layout`` one of ``layout_of``'s.
    """

    op: str
    backend: str
    dtype: str
    layout: str

    def __str__(self) -> str:
        return " | ".join(self)


@dataclass(frozen=True)
class Proof:
    """What came of a unit's proof; ``at`` is the time in seconds since 1970."""

    state: State
    reason: str = ""
    seconds: float = 0.0
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Race:
    """The choice for a call, and each candidate's time; ``among`` also has those that dropped out."""

    choice: str
    microseconds: Mapping[str, float]
    at: float = field(default_factory=time.time)
    among: Sequence[str] = field(default_factory=list)

    @classmethod
    def of(cls, choice: str, seconds: Mapping[str, float], dropped: Iterable[str] = ()) -> Race:
        return cls(choice, {name: round(s * 1e6, 2) for name, s in seconds.items()}, among=sorted({*seconds, *dropped}))

    def covers(self, names: Iterable[str]) -> bool:
        """Whether all of these took part."""
        return all(name in self.among for name in names)


def layout_of(x: Tensor) -> str:
    """``"contiguous"``, ``"channels_last"`` or, for all other strides, ``"strided"``."""
    if x.is_contiguous():
        return "contiguous"
    return "channels_last" if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else "strided"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def call_of(op: str, dtype: str, layout: str, shape: Sequence[int]) -> str:
    """The key of a race between an op's backends."""
    return f"{op} | {dtype} | {layout} | {list(shape)}"


class Known:
    """Proofs and races under one identity. With ``path`` None they last as long as the process.

    ``distrusted`` is a reason for which none of it is followed.
    """

    def __init__(self, identity: Mapping[str, Any], path: Path | None) -> None:
        self.identity, self.path = dict(identity), path
        self.distrusted = ""
        self.proofs: dict[str, Proof] = {}
        self.races: dict[str, Race] = {}
        self.decided: dict[tuple[Any, ...], str] = {}
        """What was looked up by call, until something new is known: calls ask each time."""
        self._take(self._read())

    def proof(self, unit: Unit) -> Proof:
        if self.distrusted:
            return Proof("refused", self.distrusted)
        return self.proofs.get(str(unit), Proof("unknown"))

    def winner(self, op: str, dtype: str, layout: str, shape: Sequence[int] | None) -> str:
        """The choice for a call with an x of this shape; else that of the largest one raced that
        differs in the batch alone; "" for none. Without a shape, that of the largest one."""
        exact = None if shape is None else self.races.get(call_of(op, dtype, layout, shape))
        if exact is not None:
            return exact.choice
        prefix = f"{op} | {dtype} | {layout} | "
        raced = ((call.removeprefix(prefix), race) for call, race in self.races.items() if call.startswith(prefix))
        given = None if shape is None else list(shape)[1:]
        sizes = [(list(map(int, re.findall(r"\d+", said))), race.choice) for said, race in raced]
        alike = [(math.prod(size), choice) for size, choice in sizes if given is None or size[1:] == given]
        return max(alike, default=(0, ""))[1]

    def add(self, proofs: Mapping[str, Proof] | None = None, races: Mapping[str, Race] | None = None) -> None:
        """Keep these, here and in the file."""
        self._take((proofs or {}, races or {}))
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path):
                self._take(self._read())
                self._write()
            _remove_oldest()
        except OSError as error:
            _warn(self.path, f"cannot be written, and what was found lasts as long as this process: {error}")

    def adopt(self, proofs: Mapping[str, Proof], races: Mapping[str, Race]) -> None:
        """Follow another process's table, in this process alone: it keeps it itself. What is refused here stays so."""
        own = {unit: proof for unit, proof in self.proofs.items() if proof.state == "refused"}
        self.proofs, self.races, self.decided = {**proofs, **own}, dict(races), {}

    def _take(self, found: tuple[Mapping[str, Proof], Mapping[str, Race]]) -> None:
        """Merge. A refusal outlasts a proof, as a kernel that is wrong now and then is wrong; a newer race an older."""
        proofs, races = dict(self.proofs), dict(self.races)  # other threads may be reading these
        for unit, proof in found[0].items():
            if proof.state == "refused" or proofs.get(unit, proof).state != "refused":
                proofs[unit] = proof
        for call, race in found[1].items():
            if race.at >= races.get(call, race).at:
                races[call] = race
        newest = sorted(races, key=lambda call: races[call].at)[-MAX_RACES:]
        self.proofs, self.races, self.decided = proofs, {call: races[call] for call in newest}, {}

    def _write(self) -> None:
        assert self.path is not None
        held = {"identity": self.identity, "proofs": self.proofs, "races": self.races}
        text = json.dumps(held, default=asdict, indent=1, sort_keys=True)
        # Of a name that no other host or container on a shared file system takes: process numbers repeat there.
        beside = self.path.with_name(f".{self.path.name}.tmp-{uuid.uuid4().hex}")
        try:
            beside.write_text(f"{text}\n", encoding="utf-8")
            os.replace(beside, self.path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    def _read(self) -> tuple[dict[str, Proof], dict[str, Race]]:
        if self.path is None:
            return {}, {}
        held = read(self.path) or {}
        if held and held["identity"] != self.identity:
            _warn(self.path, "is of another device, driver or version and is not used")
            held = {}
        return entries(held, "proofs", Proof), entries(held, "races", Race)


def read(path: Path) -> dict[str, Any] | None:
    """The file's content; None, and a warning, where it cannot be read or is nothing of ours. None without a file."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        _warn(path, f"cannot be read and is not used: {error}")
        return None
    if not isinstance(held, dict) or not isinstance(held.get("identity"), dict):
        _warn(path, "holds nothing of this package and is not used")
        return None
    return held


def entries(held: Mapping[str, Any], name: str, kind: Any) -> dict[str, Any]:
    """Those of a file that are what this version writes: other versions and programs may have written it."""
    found = held.get(name)
    result = {}
    for key, entry in found.items() if isinstance(found, dict) else ():
        with contextlib.suppress(TypeError, OverflowError):  # an integer may be of any length
            made = kind(**entry)
            if _is_sound(made):
                result[key] = made
    return result


def _is_sound(entry: Proof | Race) -> bool:
    """TypeError or OverflowError for what is no number. What comes from the future would outlast all that is found."""
    if isinstance(entry, Proof):
        sound = entry.state in ("proven", "refused") and isinstance(entry.reason, str)
        numbers = [entry.at, entry.seconds]
    else:
        sound = isinstance(entry.choice, str) and isinstance(entry.microseconds, dict) and isinstance(entry.among, list)
        numbers = [entry.at, *entry.microseconds.values()] if sound else []
    return sound and all(map(math.isfinite, numbers)) and entry.at < time.time() + DAY


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path.with_name(f".{path.name}.lock"), "w", encoding="utf-8") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        with contextlib.suppress(OSError):  # a file system without locks: the rename keeps the file whole
            while not _is_locked(file) and time.monotonic() < deadline:
                time.sleep(0.01)
        yield


def _is_locked(file: IO[str]) -> bool:
    """Lock a file, or False where another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_warned: set[tuple[Path, str]] = set()


def _warn(path: Path, what: str) -> None:
    """Once for each file and kind of trouble."""
    kind = what.partition(":")[0]
    if (path, kind) not in _warned:
        _warned.add((path, kind))
        warnings.warn(f"{path} {what}", stacklevel=2)


def folder() -> Path | None:
    """In the user's cache folder, by the XDG base directory specification; None for a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given or Path.home() / ".cache") / "alexnet_ext" / "kernels"
    except RuntimeError:
        return None


def files() -> list[Path]:
    """What is known under any identity, the newest last."""
    where = folder()
    found = {}
    for path in where.glob("*.json") if where is not None else ():
        with contextlib.suppress(OSError):
            found[path] = path.stat().st_mtime
    return sorted(found, key=found.__getitem__)


def _remove_oldest() -> None:
    for path in files()[:-MAX_FILES]:
        _remove(path)


def _remove(path: Path) -> None:
    for old in (path, *path.parent.glob(f".{path.name}.*")):  # its lock, and what a killed process left
        old.unlink(missing_ok=True)


@functools.cache
def code() -> dict[str, str]:
    """Hashes of the compiled libraries, and of the sources that the other kernels are compiled from."""
    libraries = sorted(_library.FOLDER.glob("libalexnet_ext_*.so"))
    sources = sorted((_library.FOLDER / "ops").rglob("*.py"))
    return {"library": _hash(libraries), "sources": _hash(sources)}


def _hash(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(_library.FOLDER)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def versions() -> dict[str, str]:
    found = {"alexnet_ext": __version__, "torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version())}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return found


@functools.cache
def driver() -> str:
    """The version of the GPU's driver: as its module has it, else the newest CUDA that it knows; "" without one."""
    with contextlib.suppress(OSError):
        said = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        return said.partition("\n")[0]
    newest = getattr(torch._C, "_cuda_getDriverVersion", None)  # none in a CPU build
    return f"CUDA {newest()}" if newest is not None and torch.cuda.is_available() else ""


def device_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        facts = {"capability": torch.backends.cpu.get_cpu_capability(), "multiprocessors": os.cpu_count()}
        return {"device": device.type, **facts}
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    facts = {"capability": capability, "multiprocessors": properties.multi_processor_count}
    return {"device": properties.name, **facts}


class Settings(NamedTuple):
    """What changes which kernels run and how exact they are: determinism, TF32 in matrix products and convolutions."""

    deterministic: bool
    cudnn_deterministic: bool
    matmul: str
    convolution: str

    def apply(self) -> None:
        backends: Any = torch.backends
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        backends.cudnn.deterministic = self.cudnn_deterministic
        backends.cuda.matmul.fp32_precision = self.matmul
        backends.cudnn.conv.fp32_precision = backends.cudnn.rnn.fp32_precision = (
            self.convolution
        )  # cuDNN's must be equal


def settings() -> Settings:
    """Those in force."""
    backends: Any = torch.backends
    return Settings(
        torch.are_deterministic_algorithms_enabled(),
        backends.cudnn.deterministic,
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
    )


def identity(device: torch.device) -> dict[str, Any]:
    """All that a proof and a time depend on."""
    return {**device_facts(device), "driver": driver(), **versions(), **code(), **settings()._asdict()}


_stores: dict[tuple[Any, ...], Known] = {}
_distrusted: dict[tuple[Any, ...], str] = {}


def on(device: torch.device) -> Known:
    """What is known on this device under the settings in force."""
    key = (device.type, device.index, settings())
    if key not in _stores:
        _stores[key] = _open(device)
        _stores[key].distrusted = _distrusted.get((device.type, device.index), "")
    return _stores[key]


def _open(device: torch.device) -> Known:
    if device.type == "cuda" and not torch.cuda.is_available():
        return Known({"device": "none"}, None)
    found, where = identity(device), folder()
    if where is None:
        return Known(found, None)
    path = where / file_name(found)
    same = (known for known in _stores.values() if known.path == path)  # GPUs of a kind share what is known
    return next(same, None) or Known(found, path)


def file_name(identity: Mapping[str, Any]) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", str(identity["device"]).lower()).strip("-")
    return f"{slug}-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]}.json"


def distrust(device: torch.device, reason: str) -> None:
    """From now on, and in this process alone, no kernel of ours counts as proven on this device; with an empty reason
    what is known counts again."""
    on(device)
    _distrusted[device.type, device.index] = reason
    for key, known in _stores.items():
        if key[:2] == (device.type, device.index):
            known.distrusted, known.decided = reason, {}


def forget() -> list[Path]:
    """Remove all files, and what this process knows; the files."""
    removed = files()
    for path in removed:
        _remove(path)
    reopen()
    return removed


def reopen() -> None:
    """As in a new process: what is in the files alone."""
    _stores.clear()
    _distrusted.clear()
    _warned.clear()
    for cached in (code, versions, driver):
        cached.cache_clear()
