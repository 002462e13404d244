"""The comparison of recipes: turns, folds and sums. The runs themselves are those of ``alexnet train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from alexnet_ext.data import ImageFolder
from benchmarks import recipes
from tests.training.test_runs import striped


def test_folds_hold_each_image_out_once_and_train_on_the_others(tmp_path: Path) -> None:
    data = striped(tmp_path / "data", 9, 2)
    folds = recipes.make_folds(data, 3, tmp_path / "folds")
    held_out: list[str] = []
    for (place,) in folds:
        found = ImageFolder.split(Path(place), 67, 0)
        parts = [{Path(path).name for path, _ in part.samples} for part in (found.train, found.held_out)]
        assert found.train.classes == ("kind 0", "kind 1")
        assert not parts[0] & parts[1]
        assert len(parts[0] | parts[1]) == 9
        assert {target for _, target in found.held_out.samples} == {0, 1}
        held_out += sorted(parts[1])
    assert sorted(held_out) == [f"{i}.png" for i in range(9)]


def test_recipes_take_turns_and_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []

    def scripted(options: list[str], out: Path) -> dict[str, Any]:
        recipe, seed = options[options.index("--recipe") + 1], options[options.index("--seed") + 1]
        calls.append((recipe, seed))
        assert options[-2:] == ["--epochs", "3"]
        is_fast = recipe == "fast"
        return {"top1": (0.5 if is_fast else 0.4) + int(seed) / 100, "seconds": (4.0 if is_fast else 10.0 + int(seed))}

    monkeypatch.setattr(recipes, "train", scripted)
    arguments = ["data", "--seeds", "3", "--options", "--epochs 3", "--json"]
    app = recipes.typer.Typer()
    app.command()(recipes.main)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["recipes"]
    assert calls == [(name, str(seed)) for seed in range(3) for name in ("folder", "fast")]
    assert found["folder"] == pytest.approx(
        {"mean": 0.41, "least": 0.4, "largest": 0.42, "seconds": 11.0, "ratio": 1.0}
    )
    assert found["fast"] == pytest.approx(
        {"mean": 0.51, "least": 0.5, "largest": 0.52, "seconds": 4.0, "ratio": 4 / 11}
    )
    table = CliRunner().invoke(app, arguments[:-1])
    assert "51.00%" in table.stdout


def test_a_run_is_that_of_the_command_line(tmp_path: Path) -> None:
    options = ["--data", "synthetic", "--image-size", "67", "--batch-size", "2", "--steps", "1", "--device", "cpu"]
    assert {"top1", "seconds"} <= recipes.train(options, tmp_path / "run").keys()
