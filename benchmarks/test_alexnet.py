"""``pytest benchmarks/test_alexnet.py --benchmark-only``: the paper's network, fused layers and torch.nn's."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from . import harness


@pytest.mark.parametrize("layers", ["fused", "stock"])
@pytest.mark.parametrize("kind", harness.NETWORK)
def test_alexnet(benchmark: BenchmarkFixture, kind: str, layers: str) -> None:
    harness.require_library("native" if layers == "fused" else "stock")
    benchmark.group = f"AlexNet {kind}, batch {harness.BATCH}"
    benchmark(harness.network_run(kind, fused=layers == "fused"))
