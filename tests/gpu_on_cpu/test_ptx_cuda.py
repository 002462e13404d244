"""Our own CUDA kernels as nvcc compiles them for compute capability 8.0, run by the machine of ptx.

test_emulator.py runs their source at more sizes. These tests cover the compiler's own division, powers, accesses
of 16 bytes and shuffles, and approximate instructions that err as far as they may.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from tests.gpu_on_cpu.cuda_adapter import CompiledOps
from tests.gpu_on_cpu.ptx.runtime import shared_folder
from tests.support import cases, oracle
from tests.support.cases import augment, block, conv, lrn, pool

# Every kernel of an op's file is launched by these, in one dtype and layout or another.
pytestmark = pytest.mark.drawn

CASES = (
    *(lrn((1, 8, 1, 30)), lrn((2, 7, 3, 5)), lrn((2, 24, 3, 5), size=3), lrn((2, 24, 3, 5), size=7)),
    *(lrn((2, 16, 3, 5), beta=0.3), lrn((1, 130, 2, 3), size=4)),
    *(pool((1, 8, 9, 10), 2, 4), pool((2, 5, 8, 6), 2, 2), pool((3, 7, 6), 3, 2)),
    *(pool((1, 16, 6, 8), 3, 2, padding=1, ceil_mode=True), pool((1, 8, 11, 9), (2, 3), (2, 1), dilation=(3, 2))),
    *(
        conv((1, 1, 1, 1), 1, (1, 1)),
        conv((2, 8, 3, 3), 40, (1, 1)),
        conv((2, 4, 7, 5), 6, (3, 3), groups=2, bias=False),
    ),
    *(
        case
        for op in cases.BLOCKS
        for case in (
            block(op, (1, 1, 1, 1), kernel_size=1, stride=1),
            block(op, (2, 8, 5, 7), lrn_size=1),
            *(block(op, (2, channels, 5, 7)) for channels in (1, 8, 24)),
            *(block(op, (2, 16, 5, 7), beta=beta, bias=False) for beta in (0.0, 0.3)),
            block(op, (2, 8, 9, 8), kernel_size=2, stride=3),
            block(op, (1, 65, 5, 7), lrn_size=4),
        )
    ),
)
OPS = sorted({case.op for case in CASES})
AUGMENT_CASES = tuple(augment((5, size + 2, size + 3, 3), size, depth) for depth in (1, 4) for size in (1, 8, 17))


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> CompiledOps:
    if shutil.which("nvcc") is None or torch.version.cuda is None:
        pytest.skip("nvcc is not on PATH, or this torch is a CPU build")
    with shared_folder(tmp_path_factory.getbasetemp(), "ptx_cuda") as folder:
        return CompiledOps(folder)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("op", OPS)
def test_compiled_kernels_match_float64(op: str, ops: CompiledOps) -> None:
    with ops.in_place() as launched:
        for case in (case for case in CASES if case.op == op):
            for dtype in cases.DTYPES:
                for layout in ("contiguous", "channels_last"):
                    oracle.assert_matches_float64(case, cases.make(case, dtype, layout), "native")
    assert set(ops.kernels[op]) <= launched


@pytest.mark.usefixtures("native")
def test_augment_equals_the_cpu_kernel_to_the_bit(ops: CompiledOps) -> None:
    found: set[str] = set()
    for case in (cases.in_dtype(case, dtype) for case in AUGMENT_CASES for dtype in cases.DTYPES):
        tensors = cases.make(case)
        expected = cases.fused(case, tensors, "native")
        with ops.in_place() as launched:
            assert torch.equal(cases.fused(case, tensors, "native"), expected)
        found |= launched
    assert set(ops.kernels["augment"]) <= found


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
