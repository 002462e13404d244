"""What a run writes down as it goes: metrics.jsonl and, where their writer takes the name, TensorBoard's events."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .._errors import os_error, path_text
from .._optional import require
from .files import write_file

METRICS = "metrics.jsonl"


class Log:
    """Appends to both. A resumed run is at ``step``, its last evaluation at ``evaluated``: later lines are removed, as
    their steps will be taken again. ``run`` None writes nothing."""

    def __init__(self, run: Path | None, step: int = 0, evaluated: int = -1) -> None:
        self.path = Path(os.devnull) if run is None else run / METRICS
        before = run is not None and (bool(step) or self.path.exists())
        if before:
            kept = [line for line in read_metrics(self.path) if _precedes(line, step, evaluated)]
            write_file(self.path, "".join(json_text(line) + "\n" for line in kept).encode())
        try:
            self.stream = self.path.open("a", encoding="utf-8")
            self.events: Any = None
            if run is not None and has_events(run):
                writer = require("torch.utils.tensorboard").SummaryWriter
                self.events = writer(str(run), purge_step=None if not before else step + 1 if step else 0)
        except OSError as error:
            raise os_error(self.path, error) from error

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line ``{"kind": ..., "step": ..., **values}``, and a curve for each number."""
        try:
            self.stream.write(json_text({"kind": kind, "step": step, **values}) + "\n")
            self.stream.flush()
            folder = f"{kind}/{values['name']}" if kind == "span" else kind
            for name, value in values.items() if self.events is not None else ():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self.events.add_scalar(f"{folder}/{name}", value, step)
        except OSError as error:
            raise os_error(self.path, error) from error

    def span(self, name: str, step: int, seconds: float) -> None:
        """A line on the time that something took since its last line, up to step ``step``."""
        self.write("span", step, {"name": name, "seconds": seconds})

    @contextmanager
    def timed(self, name: str, step: int) -> Iterator[None]:
        """Context manager: a span, unless it is left by an error."""
        start = time.perf_counter()
        yield
        self.span(name, step, time.perf_counter() - start)

    def describe(self, recipe: dict[str, Any]) -> None:
        """The run's hyperparameters, for TensorBoard's table of runs."""
        if self.events is not None:
            values = {
                name: value if isinstance(value, (int, float)) else path_text(str(value))
                for name, value in recipe.items()
            }
            for summary in require("torch.utils.tensorboard.summary").hparams(values, {"evaluate/top1": 0.0}):
                self._event(self.events.file_writer.add_summary, summary)

    def kernels(self, weight: Tensor, step: int) -> None:
        """The first layer's kernels (K, 3, height, width), of any K, as TensorBoard's image: rows of sixteen."""
        if self.events is not None:
            low, high = weight.aminmax()
            scaled = F.pad((weight - low) / (high - low).clamp_min(1e-12), (0, 1, 0, 1))
            missing = -len(scaled) % 16
            rows = F.pad(scaled, (0, 0, 0, 0, 0, 0, 0, missing)).unflatten(0, (-1, 16))
            image = rows.permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)
            self._event(self.events.add_image, "conv1", image.cpu(), step)

    def _event(self, add: Any, *arguments: Any) -> None:
        try:
            add(*arguments)
        except OSError as error:
            raise os_error(self.path, error) from error

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stream.close()
            if self.events is not None:
                self.events.close()
        except OSError as problem:
            if kind is None:  # else the first error is reported
                raise os_error(self.path, problem) from problem


def has_events(run: Path) -> bool:
    """Whether TensorBoard's writer can name its file in the folder ``run``: not where the name is no UTF-8."""
    try:
        os.fspath(run).encode()
    except UnicodeEncodeError:
        return False
    return True


def json_text(values: dict[str, Any], indent: int | None = None) -> str:
    """These values as JSON, with null for NaN and infinities, which JSON lacks."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite, indent=indent, allow_nan=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, with NaN for null. A line that a crash cut short is left out. So is one whose kind
    is no text, or whose step is no whole number of 63 bits."""
    lines = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise os_error(path, error) from error
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(value, dict):
            continue
        kind, step = value.get("kind"), value.get("step")
        if isinstance(kind, str) and type(step) is int and 0 <= step < 2**63:
            lines.append({name: math.nan if entry is None else entry for name, entry in value.items()})
    return lines


def _precedes(line: dict[str, Any], step: int, evaluated: int) -> bool:
    of_evaluation = "evaluate" in (line["kind"], line.get("name"))  # its result and its span
    return line["step"] < step or (line["step"] == step and (not of_evaluation or evaluated == step))
