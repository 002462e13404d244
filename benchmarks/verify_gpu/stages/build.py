"""Builds from this tree without network, and loads the result in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ..report import Finding
from . import Task

ROOT = Path(__file__).resolve().parents[3]
INSTALL = [sys.executable, "-m", "pip", "install", "-e", ".", "--no-build-isolation", "--no-deps"]
# Later stages prove little without a library: if pip or CUTLASS fails, the rest is built anyway.
CONFIGURE = [
    *("cmake", "-G", "Ninja", "-S", ".", "-B", "build/editable", "-DCUTLASS_INCLUDE=none"),
    *(f"-DPython_EXECUTABLE={sys.executable}", f"-DALEXNET_EXT_OUTPUT={ROOT / 'alexnet_ext'}"),
]
COMPILE = ["cmake", "--build", "build/editable"]


def run(task: Task) -> Iterator[Finding]:
    start = time.monotonic()
    built = said(*INSTALL)
    yield Finding(
        "pip install -e . --no-build-isolation --no-deps",
        built.returncode == 0,
        f"{time.monotonic() - start:.0f} s" if built.returncode == 0 else built.stdout[-1500:],
    )
    if built.returncode:
        print(built.stdout)
        for command in (CONFIGURE, COMPILE):
            print(said(*command).stdout)
    loads = "from alexnet_ext import _library as l; print(*(i.name for i in l.LIBRARIES if i.loaded))"
    loaded = said(sys.executable, "-c", loads)
    for name in ("cpu", "cuda") if task.device == "cuda" else ("cpu",):
        yield Finding(f"the {name} library loads", name in loaded.stdout.split(), loaded.stdout[-1500:].strip())
    told = said(sys.executable, "-c", "import alexnet_ext; print(alexnet_ext.info())")
    print(told.stdout)
    yield Finding("alexnet_ext.info()", told.returncode == 0, told.stdout[-1500:] if told.returncode else "")
    for name in ("cutlass", "sm90") if task.device == "cuda" else ():
        asks = f"from alexnet_ext import _library as l; print(l.{name.upper()}.reason or 'is there')"
        yield Finding(f"the convolution by {name}", None, said(sys.executable, "-c", asks).stdout.strip()[-300:])


def said(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
