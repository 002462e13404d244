"""Loads weights of other programs into ``alexnet_ext.models.alexnet``; all are checked before any is copied."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .._errors import first_line, path_text
from ..data.preprocessing import IMAGENET, Preprocessing
from ..variants import VARIANTS
from . import read_caffe, read_onnx
from .alexnet import AlexNet, alexnet, from_torchvision
from .contents import Contents, Entry

LAST = ("classifier.fc8.weight", "classifier.fc8.bias")
TORCH = (".pth", ".pt", ".ckpt", ".tar")
# The variants that a file of this ending can be of, the usual one first.
VARIANTS_OF = {
    **dict.fromkeys(TORCH, ("torchvision", "paper")),
    ".safetensors": ("paper", "torchvision"),
    ".caffemodel": ("caffe", "caffenet"),
    ".onnx": tuple(VARIANTS),
}
NESTED = ("state_dict", "model_state_dict", "model", "net", "weights")  # where checkpoints keep a state_dict
WRAPPERS = ("module", "_orig_mod")  # what DataParallel and torch.compile put into names
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_weights(
    model: AlexNet, path: str | os.PathLike[str], *, bgr: bool | None = None, new_last: bool | None = False
) -> Preprocessing | None:
    """Copy the weights of a file into ``model``, a network of ``alexnet_ext.models.alexnet``, fused or not.

    The ending of ``path`` selects the format:

    - ``.safetensors``, this package's own;
    - ``.pth``, ``.pt``, ``.ckpt`` or ``.pth.tar``, a state_dict under torchvision's names (``alexnet-owt-*.pth``, for
      variant ``"torchvision"``) or this package's, or a checkpoint that holds one, also of a model in DataParallel,
      ``torch.compile`` or a module of one's own; read by ``torch.load(weights_only=True)`` and nothing else;
    - ``.caffemodel``, Caffe's ``bvlc_alexnet`` (variant ``"caffe"``) and ``bvlc_reference_caffenet`` (``"caffenet"``),
      old and new layer format; needs protobuf (``pip install 'alexnet_ext[caffe]'``);
    - ``.onnx``, a graph of AlexNet's five convolutions and three linear layers; needs onnx
      (``pip install 'alexnet_ext[onnx]'``).

    Args:
        model: takes the weights in its own dtype and on its own device.
        path: the file.
        bgr: whether the file's conv1 takes blue, green, red; its weights are then turned around, so that ``model``
            takes red, green, blue. None: Caffe's do, others do not.
        new_last: whether the last layer of ``model`` stays as it is, to learn other classes than the file's. None: only
            if the file's has another shape.

    Returns:
        How images were prepared when the network was trained, if the format records it: for Caffe colours from 0 to
        255 less their means, for torchvision its own normalization, None for ONNX and files of bare weights.

    Raises:
        ValueError: the file is damaged, of another variant, or its tensors are not the model's. One sentence lists the
            tensors that are missing, unknown, of the wrong shape or not floating-point. Nothing has been copied then.
        OSError: the file cannot be read. ImportError: a package to read it with is not installed.
        TypeError: model is not an AlexNet.
    """
    if not isinstance(model, AlexNet):
        raise TypeError(f"model must come from alexnet_ext.models.alexnet, got {type(model).__name__}")
    file = Path(path)
    reader = _reader(file)
    with file.open("rb"):
        pass  # a missing or unreadable file is an OSError, whichever library would read it
    contents = reader(file, model)
    state = model.state_dict()
    if new_last is None:
        new_last = any(
            name in contents.entries and contents.entries[name].shape != tuple(state[name].shape) for name in LAST
        )
    if new_last:
        state = {name: tensor for name, tensor in state.items() if name not in LAST}
        contents = contents._replace(entries={n: entry for n, entry in contents.entries.items() if n not in LAST})
    problems = _differences(contents, model, state)
    if any(tensor.is_meta for tensor in state.values()):
        problems.append("the model is on the meta device, where no weights can be kept")
    if problems:
        raise ValueError(f"{path_text(file)} does not fit variant {model.config.variant!r}: {'; '.join(problems)}")
    values = {name: entry.read() for name, entry in contents.entries.items()}
    if contents.bgr if bgr is None else bgr:
        values["features.conv1.weight"] = values["features.conv1.weight"].flip(1)
    with torch.no_grad():
        for name, target in state.items():
            target.copy_(values[name])
    return contents.preprocessing


def find_variant(path: str | os.PathLike[str]) -> str:
    """The variant whose convolutions fit a file for ``load_weights``; where none does, the usual one of its ending.

    Raises as ``load_weights`` does, also for a damaged file.
    """
    file = Path(path)
    reader = _reader(file)
    candidates = VARIANTS_OF[file.suffix]
    for variant in candidates:
        with torch.device("meta"):
            model = alexnet(variant, init="torch")
        state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("features.")}
        contents = reader(file, model)
        found = {name: entry for name, entry in contents.entries.items() if name.startswith("features.")}
        if not _differences(contents._replace(entries=found, activation=None), model, state):
            return variant
    return candidates[0]


Reader = Callable[[Path, AlexNet], Contents]


def _reader(file: Path) -> Reader:
    if file.suffix == ".safetensors":
        return _read_safetensors
    if file.suffix in TORCH:
        return _read_torch
    if file.suffix == ".caffemodel":
        return read_caffe.read
    if file.suffix == ".onnx":
        return read_onnx.read
    raise ValueError(f"{path_text(file)}: expected a .safetensors, .pth, .pt, .caffemodel or .onnx file")


def _differences(contents: Contents, model: AlexNet, state: Mapping[str, Tensor]) -> list[str]:
    """Everything that keeps these contents from being copied into the model."""
    return [*_other_network(contents, model), *_other_tensors(contents.entries, state)]


def _other_network(contents: Contents, model: AlexNet) -> Iterator[str]:
    """How the file's network differs from the model's variant, as far as the format tells."""
    variant = model.config.variant
    table = VARIANTS[variant]
    if contents.variant not in (None, variant):
        yield f"it is of variant {contents.variant!r}"
    if contents.activation not in (None, model.config.activation):
        yield f"its activation is {contents.activation}, expected {model.config.activation}"
    if contents.order is not None and contents.order != tuple(kind for kind in table.order if kind != "relu"):
        yield f"conv1 is followed by {' and '.join(contents.order) or 'neither norm nor pool'}"
    pairs = zip(contents.lrn or (), table.lrn or (), strict=False)
    if not all(math.isclose(found, expected, rel_tol=1e-5) for found, expected in pairs):
        yield f"its {contents.lrn}, expected {table.lrn}"
    groups = tuple(conv.groups for conv in table.convs)
    if contents.groups not in (None, groups):
        yield f"its convolutions have groups {list(contents.groups or ())}, expected {list(groups)}"


def _other_tensors(found: Mapping[str, Entry], state: Mapping[str, Tensor]) -> Iterator[str]:
    """How the file's tensors differ from the model's, by name, shape and dtype."""
    for word, names in (("missing", state.keys() - found.keys()), ("unknown", found.keys() - state.keys())):
        if names:
            more = f" and {len(names) - 16} more" if len(names) > 16 else ""
            yield f"{word} {', '.join(ascii(name)[1:-1] for name in sorted(names)[:16])}{more}"
    for name, tensor in state.items():
        if name not in found:
            continue
        shape = tuple(tensor.shape)
        if found[name].shape != shape:
            yield f"{name} is {list(found[name].shape)}, expected {list(shape)}"
        elif found[name].dtype not in DTYPES:
            yield f"{name} is of {found[name].dtype}, expected floating-point numbers"


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """``safetensors.safe_open`` of a file of any name: itself it takes none that is not UTF-8."""
    from safetensors import safe_open

    with file.open("rb") as stream, safe_open(f"/proc/self/fd/{stream.fileno()}", framework="pt") as handle:
        yield handle


def _read_safetensors(file: Path, model: AlexNet) -> Contents:
    from safetensors import SafetensorError

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    try:
        with open_safetensors(file) as handle:
            metadata = handle.metadata() or {}
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        header = json.loads(metadata.get("alexnet_ext", "{}"))
        variant = header["config"]["variant"] if header else None
        activation = header["config"].get("activation", "relu") if header else None
        preprocessing = None
        if header.get("preprocessing"):
            given = header["preprocessing"]
            preprocessing = Preprocessing(**given | {name: tuple(given[name]) for name in ("mean", "std")})
    except SafetensorError as error:
        raise ValueError(f"{path_text(file)}: a damaged safetensors file ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path_text(file)}: its header does not describe a network ({error})") from error

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with open_safetensors(file) as handle:
                return handle.get_tensor(name)

        return read

    entries = {
        name: Entry(shape, dtypes.get(dtype, torch.int64), reader(name)) for name, (shape, dtype) in described.items()
    }
    contents = Contents(entries, variant=variant, activation=activation, preprocessing=preprocessing)
    return _own_names(contents, path_text(file))


def _read_torch(file: Path, model: AlexNet) -> Contents:
    shown, zipped = path_text(file), zipfile.is_zipfile(file)
    try:
        if zipped:
            with zipfile.ZipFile(file) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > file.stat().st_size:  # torch does not compress: a larger size is a bomb
                raise ValueError(f"declares {size:,} bytes, more than it has")
        # Mapped, so that a tensor costs memory only when its values are read, after its shape has been checked.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{shown}: damaged, or more than tensors: weights_only=True refuses it") from error
    except Exception as error:  # zipfile, pickle and torch each raise errors of their own
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{shown}: a damaged file ({first_line(error)})") from error
    found = next((part for part in _parts(loaded) if _is_state_dict(part)), None)
    if found is None:
        raise ValueError(
            f"{shown}: not a state_dict, a dictionary of tensors by name, and no checkpoint that holds one"
        )
    loaded = _plain_names(found)
    for name, tensor in loaded.items():
        if tensor.layout != torch.strided or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{shown}: {ascii(name)[1:-1]} of shape {list(tensor.shape)} is not stored value by value "
                "(an expanded or sparse tensor)"
            )
    entries = {name: Entry(tuple(t.shape), t.dtype, t.clone) for name, t in loaded.items()}
    return _own_names(Contents(entries), shown)


def _parts(loaded: object) -> Iterator[object]:
    """What a file holds, and what a checkpoint may hold in it."""
    yield loaded
    if isinstance(loaded, Mapping):
        yield from (loaded[name] for name in NESTED if name in loaded)


def _is_state_dict(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(part, Tensor) for name, part in value.items())
    )


def _plain_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names that they have in the network alone, out of whatever modules hold it."""
    names = {name: [part for part in name.split(".") if part not in WRAPPERS] for name in state_dict}
    # "features.conv1.weight" is a whole name; what all of longer ones begin with is not the network's.
    while all(len(parts) > 3 for parts in names.values()) and len({parts[0] for parts in names.values()}) == 1:
        names = {name: parts[1:] for name, parts in names.items()}
    plain = {".".join(parts): state_dict[name] for name, parts in names.items()}
    return plain if len(plain) == len(state_dict) else dict(state_dict)


def _own_names(contents: Contents, shown: str) -> Contents:
    """The contents of a file with torchvision's names under this package's."""
    if not any(name.startswith(("features.0.", "classifier.1.")) for name in contents.entries):
        return contents
    try:
        entries = from_torchvision(contents.entries)
    except KeyError as error:
        raise ValueError(f"{shown}: {error.args[0]}") from error
    return contents._replace(entries=entries, variant="torchvision", preprocessing=Preprocessing(224, 256, **IMAGENET))
