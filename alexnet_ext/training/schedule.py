"""The learning rate of each step: by the recipe alone, or by the held-out error as well."""

from __future__ import annotations

import math

import torch

from .recipe import Recipe

# The paper's patience is some epochs of a million images each. The epochs of a small folder are a few steps: its rate
# would fall before anything is learnt.
PLATEAU_IMAGES = 12_800


class Schedule:
    """``rate(step)`` is the learning rate of step number ``step`` (from 0) of ``total``.

    With the schedule ``"plateau"`` it is divided by ten where the held-out error stops falling, as the paper does three
    times.
    """

    def __init__(self, recipe: Recipe, total: int) -> None:
        self.recipe, self.total = recipe, total
        self.seen_step, self.least_error = 0, math.inf  # the plateau's last look, and the least error since
        optimizer = torch.optim.SGD([torch.zeros(())], lr=recipe.lr)  # holds the rate for the plateau alone
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.1, patience=5, threshold=1e-3, threshold_mode="abs", min_lr=recipe.lr * 0.999e-3
        )

    def rate(self, step: int) -> float:
        if self.recipe.schedule != "plateau" or step <= self.recipe.warmup:
            return self.recipe.lr_at(step, self.total)
        return float(self.plateau.optimizer.param_groups[0]["lr"])

    def see(self, step: int, error: float) -> None:
        """Show the plateau the least held-out error after every ``PLATEAU_IMAGES`` training images or more."""
        self.least_error = min(self.least_error, error)
        images = self.recipe.batch_size * self.recipe.accumulate
        seen = (step - max(self.seen_step, self.recipe.warmup)) * images
        if self.recipe.schedule == "plateau" and seen >= PLATEAU_IMAGES:
            self.plateau.step(self.least_error)
            self.seen_step, self.least_error = step, math.inf
