"""compute-sanitizer's tools over one run of each op; each tool must first see the bug planted for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..report import Finding

ROOT = Path(__file__).resolve().parents[3]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = "9"
"""The exit code that says that a tool saw an error."""


def run(device: str) -> Iterator[Finding]:
    if device != "cuda":
        return
    sanitizer, nvcc = shutil.which("compute-sanitizer"), shutil.which("nvcc")
    if sanitizer is None or nvcc is None:
        yield Finding("tools", False, f"compute-sanitizer: {sanitizer}, nvcc: {nvcc}; both are needed")
        return
    with tempfile.TemporaryDirectory() as folder:
        planted = Path(folder, "planted")
        source = Path(__file__).with_name("planted.cu")
        subprocess.run([nvcc, "-arch=native", "-lineinfo", "-o", planted, source], check=True)
        for tool in TOOLS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", FOUND]
            seen = subprocess.run([*command, planted, tool], capture_output=True, text=True)
            yield Finding(f"{tool} sees the planted bug", str(seen.returncode) == FOUND, seen.stdout[-300:])
            # Its own allocations, so that a write beyond a tensor's end meets no neighbour of one cached block.
            environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            ops = subprocess.run(
                [*command, sys.executable, "-m", "benchmarks.verify_gpu.sanitized"],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
            )
            yield Finding(
                f"{tool} sees nothing in the ops", ops.returncode == 0, ops.stdout[-1500:] + ops.stderr[-500:]
            )
