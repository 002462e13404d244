"""The build, in tests of seconds: linked libraries, the options that setup.py passes on, a missing library.

The slow half (virtual environments, wheels, other torch versions, incremental rebuilds) is in .ci/.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from alexnet_ext import _library
from alexnet_ext.selfcheck.info import info
from tests.support import ROOT

OBJECTS = ROOT / "build" / "editable" / "CMakeFiles"


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "TORCH_CUDA_ARCH_LIST")}
    return subprocess.run(
        command, cwd=cwd, env=variables | environment, capture_output=True, text=True, timeout=300, check=False
    )


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} (binutils) is not installed")


# ---- linked libraries


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_libraries_name_torch_by_soname_alone_and_carry_cudart(name: str) -> None:
    needs("readelf")
    path = _library.FOLDER / f"libalexnet_ext_{name}.so"
    if not path.exists():
        pytest.skip(f"{path.name} is not built: {_library.build_record().get(f'{name}_reason', 'no build record')}")
    entries = run(["readelf", "--dynamic", "--wide", str(path)], ROOT).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", entries)
    assert "libtorch_cpu.so" in needed
    assert not [entry for entry in needed if "/" in entry]
    assert not re.findall(r"\((?:RPATH|RUNPATH)\)", entries)
    assert not [entry for entry in needed if re.match(r"libcuda|libcudart|libc10|libtorch_python|libpython", entry)]


def leaking_symbols(isa: str, listing: str) -> list[str]:
    """Weak symbols of ``nm -C`` that the linker could keep for another instruction set's object files."""
    weak = re.findall(r"^\S+ [WVu] (.*)$", listing, re.MULTILINE)
    own = re.compile(rf"alexnet_ext::{isa}\b|\(alexnet_ext::Isa\)\d|^DW\.ref\.")
    return [symbol for symbol in weak if not own.search(symbol)]


def test_leaking_symbols_are_recognized() -> None:
    own = "0000 W float alexnet_ext::avx2::narrow<float>(float)\n0000 V DW.ref.__gxx_personality_v0\n"
    assert leaking_symbols("avx2", own) == []
    assert leaking_symbols("avx2", own + "0000 W std::sqrt(float)\n") == ["std::sqrt(float)"]
    assert leaking_symbols("avx2", "0000 W alexnet_ext::ceil_div(long, long)\n") == [
        "alexnet_ext::ceil_div(long, long)"
    ]


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_inline_function_of_a_wide_instruction_set_can_serve_a_narrow_one(isa: str) -> None:
    needs("nm")
    objects = sorted((OBJECTS / f"cpu_kernels_{isa}.dir").rglob("*.o"))
    if not objects:
        pytest.skip(f"no object files under {OBJECTS}: not an editable install, or not x86-64")
    listing = run(["nm", "-C", *map(str, objects)], ROOT).stdout
    assert f"(alexnet_ext::Isa){1 if isa == 'avx2' else 2}" in listing
    assert leaking_symbols(isa, listing) == []


# ---- CMake: parts left out, the reason and the remedy

CPU_BUILD = "/no/torch;2.99.0;;"
CUDA_BUILD = "/no/torch;2.99.0;13.0;"


