"""The pictures of runs: curves, activations (the paper's figure 1), the first layer's kernels (figure 3), guesses and
nearest images (figure 4), and which class is taken for which."""

from __future__ import annotations

import io
import logging
import os
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._errors import CommandError, path_text
from .._optional import require
from ..data.batches import Dataset
from .evaluate import Evaluation
from .files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib warns at length about a home that is not writable, which does not matter here.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".pdf": "pdf", ".svg": "svg", "": "png"}
# Okabe and Ito's colours, which colour-blind readers can tell apart; PALE and GREY are tints.
BLUE, PALE, ORANGE, GREEN, RED, GREY = "#0072b2", "#a9c4e4", "#e69f00", "#009e73", "#d55e00", "#5c6670"
SERIES = (BLUE, RED, GREEN, "#cc79a7", ORANGE, "#56b4e9", "#000000")  # a run each; then again, dashed
DASHES = ("-", "--", ":", "-.")
DPI = {"svg": 300}  # of images inside of a drawing; other formats take the figure's
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.labelcolor": GREY,
    "axes.grid": True,
    "grid.color": "#e6e9ec",
    "axes.axisbelow": True,
    "text.parse_math": False,  # names of files and classes may hold dollars
    "svg.hashsalt": "alexnet_ext",  # the same picture has the same bytes
}


class Row(NamedTuple):
    """A row of ``nearest``: an image and its class; then (image, class, distance) of others, the nearest first."""

    image: Tensor
    target: int
    near: list[tuple[Tensor, int, float]]


