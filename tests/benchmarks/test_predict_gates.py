"""The gates of benchmarks.predict: kernels are compiled for 9.0 and counted anew.

Every one of AlexNet's training step is; of the others (fp32, contiguous images) a third that the commit picks.
So are twins in Triton, in a process of their own with Triton's compiler.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch

from benchmarks.predict import count, gates
from benchmarks.predict.kernels import COUNTS
from tests.gpu_on_cpu.ptx.runtime import shared_folder
from tests.gpu_on_cpu.uninterpreted import printed

COMMITTED = json.loads(COUNTS.read_text(encoding="utf-8"))
JOBS = {job.work.name: job for job in count.jobs()}
NATIVE = sorted(name for name in JOBS if not name.endswith("triton"))
COUNTED = [name if gates.on_path(name) else pytest.param(name, marks=pytest.mark.drawn) for name in NATIVE]


def counted_in_triton(*words: str) -> dict[str, Any]:
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.version.cuda is None:
        pytest.skip("this torch is a CPU build: the kernels are not defined without the interpreter")
    return {line["name"]: line["row"] for line in printed("benchmarks.predict.count", "triton", *words)}


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("nvcc") is None or torch.version.cuda is None:
        pytest.skip("nvcc is not on PATH, or this torch is a CPU build")
    with shared_folder(tmp_path_factory.getbasetemp(), "predict") as folder:
        return count.NativeCounter(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_gates_hold(name: str, counter: count.NativeCounter) -> None:
    assert list(gates.faults(name, counter.row(JOBS[name]), COMMITTED)) == []


def test_a_triton_kernel_is_counted_as_it_was() -> None:
    name = "relu_max_pool2d forward 128x256x13x13 bfloat16 channels_last triton"
    rows = counted_in_triton("relu_max_pool2d", "forward", "128x256x13x13")
    assert list(rows) == [name]
    assert list(gates.faults(name, rows[name], COMMITTED)) == []


@pytest.mark.slow
def test_gates_hold_for_triton() -> None:
    rows = counted_in_triton()
    assert set(rows) == {name for name in JOBS if name.endswith("triton")}
    assert [fault for name in rows if gates.on_path(name) for fault in gates.faults(name, rows[name], COMMITTED)] == []


@pytest.mark.slow
def test_the_thread_that_loads_keeps_up_with_the_products() -> None:
    from tests.tools.cuda_budget import cutlass_include

    if shutil.which("nvcc") is None or not cutlass_include():
        pytest.skip("nvcc is not on PATH, or CUTLASS's headers are missing")
    assert list(gates.producer_faults(count.producers())) == []
