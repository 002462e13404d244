"""Runs each op under compute-sanitizer's tools; each tool must first see the bug planted for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..report import Finding
from . import TOOLS, WAYS, Task

ROOT = Path(__file__).resolve().parents[3]
FOUND = 9
"""The exit code if a tool saw an error."""
SEEN = {
    "memcheck": "Invalid __global__ write",
    "racecheck": "Race reported",
    "initcheck": "Uninitialized __global__ memory read",
    "synccheck": "Barrier error detected",
}
"""Each tool's words for its planted bug: other errors, such as an unknown driver, have the same exit code."""
# Otherwise the driver's own calls at start count as errors of memcheck: some fail, and none is ours.
OPTIONS = {"memcheck": ("--report-api-errors", "no")}


def run(task: Task) -> Iterator[Finding]:
    if task.device != "cuda":
        return
    nvcc = shutil.which("nvcc")
    sanitizer = tool_of("compute-sanitizer", nvcc)
    if sanitizer is None or nvcc is None:
        yield Finding("tools", False, f"compute-sanitizer: {sanitizer}, nvcc: {nvcc}; both are needed")
        return
    for tool in TOOLS:
        # Many processes start at once, and Python needs time before it calls CUDA.
        options = ("--tool", tool, "--error-exitcode", str(FOUND), "--launch-timeout", "60", *OPTIONS.get(tool, ()))
        command = [sanitizer, *options]
        if task.wants(f"planted {tool}"):
            yield sees_planted(command, tool, nvcc, task.end)
        for way in WAYS:
            if task.wants(f"{way} {tool}"):
                yield sees_nothing(command, tool, way, task.end)


def tool_of(name: str, nvcc: str | None) -> str | None:
    """The path of a tool: on PATH, or in the toolkit of ``nvcc``, which may be a script that calls another nvcc."""
    found = shutil.which(name)
    if found or nvcc is None:
        return found
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    folders = re.findall(r"TOP=(\S+)", told)
    return shutil.which(name, path=os.pathsep.join(f"{folder}/bin" for folder in folders))


def sees_planted(command: list[str], tool: str, nvcc: str, end: float) -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        planted = Path(folder, "planted")
        source = Path(__file__).with_name("planted.cu")
        built = output_of([nvcc, "-arch=native", "-lineinfo", "-o", str(planted), str(source)], end)
        if built[0] != 0:
            return Finding(f"{tool} sees the planted bug", False, f"nvcc: {built[1][-1000:]}")
        code, said = output_of([*command, str(planted), tool], end)
    return Finding(
        f"{tool} sees the planted bug", code == FOUND and SEEN[tool] in said, f"exit code {code}: {said[-500:]}"
    )


def sees_nothing(command: list[str], tool: str, way: str, end: float) -> Finding:
    code, said = output_of([*command, sys.executable, "-m", "benchmarks.verify_gpu.sanitized", way], end)
    ran = re.findall(r"^ran (.+)", said, re.M)
    if code == 0:
        detail = f"{len(ran)} calls"
    else:
        # An error names its kernel; if cuDNN convolves, not all kernels are ours.
        kernels = dict.fromkeys(re.findall(r"^=+ +at (.+?)\+0x", said, re.M))
        errors = dict.fromkeys(
            re.findall(r"^=+ +(?:Error: |Warning: )?(\S.*(?:detected|read|write|reported).*)", said, re.M)
        )
        detail = f"exit code {code} after {ran[-1:]}; {list(errors)[:3]} in {list(kernels)[:5]}; {said[-800:]}"
    return Finding(f"{tool} sees nothing in {way}", code == 0 and bool(ran), detail, about={"backend": way})


def output_of(command: list[str], end: float) -> tuple[int | None, str]:
    """(exit code, output); the code is None if the time ran out."""
    # Each tensor is an allocation of its own, so that a write beyond its end does not hit a neighbour in one block.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        try:
            code: int | None = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, end - time.monotonic()) if end < float("inf") else None,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        said.seek(0)
        return code, said.read()
