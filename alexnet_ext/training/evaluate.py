"""Accuracy of a network on held-out images, and its prediction for one image."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import BadImage, CommandError, is_out_of_memory
from ..data.batches import Batch, Dataset, Drawn, Key, batches
from ..data.preprocessing import Preprocessing, bilinear
from ..ops import augment
from ..ops.augment.reference import yuv420_to_rgb
from ..parallel.ranks import ALONE, Ranks
from .interrupt import Interrupted

BATCH = 50
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Evaluation:
    """Sums over the images evaluated, and for each image its five best classes.

    ``guesses`` and ``probabilities`` are (N, 5 or fewer classes), best first; ``truth`` is the probability of the
    right class; ``indices`` are the images' places in the data, ``targets`` their classes.
    """

    loss: float
    seconds: float
    indices: Tensor
    targets: Tensor
    guesses: Tensor
    probabilities: Tensor
    truth: Tensor
    errors: list[BadImage] = field(default_factory=list)

    @property
    def images(self) -> int:
        return len(self.targets)

    @property
    def right(self) -> Tensor:
        """Whether the best guess was right, for each image."""
        return self.guesses[:, 0] == self.targets

    @property
    def top1(self) -> float:
        return float(self.right.float().mean())

    @property
    def top5(self) -> float:
        return float((self.guesses == self.targets[:, None]).any(1).float().mean())

    def by_class(self, count: int) -> list[tuple[int, int]]:
        """(right, images) for each of ``count`` classes."""
        right = torch.bincount(self.targets[self.right], minlength=count).tolist()
        return list(zip(right, torch.bincount(self.targets, minlength=count).tolist(), strict=True))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The autocast context of ``"fp32"`` (none), ``"bf16"`` or ``"fp16"``."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def to_device(
    images: Tensor,
    preprocessing: Preprocessing,
    device: torch.device,
    drawn: Drawn | None = None,
    **augmented: Any,
) -> Tensor:
    """A batch as the network takes it: moved to ``device`` as bytes, augmented as ``drawn`` says, normalized, and laid
    out channels-last. ``augmented`` are the ``dtype`` and ``space_to_depth`` of ``ops.augment``.

    Squares that are to be augmented are scaled to ``preprocessing.resize`` if they have another side; ``drawn`` is for
    the side that they have."""
    images = images.to(device, non_blocking=True)
    if drawn is None:
        return preprocessing(images).contiguous(memory_format=torch.channels_last)
    offsets, flips, shifts = (values.to(device, non_blocking=True) for values in drawn)
    before, now = images.shape[-1], preprocessing.resize
    if before != now:  # the same part of the image in other pixels
        if images.dim() == 3:
            images = yuv420_to_rgb(images).permute(0, 3, 1, 2)
        images = bilinear(images.float(), now).round_().to(torch.uint8)
        offsets = ((offsets * now + before // 2) // before).clamp_(max=now - preprocessing.size)
    pixels = images if images.dim() == 3 else images.permute(0, 2, 3, 1)  # I420, or RGB
    size, mean, std = preprocessing.size, preprocessing.mean, preprocessing.std
    return augment(pixels, offsets, flips, shifts, size, mean=mean, std=std, **augmented)


def ten_crops(images: Tensor, size: int) -> Iterator[Tensor]:
    """The paper's ten views of (N, channels, height, width), each (N, channels, size, size): the four corners and the
    centre, each followed by its reflection."""
    down, right = images.shape[-2] - size, images.shape[-1] - size
    places = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
    for top, left in places:
        view = images[..., top : top + size, left : left + size]
        yield view
        yield view.flip(-1)


def with_room(dataset: Dataset, preprocessing: Preprocessing) -> Dataset:
    """The images of ``dataset`` as whole squares of side ``preprocessing.resize``, for ``evaluate(ten_crop=True)``.
    Raises CommandError where a crop has no room around it, as in digits."""
    if preprocessing.resize == preprocessing.size:
        raise CommandError(
            "--ten-crop: these images fill the network's input, expected some with room around a crop", 2
        )
    wide: Any = copy.copy(dataset)
    wide.preprocessing = dataclasses.replace(preprocessing, size=preprocessing.resize)
    return wide


def _logits(
    model: nn.Module, images: Tensor, preprocessing: Preprocessing, device: torch.device, ten_crop: bool
) -> Tensor:
    """Scores of a batch, on the CPU; of ten crops the logarithm of their mean softmax. One crop of each image passes
    the network at a time, so that ten take no more memory than one."""
    if not ten_crop:
        return model(to_device(images, preprocessing, device)).float().cpu()
    crops = [
        model(to_device(crop, preprocessing, device)).float().cpu().log_softmax(1)
        for crop in ten_crops(images, preprocessing.size)
    ]
    return torch.stack(crops).logsumexp(0) - math.log(len(crops))


def _in_pieces(
    scores: Callable[[Tensor], Tensor], images: Tensor, size: int, note: Callable[[str], None]
) -> tuple[Tensor, int]:
    """``scores`` of at most ``size`` images at a time, halved until they fit into memory; and the number that did."""
    while True:
        largest = min(size, len(images))
        try:
            return torch.cat([scores(piece) for piece in images.split(largest)]), size
        except RuntimeError as error:
            if largest == 1 or not is_out_of_memory(error):
                raise
        size = -(-largest // 2)  # not above: there the error still holds the memory of what failed
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        note(f"{largest} images at a time do not fit into memory: now {size}")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    device: torch.device,
    precision: str = "fp32",
    limit: int | None = None,
    ten_crop: bool = False,
    read: Callable[[Sequence[Sequence[Key]]], Iterator[Batch]] | None = None,
    on_batch: Callable[[int, int], None] = lambda _done, _total: None,
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda _text: None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Evaluate on the first ``limit`` images; unreadable ones are left out and listed. ``read`` is as for ``batches``;
    ``on_batch(done, total)`` is called after each batch. ``ten_crop`` averages the softmax over ten crops of each image
    (section 4.1 of the paper); ``dataset`` is then one of ``with_room``. Raises Interrupted when ``stop()`` turns true.
    A batch beyond memory is halved until it fits, and ``note`` is called with a line that says so. ``model`` keeps its
    mode.

    ``ranks`` take turns, each with a whole batch: the result is that of one process, on all of them."""
    was_training = model.training
    model.eval()
    start, own = time.perf_counter(), []
    total = min(len(dataset), limit or len(dataset))
    size = BATCH  # images at a time

    def scores(images: Tensor) -> Tensor:
        return _logits(model, images, preprocessing, device, ten_crop)

    def turns(keys: list[list[Key]]) -> list[list[Key]]:
        missing: list[list[Key]] = [[]] * (-len(keys) % ranks.size)
        return (keys + missing)[ranks.rank :: ranks.size]

    try:
        found = batches(dataset, BATCH, limit=limit, part=turns, read=read, pin_memory=device.type == "cuda")
        for done in range(BATCH * ranks.size, total + BATCH * ranks.size, BATCH * ranks.size):
            batch = _unless_stopped(found, stop, ranks)
            measured = None
            if len(batch.targets):
                with autocast(device, precision):
                    logits, size = _in_pieces(scores, batch.images, size, note)
                measured = _measured(batch, logits)
            own.append((batch.errors, measured))
            on_batch(min(done, total), total)
    finally:
        model.train(was_training)
    gathered = [part for turn in zip(*ranks.gather(own), strict=True) for part in turn]
    errors = [error for some, _ in gathered for error in some]
    parts = [measured for _, measured in gathered if measured is not None]
    if not parts:
        raise errors[0]
    losses, *columns = zip(*parts, strict=True)
    indices, targets, guesses, probabilities, truth = map(torch.cat, columns)
    loss, seconds = sum(losses) / len(targets), time.perf_counter() - start
    return Evaluation(loss, seconds, indices, targets, guesses, probabilities, truth, errors)


def _unless_stopped(found: Iterator[Batch], stop: Callable[[], bool], ranks: Ranks) -> Batch:
    """The next batch. Raises Interrupted on every rank if one of them is to stop, or was stopped in its wait."""
    batch = None
    with contextlib.suppress(Interrupted):
        batch = next(found)
    (stopped,) = ranks.any(batch is None or stop())
    if batch is None or stopped:
        raise Interrupted
    return batch


def _measured(batch: Batch, logits: Tensor) -> tuple[Any, ...]:
    """The summed loss of a batch, then the columns of an Evaluation."""
    scores = logits.softmax(1)
    best = scores.topk(min(5, scores.shape[1]))
    truth = scores.gather(1, batch.targets[:, None])[:, 0]
    loss = float(F.cross_entropy(logits, batch.targets, reduction="sum"))
    return loss, batch.indices, batch.targets, best.indices, best.values, truth
