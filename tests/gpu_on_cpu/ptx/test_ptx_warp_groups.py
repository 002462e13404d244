"""wgmma of ptx: products from registers, and the changes to registers and matrices that are forbidden meanwhile.

Triton's and CUTLASS's kernels (test_ptx_triton.py, test_ptx_hopper.py) have their first matrix in shared
memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .hopper import HopperMachine
from .machine import Launch
from .program import PtxError, parse

# A thread's four registers of the first matrix, 64 x 32 bytes; of the second, 16 x 32 bytes, it writes four bytes.
SUMS = "{%r20,%r21,%r22,%r23,%r24,%r25,%r26,%r27}"
PTX = """
.visible .entry multiply(.param .u64 a, .param .u64 b, .param .u64 d)
{
    .reg .pred %p<2>; .reg .b32 %r<30>; .reg .b64 %rd<9>;
    .shared .align 128 .b8 matrix[512];
    ld.param.b64 %rd1, [a]; ld.param.b64 %rd2, [b]; ld.param.b64 %rd3, [d];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd4, %r1, 16, %rd1; ld.global.v4.b32 {%r10,%r11,%r12,%r13}, [%rd4];
    mad.wide.u32 %rd5, %r1, 4, %rd2; ld.global.b32 %r2, [%rd5];
    shl.b32 %r3, %r1, 2; mov.b32 %r4, matrix; add.s32 %r5, %r3, %r4; st.shared.b32 [%r5], %r2;
    fence.proxy.async;
    bar.sync 0;
    mov.pred %p1, 0; mov.b64 %rd6, DESCRIPTOR;
    wgmma.fence.sync.aligned;
    // behind the fence
    wgmma.mma_async.sync.aligned.m64n16kKIND SUMS, {%r10,%r11,%r12,%r13}, %rd6, %p1, 1, 1ACROSS;
    // behind the product
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 %rd7, %r1, 32, %rd3;
    st.global.v4.b32 [%rd7], {%r20,%r21,%r22,%r23}; st.global.v4.b32 [%rd7+16], {%r24,%r25,%r26,%r27};
    ret;
}
"""
# 8 x 16 bytes together; two of them along a row.
PTX = PTX.replace("DESCRIPTOR", str((128 >> 4) << 16 | (256 >> 4) << 32)).replace("SUMS", SUMS)
TYPES = {"16.f32.f16.f16": (np.float16, ", 0"), "8.f32.tf32.tf32": (np.float32, "")}
BF16 = "16.f32.bf16.bf16"
AGAIN = "wgmma.mma_async.sync.aligned.m64n%dk16.f32.f16.f16 %s, {%%r10,%%r11,%%r12,%%r13}, %%rd6, %%p1, 1, 1, 0;"


def multiplied(kind: str, changed: dict[str, str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The machine's product, [64, 16], and the exact one."""
    dtype, across = TYPES.get(kind, (np.float32, ", 0"))
    text = PTX.replace("KIND", kind).replace("ACROSS", across)
    for old, new in changed.items():
        assert old in text
        text = text.replace(old, new)
    depth = int(kind.split(".")[0])
    random = np.random.default_rng(0)
    a, b = (random.integers(-8, 9, (rows, depth)).astype(dtype) for rows in (64, 16))
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    if kind == BF16:
        a, b = ((matrix.view(np.uint32) >> 16).astype(np.uint16) for matrix in (a, b))
    if dtype == np.float32 and kind != BF16:  # bits that TF32 lacks
        a, b = ((matrix.view(np.uint32) | np.uint32(0x1FFF)).view(np.float32) for matrix in (a, b))
    wide = 4 // a.itemsize
    thread, register, part = np.ogrid[:128, :4, :wide]
    row = thread // 32 * 16 + thread % 32 // 4 + register % 2 * 8
    fragments = np.ascontiguousarray(a[row, thread % 4 * wide + part + register // 2 * (depth // 2)])
    blocks = np.ascontiguousarray(b.reshape(2, 8, 2, depth // 2).swapaxes(1, 2))
    sums = np.empty((128, 8), np.float32)
    (kernel,) = parse(text).values()
    buffers = [fragments, blocks, sums]
    arguments = [buffer.ctypes.data.to_bytes(8, "little") for buffer in buffers]
    HopperMachine(Launch(kernel, buffers, arguments, 128, 0)).run((1, 1, 1))
    found = np.empty((64, 16))
    thread, register = np.ogrid[:128, :8]
    row = thread // 32 * 16 + thread % 32 // 4 + register // 2 % 2 * 8
    found[row, register // 4 * 8 + thread % 4 * 2 + register % 2] = sums
    return found, exact


@pytest.mark.parametrize("kind", [*TYPES, BF16])
def test_the_first_matrix_in_registers(kind: str) -> None:
    found, exact = multiplied(kind, {})
    np.testing.assert_array_equal(found, exact)


FENCE, BEHIND, PRODUCT = "wgmma.fence.sync.aligned;", "// behind the fence", "// behind the product"


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (FENCE, "", "no wgmma.fence"),
        (BEHIND, "mov.b32 %r10, %r1;", "no wgmma.fence"),
        (BEHIND, "add.s32 %r1, %r20, 0;", "no wgmma.fence"),
        (BEHIND, AGAIN % (8, "{%r20,%r21,%r22,%r23}"), "no wgmma.fence"),
        (PRODUCT, AGAIN % (8, "{%r10,%r21,%r22,%r23}"), "not known"),
        (PRODUCT, AGAIN % (8, "{%r24,%r25,%r26,%r27}"), "no wgmma.fence"),
        (PRODUCT, f"{FENCE} {AGAIN % (8, '{%r24,%r25,%r26,%r27}')}", "sums overlap"),
        (PRODUCT, "mov.b32 %r10, %r1;", "a matrix changes"),
        (PRODUCT, "st.shared.b32 [%r5], %r1;", "no fence.proxy.async"),
        (PRODUCT, "st.shared.b32 [%r5], %r1; fence.proxy.async;", "a matrix changes"),
        ("wgmma.wait_group.sync.aligned 0;", "", "ends before"),
        ("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", "ends before"),
        ("1, 1, 0;", "1, -1, 0;", "not known"),
        ("m64n16k16.f32", "m64n16k16.f16", "not known"),
    ],
)
def test_what_may_not_happen_to_a_product(old: str, new: str, error: str) -> None:
    with pytest.raises(PtxError, match=error):
        multiplied("16.f32.f16.f16", {old: new})


def test_a_copy_of_a_register_behind_the_fence() -> None:
    """Compilers put it there, and ptxas adds a fence."""
    for new in ("mov.b32 %r20, %r21;", AGAIN % (16, SUMS)):
        found, exact = multiplied("16.f32.f16.f16", {BEHIND: new})
        np.testing.assert_array_equal(found, exact)
