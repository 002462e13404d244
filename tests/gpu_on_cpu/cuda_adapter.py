"""Our own CUDA kernels as nvcc compiles them: the ops run on CPU tensors, and the machine runs their launches.

Launchers and bindings are unchanged, but have another name, so that they load next to the package's.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.gpu_on_cpu.emulated import in_place_of_the_cpu_kernels
from tests.gpu_on_cpu.ptx.machine import Launch, Machine
from tests.gpu_on_cpu.ptx.program import Kernel, parse
from tests.gpu_on_cpu.ptx.runtime import FLAGS, HERE, LINKED, launches_run_by
from tests.gpu_on_cpu.triton_adapter import memory
from tests.support import ROOT

NAME = "alexnet_ext_ptx"


class CompiledOps:
    """The library, compiled into the folder if missing, and its kernels by the op of their file."""

    def __init__(self, folder: Path, code: Sequence[str] = ("arch=compute_80,code=compute_80",)) -> None:
        self.folder, library = folder, folder / "library.so"
        if not library.exists():
            compile_into(library, code)
        torch.ops.load_library(str(library))
        self.library = ctypes.CDLL(str(library))
        self.kernels: dict[str, dict[str, Kernel]] = {
            file.stem.removesuffix("_cuda"): parse(file.read_text(encoding="utf-8"))
            for file in sorted(folder.glob("*_cuda.ptx"))
        }
        self.by_name = {name: kernel for kernels in self.kernels.values() for name, kernel in kernels.items()}

    @contextmanager
    def in_place(self, order: str = "together", machine: Callable[[Launch], Machine] = Machine) -> Iterator[set[str]]:
        """In the block ``torch.ops.alexnet_ext`` runs the CUDA kernels on CPU tensors; yields the names launched."""
        launched: set[str] = set()

        def run(kernel: Any, *arguments: Any) -> Any:
            def launch(name: str, launch_of: Callable[[Kernel], Launch], grid: tuple[int, int, int]) -> None:
                launched.add(name)
                around = [value for value in tree_leaves((arguments, made.tensors)) if isinstance(value, torch.Tensor)]
                buffers = [memory(tensor) for tensor in around if tensor.numel()]
                machine(replace(launch_of(self.by_name[name]), buffers=buffers, order=order)).run(grid)

            with Made() as made, launches_run_by(self.library, launch):
                return kernel(*arguments)

        with in_place_of_the_cpu_kernels(NAME, run):
            yield launched

    @contextmanager
    def compiled_for(self, architecture: str, op: str, folder: Path) -> Iterator[None]:
        """In the block the kernels of an op are those that nvcc makes for another architecture."""
        source, ptx, before = ROOT / "csrc" / op / f"{op}_cuda.cu", folder / f"{op}.ptx", self.by_name
        code = ("-ptx", f"-arch=compute_{architecture}", f"-Dalexnet_ext={NAME}")
        subprocess.run(["nvcc", *FLAGS, *code, source, "-o", ptx], check=True)
        self.by_name = before | parse(ptx.read_text(encoding="utf-8"))
        try:
            yield
        finally:
            self.by_name = before


class Made(TorchDispatchMode):
    """Records the tensors that a binding allocates, results and workspaces, and fills them with NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_strided) and result.numel():
                memory(result).fill(0xFF)
            self.tensors.append(result)
        return result


def compile_into(library: Path, code: Sequence[str]) -> None:
    """Compile by nvcc, with ``-gencode`` and these words; PTX and machine code stay next to the library."""
    torch_root = Path(torch.__file__).parent
    sources = [*ROOT.glob("csrc/*/*_cuda.cu"), *ROOT.glob("csrc/*/*_cuda_ops.cpp"), ROOT / "csrc" / "library.cpp"]
    sources += [
        ROOT / "csrc" / "common" / "isa.cpp",
        HERE.parent / "emulator" / "no_device.cpp",
        HERE / "cudart.cpp",
    ]
    defined = (
        "-Xcompiler=-Wno-attributes",
        f"-Dalexnet_ext={NAME}",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    )
    found = ("-isystem", torch_root / "include", f"-L{torch_root / 'lib'}", "-ltorch_cpu")
    kept = ("-gencode", *code, "--keep", "--keep-dir", library.parent)
    subprocess.run(["nvcc", *LINKED, *FLAGS, *defined, *found, *kept, *sources, "-o", library], check=True)
