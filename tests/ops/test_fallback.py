"""A call that no compiled kernel covers runs stock PyTorch with the same results; ``native`` refuses it by name.

That importing the package never fails, whatever the library's state, is in test_build.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from alexnet_ext import _library, ops
from alexnet_ext.ops import _backend
from tests.support import ROOT, cases
from tests.support.cases import Case, each_dtype, lrn

WITHOUT_LIBRARY = """
import torch
import alexnet_ext as ax
from tests.support import cases, oracle

for case in cases.EXAMPLES:
    for dtype in cases.DTYPES:
        for layout in ("contiguous", "channels_last", "sliced"):
            oracle.assert_matches_float64(case, cases.make(case, dtype, layout))
    if "triton" in ax.ops._backend.kernels(case.op, "cpu"):
        oracle.assert_matches_float64(case, cases.make(case), "triton")
    tensors = cases.make(case)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: cases.fused(case, t), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(tensors), cases.fused(case, tensors))
    with torch.autocast("cpu", torch.bfloat16):
        y = cases.fused(case, tensors)
    assert y.dtype == (torch.bfloat16 if case.op in cases.PRODUCTS else torch.float32)
    try:
        cases.fused(case, tensors, backend="native")
    except RuntimeError as error:
        print(error)
for case in cases.OTHER_EXAMPLES:
    for dtype in cases.DTYPES:
        oracle.assert_matches_float64(cases.in_dtype(case, dtype), cases.make(case))
    tensors = cases.make(case)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: cases.fused(case, t), fullgraph=True, backend="eager")
    assert torch.equal(compiled(tensors), cases.fused(case, tensors))
    try:
        cases.fused(case, tensors, backend="native")
    except RuntimeError as error:
        print(error)
print(ax.info())
"""


@pytest.fixture(scope="module")
def said_without_library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of a process that finds a package with a build record and no library."""
    folder = tmp_path_factory.mktemp("stock_only")
    package = folder / "alexnet_ext"
    shutil.copytree(ROOT / "alexnet_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    record = {"cpu_reason": "the compiler was on holiday", "cpu_remedy": "call it back"}
    (package / "build_info.json").write_text(json.dumps(record), encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("op", _backend.OPS)
def test_without_library_every_op_runs_and_native_says_why_it_does_not(op: str, said_without_library: str) -> None:
    refusals = [line for line in said_without_library.splitlines() if line.startswith("backend='native'")]
    assert len(refusals) == len(cases.EXAMPLES + cases.OTHER_EXAMPLES)
    assert any(f"no compiled kernel for {op} is loaded; `alexnet info` says why" in line for line in refusals)


def test_without_library_info_has_the_build_records_reason_and_remedy(said_without_library: str) -> None:
    assert "cpu     not loaded: the compiler was on holiday" in said_without_library
    assert "to mend it: call it back" in said_without_library
    for op in _backend.OPS:
        assert any(line.split()[:3] == [op, "cpu", "stock"] for line in said_without_library.splitlines())


@pytest.mark.usefixtures("native")
@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@cases.each_example
def test_stock_and_native_agree(case: Case, layout: str, dtype: torch.dtype) -> None:
    tensors = cases.make(case, dtype, layout)
    ours, stock = cases.fused(case, tensors, "native"), cases.fused(case, tensors, "stock")
    assert cases.runs_ours(ours)
    assert not cases.runs_ours(stock)
    assert ours.dtype == stock.dtype
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        (r"dtype torch\.int64", lambda b: ops.local_response_norm(torch.arange(24).view(1, 6, 2, 2), 3, backend=b)),
        (r"dtype torch\.int64", lambda b: ops.relu_max_pool2d(torch.arange(24).view(1, 6, 2, 2), 2, backend=b)),
        ("x of rank 7", lambda b: ops.local_response_norm(torch.randn(1, 6, 1, 2, 1, 2, 1), 3, backend=b)),
        (r"a window of \[16, 16\]", lambda b: ops.relu_max_pool2d(torch.randn(1, 1, 16, 17), 16, backend=b)),
        (
            r"a window of \[16, 16\]",
            lambda b: ops.relu_lrn_max_pool2d(torch.randn(1, 1, 16, 17), None, 3, 1.0, 0.5, 1.0, 16, 1, backend=b),
        ),
        (
            r"a window of \[16, 16\]",
            lambda b: ops.relu_max_pool2d_lrn(torch.randn(1, 1, 16, 17), None, 3, 1.0, 0.5, 1.0, 16, 1, backend=b),
        ),
        (
            r"an unbatched x of shape \[3, 8, 9\]",
            lambda b: ops.relu_lrn_max_pool2d(torch.randn(3, 8, 9), None, 3, 1.0, 0.5, 1.0, 3, 2, backend=b),
        ),
        (
            r"an unbatched x of shape \[3, 8, 9\]",
            lambda b: ops.relu_max_pool2d_lrn(torch.randn(3, 8, 9), None, 3, 1.0, 0.5, 1.0, 3, 2, backend=b),
        ),
    ],
    ids=[
        *("lrn_int64", "pool_int64", "lrn_rank7", "pool_16x16", "lrn_pool_16x16", "pool_lrn_16x16"),
        *("lrn_pool_unbatched", "pool_lrn_unbatched"),
    ],
)
@pytest.mark.usefixtures("native")
def test_auto_runs_stock_where_native_refuses(what: str, call: object) -> None:
    torch.manual_seed(0)
    auto = call("auto")
    torch.manual_seed(0)
    assert torch.equal(auto, call("stock"))
    with pytest.raises(RuntimeError, match=f"backend='native' does not cover {what}"):
        call("native")


def test_triton_is_refused_where_there_is_no_such_kernel() -> None:
    with pytest.raises(
        RuntimeError, match=r"backend='triton' does not cover .*(no Triton kernel|Triton is not installed)"
    ):
        ops.linear_bias_relu(torch.randn(9, 3), torch.randn(4, 3), backend="triton")


@pytest.mark.parametrize("op", cases.named("in_triton"))
def test_triton_says_what_to_do_where_it_cannot_run(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(example for example in cases.EXAMPLES + cases.OTHER_EXAMPLES if example.op == op)
    monkeypatch.delitem(_backend.KERNELS[op]["cpu"], "triton", raising=False)
    found = _library.Library("triton", "cuda", True)
    monkeypatch.setattr(_library, "TRITON", found)
    with pytest.raises(RuntimeError, match=r"'cpu' \(move the tensors to a GPU, or set TRITON_INTERPRET=1"):
        cases.fused(case, cases.make(case), "triton")
    missing = _library.Library("triton", "cuda", False, "Triton is not installed", "pip install triton")
    monkeypatch.setattr(_library, "TRITON", missing)
    with pytest.raises(RuntimeError, match=r"Triton is not installed; to mend it: pip install triton"):
        cases.fused(case, cases.make(case), "triton")


def test_an_unknown_backend_is_refused() -> None:
    case = lrn((1, 2, 3, 4))
    with pytest.raises(ValueError, match="backend must be one of auto, native, triton, stock, got 'cudnn'"):
        cases.fused(case, cases.make(case), "cudnn")
