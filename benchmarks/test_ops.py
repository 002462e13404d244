"""``pytest benchmarks/test_ops.py --benchmark-only``: each op native beside stock, a group a layer and direction."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.support.cases import SPECS, Case, alexnet_cases

from . import harness


@pytest.mark.parametrize("backend", ["native", "stock"])
@pytest.mark.parametrize(
    ("case", "direction"),
    [
        pytest.param(case, direction, id=f"{op}-{harness.layer_name(case).replace(' ', '-')}-{direction}")
        for op in SPECS
        for case in alexnet_cases(op, harness.BATCH)
        for direction in harness.directions(op)
    ],
)
def test_op(benchmark: BenchmarkFixture, case: Case, direction: str, backend: str) -> None:
    harness.require_library(backend)
    benchmark.group = f"{case.op} {harness.layer_name(case)} {direction}"
    benchmark(harness.op_run(case, direction, backend))
