"""One step of training: augmented images in, loss and gradients, new weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from ..data.batches import Batch
from ..data.preprocessing import Preprocessing
from .evaluate import DTYPES, autocast, to_device
from .recipe import Recipe


class Taken(NamedTuple):
    """What a step measured, on the device: the mean loss and the number of right guesses of ``images`` images."""

    loss: Tensor
    right: Tensor
    images: int


class TrainingStep:
    """Steps of SGD on ``model`` by ``recipe``; ``loss()`` is also that of the images of the last one."""

    def __init__(self, model: models.AlexNet, recipe: Recipe, device: torch.device) -> None:
        self.model, self.recipe, self.device = model, recipe, device
        dtype = DTYPES[recipe.precision]
        depth = model.take_depth(device, dtype)
        # In autocast's dtype at once, and with the depth that conv1 takes: no other pass over the images follows.
        self.augmented: dict[str, Any] = {"space_to_depth": depth, "dtype": dtype}
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            self.trained,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=recipe.precision == "fp16")
        self.last: tuple[Tensor, Tensor] | None = None  # the last step's images and classes

    def __call__(self, group: list[Batch], preprocessing: Preprocessing, rate: float) -> Taken:
        """One step at learning rate ``rate`` on all images of some batches, each of at least one image."""
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate
        images = sum(len(batch.targets) for batch in group)
        loss, right = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in group:
            targets = batch.targets.to(self.device, non_blocking=True)
            images_in = to_device(batch.images, preprocessing, self.device, batch.drawn, **self.augmented)
            self.last = images_in, targets
            logits, mean = self._loss(*self.last)
            part = mean * (len(targets) / images)
            self.scaler.scale(part).backward()
            loss += part.detach()
            right += (logits.argmax(1) == targets).sum()
        if self.recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained, self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(loss, right, images)

    def _loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and the mean loss."""
        with autocast(self.device, self.recipe.precision):
            logits = self.model(images)
            return logits.detach(), F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)

    def last_loss(self) -> float | None:
        """The loss of the last step's images by the weights after it, without dropout; None before the first step."""
        if self.last is None:
            return None
        self.model.eval()
        with torch.no_grad():
            _, loss = self._loss(*self.last)
        self.model.train()
        return float(loss)
