"""What this installation is: ``info()``."""

from __future__ import annotations

import itertools
import json
import os
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import _library
from .._version import __version__
from ..ops import _backend, _known
from .cases import LAYOUTS

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Choice:
    """What ``backend="auto"`` runs for an op on a device, and why.

    ``backend`` is ``"native"``, ``"triton"`` or ``"stock"``; ``"auto"`` where each direction and shape is measured for
    itself; ``"none"`` where calls raise RuntimeError, as the backend of a ``use_backend`` block has no kernel there.
    """

    op: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True)
class KnownOfDevice:
    """What a file holds of the kernels on one device.

    ``current`` says whether that is the identity of a GPU in this process, so that calls follow it. ``proofs`` are by
    unit (op, backend, dtype, layout), ``races`` by call.
    """

    file: str
    device: str
    current: bool
    proofs: dict[str, _known.Proof]
    races: dict[str, _known.Race]

    def lines(self) -> list[str]:
        state = "in force" if self.current else "of another driver, version, code or setting: not followed"
        lines = [f"  {self.device}, {state} ({self.file})"]
        for unit, proof in sorted(self.proofs.items()):
            reason = f": {proof.reason}" if proof.reason else ""
            lines.append(f"    {proof.state}, {_age(proof.at)}, in {proof.seconds:.1f} s: {unit}{reason}")
        for call, race in sorted(self.races.items()):
            times = sorted(race.microseconds.items(), key=lambda pair: pair[1])
            said = ", ".join(f"{name} {time:.1f} us" for name, time in times)
            lines.append(f"    {race.choice}, {_age(race.at)}: {call} ({said})")
        return lines


def _age(at: float) -> str:
    """How long ago that was."""
    seconds = max(time.time() - at, 0.0)
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


@dataclass(frozen=True, repr=False)
class Info:
    """What ``info()`` found; ``str()`` of it is a text to print, ``as_dict()`` is ready for JSON."""

    version: str
    torch: str
    torch_cuda: str | None
    gpus: list[str]
    cpu_capability: str
    cpu_count: int
    threads: int
    libraries: tuple[_library.Library, ...]
    build_record: dict[str, Any]
    choices: list[Choice] = field(default_factory=list)
    known: list[KnownOfDevice] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __repr__(self) -> str:
        lines = [
            f"alexnet_ext {self.version}",
            f"torch       {self.torch} ({f'CUDA {self.torch_cuda}' if self.torch_cuda else 'CPU build'})",
            f"CPU         {self.cpu_capability}, {self.threads} threads of {self.cpu_count} processors",
            f"GPU         {', '.join(self.gpus) or 'none'}",
            "",
            "Libraries",
        ]
        for library in self.libraries:
            lines.append(f"  {library.name:7s} {'loaded' if library.loaded else f'not loaded: {library.reason}'}")
            if library.remedy:
                lines.append(f"          to mend it: {library.remedy}")
        lines += ["", "Build record"]
        for name, value in self.build_record.items():
            text = value if isinstance(value, str) else json.dumps(value)
            if text:  # an empty reason: nothing was left out
                lines.append(f"  {name}: {text}")
        if not self.build_record:
            lines.append("  none: nothing has been built in this folder")
        lines += ["", "Backends that backend='auto' picks"]
        width = max((len(choice.op) for choice in self.choices), default=0)
        for choice in self.choices:
            lines.append(f"  {choice.op:{width}s}  {choice.device:4s}  {choice.backend:6s}  {choice.reason}")
        lines += ["", f"Kernels proven and raced on this machine ({_known.folder() or 'no home folder'})"]
        lines += [line for known in self.known for line in known.lines()] or ["  none"]
        return "\n".join(lines)


def info() -> Info:
    """What is installed, built and loaded, and which backend each op uses on each device and why.

    >>> print(alexnet_ext.info())
    """
    gpus = []
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Info(
        version=__version__,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        gpus=gpus,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpu_count=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        libraries=(*_library.LIBRARIES, _library.TRITON, _library.CUTLASS, _library.SM90),
        build_record=_library.build_record(),
        choices=[choice(op, device) for op in _backend.OPS for device in DEVICES],
        known=_known_here(),
    )


def _known_here() -> list[KnownOfDevice]:
    kinds = [torch.device(kind) for kind in _backend.ORDER if kind != "meta"]
    current = [_known.on(device).identity for device in kinds if _backend.proves(device)]
    found = []
    for path in _known.files():
        held = _known.read(path)
        if held is not None:
            proofs, races = _known.entries(held, "proofs", _known.Proof), _known.entries(held, "races", _known.Race)
            found.append(
                KnownOfDevice(
                    str(path), str(held["identity"].get("device")), held["identity"] in current, proofs, races
                )
            )
    return found


def choice(op: str, device: str) -> Choice:
    """What ``backend="auto"`` runs for ``op`` on ``device`` (``"cpu"`` or ``"cuda"``) at this moment.

    On a device that proves kernels itself, what is known may differ by dtype and layout: one where ours run is shown.
    """
    where = torch.device(device)
    decision = _backend.decide(op, where)
    if decision.backend != "stock" or not _backend.proves(where):
        return Choice(op, device, *decision)
    for dtype, (layout, memory_format) in itertools.product(_backend.PROVABLE, LAYOUTS.items()):
        alike = torch.empty((2, 2, 2, 2), device="meta", memory_format=memory_format)
        found = _backend.decide(op, where, dtype, x=alike)
        if found.backend != "stock":
            return Choice(op, device, found.backend, f"{found.reason} ({_known.name_of(dtype)}, {layout})")
    return Choice(op, device, *decision)
