"""Random shapes, constants, dtypes and layouts against float64: 500 cases an op, and 20,000 with ``pytest -m slow``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support import cases, oracle
from tests.support.cases import Case

# With it oneDNN's bf16 convolutions of few channels and pixels crash or return stray memory, in stock PyTorch too:
# F.conv2d of (1, 4, 5, 3) with (1, 4, 1, 3) at stride (1, 2), or the weight's gradient at a tap in the padding alone.
AMX = torch.cpu._is_amx_tile_supported()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("examples", [500, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", cases.OPS)
def test_fuzz(op: str, examples: int) -> None:
    """The 500 cases are the same every time; the long run draws new ones and prints how to repeat a failure."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples == 500,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=st.composite(cases.SPECS[op].fuzz)(),
        dtype=st.sampled_from(cases.DTYPES),
        layout=st.sampled_from(cases.LAYOUTS),
        dy_layout=st.sampled_from(cases.LAYOUTS),
        seed=st.integers(0, 99),
    )
    def run(case: Case, dtype: torch.dtype, layout: str, dy_layout: str, seed: int) -> None:
        assume(case.op != "conv2d_bias_relu" or dtype != torch.bfloat16 or not AMX)
        if len(case.shapes["x"]) > 4 and layout in ("transposed", "sliced", "expanded"):
            layout = "offset"  # stock, our reference, cannot view these strides
        oracle.assert_matches_float64(case, cases.make(case, dtype, layout, seed=seed), dy_layout=dy_layout)

    run()
