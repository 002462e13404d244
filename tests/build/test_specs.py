"""The specs: complete, and what they declare is what is on disk; who may import whom."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tests.support import ROOT, cases
from tests.support.spec import Spec

GRADIENT, WITHOUT_GRADIENT = "local_response_norm", "augment"
each_op = pytest.mark.parametrize("op", cases.SPECS)


@each_op
def test_an_op_is_on_the_gpu_where_its_kernels_are(op: str) -> None:
    cuda = list((ROOT / "csrc" / op).rglob(f"{op}_cuda_ops.cpp"))
    triton = ROOT / "alexnet_ext/ops" / op / "triton_kernels.py"
    assert cases.SPECS[op].on_gpu == bool(cuda)
    assert cases.SPECS[op].in_triton == triton.is_file()
    assert cases.SPECS[op].name == op


def test_every_triton_kernel_must_be_launched_as_compiled() -> None:
    """By the runs of its own op, or of one that is made of it."""
    written = {
        f"{path.parent.name}{name}"
        for path in (ROOT / "alexnet_ext/ops").glob("*/triton_kernels.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(written) > len(cases.named("on_gpu"))
    assert written == set().union(*(spec.triton_kernels for spec in cases.SPECS.values()))


@pytest.mark.parametrize("name", [field.name for field in fields(Spec)])
def test_a_spec_without_a_field_is_none(name: str) -> None:
    given = vars(cases.SPECS[GRADIENT])
    with pytest.raises(TypeError, match=rf"missing 1 required keyword-only argument: '{name}'"):
        Spec(**{field: value for field, value in given.items() if field != name})


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *((WITHOUT_GRADIENT, name) for name in ("cases", "examples", "alexnet", "faults")),
        *((GRADIENT, name) for name in ("edges", "small", "backward_arguments", "needs", "saved", "fuzz")),
        *((GRADIENT, name) for name in ("bad_calls", "bad_backward_calls")),
        *((WITHOUT_GRADIENT, name) for name in ("emulated", "ptx", "runs", "triton_kernels")),
        *((GRADIENT, name) for name in ("emulated_orders", "large")),
    ],
)
def test_a_spec_that_leaves_a_suite_without_work_is_refused(op: str, name: str) -> None:
    spec = cases.SPECS[op]
    value = getattr(spec, name)
    with pytest.raises(ValueError, match=rf"the spec of {op} has nothing in {name}: a suite would leave it out"):
        replace(spec, **{name: None if callable(value) else type(value)()})


def test_a_spec_has_cases_of_its_own_op() -> None:
    with pytest.raises(ValueError, match="the spec of augment has cases of local_response_norm"):
        replace(cases.SPECS["augment"], large=cases.SPECS[GRADIENT].large)


@each_op
def test_an_op_has_faults_in_its_kernels(op: str) -> None:
    files = {fault.file for fault in cases.SPECS[op].faults}
    assert all(file.startswith((f"csrc/{op}/", f"alexnet_ext/ops/{op}/")) for file in files)


def imported(folder: Path) -> dict[Path, set[str]]:
    """The modules of tests and benchmarks that each file below the folder imports, by what it is written as."""
    pattern = re.compile(r"^ *(?:from|import) ((?:tests|benchmarks|\.+)[\w.]*)", re.MULTILINE)
    return {path: set(pattern.findall(path.read_text(encoding="utf-8"))) for path in folder.rglob("*.py")}


def test_tests_and_benchmarks_import_one_another_in_one_direction() -> None:
    """Benchmarks know tests/support, and what counts also the PTX machine; of the tests only theirs know benchmarks."""
    for path, modules in imported(ROOT / "benchmarks").items():
        counts = path == ROOT / "benchmarks/predict/count.py"
        known = ("tests.support", *(("tests.gpu_on_cpu", "tests.tools") if counts else ()))
        assert all(name.startswith(known) for name in modules if name.startswith("tests")), path
    for path, modules in imported(ROOT / "tests").items():
        if (ROOT / "tests/benchmarks") not in path.parents:
            assert not any(name.startswith("benchmarks") for name in modules), path


def test_the_ptx_machine_imports_nothing_above_it() -> None:
    found = imported(ROOT / "tests/gpu_on_cpu/ptx")
    assert len(found) > 10
    for path, modules in found.items():
        assert not any(name.startswith(("tests", "benchmarks", "..")) for name in modules), path
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"^ *(from|import) (torch|triton|alexnet_ext)\b", source, re.MULTILINE), path
