"""The commands that train to compare: what they prepare and what they compute of the runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from alexnet_ext.data import CommandError
from alexnet_ext.training.recipe import SYNTHETIC
from benchmarks import curves, elpv


def test_cells_that_are_surely_whole_or_broken_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 30, 30), dtype=np.uint8)
    probabilities = np.array([0, 1, 1 / 3, 0, 2 / 3, 1])
    package = ModuleType("elpv_dataset.utils")
    monkeypatch.setattr(package, "load_dataset", lambda: (images, probabilities, np.array(["mono"] * 6)), raising=False)
    monkeypatch.setitem(sys.modules, "elpv_dataset", ModuleType("elpv_dataset"))
    monkeypatch.setitem(sys.modules, "elpv_dataset.utils", package)
    assert elpv.write(tmp_path / "cells") == {"whole": 2, "broken": 2}
    written = {path.relative_to(tmp_path / "cells").as_posix(): path for path in tmp_path.rglob("*.png")}
    assert set(written) == {f"{name}-mono.png" for name in ("whole/0000", "whole/0003", "broken/0001", "broken/0005")}
    with Image.open(written["broken/0005-mono.png"]) as image:
        assert np.array_equal(np.asarray(image), images[5])
    with pytest.raises(FileExistsError):
        elpv.write(tmp_path / "cells")


def test_cells_need_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)
    with pytest.raises(CommandError, match=r"elpv_dataset is not installed: pip install -e '\.\[interop\]'"):
        elpv.write(tmp_path / "cells")


def test_curves_drift_by_the_largest_distance_of_their_means() -> None:
    one = np.linspace(2, 1, 40)
    other = one.copy()
    other[20:] += 0.25
    other[5] += 1.0  # a single step counts for a tenth
    assert curves.drift(one, one) == 0
    assert curves.drift(one, other) == pytest.approx(0.25)
    assert curves.drift(one[:4], one[:4] + 0.5) == pytest.approx(0.5)


def test_curves_of_fused_and_stock_layers_are_those_of_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps: the losses differ by roundings alone."""
    monkeypatch.setattr(curves, "DIGITS", replace(SYNTHETIC, image_size=67, batch_size=4))
    app = typer.Typer()
    app.command()(curves.main)
    found = CliRunner().invoke(app, ["--steps", "2", "--out", str(tmp_path)], env={"COLUMNS": "140"})
    assert found.exit_code == 0, found.output
    fused, stock, half = (curves.read(tmp_path / name) for name in curves.RUNS)
    assert len(fused) == 2
    np.testing.assert_allclose(stock, fused, rtol=1e-4)
    np.testing.assert_allclose(half, fused, rtol=1e-4)
    assert all(name in found.output for name in curves.RUNS)
