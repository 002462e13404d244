"""Loads the compiled libraries, and remembers why one is missing.

Importing the package never fails: a library that could not be built or loaded is recorded here, the ops run on
stock PyTorch instead, and ``alexnet info`` prints the record.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
REBUILD = "pip install -e . --no-build-isolation --no-deps"


@dataclass(frozen=True)
class Library:
    """One compiled library: its device, whether it is loaded, and if not, the reason and the remedy."""

    name: str
    device: str
    loaded: bool
    reason: str = ""
    remedy: str = ""


def build_record() -> dict[str, str]:
    """The build's own record: torch version, instruction sets, parts left out and why."""
    try:
        record = json.loads((FOLDER / "build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _load(name: str, device: str, unwanted: str) -> Library:
    """Load one library unless ``unwanted`` says why this torch has no use for it."""
    path = FOLDER / f"libalexnet_ext_{name}.so"
    if unwanted:
        return Library(name, device, False, unwanted)
    if not path.exists():
        record = build_record()
        reason = record.get(f"{name}_reason") or f"{path.name} is not built"
        return Library(name, device, False, reason, record.get(f"{name}_remedy") or REBUILD)
    try:
        torch.ops.load_library(str(path))
    except Exception as error:  # a library of another machine, an older torch: any error of the loader
        cause = error.__cause__ or error
        return Library(name, device, False, f"{path.name} does not load: {cause}", REBUILD)
    return Library(name, device, True)


def _load_all() -> tuple[Library, ...]:
    cpu = _load("cpu", "cpu", "")
    unwanted = ""
    if torch.version.cuda is None:
        unwanted = "this torch is a CPU build"
    elif not cpu.loaded:
        unwanted = "the CPU library, which holds the schemas, is not loaded"
    return cpu, _load("cuda", "cuda", unwanted)


LIBRARIES: tuple[Library, ...] = _load_all()


def _find_triton() -> Library:
    """Triton is imported, and its kernels defined, only where they can run: on a GPU, or in its interpreter."""
    if torch.version.cuda is None and os.environ.get("TRITON_INTERPRET", "0") != "1":
        remedy = "install a CUDA build of torch, or set TRITON_INTERPRET=1 before Python starts"
        return Library("triton", "cuda", False, "this torch is a CPU build", remedy)
    if importlib.util.find_spec("triton") is None:
        return Library("triton", "cuda", False, "Triton is not installed", "pip install triton")
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken installation may raise anything
        return Library("triton", "cuda", False, f"Triton does not import: {error}", "pip install triton")
    return Library("triton", "cuda", True)


TRITON = _find_triton()
INTERPRETED = TRITON.loaded and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton kernels run in its interpreter: slowly, on CPU tensors."""


def _find_cutlass(name: str) -> Library:
    """The convolution by CUTLASS, part of a CUDA library that was built with CUTLASS's headers.

    ``"cutlass"`` is for compute capability 8.0 and newer, ``"sm90"`` for 9.0 alone.
    """
    if not LIBRARIES[1].loaded:
        return Library(name, "cuda", False, "it is part of the CUDA library")
    if has_kernel(f"conv2d_bias_relu_{name}", "cuda"):
        return Library(name, "cuda", True)
    record = build_record()
    reason = record.get(f"{name}_reason") or "the CUDA library was built without it"
    return Library(name, "cuda", False, reason, record.get(f"{name}_remedy") or REBUILD)


def _has_module(op: str, name: str) -> bool:
    return importlib.util.find_spec(f"{__package__}.ops.{op}.{name}") is not None


def triton_devices(op: str) -> tuple[str, ...]:
    """Kinds of devices on which this process can run the Triton kernels of ``op``; empty where it has none."""
    if not TRITON.loaded or not _has_module(op, "triton_kernels"):
        return ()
    return ("cpu", "cuda") if INTERPRETED else ("cuda",)


def has_candidates(op: str) -> bool:
    """Whether ``op`` has kernels for a GPU to choose among by measurement (``ops/<op>/candidates.py``)."""
    return (TRITON.loaded or LIBRARIES[1].loaded) and _has_module(op, "candidates")


def has_kernel(op: str, device_type: str) -> bool:
    """Whether ``alexnet_ext::op`` has a compiled kernel for this device type."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None or not LIBRARIES[0].loaded:
        return False
    name = f"alexnet_ext::{op}"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, key))


CUTLASS, SM90 = _find_cutlass("cutlass"), _find_cutlass("sm90")
