"""The mirror: an op's name finds its schema, kernels, Python side, test and benchmark; no file or function is long."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import alexnet_ext
from alexnet_ext import models, nn, ops
from alexnet_ext.ops import _backend, _register
from tests.support import ROOT, cases

FOLDERS = ("alexnet_ext", "benchmarks", "csrc", "examples", "tests")
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh"}
LONGEST, LONGEST_FUNCTION = 500, 60
CPU_ENDINGS = (".h", "_cpu.cpp", "_ops.cpp")
ENDINGS = (*CPU_ENDINGS, "_plan.h", "_kernels.cuh", "_cuda.cu", "_cuda_ops.cpp")

ON_GPU = cases.named("on_gpu")
each_op = pytest.mark.parametrize("op", _backend.OPS)


def folders(parent: str) -> set[str]:
    return {path.name for path in (ROOT / parent).iterdir() if path.is_dir() and not path.name.startswith("_")}


def test_the_op_folders_are_the_ops() -> None:
    assert folders("alexnet_ext/ops") == set(_backend.OPS)
    assert folders("csrc") == {*_backend.OPS, "common"}
    assert folders("tests/ops") == set(_backend.OPS)
    assert set(cases.SPECS) == set(_backend.OPS)
    assert set(ops.__all__) == {*_backend.OPS, "use_backend"}
    assert _register.RECORDS.keys() == set(_backend.OPS)


@each_op
def test_every_op_has_its_files(op: str) -> None:
    on_gpu = op in ON_GPU
    expected = [
        *(f"csrc/{op}/{op}{ending}" for ending in (ENDINGS if on_gpu else CPU_ENDINGS)),
        *(f"alexnet_ext/ops/{op}/{name}" for name in ("__init__.py", "op.py", "reference.py")),
        *([f"alexnet_ext/ops/{op}/triton_kernels.py"] if cases.SPECS[op].in_triton else []),
        *(f"tests/ops/{op}/{name}" for name in ("__init__.py", "spec.py", f"test_{op}.py", f"test_{op}.cpp")),
    ]
    assert [path for path in expected if not (ROOT / path).is_file()] == []


def names(op: str) -> tuple[str, ...]:
    """The op and its backward, where it has one."""
    return (op,) if op in cases.WITHOUT_GRADIENT else (op, f"{op}_backward")


@each_op
def test_every_op_and_its_backward_has_a_schema_and_a_cpu_kernel(op: str) -> None:
    library = (ROOT / "csrc/library.cpp").read_text(encoding="utf-8")
    bindings = (ROOT / f"csrc/{op}/{op}_ops.cpp").read_text(encoding="utf-8")
    for name in names(op):
        assert len(re.findall(rf'"{name}\(', library)) == 1, f"schema of {name}"
        assert len(re.findall(rf'impl\("{name}"', bindings)) == 1, f"registration of {name}"


@pytest.mark.parametrize("op", ON_GPU)
def test_every_op_and_its_backward_has_a_cuda_kernel(op: str) -> None:
    bindings = (ROOT / f"csrc/{op}/{op}_cuda_ops.cpp").read_text(encoding="utf-8")
    for name in names(op):
        assert len(re.findall(rf'impl\("{name}"', bindings)) == 1, f"registration of {name}"
    # Both on the device and the stream that are current for their input, and with the launch checked.
    registered = len(re.findall(r"m\.impl\(", bindings))
    assert len(re.findall(r"^  CudaStream stream\(", bindings, re.MULTILINE)) == registered
    assert len(re.findall(r"stream\.check\(", bindings)) >= len(names(op))


def test_kernels_are_launched_in_one_place_and_declare_no_shared_memory() -> None:
    """So the emulator runs the same code as nvcc compiles, and knows the size of a block's shared memory."""
    sources = {path: path.read_text("utf-8") for path in (ROOT / "csrc").rglob("*.cu*")}
    assert len(sources) > len(_backend.OPS)
    launch = ROOT / "csrc/common/launch.cuh"
    for words in ("<<<", "__shared__"):
        assert [path for path, text in sources.items() if words in text] == [launch], words


