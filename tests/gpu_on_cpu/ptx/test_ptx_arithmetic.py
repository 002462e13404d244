"""The machine's arithmetic where NumPy has none."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from .arithmetic import fused


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
