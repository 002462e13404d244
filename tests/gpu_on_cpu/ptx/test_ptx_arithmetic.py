"""The machine's arithmetic where NumPy has none."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from .arithmetic import from_bf16, fused, to_bf16
from .machine import Launch, Machine
from .program import PtxError, parse

KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry add(.param .u64 add_param_0)
{
  .reg .b16 %rs<4>;
  .reg .b32 %r<4>;
  .reg .b64 %rd<2>;
  ld.param.u64 %rd1, [add_param_0];
  ld.global.u32 %r1, [%rd1];
  ld.global.u32 %r2, [%rd1+4];
  ld.global.u16 %rs1, [%rd1];
  ld.global.u16 %rs2, [%rd1+4];
  INSTRUCTION
  ret;
}
"""


def test_a_fused_multiply_add_rounds_once() -> None:
    """Sums that cancel in part or in whole, and sums that do not."""
    random = np.random.default_rng(0)
    a, b, c = random.standard_normal((3, 6000))
    c[::3] = -(a * b)[::3]
    c[1::3] = (-(a * b) * (1 + 1e-12 * c))[1::3]
    exact = [
        float(Fraction(x) * Fraction(y) + Fraction(z))
        for x, y, z in zip(*map(np.ndarray.tolist, (a, b, c)), strict=True)
    ]
    assert fused(a, b, c).tolist() == exact
    assert (a * b + c).tolist() != exact


def test_a_fused_multiply_add_of_no_finite_result() -> None:
    a, b, c = (
        np.array(values) for values in ((np.inf, np.nan, 1e300, 2.0), (1.0, 1.0, 1e300, 3.0), (1.0, 1.0, 1.0, -np.inf))
    )
    np.testing.assert_equal(fused(a, b, c), [np.inf, np.nan, np.inf, -np.inf])


@pytest.mark.parametrize(
    "instruction",
    [
        "add.bf16x2 %r3, %r1, %r2; st.global.u32 [%rd1+8], %r3;",
        "mov.b32 %r3, 0x3F803F80; fma.rn.bf16x2 %r3, %r1, %r3, %r2; st.global.u32 [%rd1+8], %r3;",
        "add.bf16 %rs3, %rs1, %rs2; st.global.u16 [%rd1+8], %rs3;",
        "mov.b16 %rs3, 0x3F80; fma.rn.bf16 %rs3, %rs1, %rs3, %rs2; st.global.u16 [%rd1+8], %rs3;",
    ],
)
@pytest.mark.parametrize(
    ("a", "b", "exact"),
    [(1.0, 2**-8, 1.0), (1.0, 3 * 2**-8, 1.015625), (-0.0, 0.0, 0.0), (1.0, 2**-7, 1.0078125), (np.inf, 1.0, np.inf)],
)
def test_a_sum_of_bf16_is_rounded_to_even(instruction: str, a: float, b: float, exact: float) -> None:
    halves = to_bf16(np.array([a, -a, b, -b, 0, 0], np.float32))
    (kernel,) = parse(KERNEL.replace("INSTRUCTION", instruction)).values()
    address = np.uint64(halves.ctypes.data).tobytes()
    Machine(Launch(kernel, [halves], [address], 1, 0)).run((1, 1, 1))
    found = from_bf16(halves[4 : 6 if "x2" in instruction else 5])
    np.testing.assert_array_equal(found, [exact, -exact][: len(found)])
    assert not np.signbit(found[0])


def test_a_product_of_bf16_is_refused() -> None:
    (kernel,) = parse(KERNEL.replace("INSTRUCTION", "fma.rn.bf16 %rs3, %rs1, %rs2, %rs1;")).values()
    halves = to_bf16(np.full(6, 2, np.float32))
    address = np.uint64(halves.ctypes.data).tobytes()
    with pytest.raises(PtxError, match="not 1"):
        Machine(Launch(kernel, [halves], [address], 1, 0)).run((1, 1, 1))
