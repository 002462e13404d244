"""Hypothesis's strategies for shapes and constants, which the specs' ``fuzz`` draw from."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tests.support.spec import Draw

sampled = st.sampled_from
integers = st.integers
booleans = st.booleans
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