def configured(folder: Path, torch_facts: str, *options: str, with_nvcc: bool = False) -> tuple[str, dict[str, str]]:
    """Configures a copy of the tree for such a torch, with or without nvcc. Returns CMake's output and the record."""
    tools = Path(sys.executable).parent
    entries = [entry for entry in os.environ["PATH"].split(os.pathsep) if with_nvcc or not nvcc(entry)]
    path = os.pathsep.join([str(tools), *entries])
    version = run(["cmake", "--version"], ROOT, PATH=path) if shutil.which("cmake", path=path) else None
    found = re.search(r"version (\d+)\.(\d+)", version.stdout) if version else None
    if found is None or (int(found[1]), int(found[2])) < (3, 26) or shutil.which("ninja", path=path) is None:
        pytest.skip("cmake 3.26 or newer and ninja are not installed (pip install cmake ninja)")
    tree = folder / "tree"
    for name in ("cmake", "csrc"):
        shutil.copytree(ROOT / name, tree / name)
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    (tree / "cmake" / "torch_facts.py").write_text(f"print({torch_facts!r})\n")
    command = ["cmake", "-G", "Ninja", "-S", str(tree), "-B", str(folder / "build")]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DALEXNET_EXT_OUTPUT={folder}", *options]
    done = run(command, folder, PATH=path)
    assert done.returncode == 0, done.stderr
    return " ".join((done.stderr + done.stdout).split()), json.loads((folder / "build_info.json").read_text())


def nvcc(folder: str) -> bool:
    return (Path(folder) / "nvcc").exists()


def test_without_nvcc_the_cuda_library_is_left_out_and_said_so(tmp_path: Path) -> None:
    said, record = configured(tmp_path, CUDA_BUILD)
    assert "no working nvcc was found" in record["cuda_reason"]
    assert "put the nvcc of a CUDA toolkit on PATH" in record["cuda_remedy"]
    assert "pip install -e . --no-build-isolation" in record["cuda_remedy"]
    assert record["cuda_reason"] in said
    assert record["cuda_remedy"] in said


def test_for_a_cpu_build_of_torch_the_cuda_library_is_left_out_and_said_so(tmp_path: Path) -> None:
    said, record = configured(tmp_path, CPU_BUILD)
    assert record["cuda_reason"] == "PyTorch 2.99.0 is a CPU build"
    assert "install a CUDA build of torch" in record["cuda_remedy"]
    assert record["cuda_reason"] in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_without_its_headers_cutlass_is_left_out_and_said_so(tmp_path: Path) -> None:
    said, record = configured(tmp_path, CUDA_BUILD, "-DCUTLASS_INCLUDE=/no/headers", with_nvcc=True)
    assert (record["cuda_reason"], record["cutlass"]) == ("", "")
    assert "looked in /no/headers" in record["cutlass_reason"]
    assert "pip install 'nvidia-cutlass" in record["cutlass_remedy"]
    assert record["cutlass_reason"] in said
    assert record["cutlass_remedy"] in said
    assert "_cutlass" not in (tmp_path / "build" / "build.ninja").read_text(encoding="utf-8")


