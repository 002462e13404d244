"""What the Triton kernels compute as compiled for compute capability 8.0: their PTX, run by the machine of tests/ptx.

Unlike the interpreter this has products of bf16, TF32 and fp64 as the tensor cores do them, accesses of 16 bytes, and
approximate instructions that err as far as they may. A process of its own compiles (``tests/ptx_triton.py``);
``pytest -m ahead`` runs more of them.
"""

from __future__ import annotations

import pytest
import torch

from . import cases
from .uninterpreted import printed

pytest.importorskip("triton", reason="Triton is not installed")

MMA = "mma.sync.aligned.m16n8k"
PRODUCTS = {
    "bfloat16": f"{MMA}16.row.col.f32.bf16.bf16.f32",
    "float16": f"{MMA}16.row.col.f32.f16.f16.f32",
    "tf32": f"{MMA}8.row.col.f32.tf32.tf32.f32",
    "float64": "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64",
}
KERNELS = {
    "augment": {"augment_forward_kernel"},
    "conv2d_bias_relu": {f"conv2d_bias_relu_{name}_kernel" for name in ("product", "weight", "mask")},
    # The gradient of pooling, then normalization, is that of each.
    "relu_max_pool2d_lrn": {
        "relu_max_pool2d_lrn_forward_kernel",
        "local_response_norm_backward_kernel",
        "relu_max_pool2d_backward_kernel",
    },
}


@pytest.mark.parametrize("op", [*cases.ON_GPU, *cases.WITHOUT_GRADIENT])
@pytest.mark.parametrize("grid", ["quick", pytest.param("full", marks=pytest.mark.ahead)])
def test_compiled_kernels_match_float64(op: str, grid: str) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is a CPU build: the kernels are not defined without the interpreter")
    rows = printed("tests.ptx_triton", op, grid)
    failed = [f"{row['run']}: {row['error']}" for row in rows if row["error"]]
    assert not failed, "\n".join(failed)
    each = KERNELS.get(op, {f"{op}_forward_kernel", f"{op}_backward_kernel"})
    assert len(rows) >= 5
    assert each <= {kernel for row in rows for kernel in row["kernels"]}
    if op == "conv2d_bias_relu":
        for row in rows:
            product = PRODUCTS.get("tf32" if row["tf32"] else row["dtype"])
            found = {name for name in row["instructions"] if name.startswith("mma")}
            assert found == ({product} if product else set()), row["run"]
    elif op != "augment":
        wide = [
            r for r in rows if r["channels"] % 16 == 0 and r["dtype"] == "bfloat16" and r["layout"] == "channels_last"
        ]
        assert len(wide) >= 3
        assert [r["run"] for r in wide if not {"ld.global.v4.b32", "st.global.v4.b32"} <= set(r["instructions"])] == []