def curves(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Loss and accuracy over the steps, from the lines of a metrics.jsonl."""
    train = [line for line in lines if line["kind"] == "train"]
    held_out = [line for line in lines if line["kind"] == "evaluate"]
    with require("matplotlib").rc_context(STYLE):
        figure = _figure(10, 4)
        for axes, name, measured, title in (
            (figure.add_subplot(1, 2, 1), "loss", "loss", "Loss"),
            (figure.add_subplot(1, 2, 2), "accuracy", "top1", "Accuracy"),
        ):
            scale = 100 if name == "accuracy" else 1
            steps = np.array([line["step"] for line in train])
            values = np.array([line[name] * scale for line in train], dtype=float)
            axes.plot(steps, values, color=PALE, linewidth=1, label="training, each batch")
            axes.plot(steps, _smooth(values), color=BLUE, linewidth=2, label="training, running mean")
            points = [(line["step"], line[measured] * scale) for line in held_out]
            if points:
                axes.plot(
                    *zip(*points, strict=True), "o-", color=ORANGE, markersize=5, label="held-out images", zorder=5
                )
                axes.annotate(
                    f"{points[-1][1]:.1f} %" if scale > 1 else f"{points[-1][1]:.3f}",
                    points[-1],
                    xytext=(-4, -16 if scale > 1 else 10),
                    textcoords="offset points",
                    ha="right",
                    color=ORANGE,
                    fontweight="bold",
                )
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator("auto", integer=True))
            if scale > 1:
                axes.set_ylim(0, 102)
                axes.yaxis.set_major_formatter("{x:.0f} %")
            else:
                # The loss before warm-up can be far off: the axis covers the rest of the run.
                finite = values[np.isfinite(values)]
                axes.set_ylim(0, max(0.1, float(np.percentile(finite, 99)) * 1.05) if len(finite) else 1)
            axes.legend(frameon=False, fontsize=9)
        _write(figure, path)


Lines = Sequence[dict[str, Any]]


def several_curves(path: Path, runs: Sequence[tuple[str, Lines]]) -> None:
    """Training loss, training accuracy and held-out error of named runs, from the lines of their metrics.jsonl: over
    epochs where all runs began a second one, else over steps."""
    lengths = [_epoch_steps(lines) for _, lines in runs]
    by_epoch = None not in lengths
    with require("matplotlib").rc_context(STYLE):
        figure = _figure(10, 3.6)
        loss, accuracy, error = figure.subplots(1, 3)
        for number, ((name, lines), length) in enumerate(zip(runs, lengths, strict=True)):
            style = _style(number) | {"label": _label(name)}
            scale = 1 / length if by_epoch and length is not None else 1
            train = [line for line in lines if line["kind"] == "train"]
            held_out = [line for line in lines if line["kind"] == "evaluate"]
            steps = np.array([line["step"] * scale for line in train])
            for axes, key, factor in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
                values = np.array([line[key] * factor for line in train], dtype=float)
                axes.plot(steps, _smooth(values), **style)
            points = [(line["step"] * scale, 100 - line["top1"] * 100) for line in held_out]
            error.plot(*(zip(*points, strict=True) if points else ((), ())), marker="o", markersize=3.5, **style)
        for axes, title in ((loss, "Training loss"), (accuracy, "Training accuracy"), (error, "Held-out error")):
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_xlabel("epoch" if by_epoch else "step")
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            if axes is not loss:
                axes.yaxis.set_major_formatter("{x:.0f} %")
        accuracy.set_ylim(0, 102)
        if len(runs) > 1:
            figure.legend(*loss.get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False)
        _write(figure, path)


def activations(path: Path, runs: Sequence[tuple[str, Lines]]) -> None:
    """The paper's figure 1: the training error of each whole epoch, measured while it trains, by named activation."""
    with require("matplotlib").rc_context(STYLE):
        figure = _figure(5, 3.8)
        axes = figure.add_subplot()
        for number, (name, lines) in enumerate(runs):
            errors = _epoch_errors(lines)
            epochs = range(1, len(errors) + 1)
            axes.plot(epochs, errors, marker="o", markersize=4, label=_label(name), **_style(number, dashed=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel("training error")
        axes.set_ylim(0)
        axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator("auto", integer=True))
        axes.yaxis.set_major_formatter("{x:.0f} %")
        axes.legend(frameon=False)
        _write(figure, path)


def _style(number: int, dashed: bool = False) -> dict[str, Any]:
    """Colour and line of a series; ``dashed`` gives each a dash of its own, for a print without colours."""
    dashes = number if dashed else number // len(SERIES)
    return {"color": SERIES[number % len(SERIES)], "linestyle": DASHES[dashes % len(DASHES)], "linewidth": 1.6}


def _epoch_steps(lines: Lines) -> int | None:
    """Steps of one epoch; None for a run that did not reach its second one."""
    train = [line for line in lines if line["kind"] == "train"]
    if not train or train[-1].get("epoch", 0) < 1:
        return None
    return max((line["step"] for line in train if line["epoch"] == 0), default=None)


def _epoch_errors(lines: Lines) -> list[float]:
    """The mean training error of each epoch, in percent; an unfinished last one is left out, unless it is the only."""
    found: dict[int, list[float]] = {}
    for line in lines:
        if line["kind"] == "train":
            found.setdefault(line["epoch"], []).append(100 - line["accuracy"] * 100)
    whole = len(found) > 1 and len(found[max(found)]) < (_epoch_steps(lines) or 0)
    return [float(np.mean(found[epoch])) for epoch in sorted(found)[: -1 if whole else None]]


def kernels(path: Path, weight: Tensor, start: Tensor | None = None, towers: int = 1) -> None:
    """Every kernel of the first convolution as a small image, those of each of the ``towers`` in a block of their own.

    After a short run they still look like their random ``start``; the difference is then drawn below.
    """
    weight = weight.detach().float().cpu()
    count, _, height, width = weight.shape
    title, blocks = f"{count} kernels of the first convolution, {height} x {width} x 3", weight.chunk(towers)
    sheets = [(f"Tower {number}: {len(block)} of the {title}", block) for number, block in enumerate(blocks, 1)]
    if towers == 1:
        sheets = [(f"The {title}", weight)]
    if start is not None:
        added = weight - start.detach().float().cpu()
        if added.norm() < start.norm():
            sheets.append(("What training has added to their random start", added))
    columns = 16 if len(blocks[0]) % 16 == 0 else 8
    rows = -(-len(blocks[0]) // columns)
    with require("matplotlib").rc_context(STYLE):
        figure = _figure(columns * 0.6, (rows * 0.6 + 0.4) * len(sheets))
        for index, (title, values) in enumerate(sheets, 1):
            axes = figure.add_subplot(len(sheets), 1, index)
            axes.imshow(_sheet(values, columns), interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(title, loc="left", fontweight="bold")
        _write(figure, path)


def _sheet(weight: Tensor, columns: int) -> np.ndarray:
    """Kernels side by side, (height, width, 3); grey is zero, each is scaled by its largest value."""
    scaled = weight / weight.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12) * 0.5 + 0.5
    count, _, height, width = scaled.shape
    sheet = torch.ones(3, -(-count // columns) * (height + 1) - 1, columns * (width + 1) - 1)
    for index, kernel in enumerate(scaled):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        sheet[:, top : top + height, left : left + width] = kernel
    return sheet.permute(1, 2, 0).numpy()


def guesses(path: Path, dataset: Dataset, result: Evaluation, classes: Sequence[str], seed: int = 0) -> None:
    """Held-out images with their five best guesses: four drawn by chance, of different classes if possible, and below
    them the four that the network got most wrong. Fewer than eight images are all drawn."""
    chosen = list(range(result.images))
    title = "Held-out images and their five best guesses, the right class in green"
    if result.images >= 8:
        hardest = result.truth.argsort()[:4].tolist()
        chosen = of_all_classes(result.targets.tolist(), 4, seed, without=hardest) + hardest
        title += "; the lower row is the most wrong"
    with require("matplotlib").rc_context(STYLE):
        rows = -(-len(chosen) // 4)
        figure = _figure(11, 3.1 * rows + 0.3)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=GREY)
        cells = figure.subfigures(rows, min(4, len(chosen)), squeeze=False)
        for cell, i in zip(cells.flat, chosen, strict=False):
            image = dataset[0, int(result.indices[i])].image
            if image is None:  # readable a minute ago: another program changed the file
                continue
            picture, bars = cell.subplots(2, 1, height_ratios=[1.5, 1])
            _show(picture, image)
            target = int(result.targets[i])
            right = int(result.guesses[i, 0]) == target
            picture.set_title(
                _short(classes[target], 16), fontsize=10, fontweight="bold", color=GREEN if right else RED
            )
            _bars(bars, result.guesses[i], result.probabilities[i], classes, target)
        _write(figure, path)


def of_all_classes(targets: Sequence[int], count: int, seed: int, without: Sequence[int] = ()) -> list[int]:
    """Places of ``count`` images, drawn by chance: no class comes twice before each has come once."""
    chance = random.Random(seed)
    places = [place for place in range(len(targets)) if place not in without]
    chance.shuffle(places)
    seen: dict[int, int] = {}
    turns = []
    for place in places:
        turns.append((seen.setdefault(targets[place], 0), place))
        seen[targets[place]] += 1
    return [place for _, place in sorted(turns, key=lambda turn: turn[0])[:count]]


def nearest(path: Path, rows: Sequence[Row], classes: Sequence[str], compared: int, images: int) -> None:
    """Held-out images, and next to each the training images with the nearest fc7 vectors, and their distance. Of all
    training ``images`` that many were ``compared``."""
    of = f"{compared:,} training images" if compared == images else f"{compared:,} of {images:,} training images"
    columns = 1 + max(len(row.near) for row in rows)
    with require("matplotlib").rc_context(STYLE):
        figure = _figure(1.15 * columns + 0.2, 1.38 * len(rows) + 0.5)
        figure.suptitle(
            f"Held-out images (left), and the nearest of {of} by the distance of their fc7 vectors",
            x=0.01,
            ha="left",
            fontsize=10,
            color=GREY,
        )
        ratios = [1.0, 0.12, *[1.0] * (columns - 1)]
        grid = figure.subplots(len(rows), columns + 1, squeeze=False, width_ratios=ratios)
        for cell in grid.flat:
            cell.set_axis_off()
        for cells, row in zip(grid, rows, strict=True):
            _show(cells[0], row.image)
            cells[0].set_title(_short(classes[row.target], 14), fontsize=9, fontweight="bold", color=GREY)
            for cell, (image, target, distance) in zip(cells[2:], row.near, strict=False):
                _show(cell, image)
                colour = GREEN if target == row.target else RED
                cell.set_title(f"{_short(classes[target], 14)}\n{distance:#.3g}", fontsize=7, color=colour)
        _write(figure, path)


def confusion(path: Path, result: Evaluation, classes: Sequence[str]) -> None:
    """Which class is taken for which: a row for each class, whose shares add up to one."""
    count = len(classes)
    pairs = torch.bincount(result.targets * count + result.guesses[:, 0], minlength=count * count).view(count, count)
    shares = (pairs / pairs.sum(1, keepdim=True).clamp_min(1)).numpy()
    named = count <= 40
    side = max(4.5, min(14, 2.5 + count * (0.42 if named else 0.02)))
    with require("matplotlib").rc_context(STYLE | {"axes.grid": False}):
        figure = _figure(side + 0.8, side)
        axes = figure.add_subplot()
        shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        figure.colorbar(shown, ax=axes, format="{x:.0%}", shrink=0.8)
        axes.set_xlabel("best guess")
        axes.set_ylabel("class")
        axes.set_title(f"{result.top1:.1%} of {result.images:,} images right", loc="left", fontweight="bold")
        if named:
            names = [_short(name) for name in classes]
            axes.set_xticks(range(count), names, rotation=90 * (max(map(len, names)) > 3), fontsize=8)
            axes.set_yticks(range(count), names, fontsize=8)
        for target, guess in pairs.nonzero().tolist() if count <= 20 else []:
            colour = "white" if shares[target, guess] > 0.5 else GREY
            text = f"{int(pairs[target, guess]):,}"
            axes.text(guess, target, text, ha="center", va="center", fontsize=8, color=colour)
        _write(figure, path)


def prediction(
    path: Path, image: Any, probabilities: Tensor, classes: Sequence[str], title: str, of: Path | None = None
) -> None:
    """One image (a PIL image) and its best classes. A PNG records the file ``of`` that it shows."""
    best = probabilities.topk(min(5, len(classes)))
    with require("matplotlib").rc_context(STYLE):
        figure = _figure(8, 3.6)
        picture, bars = figure.subplots(1, 2, width_ratios=[1, 1.2])
        picture.imshow(np.asarray(image), interpolation="nearest" if max(image.size) < 100 else "antialiased")
        picture.set_axis_off()
        picture.set_title(_short(title, 48), loc="left", fontsize=9, color=GREY)
        _bars(bars, best.indices, best.values, classes, None)
        figure.set_label("" if of is None else source(of))
        _write(figure, path)


def check_format(path: Path) -> None:
    """Raises CommandError if a picture's ending is not that of a known format."""
    if path.suffix.lower() not in FORMATS:
        known = ", ".join(filter(None, FORMATS))
        raise CommandError(f"{path_text(path)}: expected a name with one of the endings {known}", 2)


def source(image: Path) -> str:
    """A picture's record of the image that it shows: the whole path, in ASCII."""
    return ascii(os.path.abspath(image))[1:-1]


def drawn_of(path: Path) -> str | None:
    """``source`` of the image that a PNG of ``prediction`` shows; None for any other file."""
    try:
        with require("PIL.Image").open(path, formats=("PNG",)) as image:
            found = image.info.get("Source")
            return found if isinstance(found, str) else None
    except (OSError, ValueError, SyntaxError):
        return None


def _bars(axes: Axes, order: Tensor, values: Tensor, classes: Sequence[str], target: int | None) -> None:
    """Horizontal bars, the best on top; the right class in green, the others blue."""
    places = list(range(len(order)))
    colours = [GREEN if int(i) == target else BLUE for i in order]
    axes.barh(places, values.numpy(), color=colours, height=0.72)
    axes.set_yticks(places, [_short(classes[int(i)]) for i in order], fontsize=9)
    for place, value in zip(places, values.tolist(), strict=True):
        axes.text(min(value, 1) + 0.02, place, f"{value:.1%}", va="center", fontsize=8, color=GREY)
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.set_xlim(0, 1.22)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _show(axes: Axes, image: Tensor) -> None:
    grey = image.shape[0] == 1
    axes.imshow((image[0] if grey else image.permute(1, 2, 0)).numpy(), cmap="gray" if grey else None, vmin=0, vmax=255)
    axes.set_axis_off()


def _short(name: str, length: int = 18) -> str:
    name = path_text(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def _label(name: str) -> str:
    """A name in a legend, from which matplotlib leaves out those that begin with "_"."""
    short = _short(name, 40)
    return f" {short}" if short.startswith("_") else short


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over the finite values in the last twentieth of the run, shorter at its start; NaN without any."""
    width = max(1, len(values) // 20)
    finite = np.isfinite(values)
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    running = (np.concatenate([[0.0], np.cumsum(some)]) for some in (np.where(finite, values, 0.0), finite))
    sums, counts = (some[ends] - some[starts] for some in running)
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _figure(width: float, height: float) -> Figure:
    """A figure that uses no window system and no global state of pyplot."""
    return require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained", dpi=130)


def _write(figure: Figure, path: Path) -> None:
    """Write a picture in the format that its ending names; a PNG keeps the figure's label, its ``source``."""
    kind = FORMATS[path.suffix.lower()]
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        metadata = {"png": {"Source": str(figure.get_label())}, "svg": {"Date": None}}.get(kind)
        figure.savefig(buffer, format=kind, facecolor="white", metadata=metadata, dpi=DPI.get(kind, "figure"))
    write_file(path, buffer.getvalue())