def cuda_commands(folder: Path) -> dict[str, str]:
    """The compiler's command for each CUDA file of the tree configured there."""
    said = run(["ninja", "-C", str(folder / "build"), "-t", "compdb"], folder, PATH=os.environ["PATH"]).stdout
    return {Path(entry["file"]).name: entry["command"] for entry in json.loads(said) if entry["file"].endswith(".cu")}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_cutlass_is_compiled_where_its_headers_are_and_for_8_0_and_newer_alone(tmp_path: Path) -> None:
    header = tmp_path / "headers" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 3\n#define CUTLASS_PATCH 1 \n")
    facts = CUDA_BUILD.removesuffix(";") + ";7.5,9.0+PTX"
    _, record = configured(tmp_path, facts, f"-DCUTLASS_INCLUDE={header.parents[1]}", with_nvcc=True)
    assert (record["cutlass"], record["cutlass_reason"]) == ("4.3.1", "")
    compiled = cuda_commands(tmp_path)
    ours = {name: command for name, command in compiled.items() if name.endswith("_cutlass.cu")}
    assert len(ours) == 9
    assert not any(name.endswith("_sm90.cu") for name in compiled)
    assert "packed_stride.hpp was found neither in" in record["sm90_reason"]
    assert all("sm_90" in command and "sm_75" not in command for command in ours.values())
    assert all("sm_75" in command for name, command in compiled.items() if name not in ours)
    older = facts.replace(",9.0+PTX", "")
    _, record = configured(tmp_path / "old", older, f"-DCUTLASS_INCLUDE={header.parents[1]}", with_nvcc=True)
    assert "is 8.0 or newer" in record["cutlass_reason"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_the_kernels_of_9_0_are_compiled_for_it_alone_and_where_it_is_wanted(tmp_path: Path) -> None:
    headers = tmp_path / "cutlass" / "include"
    for path in (headers / "cutlass/version.h", tmp_path / "cutlass/tools/util/include/cutlass/util/packed_stride.hpp"):
        path.parent.mkdir(parents=True)
        path.write_text("")
    facts = CUDA_BUILD.removesuffix(";") + ";8.0,9.0+PTX"
    _, record = configured(tmp_path, facts, f"-DCUTLASS_INCLUDE={headers}", with_nvcc=True)
    assert record["sm90_reason"] == ""
    compiled = cuda_commands(tmp_path)
    ours = {name: command for name, command in compiled.items() if name.endswith("_sm90.cu")}
    assert len(ours) == 7
    assert all(set(re.findall(r"sm_\w+", command)) >= {"sm_90a"} for command in ours.values())
    assert not any(re.search(r"sm_80|sm_90\b|compute_90\b", command) for command in ours.values())
    assert_mma_sync_is_for(compiled, half={"sm_80", "compute_80"}, tf32={"sm_80", "sm_90", "compute_90"})
    alone = facts.replace("8.0,9.0+PTX", "9.0")
    configured(tmp_path / "alone", alone, f"-DCUTLASS_INCLUDE={headers}", with_nvcc=True)
    assert_mma_sync_is_for(cuda_commands(tmp_path / "alone"), half=None, tf32={"sm_90"})
    _, record = configured(
        tmp_path / "old", facts.replace(",9.0+PTX", ""), f"-DCUTLASS_INCLUDE={headers}", with_nvcc=True
    )
    assert record["cutlass_reason"] == ""
    assert "9.0 is none of the GPU architectures" in record["sm90_reason"]
    compiled = cuda_commands(tmp_path / "old")
    assert not any(name.endswith("_sm90.cu") for name in compiled)
    assert_mma_sync_is_for(compiled, half={"sm_80"}, tf32={"sm_80"})


def assert_mma_sync_is_for(compiled: dict[str, str], half: set[str] | None, tf32: set[str]) -> None:
    """What CUTLASS's kernels that are not of sm90 are compiled into; None if those of bf16 and fp16 are left out."""
    code = {
        name: {kind for part in re.findall(r"code=\[([^]]+)\]", command) for kind in part.split(",")}
        for name, command in compiled.items()
        if name.endswith("_cutlass.cu")
    }
    of_tf32 = [found for name, found in code.items() if "tf32" in name]
    of_half = [found for name, found in code.items() if "tf32" not in name]
    assert of_tf32 == [tf32] * 3
    assert of_half == ([] if half is None else [half] * 6)


def test_info_repeats_reason_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"cuda_reason": "no nvcc in sight", "cuda_remedy": "find one"}
    (tmp_path / "build_info.json").write_text(json.dumps(record))
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    monkeypatch.setattr(_library, "LIBRARIES", (_library._load("cpu", "cpu", ""), _library._load("cuda", "cuda", "")))
    text = str(info())
    assert "not loaded: no nvcc in sight" in text
    assert "to mend it: find one" in text
    assert "not loaded: libalexnet_ext_cpu.so is not built" in text
    assert f"to mend it: {_library.REBUILD}" in text


# ---- setup.py: options for CMake, and errors from it


