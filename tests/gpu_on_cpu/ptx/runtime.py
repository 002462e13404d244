"""Compiles a .cu file for the machine, and calls its launchers: the kernels that they launch run there."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .hopper import HopperMachine
from .machine import Launch, Machine
from .program import Kernel, parse

HERE = Path(__file__).parent
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "--extended-lambda", "-Xcompiler=-fPIC")
# Otherwise a CUDA runtime that PyTorch has loaded would be called instead of the stand-in.
LINKED = ("-shared", "--cudart=none", "-Xlinker=-Bsymbolic")
LAUNCHED = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


@contextmanager
def launches_run_by(
    library: ctypes.CDLL, run: Callable[[str, Callable[[Kernel], Launch], Any], None]
) -> Iterator[None]:
    """In the block each launch of the library calls run(name, a description of the launch, grid)."""
    failed: list[BaseException] = []

    def handed(name: bytes, grid: Any, threads: int, shared: int, given: Any) -> None:
        def launched(kernel: Kernel) -> Launch:
            values = [ctypes.string_at(given[i], size) for i, (_, size) in enumerate(kernel.parameters)]
            return Launch(kernel, (), values, threads, shared, cluster=grid[3])

        if failed:
            return
        try:
            run(name.decode(), launched, (grid[0], grid[1], grid[2]))
        except BaseException as error:  # ctypes would print it and go on
            failed.append(error)

    callback = LAUNCHED(handed)
    library.ptx_on_launch(callback)
    try:
        yield
    finally:
        library.ptx_on_launch(None)
    if failed:
        raise failed[0]


@contextmanager
def shared_folder(base: Path, name: str) -> Iterator[Path]:
    """A folder that pytest's workers share, next to their own (``base``); one worker at a time has it."""
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


class Program:
    """A .cu file as PTX and as a library of launchers, compiled if the folder lacks them."""

    def __init__(self, source: Path, include: Path, folder: Path, architecture: str = "80") -> None:
        kept = folder / source.stem
        kept.mkdir(exist_ok=True)
        code = f"arch=compute_{architecture},code=compute_{architecture}"
        includes = (f"-I{include}", f"-I{include}/../tools/util/include")
        self.machine = HopperMachine if architecture == "90a" else Machine
        command = ["nvcc", *LINKED, *FLAGS, "-gencode", code, *includes, source, *HERE.glob("cudart*.cpp")]
        if not (kept / "library.so").exists():
            subprocess.run([*command, "-o", kept / "library.so", "--keep", "--keep-dir", kept], check=True)
        self.library = ctypes.CDLL(str(kept / "library.so"))
        self.kernels: dict[str, Kernel] = parse((kept / f"{source.stem}.ptx").read_text(encoding="utf-8"))
        names = subprocess.run(["nm", "-D", "--defined-only", kept / "library.so"], capture_output=True, text=True)
        self.symbols = [line.split()[-1] for line in names.stdout.splitlines()]

    def launch(
        self,
        launcher: str,
        arguments: Sequence[Any],
        buffers: Sequence[np.ndarray[Any, Any]],
        order: str = "together",
    ) -> int:
        """Call the one launcher with this word in its name; its kernels may touch these buffers. Its cudaError_t."""
        (symbol,) = [name for name in self.symbols if launcher in name]

        def run(name: str, launched: Callable[[Kernel], Launch], grid: tuple[int, int, int]) -> None:
            self.machine(replace(launched(self.kernels[name]), buffers=buffers, order=order)).run(grid)

        with launches_run_by(self.library, run):
            status: int = getattr(self.library, symbol)(*arguments)
        return status
