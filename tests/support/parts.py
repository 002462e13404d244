"""Parts of what takes long, as a plugin of pytest. A plain run takes a third of it, which its commit picks, so that
three commits see about all of it. ``--part rest`` takes what such a run leaves out, ``--part whole`` everything."""

from __future__ import annotations

import hashlib
import subprocess
from collections import Counter
from functools import cache
from typing import Any

import pytest

from tests.support import ROOT

GRID = 40  # a test of more parameter sets is a grid
# What a plain run leaves out, and the command that runs it.
KINDS = {
    "of grids": "pytest --part rest",
    "slow": "pytest -m slow --part whole",
}
LEFT: Counter[str] = Counter()  # tests that this process leaves out, by kind


@cache
def picked() -> int:
    """0, 1 or 2 by the hash of the commit that is checked out; 0 where there is none."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(git.stdout, 16) % 3


def third_of(name: str) -> int:
    """0, 1 or 2 by the hash of a name: whatever is added or removed moves no other."""
    return hashlib.sha256(name.encode()).digest()[0] % 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        choices=("third", "rest", "whole"),
        help="of grids, and of kernels compiled ahead: the third that the commit picks (where no test is named), the "
        "other two, or all (where one is)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.part is None:  # worker processes are sent the answer
        named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS or config.option.keyword
        config.option.part = "whole" if named else "third"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that are not of the requested part."""
    part = config.option.part
    if part == "whole":
        return
    sizes = Counter(_function(item) for item in items)
    kept, left = [], []
    for item in items:
        grid = sizes[_function(item)] > GRID and _kind(item) != "slow"
        parted = grid or any(item.iter_markers("drawn")) or _third(item) is not None
        wanted = not parted or _is_picked(item) if part == "third" else parted and not _is_picked(item)
        (kept if wanted else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def _third(item: pytest.Item) -> int | None:
    """The third that a test's mark ``slow(third=...)`` names: tests of one costly preparation are of the same."""
    return next((mark.kwargs["third"] for mark in item.iter_markers("slow") if mark.kwargs), None)


def _is_picked(item: pytest.Item) -> bool:
    third = _third(item)
    return (third_of(item.nodeid) if third is None else third) == picked()


def _kind(item: pytest.Item) -> str:
    return "slow" if any(item.iter_markers("slow")) else "of grids"


def pytest_deselected(items: list[pytest.Item]) -> None:
    LEFT.update(_kind(item) for item in items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: all of them leave out the same
        session.config.workeroutput["left"] = dict(LEFT)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    LEFT.clear()
    LEFT.update(getattr(node, "workeroutput", {}).get("left", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line on what a plain run leaves to which command."""
    left = ", ".join(f"{LEFT[kind]:,} {kind} ({command})" for kind, command in KINDS.items() if LEFT[kind])
    if left and config.option.part == "third" and config.option.markexpr.startswith("not "):
        terminalreporter.write_line(f"third {picked() + 1} of 3; left out: {left}")
