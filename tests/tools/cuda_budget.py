"""``python -m tests.tools.cuda_budget``: what every CUDA kernel takes on every architecture, compared with a file.

Compiles csrc/*/*_cuda.cu with nvcc for each architecture (no GPU is needed), csrc/*/cutlass/*.cu and
csrc/*/sm90/*.cu for those that a build takes by default, and reads ptxas's report: registers must not be more than
cuda_budget.json says, static shared memory likewise, and there is no stack and no spill at all. Kernels made for
16-byte accesses or for tensor cores must have these in their machine code. Exit code 1 when something does not hold.
Without CUTLASS's headers its kernels are left out.

    python -m tests.tools.cuda_budget --renew    # writes the file anew; what must be zero or there must be so even then
    python -m tests.tools.cuda_budget --cutlass   # missing headers of CUTLASS are a fault
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import ROOT

BUDGET = Path(__file__).with_suffix(".json")
ARCHITECTURES = ("80", "90", "100", "120")
CUTLASS_ARCHITECTURES = {"cutlass/*f16": ("80",), "cutlass/*tf32": ("80", "90"), "sm90/": ("90a",)}
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "--extended-lambda", "-Xptxas", "-v")

# By name, or by a number of neighbouring elements, their second template argument, above 1.
VECTOR_KERNEL = re.compile(
    r"_(lanes|vectors)_|^augment_|^(relu_max_pool2d(_planes|(_patches)?_backward)?|bias_relu)_kernel<\w+, [248]\b"
)
LOAD, STORE = "LDG.E.128", "STG.E.128"
# From global to shared memory, 16 bytes at a time, and products of tensor cores.
COPY, PRODUCT = r"LDGSTS\S*\.128", {"tf32": r"HMMA\.\S*TF32", "bf16": r"HMMA\.\S*BF16", "f16": r"HMMA\.16816\.F32 "}
# TMA, which gathers pixels for the product and stores the results (sums of weights leave registers two at a time), and
# products of a group of four warps.
GATHER, SCATTER, STORE_SUMS = r"UTMALDG\S*\.IM2COL", r"UTMASTG\S*\.IM2COL", r"STG\.E\.64"
WARP_GROUP_PRODUCT = {
    "bf16": r"HGMMA\.\S*\.F32\.BF16",
    "f16": r"HGMMA\.\S*\.F32 ",
    "tf32": r"HGMMA\.\S*\.F32\.TF32",
}
PRODUCT_KERNEL = re.compile(r"_ZN7cutlass|\w+_sm90_kernel")
CUTLASS_KERNEL = re.compile(r"(\w+)_(tf32|bf16|f16)_(cutlass|sm90)$")


def instructions(name: str) -> tuple[str, ...]:
    """What must be in a kernel's machine code: accesses of 16 bytes, and products of its type on tensor cores.

    A crop's bytes begin anywhere, and flipped they run backwards.
    """
    if found := CUTLASS_KERNEL.match(name):
        direction, dtype, kind = found.groups()
        if kind == "cutlass":
            return COPY, PRODUCT[dtype], STORE
        return GATHER, WARP_GROUP_PRODUCT[dtype], STORE_SUMS if direction == "weight_gradient" else SCATTER
    if not VECTOR_KERNEL.search(name):
        return ()
    return (STORE,) if name.startswith("augment") else (LOAD, STORE)


@dataclass
class Usage:
    """What one kernel takes on one architecture."""

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    missing: list[str] = field(default_factory=list)  # instructions that it should have


def tool(name: str) -> str:
    """A program of the CUDA toolkit: on PATH, or in Triton's package."""
    if found := shutil.which(name):
        return found
    try:
        import triton

        found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if found.exists():
            return str(found)
    except ImportError:
        pass
    raise SystemExit(f"{name} is on PATH nowhere, and Triton is not installed")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def plain(mangled: list[str], source: Path) -> dict[str, str]:
    """Names as a reader writes them: relu_max_pool2d_kernel<float, 4, 3>. A product's, of 2 KB, is its file's."""
    names = run("c++filt", *mangled).splitlines()
    short = (re.sub(r"alexnet_ext::|\(anonymous namespace\)::|^void ", "", name).split("(")[0] for name in names)
    found = dict(zip(mangled, short, strict=True))
    return {name: source.stem if PRODUCT_KERNEL.match(name) else text for name, text in found.items()}


def read_report(report: str) -> dict[str, Usage]:
    """ptxas's words, by mangled name."""
    usages: dict[str, Usage] = {}
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            usage = usages[found[1]] = Usage()
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            usage.stack, usage.spills = int(found[1]), int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            usage.registers, usage.shared = int(found[1]), int(shared[1]) if shared else 0
    return usages


