"""The training loop: steps, evaluations, checkpoints, and going on from one as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import models
from ..data.batches import Batch, batches
from ..data.errors import BadImage, CommandError, path_text
from ..data.readers import Readers
from ..data.sources import Split
from . import checkpoint
from .evaluate import Evaluation, autocast, evaluate, to_device
from .files import locked, write_file
from .interrupt import Interrupt, Interrupted
from .log import Log
from .memory import keep_freed_memory
from .progress import Reporter
from .recipe import Recipe

MAX_SKIPPED = 0.05  # of the training images: more unreadable ones end the run
CHECKPOINT_SECONDS = 600.0
FLUSH_EVERY_CUDA = 20  # steps between readings of the loss, each of which waits for the GPU


class Trainer:
    """Trains ``recipe`` on ``split`` into the folder ``out``; ``run()`` does it all.

    On the CPU a run is a function of recipe, data and thread count: interrupted and resumed at any step, it
    ends with the same weights, bit for bit.
    """

    def __init__(self, recipe: Recipe, split: Split, out: Path, device: torch.device, workers: int = 0) -> None:
        self.recipe, self.split, self.out, self.device, self.workers = recipe, split, out, device, workers
        self.total = recipe.total_steps(len(split.train))
        self.epoch_steps = math.ceil(len(split.train) / recipe.batch_size)
        self.step = self.epoch = self.batch = 0
        self.evaluated = -1  # the step of the last evaluation
        self.seconds = 0.0  # spent on steps, over all of the run's processes
        self.skipped: list[str] = []  # paths of training images that could not be read
        # Steps whose loss has not been read: (step, loss, right, images, values), and since when they count.
        self.pending: list[tuple[int, Tensor, Tensor, int, dict[str, Any]]] = []
        self.mark = time.perf_counter()
        self.flush_every = FLUSH_EVERY_CUDA if device.type == "cuda" else 1

        if device.type == "cpu":
            keep_freed_memory()
        seed_everything(recipe.seed)
        self.model = models.alexnet(
            variant=recipe.model,
            fused=not recipe.stock,
            num_classes=len(split.train.classes),
            image_size=recipe.image_size,
            dropout=recipe.dropout,
            init=recipe.init,
        )
        self.model.to(device).to(memory_format=torch.channels_last)
        self.start = first_kernels(self.model).detach().clone()  # for the picture of what training adds to it
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        # The paper divides the rate by ten three times.
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=0.1, patience=5, threshold=1e-3, threshold_mode="abs", min_lr=recipe.lr * 0.999e-3
        )
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=recipe.precision == "fp16")
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True

    @property
    def description(self) -> checkpoint.Description:
        return checkpoint.Description(
            self.model.config,
            self.split.train.classes,
            self.split.preprocessing,
            self.recipe.data,
            self.step,
            self.recipe.val,
            self.recipe.held_out,
            self.split.listing,
        )

    def run(self, reporter: Reporter, stop_at: int | None = None) -> Evaluation:
        """Train to the last step and evaluate on every held-out image.

        Raises Interrupted, with a checkpoint written, on SIGINT and SIGTERM, and before step ``stop_at``.
        """
        with (
            locked(self.out),
            Interrupt() as interrupt,
            Readers(self.split.train, self.workers, interrupt.look) as self.readers,
            Readers(self.split.held_out, self.workers, interrupt.look) as self.held_out_readers,
            Log(self.out, self.step, self.evaluated) as log,
        ):
            recipe = json.dumps(dataclasses.asdict(self.recipe), indent=1)  # a resumed run may be longer
            write_file(self.out / "recipe.json", f"{recipe}\n".encode())
            loader: Iterator[Batch] | None = None
            saved = self.mark = time.perf_counter()
            while True:
                stopping = interrupt.requested or self.step == stop_at
                finished = self.step == self.total
                evaluating = finished or self._evaluation_due()
                saving = finished or stopping or time.perf_counter() - saved > CHECKPOINT_SECONDS
                if evaluating or saving or len(self.pending) >= self.flush_every:
                    self._flush(log, reporter)
                if evaluating and not finished and not stopping:
                    stopping = self._evaluate(log, reporter, interrupt) is None
                if saving or stopping:
                    self.save()
                    saved = time.perf_counter()
                if stopping:
                    raise Interrupted
                if finished:
                    result = self._evaluate(log, reporter, interrupt)
                    if result is None:
                        raise Interrupted
                    return result
                if evaluating or saving:
                    self.mark = time.perf_counter()
                loader = loader or self._loader(self.readers)
                try:
                    batch = next(loader)
                except Interrupted:
                    continue  # in the middle of a wait
                self._train(batch, reporter)
                self.step, self.batch = self.step + 1, self.batch + 1
                if self.batch == self.epoch_steps:
                    self.epoch, self.batch, loader = self.epoch + 1, 0, None

    def _loader(self, read: Readers | None = None) -> Iterator[Batch]:
        return batches(
            self.split.train,
            self.recipe.batch_size,
            seed=self.recipe.seed,
            epoch=self.epoch,
            start=self.batch,
            read=read,
            pin_memory=self.device.type == "cuda",
        )

    def _train(self, batch: Batch, reporter: Reporter) -> None:
        """One step, or none where no image of the batch could be read."""
        self._count_skipped(batch.errors, reporter)
        if not len(batch.targets):
            return
        if self.recipe.schedule != "plateau":
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.lr_at(self.step, self.total)
        images = to_device(batch.images, self.split.preprocessing, self.device, batch.drawn)
        targets = batch.targets.to(self.device, non_blocking=True)
        with autocast(self.device, self.recipe.precision):
            logits = self.model(images)
            loss = F.cross_entropy(logits, targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        right = (logits.detach().argmax(1) == targets).sum()
        values = {"epoch": self.epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        self.pending.append((self.step + 1, loss.detach(), right, len(targets), values))

    def _count_skipped(self, errors: list[BadImage], reporter: Reporter) -> None:
        for error in errors:
            if error.path in self.skipped:
                continue
            self.skipped.append(error.path)
            reporter.note(f"skipped {error}")
            if len(self.skipped) > max(1, MAX_SKIPPED * len(self.split.train)):
                raise CommandError(
                    f"{error}; with it {len(self.skipped)} of {len(self.split.train)} training images are "
                    f"unreadable, more than {MAX_SKIPPED:.0%}"
                )

    def _flush(self, log: Log, reporter: Reporter) -> None:
        """Read, check and write down the losses of the steps since the last time."""
        read = [(step, float(loss), int(right) / count, values) for step, loss, right, count, values in self.pending]
        now = time.perf_counter()
        self.seconds += now - self.mark
        rate = sum(count for _, _, _, count, _ in self.pending) / max(now - self.mark, 1e-9)
        self.mark = now
        self.pending.clear()
        for step, loss, accuracy, values in read:
            measured = {"loss": loss, "accuracy": accuracy, "images_per_second": rate, "seconds": self.seconds}
            log.write("train", step, values | measured)
            self._check_finite(loss, step)
            reporter.step(step, loss, accuracy, rate)

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise CommandError(
                f"{path_text(self.out)}: the loss is {loss} at step {step}; try a lower --lr "
                "(checkpoints of earlier steps stay as they were)"
            )

    def _evaluation_due(self) -> bool:
        if self.step == 0 or self.evaluated == self.step:
            return False
        every = self.recipe.evaluate_every
        return self.step % every == 0 if every else self.batch == 0

    def _evaluate(self, log: Log, reporter: Reporter, interrupt: Interrupt) -> Evaluation | None:
        """Evaluate and write it down, on all held-out images after the last step; None when interrupted."""
        limit = None if self.step == self.total else self.recipe.evaluate_limit
        try:
            result = evaluate(
                self.model,
                self.split.held_out,
                self.split.preprocessing,
                device=self.device,
                precision=self.recipe.precision,
                limit=limit,
                read=self.held_out_readers,
                on_batch=reporter.evaluating,
                stop=lambda: interrupt.requested,
            )
        except Interrupted:
            return None
        for error in result.errors:
            reporter.note(f"skipped {error}")
        if self.recipe.schedule == "plateau":
            self.plateau.step(1 - result.top1)
        self.evaluated = self.step
        values = {"loss": result.loss, "top1": result.top1, "top5": result.top5, "images": result.images}
        log.write("evaluate", self.step, values)
        self._check_finite(result.loss, self.step)  # a step's own loss is of the weights before it
        if self.step < self.total:
            reporter.note(f"step {self.step}: {result.top1:.1%} of {result.images} held-out images right")
        return result

    def save(self) -> Path:
        """Write a checkpoint of this step."""
        state = {
            "recipe": dataclasses.asdict(self.recipe),
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "evaluated": self.evaluated,
            "seconds": self.seconds,
            "skipped": list(self.skipped),
            "images": len(self.split.train),
            "classes": list(self.split.train.classes),
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "scaler": self.scaler.state_dict(),
            "start": self.start,
            "random": random_state(),
        }
        return checkpoint.save(self.out, self.model, self.description, state)

    def load(self, path: Path, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Go on from the checkpoint folder ``path``, read into ``state`` and ``weights``.

        Raises CommandError for a state of other data, of an optimizer of other shapes or without its step, before
        anything has changed; for what else is no trainer's state, when some of it may have been taken over.
        """
        shown = path_text(path)
        classes, images = list(self.split.train.classes), len(self.split.train)
        try:
            if state["classes"] != classes or state["images"] != images:
                raise CommandError(
                    f"{shown}: was trained on {state['images']} images of {len(state['classes'])} classes, "
                    f"and {path_text(self.recipe.data)} now has {images} of {len(classes)}"
                )
            checkpoint.check_optimizer(path, state["optimizer"], self.optimizer)
            numbers = [int(state[name]) for name in ("step", "epoch", "batch", "evaluated")]
            if state["start"].shape != self.start.shape:
                raise ValueError(f"start is of shape {list(state['start'].shape)}")
            self.model.load_state_dict(weights)
            self.start.copy_(state["start"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.plateau.load_state_dict(state["plateau"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.epoch, self.batch, self.evaluated = numbers
            self.seconds, self.skipped = float(state["seconds"]), [str(name) for name in state["skipped"]]
            set_random_state(state["random"])  # last: whatever was drawn on the way here does not count
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CommandError(f"{shown}: not a trainer's state of this version ({error!r})") from error


def first_kernels(model: torch.nn.Module) -> Tensor:
    """The weights of the first convolution."""
    return next(module.weight for module in model.modules() if isinstance(module, torch.nn.Conv2d))


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The states of all generators in plain types and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` returned; a GPU's state only where there are as many GPUs as then."""
    name, keys, position, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
