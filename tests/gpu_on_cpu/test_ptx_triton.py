"""The results of the Triton kernels as compiled for compute capability 8.0 and 9.0: their PTX, run by ptx.

Unlike the interpreter this has products of bf16, TF32 and fp64 as the tensor cores do them, accesses of 16 bytes, and
approximate instructions that err as far as they may. A process of its own compiles (``triton_compiled.py``);
``pytest -m slow`` runs more of them, most of those for 9.0 among them.
"""

from __future__ import annotations

import re

import pytest
import torch

from tests.gpu_on_cpu.uninterpreted import printed
from tests.support import cases

pytest.importorskip("triton", reason="Triton is not installed")

MMA, WGMMA = "mma.sync.aligned.m16n8k", "wgmma.mma_async.sync.aligned.m64nNk"
FP64_PRODUCT = "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64"
PRODUCTS = {
    80: {
        "bfloat16": f"{MMA}16.row.col.f32.bf16.bf16.f32",
        "float16": f"{MMA}16.row.col.f32.f16.f16.f32",
        "tf32": f"{MMA}8.row.col.f32.tf32.tf32.f32",
        "float64": FP64_PRODUCT,
    },
    90: {
        "bfloat16": f"{WGMMA}16.f32.bf16.bf16",
        "float16": f"{WGMMA}16.f32.f16.f16",
        "tf32": f"{WGMMA}8.f32.tf32.tf32",
        "float64": FP64_PRODUCT,
    },
}
CASES = [
    pytest.param(
        op, grid, capability, marks=[pytest.mark.slow, pytest.mark.drawn] if grid == "full" or capability == 90 else []
    )
    for op in cases.named("in_triton")
    for grid, capability in (("quick", 80), ("full", 80), ("quick", 90))
]


@pytest.mark.parametrize(("op", "grid", "capability"), [*CASES, ("conv2d_bias_relu", "sample", 90)])
def test_compiled_kernels_match_float64(op: str, grid: str, capability: int) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is a CPU build: the kernels are not defined without the interpreter")
    every = printed("tests.gpu_on_cpu.triton_compiled", op, grid, str(capability))
    assert len(every) >= 5
    rows = [row for row in every if not row["missing"]]
    failed = [f"{row['run']}: {row['error']}" for row in rows if row["error"]]
    assert not failed, "\n".join(failed)
    unnoticed = [row["missing"] for row in every if row["missing"] and not row["error"]]
    assert unnoticed == [], "left out of the kernels, these change nothing"
    assert cases.SPECS[op].triton_kernels <= {kernel for row in rows for kernel in row["kernels"]}
    if op == "conv2d_bias_relu":
        for row in rows:
            product = PRODUCTS[capability].get("tf32" if row["tf32"] else row["dtype"])
            named = {re.sub(r"m64n\d+", "m64nN", name) for name in row["instructions"]}
            found = {name for name in named if name.startswith(("mma", "wgmma.mma"))}
            assert found == ({product} if product else set()), row["run"]
    elif op != "augment":
        wide = [
            r for r in rows if r["channels"] % 16 == 0 and r["dtype"] == "bfloat16" and r["layout"] == "channels_last"
        ]
        assert len(wide) >= 3
        assert [r["run"] for r in wide if not {"ld.global.v4.b32", "st.global.v4.b32"} <= set(r["instructions"])] == []