def build_with(cmake: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext`` with a cmake that is this shell script."""
    package = folder / "fake" / "cmake"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"CMAKE_BIN_DIR = {str(package)!r}\n")
    (package / "cmake").write_text(f"#!/bin/sh\n{cmake}\n")
    (package / "cmake").chmod(0o755)
    if tuple(map(int, setuptools_version().split(".")[:1])) < (77,):
        pytest.skip(f"setuptools {setuptools_version()} is older than the 77 that pyproject.toml asks for")
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    return run(command, ROOT, PYTHONPATH=str(package.parent), **environment)


def setuptools_version() -> str:
    import setuptools

    return setuptools.__version__


def test_max_jobs_reaches_the_build(tmp_path: Path) -> None:
    done = build_with('echo "cmake $*"', tmp_path, MAX_JOBS="3")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^cmake --build .* --parallel 3$", done.stdout, re.MULTILINE), done.stdout


def test_a_compile_error_is_the_compilers_own_message_and_no_traceback(tmp_path: Path) -> None:
    done = build_with('[ "$1" != --build ] || { echo "kernel.cpp:7: error: no member named y"; exit 1; }', tmp_path)
    assert done.returncode != 0
    assert "kernel.cpp:7: error: no member named y" in done.stdout
    assert "alexnet_ext did not compile: the message above says why" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_source_distribution_has_all_that_the_build_reads(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("cmake", "csrc", "alexnet_ext"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    done = run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)], tree)
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("alexnet_ext-*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path for folder in ("cmake", "csrc") for path in (ROOT / folder).rglob("*.*") if path.is_file()]
    assert len(sources) > 50
    assert {str(path.relative_to(ROOT)) for path in sources} | {"CMakeLists.txt", "setup.py"} <= names


# ---- import without a library, or with one that is none

STOCK_ONLY = """
import json
import torch
import alexnet_ext as ax
from alexnet_ext import _library
from tests.support import cases, oracle

for case in cases.EXAMPLES:
    oracle.assert_matches_float64(case, cases.make(case))
networks = []
for fused in (True, False):
    torch.manual_seed(0)
    networks.append(ax.models.alexnet("paper", fused=fused, num_classes=10, image_size=67, init="kaiming").eval())
x = torch.randn(2, 3, 67, 67)
torch.testing.assert_close(networks[0](x), networks[1](x))
print(json.dumps({"folder": str(_library.FOLDER), "reason": _library.LIBRARIES[0].reason,
                  "remedy": _library.LIBRARIES[0].remedy, "info": str(ax.info())}))
"""


@pytest.mark.parametrize(
    ("library", "reason"),
    [(None, "libalexnet_ext_cpu.so is not built"), (b"no library at all", "libalexnet_ext_cpu.so does not load: ")],
    ids=["missing", "garbage"],
)
def test_import_never_fails_and_everything_runs_stock(tmp_path: Path, library: bytes | None, reason: str) -> None:
    package = tmp_path / "alexnet_ext"
    shutil.copytree(ROOT / "alexnet_ext", package, ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__"))
    if library is not None:
        for name in ("cpu", "cuda"):
            (package / f"libalexnet_ext_{name}.so").write_bytes(library)
    done = run([sys.executable, "-c", STOCK_ONLY], tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["folder"] == str(package)
    assert found["reason"].startswith(reason)
    assert found["remedy"] == _library.REBUILD
    assert f"cpu     not loaded: {reason}" in found["info"]
    assert f"to mend it: {_library.REBUILD}" in found["info"]
    # Nothing claims to be compiled.
    assert "native" not in re.sub(r".*Backends", "", found["info"], flags=re.DOTALL)


def test_this_installation_has_its_cpu_library() -> None:
    """Tests of the compiled ops skip without it, so its absence must fail somewhere."""
    cpu = _library.LIBRARIES[0]
    assert cpu.loaded, f"{cpu.reason}; to mend it: {cpu.remedy}"
    record = _library.build_record()
    assert set(record["cpu_instruction_sets"].split(", ")) >= {"portable"}
    cuda = _library.LIBRARIES[1]
    if torch.version.cuda and not cuda.loaded:
        assert cuda.reason
        assert cuda.remedy
