"""Weights that other programs wrote, into ``alexnet_ext.models.alexnet``: checked as a whole before any is copied."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .._errors import first_line, path_text
from ..data.preprocessing import IMAGENET, Preprocessing
from ..variants import VARIANTS
from . import read_caffe, read_onnx
from .alexnet import AlexNet, from_torchvision
from .contents import Contents, Entry

LAST = ("classifier.fc8.weight", "classifier.fc8.bias")
# The variant that a file of this ending is of as a rule.
VARIANT_OF = {".pth": "torchvision", ".pt": "torchvision", ".caffemodel": "caffe", ".onnx": "paper"}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def load_weights(
    model: AlexNet, path: str | os.PathLike[str], *, bgr: bool | None = None, new_last: bool | None = False
) -> Preprocessing | None:
    """Copy the weights of a file into ``model``, a network of ``alexnet_ext.models.alexnet``, fused or not.

    The ending of ``path`` tells the format:

    - ``.safetensors``, this package's own;
    - ``.pth`` or ``.pt``, a state_dict under torchvision's names (``alexnet-owt-*.pth``, for variant
      ``"torchvision"``) or this package's, read by ``torch.load(weights_only=True)`` and nothing else;
    - ``.caffemodel``, Caffe's ``bvlc_alexnet`` (variant ``"caffe"``) and ``bvlc_reference_caffenet`` (``"caffenet"``),
      old and new layer format; needs protobuf (``pip install 'alexnet_ext[caffe]'``);
    - ``.onnx``, a graph of AlexNet's five convolutions and three linear layers; needs onnx
      (``pip install 'alexnet_ext[onnx]'``).

    Args:
        model: takes the weights in its own dtype and on its own device.
        path: the file.
        bgr: whether the file's conv1 takes blue, green, red; its weights are then turned around, so that ``model``
            takes red, green, blue. None: Caffe's do, others do not.
        new_last: whether the last layer of ``model`` stays as it is, to learn other classes than the file's. None: it
            does where the file's is of another shape.

    Returns:
        How images were brought to the network when it was trained, where the format tells: for Caffe colours from 0
        to 255 less their means, for torchvision its own normalization, None for ONNX and files of bare weights.

    Raises:
        ValueError: the file is damaged, of another variant, or its tensors are not the model's: one sentence that lists
            what is missing, unknown, of the wrong shape or no floating-point numbers. Nothing has been copied then.
        OSError: the file cannot be read. ImportError: a package to read it with is not installed.
        TypeError: model is not an AlexNet.
    """
    if not isinstance(model, AlexNet):
        raise TypeError(f"model must come from alexnet_ext.models.alexnet, got {type(model).__name__}")
    file = Path(path)
    reader = _reader(file)
    with file.open("rb"):
        pass  # what is missing or may not be read is an OSError, whichever library would read it
    contents = reader(file, model)
    state = model.state_dict()
    if new_last is None:
        new_last = any(
            name in contents.entries and contents.entries[name].shape != tuple(state[name].shape) for name in LAST
        )
    if new_last:
        state = {name: tensor for name, tensor in state.items() if name not in LAST}
        contents = contents._replace(entries={n: entry for n, entry in contents.entries.items() if n not in LAST})
    problem = _difference(contents, model, state)
    if problem:
        raise ValueError(f"{path_text(file)} does not fit variant {model.config.variant!r}: {problem}")
    values = {name: entry.read() for name, entry in contents.entries.items()}
    if contents.bgr if bgr is None else bgr:
        values["features.conv1.weight"] = values["features.conv1.weight"].flip(1)
    with torch.no_grad():
        for name, target in state.items():
            target.copy_(values[name])
    return contents.preprocessing


Reader = Callable[[Path, AlexNet], Contents]


def _reader(file: Path) -> Reader:
    if file.suffix == ".safetensors":
        return _read_safetensors
    if file.suffix in (".pth", ".pt"):
        return _read_torch
    if file.suffix == ".caffemodel":
        return read_caffe.read
    if file.suffix == ".onnx":
        return read_onnx.read
    raise ValueError(f"{path_text(file)}: expected a .safetensors, .pth, .pt, .caffemodel or .onnx file")


def _difference(contents: Contents, model: AlexNet, state: Mapping[str, Tensor]) -> str:
    """Everything that keeps these contents from being copied into the model, or ""."""
    table, found, problems = VARIANTS[model.config.variant], contents.entries, []
    if contents.variant not in (None, model.config.variant):
        problems.append(f"it is of variant {contents.variant!r}")
    if contents.order is not None and contents.order != tuple(k for k in table.order if k != "relu"):
        problems.append(f"conv1 is followed by {' and '.join(contents.order) or 'neither norm nor pool'}")
    if contents.lrn and not all(
        math.isclose(a, b, rel_tol=1e-5) for a, b in zip(contents.lrn, table.lrn or (), strict=False)
    ):
        problems.append(f"its {contents.lrn}, expected {table.lrn}")
    if contents.groups is not None and contents.groups != (groups := tuple(conv.groups for conv in table.convs)):
        problems.append(f"its convolutions have groups {list(contents.groups)}, expected {list(groups)}")
    for word, names in (("missing", state.keys() - found.keys()), ("unknown", found.keys() - state.keys())):
        if names:
            more = f" and {len(names) - 16} more" if len(names) > 16 else ""
            problems.append(f"{word} {', '.join(ascii(name)[1:-1] for name in sorted(names)[:16])}{more}")
    for name in (name for name in state if name in found):
        shape = tuple(state[name].shape)
        if found[name].shape != shape:
            problems.append(f"{name} is {list(found[name].shape)}, expected {list(shape)}")
        elif found[name].dtype not in DTYPES:
            problems.append(f"{name} is of {found[name].dtype}, expected floating-point numbers")
    if any(tensor.is_meta for tensor in state.values()):
        problems.append("the model is on the meta device, where no weights can be kept")
    return "; ".join(problems)


def _read_safetensors(file: Path, model: AlexNet) -> Contents:
    from safetensors import SafetensorError, safe_open

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    try:
        opened = safe_open(file, framework="pt")
        with opened as handle:
            metadata = handle.metadata() or {}
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            described = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        header = json.loads(metadata.get("alexnet_ext", "{}"))
        variant = header["config"]["variant"] if header else None
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
            with safe_open(file, framework="pt") as handle:
                return handle.get_tensor(name)

        return read

    entries = {
        name: Entry(shape, dtypes.get(dtype, torch.int64), reader(name)) for name, (shape, dtype) in described.items()
    }
    return Contents(entries, variant=variant, preprocessing=preprocessing)


def _read_torch(file: Path, model: AlexNet) -> Contents:
    shown, zipped = path_text(file), zipfile.is_zipfile(file)
    try:
        if zipped:
            with zipfile.ZipFile(file) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > file.stat().st_size:  # torch stores without compressing: more is a bomb
                raise ValueError(f"declares {size:,} bytes, more than it has")
        # Mapped, so that a tensor costs memory when its values are read and not before its shape has been looked at.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{shown}: damaged, or more than tensors: weights_only=True refuses it") from error
    except Exception as error:  # zipfile, pickle and torch each have their own for a broken file
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{shown}: a damaged file ({first_line(error)})") from error
    tensors = isinstance(loaded, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    )
    if not tensors:
        raise ValueError(f"{shown}: not a state_dict, a dictionary of tensors by name")
    from_theirs = any(name.startswith(("features.0.", "classifier.1.")) for name in loaded)
    preprocessing, variant = None, None
    if from_theirs:
        try:
            loaded = from_torchvision(loaded)
        except KeyError as error:
            raise ValueError(f"{shown}: {error.args[0]}") from error
        preprocessing, variant = Preprocessing(224, 256, **IMAGENET), "torchvision"
    for name, tensor in loaded.items():
        if tensor.layout != torch.strided or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{shown}: {ascii(name)[1:-1]} of shape {list(tensor.shape)} is not stored value by value "
                "(an expanded or sparse tensor)"
            )
    entries = {name: Entry(tuple(t.shape), t.dtype, t.clone) for name, t in loaded.items()}
    return Contents(entries, variant=variant, preprocessing=preprocessing)
