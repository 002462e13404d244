"""Random shapes, constants, dtypes and layouts against float64: 500 cases an op, and 20,000 with ``pytest -m long``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support import cases, oracle
from tests.support.cases import Case, block, conv, linear, lrn, pool

# With it oneDNN's bf16 convolutions of few channels and pixels crash or return stray memory, in stock PyTorch too:
# F.conv2d of (1, 4, 5, 3) with (1, 4, 1, 3) at stride (1, 2), or the weight's gradient at a tap in the padding alone.
AMX = torch.cpu._is_amx_tile_supported()

Draw = Callable[[st.SearchStrategy[Any]], Any]

sizes = st.integers(1, 6) | st.integers(1, 40)
channels = st.integers(1, 9) | st.integers(1, 70)
alphas = st.sampled_from([1e-4, 5e-4, 0.1, 1.5])
betas = st.sampled_from([0.75, 0.5, 1.0, 2.0, 0.3])
windows = st.integers(1, 5) | st.sampled_from([7, 15, 33])


def pair_within(draw: Draw, low: int, high: tuple[int, int]) -> tuple[int, int]:
    return draw(st.integers(low, high[0])), draw(st.integers(low, high[1]))


def draw_shape(draw: Draw, rank: int = 4) -> tuple[int, ...]:
    """(N, C, H, W) of at most some thousand values, rarely none."""
    batch, plane = draw(st.integers(0, 3)), [draw(sizes) for _ in range(rank - 2)]
    while max(batch, 1) * (count := torch.Size(plane).numel()) > 1500:
        plane[plane.index(max(plane))] = 1 + count % 5
    depth = min(draw(channels), max(1, 20_000 // (max(batch, 1) * torch.Size(plane).numel())))
    return batch, depth, *plane


@st.composite
def lrn_cases(draw: Draw) -> Case:
    shape = draw_shape(draw, draw(st.sampled_from([3, 4, 4, 4, 5, 6])))
    return lrn(shape, draw(windows), draw(alphas), draw(betas), draw(st.sampled_from([1.0, 2.0, 0.5])))


@st.composite
def pool_cases(draw: Draw) -> Case:
    shape = draw_shape(draw)
    dilation = pair_within(draw, 1, (3, 3))
    reach = [(shape[2 + i] - 1) // dilation[i] + 1 for i in (0, 1)]
    kernel = pair_within(draw, 1, (min(reach[0], 5), min(reach[1], 5)))
    padding = pair_within(draw, 0, (kernel[0] // 2, kernel[1] // 2))
    stride = pair_within(draw, 1, (4, 4))
    return pool(shape, kernel, stride, padding=padding, dilation=dilation, ceil_mode=draw(st.booleans()))


@st.composite
def conv_cases(draw: Draw) -> Case:
    batch, _, height, width = draw_shape(draw)
    groups, dilation, stride = (
        draw(st.sampled_from([1, 2, 3])),
        pair_within(draw, 1, (2, 2)),
        pair_within(draw, 1, (3, 3)),
    )
    kernel = pair_within(draw, 1, (5, 5))
    padding, sizes = [], [height, width]
    for i in (0, 1):
        # Every window must touch the image. For one in the padding alone oneDNN's convolution with a bias crashes on
        # channels-last inputs, under torch.nn as well (oneDNN#5942, pytorch#195394).
        reach = dilation[i] * (kernel[i] - 1)
        padding.append(draw(st.integers(0, min(3, reach))))
        sizes[i] = max(sizes[i], reach + 1 - 2 * padding[i])
        image, taps = range(padding[i], padding[i] + sizes[i]), range(0, reach + 1, dilation[i])
        starts = range(0, sizes[i] + 2 * padding[i] - reach, stride[i])
        assume(all(any(start + tap in image for tap in taps) for start in starts))
    each_in, each_out = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    shape = (batch, groups * each_in, *sizes)
    options = {"stride": stride, "padding": tuple(padding), "dilation": dilation, "groups": groups}
    options["relu"] = draw(st.booleans())
    return conv(shape, groups * each_out, kernel, draw(st.booleans()), **options)


@st.composite
def linear_cases(draw: Draw) -> Case:
    rows, inputs, outputs = draw(st.integers(0, 40)), draw(st.integers(0, 150)), draw(st.integers(1, 40))
    return linear((rows, inputs), outputs, draw(st.booleans()))


@st.composite
def block_cases(draw: Draw, op: str) -> Case:
    shape = draw_shape(draw)
    constants = {
        "lrn_size": draw(windows),
        "alpha": draw(alphas),
        "beta": draw(betas),
        "k": draw(st.sampled_from([1, 2])),
    }
    kernel = pair_within(draw, 1, (min(shape[2], 4), min(shape[3], 4)))
    return block(op, shape, draw(st.booleans()), kernel_size=kernel, stride=pair_within(draw, 1, (4, 4)), **constants)


CASES: dict[str, st.SearchStrategy[Case]] = {
    "local_response_norm": lrn_cases(),
    "relu_max_pool2d": pool_cases(),
    "conv2d_bias_relu": conv_cases(),
    "linear_bias_relu": linear_cases(),
    **{op: block_cases(op) for op in cases.BLOCKS},
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("examples", [500, pytest.param(20_000, marks=pytest.mark.long)])
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
        case=CASES[op],
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