@functools.cache
def cutlass_include() -> str:
    """The folder of CUTLASS's headers, as the build finds it; nothing where they are missing."""
    return run(sys.executable, str(ROOT / "cmake" / "cutlass_include.py"))


def cutlass_folders() -> tuple[str, ...]:
    """The folders of CUTLASS's headers and utilities, as options of the compiler."""
    utilities = Path(cutlass_include()).parent / "tools" / "util" / "include"
    return ("-isystem", cutlass_include(), "-isystem", str(utilities))


def compile_one(source: Path, architecture: str, folder: Path) -> dict[str, Usage]:
    cubin = folder / f"{source.stem}-{architecture}.cubin"
    headers = cutlass_folders() if CUTLASS_KERNEL.match(source.stem) else ()
    given = (*FLAGS, *headers, f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin), str(source))
    usages = read_report(run("nvcc", *given))
    if not usages:
        raise SystemExit(f"{source.name}: no kernel in ptxas's report")
    names = plain(list(usages), source)
    listing = run(tool("cuobjdump"), "-sass", str(cubin))
    code = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function : |\Z)", listing, re.S))
    for mangled, usage in usages.items():
        usage.missing = [words for words in instructions(names[mangled]) if not re.search(words, code[mangled])]
    return {names[mangled]: usage for mangled, usage in usages.items()}


def measure(jobs: int) -> dict[str, dict[str, Usage]]:
    """Usage by kernel and architecture."""
    sources = dict.fromkeys(sorted((ROOT / "csrc").glob("*/*_cuda.cu")), ARCHITECTURES)
    if cutlass_include():
        for name, wanted in CUTLASS_ARCHITECTURES.items():
            sources |= dict.fromkeys(sorted((ROOT / "csrc").glob(f"*/{name}*.cu")), wanted)
    found: dict[str, dict[str, Usage]] = {}
    with tempfile.TemporaryDirectory(prefix="cuda-budget-") as folder, ThreadPoolExecutor(jobs) as pool:
        tasks = [(source, architecture) for source, wanted in sources.items() for architecture in wanted]
        for (_, architecture), usages in zip(
            tasks, pool.map(lambda task: compile_one(*task, Path(folder)), tasks), strict=True
        ):
            for name, usage in usages.items():
                found.setdefault(name, {})[architecture] = usage
    return found


def expected(name: str) -> bool:
    return bool(cutlass_include()) or not CUTLASS_KERNEL.match(name)


def faults(found: dict[str, dict[str, Usage]], budget: dict[str, dict[str, list[int]]] | None) -> list[str]:
    """What does not hold, a sentence each; without a budget only what must hold in any case."""
    said = []
    for name, by_architecture in sorted(found.items()):
        for architecture, usage in by_architecture.items():
            where = f"{name} on sm_{architecture}"
            if usage.stack or usage.spills:
                said.append(f"{where} has {usage.stack} bytes of stack and spills {usage.spills}, expected none")
            said += [f"{where} has no {access} in its machine code" for access in usage.missing]
            allowed = (budget or {}).get(name, {}).get(architecture)
            if allowed and (usage.registers > allowed[0] or usage.shared > allowed[1]):
                said.append(
                    f"{where} takes {usage.registers} registers and {usage.shared} bytes of static shared memory, "
                    f"its budget is {allowed[0]} and {allowed[1]}"
                )
    if not any(VECTOR_KERNEL.search(name) for name in found):
        said.append("no kernel is taken for one of 16-byte accesses")
    if budget is not None and (unlike := {name for name in set(budget) ^ set(found) if expected(name)}):
        said.append(f"the budget and the kernels differ in {', '.join(sorted(unlike))}")
    return said


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--renew", action="store_true", help="write tests/tools/cuda_budget.json anew")
    parser.add_argument("--cutlass", action="store_true", help="missing headers of CUTLASS are a fault")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    options = parser.parse_args(words)
    started = time.monotonic()
    found = measure(options.jobs)
    said = faults(found, None if options.renew else json.loads(BUDGET.read_text(encoding="utf-8")))
    if options.renew:
        rows = (
            f"{json.dumps(name)}: {json.dumps({a: [u.registers, u.shared] for a, u in usages.items()})}"
            for name, usages in sorted(found.items())
        )
        BUDGET.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    if not cutlass_include():
        print("CUTLASS's kernels are left out: its headers are missing (pip install 'nvidia-cutlass>=4.2,<5')")
        said += ["CUTLASS's headers are wanted and missing"] if options.cutlass else []
    for sentence in said:
        print(sentence)
    print(
        f"{len(found)} kernels on sm_{', '.join(ARCHITECTURES)}: {len(said)} faults, {time.monotonic() - started:.0f} s"
    )
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