def test_readme_names_every_op() -> None:
    named = re.findall(r"^\| `ops\.(\w+)\(", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(_backend.OPS) <= set(named)


@each_op
def test_every_op_says_what_it_equals(op: str) -> None:
    assert "Equals ``" in getattr(ops, op).__doc__.replace("\n    ", " ")


def test_the_reference_has_every_public_name() -> None:
    """docs/*.md names them, mkdocstrings writes the pages from their docstrings."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    named = {line.split(".")[-1] for line in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}
    layers = {name for name, value in vars(nn).items() if isinstance(value, type) and value.__module__ == nn.__name__}
    public = {*ops.__all__, *models.__all__, *alexnet_ext.__all__, *(n for n in layers if not n.startswith("_")), "SGD"}
    tables = {"VARIANTS", "INITS", "AlexNetConfig", "summary"}  # data, and output of the command line
    assert public - named - tables - {"__version__", "models", "nn", "ops", "optim"} == set()


def test_kernels_know_no_pytorch() -> None:
    """Only the bindings, *_ops.cpp, library.cpp and their common headers include torch's headers."""
    kernels = [
        path
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in SUFFIXES - {".py"} and path.parent.name != "common" and not path.name.endswith("_ops.cpp")
    ]
    kernels.remove(ROOT / "csrc/library.cpp")
    assert len(kernels) >= 2 * len(_backend.OPS)
    including = [path for path in kernels if re.search(r"#include [<\"](torch|ATen|c10)/", path.read_text("utf-8"))]
    assert including == []


def test_what_public_headers_include_is_installed() -> None:
    """cmake --install takes <op>/<op>.h and the headers of csrc/common that cmake/plain_library.cmake names."""
    listed = re.search(r"set\(HEADERS (.+)\)", (ROOT / "cmake/plain_library.cmake").read_text(encoding="utf-8"))
    assert listed is not None
    installed = {ROOT / "csrc" / name for name in (*listed[1].split(), *(f"{op}/{op}.h" for op in _backend.OPS))}
    for header in installed:
        included = re.findall(r'#include "(.+)"', header.read_text(encoding="utf-8"))
        assert {(header.parent / name).resolve() for name in included} <= installed, header


def module(name: tuple[str, ...]) -> Path | None:
    """The file of a module or package of the tree."""
    path = ROOT.joinpath(*name)
    files = path.with_suffix(".py"), path / "__init__.py"
    return next((file for file in files if name and file.is_file()), None)


def imported(file: Path) -> Iterator[Path]:
    """The modules that a file names in its imports, those inside of functions too; not those for type checkers alone.

    ``from package import module`` counts for the module: what the package's ``__init__`` imports is run before it.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    checks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for_types = {node for check in checks for statement in check.body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = file.parent.relative_to(ROOT).parts
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) if module((*base, alias.name)) else base for alias in node.names]
        if node not in for_types:
            yield from filter(None, map(module, names))


def circle(graph: dict[Path, set[Path]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [str(file.relative_to(ROOT)) for file in error.args[1]]
    return []


def test_no_modules_import_one_another() -> None:
    package = ROOT / "alexnet_ext"
    graph = {file: set(imported(file)) - {file} for file in package.rglob("*.py")}
    assert package / "ops/_backend.py" in graph[package / "ops/local_response_norm/op.py"]
    assert package / "models/weights.py" in graph[package / "export.py"]
    assert package / "training/interrupt.py" in graph[package / "__init__.py"], "an import in a branch"
    assert package / "training/checkpoint.py" in graph[package / "export.py"], "an import in a function"
    assert circle(graph) == []
    graph[package / "ops/_known.py"].add(package / "selfcheck/prove.py")
    assert circle(graph)[0] == circle(graph)[-1], "a circle is found where there is one"


def test_no_file_is_long() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    assert len(files) > 50
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def code_lines(file: Path) -> dict[str, int]:
    """The lines of each function, those of its docstring not counted."""
    found = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, last = node.lineno, node.end_lineno
            assert last is not None
            document = ast.get_docstring(node, clean=False)
            lines = 0 if document is None else document.count("\n") + 1
            found[f"{file}:{first} {node.name}"] = last - first + 1 - lines
    return found


def test_no_function_is_long(tmp_path: Path) -> None:
    lengths = {k: v for folder in FOLDERS for f in (ROOT / folder).rglob("*.py") for k, v in code_lines(f).items()}
    assert len(lengths) > 1000
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}
    (example := tmp_path / "example.py").write_text(
        'def outer():\n    """One\n    two."""\n    def inner():\n        pass\n'
    )
    assert list(code_lines(example).values()) == [3, 2]
