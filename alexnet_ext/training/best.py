"""Which of a run's evaluations was the best, and the weights it was of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .evaluate import Evaluation


class Best:
    """The best evaluation so far: ``top1`` on the images that all evaluations see, its ``step``, and how many
    evaluations have been no better since then (``waited``)."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit  # the last evaluation of a run is on more images: these alone compare
        self.top1, self.step, self.waited = -1.0, -1, 0
        self.weights: dict[str, Tensor] | None = None  # until they are on the disk: writing takes longer than copying

    def see(self, step: int, result: Evaluation, model: nn.Module) -> None:
        """Take over ``result`` where it is as good as the best: of equals the later has had more training."""
        right = result.right if self.limit is None else result.right[result.indices < self.limit]
        top1 = float(right.float().mean()) if len(right) else 0.0
        self.waited = 0 if top1 > self.top1 else self.waited + 1
        if top1 >= self.top1:
            self.top1, self.step = top1, step
            self.weights = copied(model)

    def write(self, run: Path, description: checkpoint.Description) -> None:
        """Bring the best to the disk. The generation of ``description.step``, the newest, has its weights already."""
        if self.step >= 0:
            whole = self.step != description.step
            own = dataclasses.replace(description, step=self.step)
            checkpoint.save_best(run, self.weights, own, self.top1, whole)
            self.weights = None

    def state(self) -> dict[str, Any]:
        return {"top1": self.top1, "step": self.step, "waited": self.waited}

    def load(self, state: dict[str, Any], run: Path, step: int, model: nn.Module) -> None:
        """As it was at ``step``. Raises KeyError, TypeError or ValueError for no such state."""
        top1, found, waited = float(state["top1"]), int(state["step"]), int(state["waited"])
        if not (-1 <= top1 <= 1 and -1 <= found <= step and waited >= 0):
            raise ValueError(f"best is {state}")
        written = checkpoint.read_best(run)
        if written is not None and found < written[0] <= step:  # the last evaluation of a run that now is longer
            found, top1, waited = *written, 0
        if written is None or written[0] != found:
            if found != step:
                return  # its weights are lost
            self.weights = copied(model)
        self.top1, self.step, self.waited = top1, found, waited


@torch.no_grad()
def copied(model: nn.Module) -> dict[str, Tensor]:
    """The weights of now, in memory of their own on the CPU."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}
