"""Runs by their recipes: which one ``alexnet train --resume auto`` goes on with, and whether it is finished."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import checkpoint
from .recipe import CHANGEABLE, Recipe

RECIPE, RESULT = "recipe.json", "result.json"
ENDS = ("epochs", "steps", "patience")  # the fields of a recipe that say when a run ends


def of_recipe(recipe: Recipe, root: Path, out: Path | None = None) -> Path | None:
    """The run of ``recipe`` that goes on: ``out`` if it is one, else the newest in the folder ``root``; None without.

    Its recipe may differ in the fields of ``CHANGEABLE``. The newest is the one that was last begun or resumed.
    """
    if out is not None and _is_of(recipe, out):
        return out
    found = [path.parent for path in root.glob(f"*/{RECIPE}") if _is_of(recipe, path.parent)]
    return max(found, key=lambda run: ((run / RECIPE).stat().st_mtime_ns, run.name), default=None)


def _is_of(recipe: Recipe, run: Path) -> bool:
    values = _read(run / RECIPE)
    try:
        own = Recipe.from_dict(values)
    except (TypeError, ValueError):  # of another version
        return False
    return replace(own, **{name: getattr(recipe, name) for name in CHANGEABLE}) == recipe


def ends(recipe: Recipe) -> dict[str, Any]:
    """When a run of ``recipe`` ends; its result.json has it, so that a longer one is not taken for finished."""
    return {name: getattr(recipe, name) for name in ENDS}


def finished(run: Path, given: dict[str, Any]) -> bool:
    """Whether a run has its result, of its newest checkpoint, and none of the options ``given`` makes it longer."""
    result, held = _read(run / RESULT), checkpoint.generations(run)
    try:
        last, own = checkpoint.place(run, result["steps"]), replace(Recipe("digits"), **result["ends"])
    except (KeyError, TypeError, ValueError):  # none, or of another version
        return False
    if held and held[0] != last:
        return False
    return ends(own.changed({name: given[name] for name in ENDS if name in given})) == ends(own)


def begun(run: Path) -> bool:
    """Whether there is anything to lose in a run's folder: a checkpoint or a result."""
    return bool(checkpoint.generations(run)) or (run / RESULT).exists()


def _read(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file; an empty one where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
