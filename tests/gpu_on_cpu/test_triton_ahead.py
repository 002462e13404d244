"""The Triton kernels' compiled code, with no GPU: tensor cores, 16-byte accesses, no spills, shared memory.

A process of its own compiles, as this one may be under Triton's interpreter. ``pytest -m slow`` compiles every kernel
and configuration for one of compute capability 8.0, 9.0 and 10.0, with ``--part whole`` for all (10 minutes on one
core); the plain suite compiles a sample.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.gpu_on_cpu.uninterpreted import printed
from tests.support import cases

pytest.importorskip("triton", reason="Triton is not installed")

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PRODUCT = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
CONVOLUTION = ("_product_kernel", "_weight_kernel")

FULL = [
    pytest.param(f"full {capability}", marks=pytest.mark.slow(third=third)) for third, capability in enumerate(PRODUCT)
]
grids = pytest.mark.parametrize("grid", ["quick", *FULL])


@cache
def compiled(grid: str) -> list[dict[str, Any]]:
    return printed("tests.gpu_on_cpu.triton_ahead", *grid.split())


def named(row: dict[str, Any]) -> str:
    arithmetic = " tf32" if row["tf32"] else ""
    return (
        f"{row['op']} {row['kernel']} {row['dtype']}{arithmetic} {row['channels']} {row['layout']} {row['capability']}"
    )


@pytest.fixture(scope="module", autouse=True)
def _cuda_build() -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is a CPU build: the kernels are not defined without the interpreter")


@grids
def test_every_kernel_is_there(grid: str) -> None:
    rows = compiled(grid)
    ops = {row["op"] for row in rows if not row["op"].startswith("conv")}
    with_gradient = {name + suffix for name in cases.MEMORY_BOUND for suffix in ("", "_backward")}
    assert ops == with_gradient | set(cases.named("in_triton", "not gradient"))
    assert cases.named("in_triton", "product") == ("conv2d_bias_relu",), "another product needs work in triton_ahead.py"
    convolutions = {(row["kernel"], row["capability"]) for row in rows if row["op"].startswith("conv")}
    full = grid != "quick"
    kernels = (*CONVOLUTION, "_mask_kernel") if full else ("_product_kernel",)
    capabilities = [int(grid.split()[1])] if full else PRODUCT
    assert convolutions == {(kernel, capability) for kernel in kernels for capability in capabilities}


@grids
def test_convolutions_run_on_tensor_cores(grid: str) -> None:
    rows = [row for row in compiled(grid) if row["kernel"] in CONVOLUTION]
    half = [row for row in rows if row["dtype"] in ("bfloat16", "float16") or row["tf32"]]
    assert len(half) >= 3
    assert [named(row) for row in half if PRODUCT[row["capability"]] not in row["products"]] == []
    ieee = [row for row in rows if row["dtype"] == "float32" and not row["tf32"]]
    assert [named(row) for row in ieee if row["products"]] == [], "IEEE fp32 is no tensor core's"


@grids
def test_nothing_spills_and_shared_memory_suffices(grid: str) -> None:
    rows = compiled(grid)
    assert [named(row) for row in rows if row["local"]] == []
    assert [named(row) for row in rows if row["shared"] > SHARED_LIMIT[row["capability"]]] == []


@grids
def test_memory_bound_kernels_move_16_bytes_at_a_time(grid: str) -> None:
    """Channels-last only: a contiguous plane of 55 x 55, 17 channels and a crop have no 16-byte rows."""
    rows = [row for row in compiled(grid) if row["kernel"] not in CONVOLUTION and row["layout"] == "channels_last"]
    rows = [row for row in rows if row["channels"] % 16 == 0]
    assert len(rows) >= 8
    assert [named(row) for row in rows if not row["wide_stores"]] == []
    loads = [row for row in rows if row["op"] != "augment"]
    assert [named(row) for row in loads if not row["wide_loads"]] == []


@pytest.mark.slow
def test_torch_compile_sees_the_kernels() -> None:
    """The backend's graph contains the kernels, and no opaque op."""
    rows = compiled("traced")
    given = [cases.SPECS[case.op] for case in cases.EXAMPLES + cases.OTHER_EXAMPLES]
    assert len(rows) == sum(1 + spec.gradient for spec in given if spec.in_triton)
    assert [row for row in rows if row["opaque"] or not row["kernels"]] == []
