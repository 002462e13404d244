"""The best of a run's evaluations, and the weights that it measured."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import checkpoint
from .evaluate import Evaluation
from .writer import Copies


class Best:
    """The best evaluation so far: ``top1`` on the images that all evaluations see, its ``step``, and how many
    evaluations have been no better since then (``waited``)."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit  # only the first ``limit`` images compare: a run's last evaluation is on more
        self.top1, self.step, self.waited = -1.0, -1, 0
        self.weights: dict[str, Tensor] | None = None  # copied now, written later: writing takes longer
        self.copies = Copies()

    def see(self, step: int, result: Evaluation, weights: Mapping[str, Tensor]) -> None:
        """Take over ``result`` if it is as good as the best: of equals the later has had more training. Nothing may be
        writing the best so far."""
        right = result.right if self.limit is None else result.right[result.indices < self.limit]
        top1 = float(right.float().mean()) if len(right) else 0.0
        self.waited = 0 if top1 > self.top1 else self.waited + 1
        if top1 >= self.top1:
            self.top1, self.step = top1, step
            self.weights = self.copies(weights)

    def taken(self) -> Best:
        """The best so far, to be written by another thread while this one goes on."""
        taken, self.weights = copy.copy(self), None
        return taken

    def write(self, run: Path, description: checkpoint.Description) -> None:
        """Write the best weights, unless the newest generation, that of ``description.step``, has them already."""
        if self.step >= 0:
            whole = self.step != description.step
            own = dataclasses.replace(description, step=self.step)
            checkpoint.save_best(run, self.weights, own, self.top1, whole)
            self.weights = None

    def state(self) -> dict[str, Any]:
        return {"top1": self.top1, "step": self.step, "waited": self.waited}

    def load(self, state: dict[str, Any], run: Path, step: int, weights: Mapping[str, Tensor]) -> None:
        """Restore the state at ``step``, where ``weights`` are. Raises KeyError, TypeError or ValueError for none."""
        top1, found, waited = float(state["top1"]), int(state["step"]), int(state["waited"])
        if not (-1 <= top1 <= 1 and -1 <= found <= step and waited >= 0):
            raise ValueError(f"best is {state}")
        written = checkpoint.read_best(run)
        if written is not None and found < written[0] <= step:  # the last evaluation of a run that has been made longer
            found, top1, waited = *written, 0
        if written is None or written[0] != found:
            if found != step:
                return  # its weights are lost
            self.weights = self.copies(weights)
        self.top1, self.step, self.waited = top1, found, waited
