"""The gates of benchmarks.predict: kernels are compiled for 9.0 and counted anew. Every one of AlexNet's training step
is; of the others, in fp32 and for contiguous images, a third that the commit picks."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch

from benchmarks.predict import count, gates
from benchmarks.predict.kernels import COUNTS
from tests.gpu_on_cpu.ptx.runtime import shared_folder

COMMITTED = json.loads(COUNTS.read_text(encoding="utf-8"))
JOBS = {job.work.name: job for job in count.jobs()}
COUNTED = [name if gates.on_path(name) else pytest.param(name, marks=pytest.mark.drawn) for name in sorted(JOBS)]


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if shutil.which("nvcc") is None or torch.version.cuda is None:
        pytest.skip("nvcc is not on PATH, or this torch is a CPU build")
    with shared_folder(tmp_path_factory.getbasetemp(), "predict") as folder:
        return count.Counter(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_gates_hold(name: str, counter: count.Counter) -> None:
    assert list(gates.faults(name, counter.row(JOBS[name]), COMMITTED)) == []


@pytest.mark.slow
def test_the_thread_that_loads_keeps_up_with_the_products() -> None:
    from tests.tools.cuda_budget import cutlass_include

    if shutil.which("nvcc") is None or not cutlass_include():
        pytest.skip("nvcc is not on PATH, or CUTLASS's headers are missing")
    assert list(gates.producer_faults(count.producers())) == []
