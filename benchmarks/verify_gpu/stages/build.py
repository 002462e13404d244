"""Builds from this tree as a user without network does, and loads the result in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ..report import Finding

ROOT = Path(__file__).resolve().parents[3]
INSTALL = [sys.executable, "-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps"]


def run(device: str) -> Iterator[Finding]:
    start = time.monotonic()
    built = subprocess.run(INSTALL, cwd=ROOT, capture_output=True, text=True)
    yield Finding(
        "pip install -e . --no-build-isolation --no-deps",
        built.returncode == 0,
        f"{time.monotonic() - start:.0f} s" if built.returncode == 0 else (built.stdout + built.stderr)[-1500:],
    )
    loads = "from alexnet_ext import _library as l; print(*(i.name for i in l.LIBRARIES if i.loaded))"
    loaded = subprocess.run([sys.executable, "-c", loads], cwd=ROOT, capture_output=True, text=True)
    libraries = loaded.stdout.split()
    for name in ("cpu", "cuda") if device == "cuda" else ("cpu",):
        yield Finding(f"the {name} library loads", name in libraries, loaded.stderr[-1500:])
    told = subprocess.run([sys.executable, "-m", "alexnet_ext", "info"], cwd=ROOT, capture_output=True, text=True)
    print(told.stdout)
    yield Finding("alexnet info", told.returncode == 0, told.stderr[-1500:])
