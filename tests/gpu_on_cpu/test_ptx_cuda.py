"""Our own CUDA kernels as nvcc compiles them for compute capability 8.0, run by the machine of ptx.

test_emulator.py runs their source at more sizes. These tests cover the compiler's own division, powers, accesses
of 16 bytes and shuffles, and approximate instructions that err as far as they may.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest
import torch

from tests.gpu_on_cpu.cuda_adapter import CompiledOps
from tests.gpu_on_cpu.ptx.runtime import shared_folder
from tests.ops.blocks import winners_of_ties
from tests.ops.conv2d_bias_relu.spec import to_depth_and_back
from tests.support import cases, oracle
from tests.support.cases import block, pool

pytestmark = pytest.mark.drawn


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> CompiledOps:
    if shutil.which("nvcc") is None or torch.version.cuda is None:
        pytest.skip("nvcc is not on PATH, or this torch is a CPU build")
    with shared_folder(tmp_path_factory.getbasetemp(), "ptx_cuda") as folder:
        return CompiledOps(folder)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("op", cases.ON_GPU)
def test_compiled_kernels_match_float64(op: str, ops: CompiledOps) -> None:
    with ops.in_place() as launched:
        for case in cases.SPECS[op].ptx:
            for dtype in cases.DTYPES:
                for layout in ("contiguous", "channels_last"):
                    oracle.assert_matches_float64(case, cases.make(case, dtype, layout), "native")
    assert set(ops.kernels[op]) <= launched


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("op", cases.WITHOUT_GRADIENT)
def test_without_a_gradient_they_equal_the_cpu_kernel_to_the_bit(op: str, ops: CompiledOps) -> None:
    found: set[str] = set()
    for case in (cases.in_dtype(case, dtype) for case in cases.SPECS[op].ptx for dtype in cases.DTYPES):
        tensors = cases.make(case)
        expected = cases.fused(case, tensors, "native")
        with ops.in_place() as launched:
            assert torch.equal(cases.fused(case, tensors, "native"), expected)
        found |= launched
    assert set(ops.kernels[op]) <= found


@pytest.mark.usefixtures("native")
def test_a_weight_turned_to_depth_is_pytorchs(ops: CompiledOps) -> None:
    for dtype in cases.DTYPES:
        weight = torch.randn(5, 3, 11, 7).to(dtype)
        expected = to_depth_and_back(weight, 4)
        with ops.in_place() as launched:
            found = to_depth_and_back(weight, 4)
        assert len(launched) == 2
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_winners_of_ties_and_nan_are_pytorchs(layout: str, ops: CompiledOps) -> None:
    with ops.in_place():
        for dtype in cases.DTYPES:
            winners, expected = winners_of_ties((2, 24, 7, 8), dtype, layout)
            assert torch.equal(winners, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.dtype_id)
def test_pooling_compiled_for_9_0_equals_the_cpu_kernel_to_the_bit(
    dtype: torch.dtype, ops: CompiledOps, tmp_path: Path
) -> None:
    """Pairs of bf16 are compared by instructions that 8.0 lacks: NaN, ties, inf, the sign of a zero."""
    values = torch.tensor([nan, inf, -inf, -0.0, 0.0, -1.0, 1.0, 2.0], dtype=dtype)
    with ops.compiled_for("90", "relu_max_pool2d", tmp_path):
        for case in (pool((2, 16, 9, 12)), pool((1, 24, 7, 6), 3, 1, padding=1)):
            x = values[torch.randint(0, len(values), case.shapes["x"])]
            arguments = cases.raw_forward(case, {"x": cases.lay_out(x, "channels_last")})
            y, winners = torch.ops.alexnet_ext.relu_max_pool2d(*arguments)
            with ops.in_place() as launched:
                found, found_winners = torch.ops.alexnet_ext.relu_max_pool2d(*arguments)
            assert any("planes" in name for name in launched)
            assert torch.equal(found_winners, winners)
            torch.testing.assert_close(found, y, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(found.signbit() & ~found.isnan(), y.signbit() & ~y.isnan())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("op", cases.BLOCKS)
def test_the_machine_notices(op: str, ops: CompiledOps) -> None:
    """The same bits whichever warp goes first; other bits, or an error, without the barriers."""
    case = block(op, (3, 24, 11, 13))  # several blocks, and rows of bias sums
    tensors = cases.make(case, layout="channels_last")
    upstream = torch.randn(cases.stock(case, tensors).shape)

    def results(order: str) -> list[torch.Tensor]:
        with ops.in_place(order) as launched:
            y = cases.fused(case, tensors, "native")
            found = [y.detach(), *torch.autograd.grad(y, [tensors["x"], tensors["bias"]], upstream)]
        names.update(launched)
        return found

    def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    names: set[str] = set()
    expected = results("together")
    assert all(same(results(order), expected) for order in ("forward", "backward"))
    kernels = [ops.by_name[name] for name in names]
    codes = [list(kernel.code) for kernel in kernels]
    try:
        for kernel in kernels:
            kernel.code[:] = [replace(i, op=["pragma"]) if i.op[:2] == ["bar", "sync"] else i for i in kernel.code]
        assert [kernel.code for kernel in kernels] != codes
        assert not all(same(results(order), expected) for order in ("forward", "backward"))
    finally:
        for kernel, code in zip(kernels, codes, strict=True):
            kernel.code[:] = code
