"""Prints the machine and the versions of a measurement."""

from __future__ import annotations

import torch

from alexnet_ext import _library


def pytest_xdist_auto_num_workers() -> int:
    """Times are measured alone, without parallel workers (the tests' ``-n auto`` is in pyproject.toml)."""
    return 0


def pytest_report_header() -> str:
    library = _library.LIBRARIES[0]
    state = "loaded" if library.loaded else f"not loaded: {library.reason}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {capability}, {torch.get_num_threads()} threads, CPU library {state}"
