"""The training loop: steps, evaluations and checkpoints; a resumed run continues as if it had not stopped."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import models
from .._errors import BadImage, CommandError, os_error, path_text
from ..data.batches import MAX_SKIPPED, Batch, Dataset, Key, batches
from ..data.readers import Readers
from ..data.sources import Split
from ..nn import stock_kind
from ..parallel.data import Place, share
from ..parallel.ranks import ALONE, Ranks
from . import checkpoint, state
from .average import Average
from .best import Best
from .evaluate import Evaluation, evaluate, with_room
from .files import locked, unfinished, write_file
from .interrupt import Interrupt, Interrupted
from .log import Log
from .losses import Losses
from .process import memory, prepare
from .profile import profiled
from .progress import Reporter
from .recipe import Recipe, growth
from .runs import RECIPE
from .schedule import Schedule
from .step import TrainingStep
from .writer import Copies, Writer

CHECKPOINT_SECONDS = 600.0
# A mean loss that is still that of guessing after this number of steps is reported.
CHANCE_STEPS, CHANCE_WINDOW, CHANCE = 100, 50, 0.98


class Means(NamedTuple):
    """What a run uses besides its recipe, and looks at besides its results; a resumed run may have others.

    workers: processes that read images. cache: keep packed images in ``"ram"`` or on the ``"device"``. loader:
    ``"dali"`` reads folders of images by it. profile: steps that are traced. detect_nan: look at each operation.
    ranks: the processes that train together; the first of them alone logs and writes.
    """

    device: torch.device
    workers: int = 0
    cache: str | None = None
    loader: str | None = None
    profile: int = 0
    detect_nan: bool = False
    ranks: Ranks = ALONE


class Trainer:
    """Trains ``recipe`` on ``split`` into the folder ``out``; ``run()`` is the whole run.

    On the CPU a run is a function of recipe, data and thread count: interrupted and resumed at any step, it
    ends with the same weights, bit for bit. The number of ranks changes the order of sums alone.
    """

    def __init__(self, recipe: Recipe, split: Split, out: Path, means: Means) -> None:
        self.recipe, self.split, self.out, self.means = recipe, split, out, means
        self.device, self.ranks = device, ranks = means.device, means.ranks
        self.total = recipe.total_steps(len(split.train))
        self.epoch_steps = recipe.epoch_steps(len(split.train))
        self.step = self.epoch = self.batch = 0  # batch: the step within the epoch
        self.first = 0  # the step that this process begins at
        self.evaluated = -1  # the step of the last evaluation
        self.ten_crops: Evaluation | None = None  # of the last weights, where the recipe has it
        self.best = Best(recipe.evaluate_limit)
        self.writer, self.copies = Writer(), Copies()
        self.seconds = 0.0  # spent on steps, over all of the run's processes
        self.began, self.before = time.monotonic(), 0.0  # this process's start, and the seconds of those before
        self.recent: deque[float] = deque(maxlen=CHANCE_WINDOW)
        self.skipped: list[str] = []  # paths of training images that could not be read
        self.mark, self.waited = time.perf_counter(), 0.0  # the last reading of losses, and the wait for data since

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
        self.start = first_kernels(self.model).detach().clone()  # for the picture of the difference to it
        if recipe.freeze is not None:
            freeze(self.model, recipe.freeze)
        self.model.take_sides([side for side, _ in growth(recipe.grow)])
        self.average = None if recipe.ema is None else Average(self.model, recipe.ema)
        self.schedule = Schedule(recipe, self.total)
        self.take = TrainingStep(self.model, recipe, device, means.detect_nan, ranks)
        self.losses = Losses(device, ranks)

    @property
    def final(self) -> models.AlexNet:
        """The network that is evaluated and saved: that of the averaged weights if the recipe has an ``ema``."""
        return self.model if self.average is None else self.average.model

    def weights(self) -> dict[str, Tensor]:
        """The state_dict of ``final`` in fp32, its tensors those that training goes on to change."""
        return self.take.weights() if self.average is None else self.average.model.state_dict()

    @property
    def description(self) -> checkpoint.Description:
        recipe, split = self.recipe, self.split
        place = (split.train.classes, split.preprocessing, recipe.data, self.step)
        return checkpoint.Description(self.model.config, *place, recipe.val, recipe.held_out, split.listing)

    @property
    def kernels(self) -> Tensor:
        """The weights of the first convolution, in fp32."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return self.weights()[names[id(first_kernels(self.model))]].detach()

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken, over all of its processes."""
        return self.before + time.monotonic() - self.began

    def run(self, reporter: Reporter, stop_at: int | None = None) -> Evaluation:
        """Train to the last step, or until patience ends, and evaluate on every held-out image.

        Raises Interrupted, with a checkpoint written, on a signal (``Interrupt``), and before step ``stop_at``.
        """
        pin, first = self.device.type == "cuda", self.ranks.first
        with (
            self._locked(),
            Interrupt(first) as interrupt,
            self.writer,
            Readers(self.split.train, self.means.workers, interrupt.look, pin) as self.readers,
            Readers(self.split.held_out, self.means.workers, interrupt.look, pin) as self.held_out_readers,
            Log(self.out if first else None, self.step, self.evaluated) as log,
            profiled(self.out, self.means.profile if first else 0, reporter.note) as stepped,
        ):
            self.first = self.step
            self.ranks.first_does(self._clear)
            self._begin(log, reporter)
            loader: Iterator[Batch] | None = None
            saved = self.mark = time.perf_counter()
            while True:
                asked_to = interrupt.requested or self.step == stop_at
                stopping, saving, failed = self.ranks.any(asked_to, self._saving_due(saved), self.writer.failed)
                if failed:
                    self.ranks.first_does(self.writer.look)
                evaluating = self.step < self.total and self._evaluation_due()
                self._flush(log, reporter, wait=evaluating or saving or stopping or self.step == self.total)
                result = None
                if evaluating and not stopping:
                    result = self._evaluate(log, reporter, interrupt)
                    stopping = result is None
                finished = self.step == self.total or self._has_waited()
                if saving or stopping or finished:
                    with log.timed("save", self.step):
                        path = self.save()
                    saved = time.perf_counter()
                if stopping or finished:
                    self.ranks.first_does(self.writer.wait)
                if stopping:
                    raise Interrupted(self.step, path)
                if finished:
                    if result is None or self.recipe.evaluate_limit is not None:
                        result = self._evaluate(log, reporter, interrupt, last=True)
                    if result is None or not self._try_ten_crops(reporter, interrupt):
                        raise Interrupted(self.step, path)
                    self.ranks.first_does(lambda: self.best.write(self.out, self.description))
                    if self.ranks.any(interrupt.requested)[0]:
                        raise Interrupted(self.step, path)  # before the pictures
                    return result
                if evaluating or saving:
                    self.mark, self.waited = time.perf_counter(), 0.0
                loader = loader or self._loader(self.readers)
                asked = time.perf_counter()
                group: list[Batch] | None = None
                with contextlib.suppress(Interrupted):  # in the middle of a wait
                    group = list(islice(loader, self.recipe.accumulate))
                self.waited += time.perf_counter() - asked
                if not self._train(group, reporter):
                    continue
                stepped()
                self.step, self.batch = self.step + 1, self.batch + 1
                if self.batch == self.epoch_steps:
                    self.epoch, self.batch, loader = self.epoch + 1, 0, None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Context manager: the folder is this run's, which the first of its ranks sees to."""
        with contextlib.ExitStack() as stack:
            self.ranks.first_does(lambda: stack.enter_context(locked(self.out)))
            yield

    def _begin(self, log: Log, reporter: Reporter) -> None:
        recipe = dataclasses.asdict(self.recipe)  # a resumed run may be longer
        text = f"{json.dumps(recipe, indent=1)}\n".encode()
        self.ranks.first_does(lambda: write_file(self.out / RECIPE, text))
        log.describe(recipe)
        self.take.note = reporter.note
        reason = self.take.eager_reason()
        if reason is not None and self.device.type == "cuda":
            reporter.note(f"the steps run one operation at a time, not as a CUDA graph: {reason}")
        if self.take.pieces > 1 and not self.ranks.many:
            reporter.note(f"batches stay in {self.take.pieces} pieces: memory was too small before")
        if self.recipe.compile and self.means.detect_nan:
            reporter.note("the network is not compiled: --detect-nan looks at each operation")

    def start_from(self, file: Path) -> str:
        """Copy the weights of a file, in any format that ``models.load_weights`` reads, and prepare images as they were
        prepared for those weights. A last layer of other classes stays new: returns the words to report that, or "".

        Raises CommandError if the file does not fit.
        """
        model = copy.deepcopy(self.model).float()  # in fp32, also where the network is not
        model.load_state_dict(self.take.weights())
        last = model.get_parameter("classifier.fc8.weight")
        fresh = last.detach().clone()
        try:
            described = checkpoint.read_description(file) if file.suffix == ".safetensors" else None
            other = described is not None and described.classes != self.split.train.classes
            preprocessing = models.load_weights(model, file, new_last=True if other else None)
        except (ValueError, ImportError) as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            raise os_error(file, error) from error
        self.take.load_weights(model.state_dict())
        if self.average is not None:
            self.average.update(self.take.weights(), 0)
        self.start.copy_(self.kernels)
        size = self.model.config.image_size
        if preprocessing is not None:
            resize = max(size, round(preprocessing.resize * size / preprocessing.size))
            self.split = self.split.brought_as(dataclasses.replace(preprocessing, size=size, resize=resize))
        return f", with a new last layer of {len(last)} classes" if torch.equal(last, fresh) else ""

    def _saving_due(self, saved: float) -> bool:
        every = self.recipe.save_every
        return (every > 0 and self.step > self.first and self.step % every == 0) or (
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
            part=self._own_images,
            read=read,
            pin_memory=self.device.type == "cuda",
        )

    def _own_images(self, keys: list[list[Key]]) -> list[list[Key]]:
        """Of each batch this rank's images: the order is one for all."""
        return [[some[at] for at in share(len(some), self.ranks.rank, self.ranks.size)] for some in keys]

    def _train(self, group: list[Batch] | None, reporter: Reporter) -> bool:
        """One step on the images of some batches, or none if none of the images could be read. Whether the step is
        done: not if a rank has been stopped while it waited for its images, and has None of them."""
        images = [len(batch.targets) for batch in group or ()]
        errors = [error for batch in group or () for error in batch.errors]
        padded = images + [0] * (self.recipe.accumulate - len(images))
        ranks = self.ranks.numbers([group is None, len(errors), *padded])
        if group is None or any(stopped for stopped, *_ in ranks):
            return False
        if any(broken for _, broken, *_ in ranks):
            self._count_skipped([error for own in self.ranks.gather(errors) for error in own], reporter)
        counts = [counts[: len(group)] for _, _, *counts in ranks]
        before = [sum(column[: self.ranks.rank]) for column in zip(*counts, strict=True)]
        places = [Place(*place) for place in zip(before, map(sum, zip(*counts, strict=True)), strict=True)]
        kept = [number for number, place in enumerate(places) if place.images]
        if kept:
            self._step([group[number] for number in kept], [places[number] for number in kept])
        return True

    def _step(self, group: list[Batch], places: list[Place]) -> None:
        rate = self.schedule.rate(self.step)
        side = self.recipe.side_at(self.step, self.total, self.split.preprocessing.size)
        taken = self.take(group, self.split.preprocessing.at(side), rate, self.step + 1, places)
        if self.average is not None:
            self.average.update(self.take.weights(), self.step)
        self.losses.add(self.step + 1, taken, {"epoch": self.epoch, "lr": rate})

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

    def _flush(self, log: Log, reporter: Reporter, wait: bool) -> None:
        """Check and log the losses that have arrived; ``wait`` for all of them."""
        read = self.losses.read(wait)
        if not read:
            return
        now = time.perf_counter()
        spent = max(now - self.mark, 1e-9)
        self.seconds += spent
        rate = sum(measured.images for measured in read) / spent
        waiting = min(1.0, self.waited / spent)
        spans = {"data": self.waited, "step": max(0.0, spent - self.waited)}
        self.mark, self.waited = now, 0.0
        used = memory(self.device)
        for step, loss, accuracy, _, values in read:
            measured = {"loss": loss, "accuracy": accuracy, "images_per_second": rate, "seconds": self.seconds}
            log.write("train", step, values | measured)
            self._check_finite(loss, step)
            reporter.step(step, loss, accuracy, rate, waiting, used)
            self._tell_chance(loss, step, reporter)
        for name, seconds in spans.items():
            log.span(name, read[-1].step, seconds)

    def _tell_chance(self, loss: float, step: int, reporter: Reporter) -> None:
        """Warn once if nothing has been learnt after enough steps."""
        self.recent.append(loss)
        classes = len(self.split.train.classes)
        mean = sum(self.recent) / len(self.recent)
        enough = max(CHANCE_STEPS, 2 * classes) + self.schedule.warmup
        if step != min(enough, max(self.total, CHANCE_WINDOW)) or mean < CHANCE * math.log(classes):
            return
        init = "" if self.recipe.init == "kaiming" or self.recipe.weights else "--init kaiming, "
        reporter.note(
            f"step {step}: the loss is still {mean:.2f}, that of guessing among {classes} classes is "
            f"{math.log(classes):.2f}; try {init}another --lr than {self.recipe.lr:g}, or trained --weights"
        )

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss) and self.ranks.first:  # it ends the others, and knows what has been written
            with contextlib.suppress(Exception):  # the divergence is reported first
                self.writer.wait()  # it may be writing the checkpoint that is named, or removing it
            whole = [path for path in checkpoint.generations(self.out) if checkpoint.damage(path) is None]
            kept = f"the last good checkpoint is {path_text(whole[0])}" if whole else "there is no checkpoint yet"
            raise CommandError(
                f"{path_text(self.out)}: the loss is {loss} at step {step}; try a lower --lr, a longer --warmup or "
                f"--clip-norm; --detect-nan names the layer ({kept})"
            )

    def _evaluation_due(self) -> bool:
        if self.step == 0 or self.evaluated == self.step:
            return False
        every = self.recipe.evaluate_every
        return self.step % every == 0 if every else self.batch == 0

    def _evaluate(self, log: Log, reporter: Reporter, interrupt: Interrupt, last: bool = False) -> Evaluation | None:
        """Evaluate and log the result, on all held-out images at the end of the run; None when interrupted."""
        self.writer.wait()  # processes are forked here, and the memory of the best weights is reused
        limit = None if last else self.recipe.evaluate_limit
        began = time.perf_counter()
        try:
            result = self._on(self.split.held_out, self.held_out_readers, reporter, interrupt, limit=limit)
        except Interrupted:
            return None
        for error in result.errors:
            reporter.note(f"skipped {error}")
        self.schedule.see(self.step, 1 - result.top1)
        self.evaluated = self.step
        values = {"loss": result.loss, "top1": result.top1, "top5": result.top5, "images": result.images}
        log.write("evaluate", self.step, values)
        log.span("evaluate", self.step, time.perf_counter() - began)
        log.kernels(self.kernels, self.step)
        self._check_finite(result.loss, self.step)  # a step's own loss comes from the weights before it
        self.best.see(self.step, result, self.weights() if self.ranks.first else {})
        if not last:
            reporter.note(f"step {self.step}: {result.top1:.1%} of {result.images} held-out images right")
        return result

    def _on(self, dataset: Dataset, read: Readers, reporter: Reporter, interrupt: Interrupt, **rest: Any) -> Evaluation:
        return evaluate(
            self.final,
            dataset,
            self.split.preprocessing,
            device=self.device,
            precision=self.recipe.precision,
            read=read,
            on_batch=reporter.evaluating,
            stop=lambda: interrupt.requested,
            note=reporter.note,
            ranks=self.ranks,
            **rest,
        )

    def _try_ten_crops(self, reporter: Reporter, interrupt: Interrupt) -> bool:
        """Evaluate on ten crops if the recipe has it and the images have room; False when interrupted."""
        preprocessing = self.split.preprocessing
        if not self.recipe.ten_crop or preprocessing.resize == preprocessing.size:
            return True
        wide = with_room(self.split.held_out, preprocessing)
        pin = self.device.type == "cuda"
        with contextlib.suppress(Interrupted), Readers(wide, self.means.workers, interrupt.look, pin) as read:
            self.ten_crops = self._on(wide, read, reporter, interrupt, ten_crop=True)
        return self.ten_crops is not None

    def _check_weights(self) -> None:
        """End the run if its weights give no finite loss: they must not become the newest checkpoint, and the loss of
        the last step comes from the weights before it."""
        loss = self.take.last_loss()
        if loss is not None:
            self._check_finite(loss, self.step)

    def save(self) -> Path:
        """Begin to write a checkpoint of this step, and the best weights so far; ``writer`` says when they are there.

        Returns the folder that it will be."""
        self.ranks.first_does(self._write)
        return checkpoint.place(self.out, self.step)

    def _write(self) -> None:
        """What is written are copies: the next steps change the weights in place."""
        self._check_weights()
        self.writer.wait()  # the memory of its copies is reused
        weights, held = self.copies((self.weights(), state.of(self)))
        best, description = self.best.taken(), self.description

        def write() -> None:
            if best.step != description.step:  # only this process has those weights
                best.write(self.out, description)
            checkpoint.save(self.out, weights, description, held, self.recipe.keep)
            best.write(self.out, description)

        self.writer.start(write)

    def _clear(self) -> None:
        """Remove what a killed process has left half written, and before the first step also the best weights of one
        that was killed before its first checkpoint."""
        for path in unfinished(self.out):
            with contextlib.suppress(OSError):
                path.unlink()
        if self.step == 0:
            shutil.rmtree(self.out / checkpoint.BEST, ignore_errors=True)


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
