"""What a checkpoint holds of a Trainer, and how a new one goes on from it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._errors import CommandError, first_line, path_text
from . import checkpoint
from .process import random_state, set_random_state

if TYPE_CHECKING:
    from .trainer import Trainer


def of(trainer: Trainer) -> dict[str, Any]:
    """All that ``load`` needs besides the weights."""
    schedule, take = trainer.schedule, trainer.take
    return {
        "recipe": dataclasses.asdict(trainer.recipe),
        "step": trainer.step,
        "epoch": trainer.epoch,
        "batch": trainer.batch,
        "evaluated": trainer.evaluated,
        "seconds": trainer.seconds,
        "elapsed": trainer.elapsed,
        "best": trainer.best.state(),
        "plateau_since": [schedule.seen_step, schedule.least_error],
        "skipped": list(trainer.skipped),
        "images": len(trainer.split.train),
        "classes": list(trainer.split.train.classes),
        "optimizer": take.optimizer_state(),
        "plateau": schedule.plateau.state_dict(),
        "scaler": take.scaler.state_dict(),
        "pieces": take.pieces,
        "start": trainer.start,
        "random": random_state(),
        # With an average the file of weights has that.
        "trained": None if trainer.average is None else take.weights(),
    }


def load(trainer: Trainer, path: Path, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Go on from the checkpoint folder ``path``, read into ``state`` and ``weights``.

    Raises CommandError. For a state of other data, of an optimizer of other shapes or without its step, nothing
    has changed then; for any other state that is not a trainer's, part of it may have been taken over.
    """
    shown = path_text(path)
    try:
        check_data(trainer, path, state)
        checkpoint.check_optimizer(path, state["optimizer"], trainer.take.optimizer)
        place = _place(trainer, state)
        if state["start"].shape != trainer.start.shape:
            raise ValueError(f"start is of shape {list(state['start'].shape)}")
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise CommandError(f"{shown}: its weights are no finite numbers; go on from an earlier checkpoint")
        _load_optimizer(trainer, state)
        trained = weights if trainer.average is None else state["trained"]
        trainer.take.load_weights(trained)  # after the optimizer's state, as it holds the masters
        if trainer.average is not None:
            trainer.average.model.load_state_dict(weights)
        trainer.start.copy_(state["start"])
        trainer.step, trainer.epoch, trainer.batch, trainer.evaluated = place
        trainer.seconds = _number(state, "seconds")
        trainer.before = _number(state, "elapsed") if "elapsed" in state else trainer.seconds
        trainer.skipped = [str(name) for name in state["skipped"]]
        trainer.take.pieces = _pieces(state)
        if "best" in state:  # earlier versions have none
            trainer.best.load(state["best"], trainer.out, trainer.step, trainer.weights())
            since = state["plateau_since"]
            trainer.schedule.seen_step, trainer.schedule.least_error = int(since[0]), float(since[1])
        set_random_state(state["random"], trainer.ranks.many)  # last, as the lines above may draw numbers
    except CommandError:
        raise
    except Exception as error:  # torch, NumPy and Python each raise errors of their own
        raise CommandError(f"{shown}: not a trainer's state of this version ({first_line(error)})") from error


def check_data(trainer: Trainer, path: Path, state: dict[str, Any]) -> None:
    """Raises CommandError unless the data are those that the checkpoint ``path`` was trained on."""
    shown, train = path_text(path), trainer.split.train
    now, images, data = train.classes, len(train), path_text(trainer.recipe.data)
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


def _place(trainer: Trainer, state: dict[str, Any]) -> list[int]:
    """Step, epoch, step within it and last evaluation. Raises ValueError for a place that no run reaches."""
    place = step, epoch, batch, evaluated = [int(state[name]) for name in ("step", "epoch", "batch", "evaluated")]
    if not (0 <= batch < trainer.epoch_steps and epoch >= 0 and step == epoch * trainer.epoch_steps + batch):
        raise ValueError(f"step {step} is not step {batch} of {trainer.epoch_steps} in epoch {epoch}")
    if not -1 <= evaluated <= step:
        raise ValueError(f"evaluated at step {evaluated} of {step}")
    return place


def _pieces(state: dict[str, Any]) -> int:
    """Those of a batch; earlier versions record none. Raises ValueError for a number that no step halves a batch to."""
    pieces = state.get("pieces", 1)
    if type(pieces) is not int or pieces < 1:
        raise ValueError(f"pieces is {pieces!r:.50}")
    return pieces


def _load_optimizer(trainer: Trainer, state: dict[str, Any]) -> None:
    """Load the momenta and the rate; the rest comes from the recipe. Raises ValueError for impossible numbers."""
    optimizer, scaler, plateau = trainer.take.optimizer, trainer.take.scaler, trainer.schedule.plateau
    own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)
        if not 0 <= _number(group, "lr") <= trainer.recipe.lr:
            raise ValueError(f"the learning rate is {group['lr']}, above the recipe's {trainer.recipe.lr}")
    counts = {name: int(_number(state["plateau"], name)) for name in ("num_bad_epochs", "last_epoch")}
    (rate,) = [_number({"lr": rate}, "lr") for rate in state["plateau"]["_last_lr"]]
    plateau.load_state_dict({"best": float(state["plateau"]["best"]), "_last_lr": [rate], **counts})
    plateau.optimizer.param_groups[0]["lr"] = rate
    if scaler.is_enabled():
        scaler.load_state_dict({name: _number(state["scaler"], name) for name in state["scaler"]})


def _number(values: dict[str, Any], name: str) -> float:
    """A finite number of at least 0; ValueError for any other value."""
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r:.50}")
    return value
