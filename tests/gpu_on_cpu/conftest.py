"""Marks each test of this folder by its kind, so that ``pytest -m emulated`` runs one kind."""

from __future__ import annotations

from pathlib import Path

import pytest

# By file; one that is not here fails the run, so that no test is without a kind.
KINDS = {
    "test_triton": "interpreted",
    "test_triton_conv2d_bias_relu": "interpreted",
    "test_emulator": "emulated",
    "test_ptx": "ptx",
    "test_ptx_arithmetic": "ptx",
    "test_ptx_counts": "ptx",
    "test_ptx_cuda": "ptx",
    "test_ptx_hopper": "ptx",
    "test_ptx_triton": "ptx",
    "test_ptx_warp_groups": "ptx",
    "test_triton_ahead": "ahead",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(KINDS[item.path.stem])
