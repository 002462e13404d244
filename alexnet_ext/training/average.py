"""The moving average of the weights, which a run with ``ema`` evaluates and keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import models

GROWTH = 9  # the decay of step n is at most n / (n + 9): the random start and the first steps are soon forgotten


class Average:
    """An exponential moving average, as a network of its own: ``model``, with weights in fp32."""

    def __init__(self, model: models.AlexNet, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).float().requires_grad_(False)

    @torch.no_grad()
    def update(self, trained: Mapping[str, Tensor], step: int) -> None:
        """Take in the fp32 weights after step number ``step``: ``average = d average + (1 - d) weight``. Step 0 copies
        them."""
        decay = min(self.decay, step / (step + GROWTH))
        averages = dict(self.model.named_parameters())
        get_ema_multi_avg_fn(decay)(list(averages.values()), [trained[name] for name in averages], None)
