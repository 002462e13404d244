"""Checkpoints: ``RUN/checkpoints/step-N/`` with the weights, the trainer's state, and both files' checksums.

A generation is a folder that is renamed into place when complete, so weights and state are always of one step;
the last two are kept, and reading falls back to the older where the newer is damaged. ``RUN/best/step-N/`` has the
weights that did best on the held-out images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from .._errors import CommandError, first_line, os_error, path_text
from ..data.preprocessing import Preprocessing
from ..models.weights import VARIANTS_OF, open_safetensors
from .files import new_folder

WEIGHTS, STATE, RECORD = "model.safetensors", "state.pt", "checkpoint.json"
KEEP = 2
CHECKPOINTS, BEST = "checkpoints", "best"  # folders of a run
HEADER = "alexnet_ext"  # the entry of the safetensors header that holds a Description
DTYPES = ("F64", "F32", "F16", "BF16")
NO_DESCRIPTION = (ValueError, TypeError, KeyError, OverflowError, RecursionError)  # what such a header raises
OTHERS = tuple(VARIANTS_OF.keys() - {".safetensors"})  # weights that load_weights reads, and that name no classes


@dataclasses.dataclass(frozen=True)
class Description:
    """What a weights file records: enough to build the network and prepare its images, and where the held-out images
    are. ``val`` and ``held_out`` are those of the recipe, ``listing`` is the checksum of the names."""

    config: models.AlexNetConfig
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    data: str
    step: int
    val: str | None = None
    held_out: float | None = None
    listing: str = ""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Description:
        """Raises one of ``NO_DESCRIPTION`` for a text that ``to_json`` did not write."""
        values = json.loads(text)
        config = models.AlexNetConfig(**values["config"])
        preprocessing = values["preprocessing"] | {k: tuple(values["preprocessing"][k]) for k in ("mean", "std")}
        classes = tuple(str(name) for name in values["classes"])
        if len(classes) != config.num_classes:
            raise ValueError(f"{len(classes)} class names for {config.num_classes} outputs")
        if preprocessing["size"] != config.image_size:
            raise ValueError(f"images of side {preprocessing['size']!r} for a network of {config.image_size}")
        rest = {name: values[name] for name in ("val", "held_out", "listing") if name in values}
        return cls(config, classes, Preprocessing(**preprocessing), str(values["data"]), int(values["step"]), **rest)


def save(
    run: Path,
    model: nn.Module | Mapping[str, Tensor],
    description: Description,
    state: Mapping[str, Any],
    keep: int = KEEP,
) -> Path:
    """Write the generation of ``description.step``, remove all but the last ``keep``, and return the folder written.

    Raises CommandError, naming the folder, if the disk is full or not writable: nothing is left half written, and
    earlier generations stay.
    """
    path = run / CHECKPOINTS / _name(description.step)
    if path.exists():
        if damage(path) is None:
            return path  # the same step of the same run: the same content
        shutil.rmtree(path, ignore_errors=True)
    with new_folder(path) as folder:
        write_weights(folder / WEIGHTS, model, description)
        with (folder / STATE).open("wb") as stream:
            torch.save(dict(state), stream)
        _write_record(folder, {"step": description.step}, (WEIGHTS, STATE))
    for old in generations(run)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def save_best(
    run: Path, weights: Mapping[str, Tensor] | None, description: Description, top1: float, whole: bool
) -> None:
    """Write ``RUN/best/step-N/`` and remove the best so far. Raises as ``save`` does.

    The folder holds weights only if ``whole``: weights of the newest generation need no second copy. ``weights`` is
    None if the generation of this step has them.
    """
    path = run / BEST / _name(description.step)
    generation = run / CHECKPOINTS / path.name
    if not path.exists() or (whole and _holder(path) != path):
        shutil.rmtree(path, ignore_errors=True)
        with new_folder(path) as folder:
            if whole and weights is not None:
                write_weights(folder / WEIGHTS, weights, description)
            elif whole:
                shutil.copy2(generation / WEIGHTS, folder / WEIGHTS)
            _write_record(folder, {"step": description.step, "top1": top1}, (WEIGHTS,) if whole else ())
    for old in generations(run, BEST):
        if old != path:
            shutil.rmtree(old, ignore_errors=True)


def _holder(best: Path) -> Path:
    """The folder with the weights of a best evaluation: its own, or the generation of the same step."""
    return best if (best / WEIGHTS).exists() else best.parent.parent / CHECKPOINTS / best.name


def read_best(run: Path) -> tuple[int, float] | None:
    """Step and top-1 of a run's best weights; None if they are missing or damaged."""
    for path in generations(run, BEST):
        if damage(_holder(path), (WEIGHTS,)) is None:
            try:
                record = json.loads((path / RECORD).read_text(encoding="utf-8"))
                return int(record["step"]), float(record["top1"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return None


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _write_record(folder: Path, values: dict[str, Any], names: tuple[str, ...]) -> None:
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}
    record = values | {"files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write_weights(path: Path, model: nn.Module | Mapping[str, Tensor], description: Description) -> None:
    """Write a weights file: the tensors, and a header that suffices to build the network again."""
    from safetensors.torch import save_file

    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    path.touch()
    mode = path.stat().st_mode  # safetensors replaces the file by one that only its owner may read
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(weights, path, metadata={"format": "pt", HEADER: description.to_json()})
    path.chmod(mode)


def generations(run: Path, folder: str = CHECKPOINTS) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    found = [path for path in (run / folder).glob("step-*") if path.is_dir()]
    return sorted(found, key=lambda path: path.name, reverse=True)


def damage(path: Path, names: tuple[str, ...] = (WEIGHTS, STATE)) -> str | None:
    """What is wrong with the files of a checkpoint folder (by size and checksum), or None."""
    try:
        files = json.loads((path / RECORD).read_text(encoding="utf-8"))["files"]
        expected = {name: (files[name]["bytes"], files[name]["sha256"]) for name in names}
    except OSError as error:
        return f"{path_text(path / RECORD)}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError):
        return f"{path_text(path / RECORD)}: damaged"
    for name, (size, checksum) in expected.items():
        file = path / name
        try:
            found = file.stat().st_size
            if found != size:
                return f"{path_text(file)}: damaged ({found:,} bytes of {size:,})"
            if _sha256(file) != checksum:
                return f"{path_text(file)}: damaged (its checksum is not the recorded one)"
        except OSError as error:
            return f"{path_text(file)}: {error.strerror or error}"
    return None


def newest(run: Path, warn: Callable[[str], None], names: tuple[str, ...] = (WEIGHTS, STATE)) -> Path:
    """The newest checkpoint folder of a run whose files are whole; ``warn`` is called for damaged newer ones."""
    problems: list[str] = []
    for path in generations(run):
        problem = damage(path, names)
        if problem is None:
            for earlier in problems:
                warn(f"{earlier}; going back to {path.name}")
            return path
        problems.append(problem)
    if problems:
        raise CommandError(problems[0])
    if not run.exists():
        raise CommandError(f"{path_text(run)}: no such file or folder", 2)
    raise CommandError(f"{path_text(run)}: no checkpoint in it", 2)


def to_resume(path: Path, warn: Callable[[str], None]) -> tuple[Path, Path]:
    """The run folder and the checkpoint folder of ``path``: a run (its newest is taken) or a checkpoint folder.

    Raises CommandError for a checkpoint with newer ones next to it: they would come to be of another run than it.
    """
    if not (path / RECORD).exists() and not (path / WEIGHTS).exists():
        return path, newest(path, warn)
    path = Path(os.path.abspath(path))
    run, shown = path.parent.parent, path_text(path)
    if path.parent.name == BEST:
        raise CommandError(f"{shown}: weights alone; --weights starts from them, --resume {path_text(run)} goes on", 2)
    problem = damage(path)
    if problem:
        raise CommandError(problem)
    newer = [other for other in generations(run) if other.name > path.name and damage(other) is None]
    if newer:
        raise CommandError(f"{shown}: {newer[0].name} beside it is newer; remove that to go on from here", 2)
    return run, path


def find_weights(path: Path, warn: Callable[[str], None], last: bool = False) -> Path:
    """The weights file of ``path``: itself, that of a checkpoint folder, or that of a run's best evaluation (``last``:
    of its newest checkpoint)."""
    if path.is_file():
        if path.suffix in OTHERS:
            raise CommandError(
                f"{path_text(path)}: not a .safetensors file; `alexnet export --format safetensors` makes one of it", 2
            )
        return path
    if (path / RECORD).exists() or (path / WEIGHTS).exists():
        if path.absolute().parent.name == BEST:
            path = _holder(path.absolute())
        problem = damage(path, (WEIGHTS,)) if (path / RECORD).exists() else None
        if problem:
            raise CommandError(problem)
        return path / WEIGHTS
    for best in [] if last else generations(path, BEST):
        problem = damage(_holder(best), (WEIGHTS,))
        if problem is None:
            return _holder(best) / WEIGHTS
        if _holder(best) == best:
            warn(f"{problem}; going to the newest checkpoint")
    return newest(path, warn, (WEIGHTS,)) / WEIGHTS


def read_description(path: Path) -> Description | None:
    """The Description in a weights file; None if another program wrote it.

    Raises CommandError for a damaged file.
    """
    with _opened(path) as file:
        return _described(path, file)


def read_weights(path: Path) -> tuple[Description, dict[str, Tensor]]:
    """The description and the tensors (fp32, on the CPU) of a weights file. Before a byte of a tensor is read, every
    name, shape and dtype in the header is compared with the network that the file claims to hold."""
    shown = path_text(path)
    with _opened(path) as file:
        description = _described(path, file)
        if description is None:
            raise CommandError(f"{shown}: not written by alexnet_ext (its header says nothing of the network)")
        expected = _shapes(description.config)
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in found.items()}
        problem = _difference(expected, shapes)
        if problem:
            raise CommandError(f"{shown}: not the weights of variant {description.config.variant!r}: {problem}")
        return description, {name: file.get_tensor(name).float() for name in expected}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; CommandError for one that is damaged or cannot be read."""
    from safetensors import SafetensorError

    try:
        with open_safetensors(path) as file:
            yield file
    except SafetensorError as error:
        raise CommandError(f"{path_text(path)}: a damaged safetensors file ({first_line(error)})") from error
    except OSError as error:
        raise os_error(path, error) from error


def _described(path: Path, file: Any) -> Description | None:
    metadata = file.metadata() or {}
    if HEADER not in metadata:
        return None
    try:
        description = Description.from_json(metadata[HEADER])
        _shapes(description.config)
    except NO_DESCRIPTION as error:
        shown = path_text(path)
        raise CommandError(f"{shown}: its header does not describe a network ({first_line(error)})") from error
    return description


def load_model(path: Path, variant: str | None, fused: bool) -> tuple[models.AlexNet, Description]:
    """Build the network of a weights file. Raises CommandError if its variant is not ``variant``."""
    description, weights = read_weights(path)
    if variant is not None and variant != description.config.variant:
        raise CommandError(f"{path_text(path)}: weights of variant {description.config.variant!r}, not {variant!r}")
    with torch.device("meta"):  # a random start would cost time, and be overwritten
        model = models.alexnet(**dataclasses.asdict(description.config), fused=fused, init="torch")
    model.load_state_dict(weights, assign=True)
    return model, description


def read_state(path: Path) -> dict[str, Any]:
    """The dictionary of a ``state.pt``, plain types and CPU tensors only.

    Raises CommandError for a damaged file, or one whose pickle holds anything else.
    """
    shown = path_text(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > path.stat().st_size:  # torch does not compress: a larger size is a bomb
            raise CommandError(f"{shown}: declares {size:,} bytes, more than it has")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise os_error(path, error) from error
    except CommandError:
        raise
    except Exception as error:  # zipfile, pickle and torch each raise errors of their own
        raise CommandError(f"{shown}: a damaged checkpoint ({first_line(error)})") from error
    if not isinstance(state, dict):
        raise CommandError(f"{shown}: not a trainer's state")
    return state


def check_optimizer(path: Path, saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raises CommandError unless each saved tensor has its parameter's shape. Nothing has been copied then."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        count = sum(len(group["params"]) for group in saved["param_groups"])
        entries = dict(saved["state"])
        fits = count == len(parameters) and all(
            value is None or not isinstance(value, Tensor) or value.shape in (parameters[i].shape, torch.Size())
            for i, values in entries.items()
            for value in values.values()
        )
    except (KeyError, TypeError, IndexError, AttributeError):
        fits = False
    if not fits:
        raise CommandError(f"{path_text(path)}: the optimizer's state does not fit the network")


def _shapes(config: models.AlexNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = models.alexnet(**dataclasses.asdict(config), fused=False, init="torch")
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _difference(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[tuple[int, ...], str]]
) -> str | None:
    for word, names in (("lacks", expected.keys() - found.keys()), ("has unknown", found.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return f"it {word} {', '.join(sorted(names)[:3])}{more}"
    for name, shape in expected.items():
        if found[name][0] != shape:
            return f"{name} is {list(found[name][0])}, expected {list(shape)}"
        if found[name][1] not in DTYPES:
            return f"{name} is of type {found[name][1]}, expected {', '.join(DTYPES)}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
