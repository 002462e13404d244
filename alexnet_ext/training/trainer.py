"""The training loop: steps, evaluations and checkpoints; a resumed run continues as if it had not stopped."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import models
from .._errors import BadImage, CommandError, first_line, os_error, path_text
from ..data.batches import MAX_SKIPPED, Batch, batches
from ..data.readers import Readers
from ..data.sources import Split
from ..nn import stock_kind
from . import checkpoint
from .best import Best
from .evaluate import DTYPES, Evaluation, autocast, evaluate, to_device
from .files import locked, write_file
from .interrupt import Interrupt, Interrupted
from .log import Log
from .process import prepare, random_state, set_random_state
from .progress import Reporter
from .recipe import Recipe

CHECKPOINT_SECONDS = 600.0
FLUSH_EVERY_CUDA = 20  # steps between readings of the loss, each of which waits for the GPU
# The paper's patience is some epochs of a million images each. The epochs of a small folder are a few steps: its rate
# would fall before anything is learnt.
PLATEAU_IMAGES = 12_800
# A mean loss that is still that of guessing after this number of steps is reported.
CHANCE_STEPS, CHANCE_WINDOW, CHANCE = 100, 50, 0.98


class Trainer:
    """Trains ``recipe`` on ``split`` into the folder ``out``; ``run()`` is the whole run.

    On the CPU a run is a function of recipe, data and thread count: interrupted and resumed at any step, it
    ends with the same weights, bit for bit.
    """

    def __init__(self, recipe: Recipe, split: Split, out: Path, device: torch.device, workers: int = 0) -> None:
        self.recipe, self.split, self.out, self.device, self.workers = recipe, split, out, device, workers
        self.total = recipe.total_steps(len(split.train))
        self.epoch_steps = recipe.epoch_steps(len(split.train))
        self.step = self.epoch = self.batch = 0  # batch: the step within the epoch
        self.evaluated = -1  # the step of the last evaluation
        self.plateau_step, self.plateau_error = 0, math.inf  # the plateau's last look, and the least error since
        self.best = Best(recipe.evaluate_limit)
        self.seconds = 0.0  # spent on steps, over all of the run's processes
        self.began, self.before = time.monotonic(), 0.0  # this process's start, and the seconds of those before
        self.recent: deque[float] = deque(maxlen=CHANCE_WINDOW)
        self.last: tuple[Tensor, Tensor] | None = None  # the last step's images and classes
        self.skipped: list[str] = []  # paths of training images that could not be read
        # Steps whose loss has not been read yet: (step, loss, right, images, values); then the time of their start.
        self.pending: list[tuple[int, Tensor, Tensor, int, dict[str, Any]]] = []
        self.mark = time.perf_counter()
        self.flush_every = FLUSH_EVERY_CUDA if device.type == "cuda" else 1

        prepare(device, recipe.seed)
        self.model = models.alexnet(
            variant=recipe.model,
            fused=not recipe.stock,
            num_classes=len(split.train.classes),
            image_size=recipe.image_size,
            dropout=recipe.dropout,
            init=recipe.init,
            activation=recipe.activation,
        )
        self.model.to(device).to(memory_format=torch.channels_last)
        dtype = DTYPES[recipe.precision]
        depth = self.model.take_depth(device, dtype)
        # In autocast's dtype at once, and with the depth that conv1 takes: no other pass over the images follows.
        self.augmented = {"space_to_depth": depth, "dtype": dtype}
        self.start = first_kernels(self.model).detach().clone()  # for the picture of the difference to it
        if recipe.freeze is not None:
            freeze(self.model, recipe.freeze)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            self.trained,
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

    @property
    def description(self) -> checkpoint.Description:
        recipe, split = self.recipe, self.split
        place = (split.train.classes, split.preprocessing, recipe.data, self.step)
        return checkpoint.Description(self.model.config, *place, recipe.val, recipe.held_out, split.listing)

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken, over all of its processes."""
        return self.before + time.monotonic() - self.began

    def run(self, reporter: Reporter, stop_at: int | None = None) -> Evaluation:
        """Train to the last step, or until patience ends, and evaluate on every held-out image.

        Raises Interrupted, with a checkpoint written, on a signal (``Interrupt``), and before step ``stop_at``.
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
                evaluating = self.step < self.total and self._evaluation_due()
                saving = self._saving_due(saved)
                if evaluating or saving or stopping or self.step == self.total or len(self.pending) >= self.flush_every:
                    self._flush(log, reporter)
                result = None
                if evaluating and not stopping:
                    result = self._evaluate(log, reporter, interrupt)
                    stopping = result is None
                finished = self.step == self.total or self._has_waited()
                if saving or stopping or finished:
                    path = self.save()
                    saved = time.perf_counter()
                if stopping:
                    raise Interrupted(self.step, path)
                if finished:
                    if result is None or self.recipe.evaluate_limit is not None:
                        result = self._evaluate(log, reporter, interrupt, last=True)
                    if result is None:
                        raise Interrupted(self.step, path)
                    self.best.write(self.out, self.description)
                    return result
                if evaluating or saving:
                    self.mark = time.perf_counter()
                loader = loader or self._loader(self.readers)
                try:
                    group = list(islice(loader, self.recipe.accumulate))
                except Interrupted:
                    continue  # in the middle of a wait
                self._train(group, reporter)
                self.step, self.batch = self.step + 1, self.batch + 1
                if self.batch == self.epoch_steps:
                    self.epoch, self.batch, loader = self.epoch + 1, 0, None

    def start_from(self, file: Path) -> str:
        """Copy the weights of a file, in any format that ``models.load_weights`` reads, and prepare images as they were
        prepared for those weights. A last layer of other classes stays new: returns the words to report that, or "".

        Raises CommandError if the file does not fit.
        """
        last = self.model.get_parameter("classifier.fc8.weight")
        fresh = last.detach().clone()
        try:
            described = checkpoint.read_description(file) if file.suffix == ".safetensors" else None
            other = described is not None and described.classes != self.split.train.classes
            preprocessing = models.load_weights(self.model, file, new_last=True if other else None)
        except (ValueError, ImportError) as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            raise os_error(file, error) from error
        self.start.copy_(first_kernels(self.model).detach())
        size = self.model.config.image_size
        if preprocessing is not None:
            resize = max(size, round(preprocessing.resize * size / preprocessing.size))
            self.split = self.split.brought_as(dataclasses.replace(preprocessing, size=size, resize=resize))
        return f", with a new last layer of {len(last)} classes" if torch.equal(last, fresh) else ""

    def _saving_due(self, saved: float) -> bool:
        every = self.recipe.save_every
        return (every > 0 and self.step > 0 and self.step % every == 0) or (
            time.perf_counter() - saved > CHECKPOINT_SECONDS
        )

    def _has_waited(self) -> bool:
        return self.recipe.patience is not None and self.best.waited >= self.recipe.patience

    def _loader(self, read: Readers | None = None) -> Iterator[Batch]:
        return batches(
            self.split.train,
            self.recipe.batch_size,
            seed=self.recipe.seed,
            epoch=self.epoch,
            start=self.batch * self.recipe.accumulate,
            read=read,
            pin_memory=self.device.type == "cuda",
        )

    def _loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and the mean loss."""
        with autocast(self.device, self.recipe.precision):
            logits = self.model(images)
            return logits.detach(), F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)

    def _train(self, group: list[Batch], reporter: Reporter) -> None:
        """One step on the images of some batches, or none if none of the images could be read."""
        for batch in group:
            self._count_skipped(batch.errors, reporter)
        group = [batch for batch in group if len(batch.targets)]
        if not group:
            return
        if self.recipe.schedule != "plateau" or self.step <= self.recipe.warmup:
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = self.recipe.lr_at(self.step, self.total)
        images = sum(len(batch.targets) for batch in group)
        loss, right = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in group:
            targets = batch.targets.to(self.device, non_blocking=True)
            images_in = to_device(batch.images, self.split.preprocessing, self.device, batch.drawn, **self.augmented)
            self.last = images_in, targets
            logits, mean = self._loss(*self.last)
            part = mean * (len(targets) / images)
            self.scaler.scale(part).backward()
            loss += part.detach()
            right += (logits.argmax(1) == targets).sum()
        if self.recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.trained, self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        values = {"epoch": self.epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        self.pending.append((self.step + 1, loss, right, images, values))

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
        """Read, check and log the losses of the steps since the last call."""
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
            self._tell_chance(loss, step, reporter)

    def _tell_chance(self, loss: float, step: int, reporter: Reporter) -> None:
        """Warn once if nothing has been learnt after enough steps."""
        self.recent.append(loss)
        classes = len(self.split.train.classes)
        mean = sum(self.recent) / len(self.recent)
        enough = max(CHANCE_STEPS, 2 * classes) + self.recipe.warmup
        if step != min(enough, max(self.total, CHANCE_WINDOW)) or mean < CHANCE * math.log(classes):
            return
        init = "" if self.recipe.init == "kaiming" or self.recipe.weights else "--init kaiming, "
        reporter.note(
            f"step {step}: the loss is still {mean:.2f}, that of guessing among {classes} classes is "
            f"{math.log(classes):.2f}; try {init}another --lr than {self.recipe.lr:g}, or trained --weights"
        )

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

    def _evaluate(self, log: Log, reporter: Reporter, interrupt: Interrupt, last: bool = False) -> Evaluation | None:
        """Evaluate and log the result, on all held-out images at the end of the run; None when interrupted."""
        limit = None if last else self.recipe.evaluate_limit
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
        self._follow_plateau(1 - result.top1)
        self.evaluated = self.step
        values = {"loss": result.loss, "top1": result.top1, "top5": result.top5, "images": result.images}
        log.write("evaluate", self.step, values)
        self._check_finite(result.loss, self.step)  # a step's own loss comes from the weights before it
        self.best.see(self.step, result, self.model)
        if not last:
            reporter.note(f"step {self.step}: {result.top1:.1%} of {result.images} held-out images right")
        return result

    def _follow_plateau(self, error: float) -> None:
        """Show the plateau the least held-out error after every ``PLATEAU_IMAGES`` training images or more."""
        self.plateau_error = min(self.plateau_error, error)
        seen = (
            (self.step - max(self.plateau_step, self.recipe.warmup)) * self.recipe.batch_size * self.recipe.accumulate
        )
        if self.recipe.schedule == "plateau" and seen >= PLATEAU_IMAGES:
            self.plateau.step(self.plateau_error)
            self.plateau_step, self.plateau_error = self.step, math.inf

    def _check_weights(self) -> None:
        """End the run if its weights give no finite loss: they must not become the newest checkpoint, and the loss of
        the last step comes from the weights before it."""
        if self.last is None:
            return
        self.model.eval()
        with torch.no_grad():
            _, loss = self._loss(*self.last)
        self.model.train()
        self._check_finite(float(loss), self.step)

    def save(self) -> Path:
        """Write a checkpoint of this step, and the best weights so far."""
        self._check_weights()
        if self.best.step != self.step:  # only this process has those weights
            self.best.write(self.out, self.description)
        state = {
            "recipe": dataclasses.asdict(self.recipe),
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "evaluated": self.evaluated,
            "seconds": self.seconds,
            "elapsed": self.elapsed,
            "best": self.best.state(),
            "plateau_since": [self.plateau_step, self.plateau_error],
            "skipped": list(self.skipped),
            "images": len(self.split.train),
            "classes": list(self.split.train.classes),
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "scaler": self.scaler.state_dict(),
            "start": self.start,
            "random": random_state(),
        }
        path = checkpoint.save(self.out, self.model, self.description, state, self.recipe.keep)
        self.best.write(self.out, self.description)
        return path

    def load(self, path: Path, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Go on from the checkpoint folder ``path``, read into ``state`` and ``weights``.

        Raises CommandError. For a state of other data, of an optimizer of other shapes or without its step, nothing
        has changed then; for any other state that is not a trainer's, part of it may have been taken over.
        """
        shown = path_text(path)
        try:
            self.check_data(path, state)
            checkpoint.check_optimizer(path, state["optimizer"], self.optimizer)
            place = self._place(state)
            if state["start"].shape != self.start.shape:
                raise ValueError(f"start is of shape {list(state['start'].shape)}")
            if not all(tensor.isfinite().all() for tensor in weights.values()):
                raise CommandError(f"{shown}: its weights are no finite numbers; go on from an earlier checkpoint")
            self.model.load_state_dict(weights)
            self.start.copy_(state["start"])
            self._load_optimizer(state)
            self.step, self.epoch, self.batch, self.evaluated = place
            self.seconds = _number(state, "seconds")
            self.before = _number(state, "elapsed") if "elapsed" in state else self.seconds
            self.skipped = [str(name) for name in state["skipped"]]
            if "best" in state:  # earlier versions have none
                self.best.load(state["best"], self.out, self.step, self.model)
                self.plateau_step, self.plateau_error = int(state["plateau_since"][0]), float(state["plateau_since"][1])
            set_random_state(state["random"])  # last, as the lines above may draw numbers
        except CommandError:
            raise
        except Exception as error:  # torch, NumPy and Python each raise errors of their own
            raise CommandError(f"{shown}: not a trainer's state of this version ({first_line(error)})") from error

    def check_data(self, path: Path, state: dict[str, Any]) -> None:
        """Raises CommandError unless the data are those that the checkpoint ``path`` was trained on."""
        shown = path_text(path)
        now, images, data = self.split.train.classes, len(self.split.train), path_text(self.recipe.data)
        try:
            before, count = [str(name) for name in state["classes"]], int(state["images"])
        except (KeyError, TypeError, ValueError) as error:
            raise CommandError(f"{shown}: not a trainer's state of this version ({first_line(error)})") from error
        for word, names in (("lacks", set(before) - set(now)), ("has a new", set(now) - set(before))):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise CommandError(
                    f"{shown}: was trained on {len(before)} classes, and {data} now {word} class "
                    f"{path_text(min(names))}{more}"
                )
        if before != list(now) or count != images:
            raise CommandError(
                f"{shown}: was trained on {count} images of {len(before)} classes, "
                f"and {data} now has {images} of {len(now)}"
            )

    def _place(self, state: dict[str, Any]) -> list[int]:
        """Step, epoch, step within it and last evaluation. Raises ValueError for a place that no run reaches."""
        place = step, epoch, batch, evaluated = [int(state[name]) for name in ("step", "epoch", "batch", "evaluated")]
        if not (0 <= batch < self.epoch_steps and epoch >= 0 and step == epoch * self.epoch_steps + batch):
            raise ValueError(f"step {step} is not step {batch} of {self.epoch_steps} in epoch {epoch}")
        if not -1 <= evaluated <= step:
            raise ValueError(f"evaluated at step {evaluated} of {step}")
        return place

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load the momenta and the rate; the rest comes from the recipe. Raises ValueError for impossible numbers."""
        own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group.update(values)
            if not 0 <= _number(group, "lr") <= self.recipe.lr:
                raise ValueError(f"the learning rate is {group['lr']}, above the recipe's {self.recipe.lr}")
        counts = {name: int(_number(state["plateau"], name)) for name in ("num_bad_epochs", "last_epoch")}
        rates = [_number({"lr": rate}, "lr") for rate in state["plateau"]["_last_lr"]]
        self.plateau.load_state_dict({"best": float(state["plateau"]["best"]), "_last_lr": rates, **counts})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict({name: _number(state["scaler"], name) for name in state["scaler"]})


def freeze(model: torch.nn.Module, name: str) -> None:
    """Keep the weights of the module or layer ``name`` as they are. Raises ValueError where there are none."""
    frozen = [p for n, p in model.named_parameters() if f".{name}." in f".{n}"]
    if not frozen:
        layers = ", ".join(dict.fromkeys(n.split(".")[-2] for n, _ in model.named_parameters()))
        raise ValueError(f"--freeze {path_text(name)}: expected features, classifier or one of {layers}")
    for parameter in frozen:
        parameter.requires_grad_(False)


def first_kernels(model: torch.nn.Module) -> Tensor:
    """The weights of the first convolution."""
    kinds = ((module, stock_kind(module)) for module in model.modules())
    return next(module.get_parameter("weight") for module, kind in kinds if issubclass(kind, torch.nn.Conv2d))


def _number(values: dict[str, Any], name: str) -> float:
    """A finite number of at least 0; ValueError for any other value."""
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r:.50}")
    return value
