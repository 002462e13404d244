"""Reads the weights of a .caffemodel: bvlc_alexnet and bvlc_reference_caffenet, or a net of their layer names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._errors import path_text
from .._optional import missing
from ..data.preprocessing import Preprocessing
from ..variants import LRN
from .alexnet import AlexNet
from .contents import Contents, Entry, linear_or_conv

# The part of Caffe's schema that holds weights: message, field, number, type ("*" before it: repeated). A packed
# repeated float is encoded like bytes. Read as bytes, 61 million numbers do not each become a Python object.
SCHEMA = (
    ("BlobShape", (("dim", 1, "*int64"),)),
    (
        "BlobProto",
        (
            *(("num", 1, "int32"), ("channels", 2, "int32"), ("height", 3, "int32"), ("width", 4, "int32")),
            *(("data", 5, "bytes"), ("shape", 7, "BlobShape"), ("double_data", 8, "bytes")),
        ),
    ),
    ("ConvolutionParameter", (("group", 5, "uint32"),)),
    ("LRNParameter", (("local_size", 1, "uint32"), ("alpha", 2, "float"), ("beta", 3, "float"), ("k", 5, "float"))),
    (
        "V1LayerParameter",
        (
            *(("name", 4, "string"), ("type", 5, "int32"), ("blobs", 6, "*BlobProto")),
            *(("convolution_param", 10, "ConvolutionParameter"), ("lrn_param", 18, "LRNParameter")),
        ),
    ),
    (
        "LayerParameter",
        (
            *(("name", 1, "string"), ("type", 2, "string"), ("blobs", 7, "*BlobProto")),
            *(("convolution_param", 106, "ConvolutionParameter"), ("lrn_param", 118, "LRNParameter")),
        ),
    ),
    ("NetParameter", (("name", 1, "string"), ("layers", 2, "*V1LayerParameter"), ("layer", 100, "*LayerParameter"))),
)
KINDS = {15: "norm", "LRN": "norm", 17: "pool", "Pooling": "pool", 4: "conv", "Convolution": "conv"}
LRN_DEFAULTS = {"local_size": 5, "alpha": 1.0, "beta": 0.75, "k": 1.0}

# ImageNet's mean colour, which Caffe subtracts from values of 0 to 255: red, green, blue.
MEAN = (122.6789143406786, 116.66876761696767, 104.0069879317889)


def net_message() -> Any:
    """The class of Caffe's NetParameter, made of ``SCHEMA``. Raises ImportError without protobuf."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as error:
        raise missing("protobuf", "caffe", "a .caffemodel") from error
    file = descriptor_pb2.FileDescriptorProto(name="alexnet_ext/caffe.proto", package="alexnet_ext", syntax="proto2")
    field = descriptor_pb2.FieldDescriptorProto
    for name, fields in SCHEMA:
        message = file.message_type.add(name=name)
        for label, number, kind in fields:
            plain = kind.removeprefix("*")
            added = message.field.add(
                name=label, number=number, label=field.LABEL_REPEATED if plain != kind else field.LABEL_OPTIONAL
            )
            if plain[0].isupper():
                added.type, added.type_name = field.TYPE_MESSAGE, f".alexnet_ext.{plain}"
            else:
                added.type = getattr(field, f"TYPE_{plain.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("alexnet_ext.NetParameter"))


def read(file: Path, model: AlexNet) -> Contents:
    """The blobs of each layer that has any: weight and bias.

    Caffe's InnerProduct flattens (C, H, W) in that order, as ``torch.flatten`` does: fc6 needs no reordering.
    """
    net = net_message()()
    from google.protobuf.message import DecodeError

    try:
        net.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path_text(file)}: truncated or no .caffemodel ({error})") from error
    entries: dict[str, Entry] = {}
    layers = [*net.layers, *net.layer]
    kinds = [KINDS.get(layer.type, "") for layer in layers]
    for layer in layers:
        for blob, kind in zip(layer.blobs, ("weight", "bias"), strict=False):
            name = f"{linear_or_conv(layer.name)}.{kind}"
            if name in entries:
                raise ValueError(f"{path_text(file)}: two layers are called {layer.name!a}")
            entries[name] = _entry(blob, model, name, path_text(file))
        for index in range(2, len(layer.blobs)):
            entries[f"{linear_or_conv(layer.name)}.blob{index}"] = Entry((), torch.float32, torch.Tensor)
    typed = list(zip(layers, kinds, strict=True))
    groups = tuple(max(1, layer.convolution_param.group) for layer, kind in typed if kind == "conv")
    norms = [layer.lrn_param for layer, kind in typed if kind == "norm"]
    behind = [kind for kind in kinds if kind in ("norm", "pool")]
    red, green, blue = (mean / 255 for mean in MEAN)
    size = model.config.image_size
    preprocessing = Preprocessing(size, max(256, size), (red, green, blue), (1 / 255, 1 / 255, 1 / 255))
    # A file of bare weights has no norm, no pool and no settings of the five convolutions.
    return Contents(
        entries,
        order=tuple(behind[:2]) if behind else None,
        variant=None if model.config.variant in ("caffe", "caffenet") else "caffe or caffenet",
        groups=groups if any(layer.HasField("convolution_param") for layer in layers) else None,
        lrn=_lrn(norms[0]) if norms else None,
        preprocessing=preprocessing,
        bgr=True,
    )


def _lrn(message: Any) -> LRN:
    size, alpha, beta, k = (
        getattr(message, name) if message.HasField(name) else default for name, default in LRN_DEFAULTS.items()
    )
    return LRN(int(size), alpha, beta, k)


def _entry(blob: Any, model: AlexNet, name: str, shown: str) -> Entry:
    shape = tuple(blob.shape.dim) if blob.HasField("shape") else (blob.num, blob.channels, blob.height, blob.width)
    data, dtype = (blob.double_data, "<f8") if blob.double_data else (blob.data, "<f4")
    width = np.dtype(dtype).itemsize
    if any(side < 0 for side in shape) or math.prod(shape) * width != len(data):
        raise ValueError(f"{shown}: {ascii(name)[1:-1]} holds {len(data):,} bytes, {list(shape)} has another size")
    # The old format always has four dimensions: 1 x 1 x outputs x inputs, 1 x 1 x 1 x outputs.
    rank = 1 if name.endswith("bias") else 2 if name.startswith("classifier") else 4
    while len(shape) > rank and shape[0] == 1:
        shape = shape[1:]

    def values() -> Tensor:
        return torch.from_numpy(np.frombuffer(data, dtype).astype(dtype[1:])).view(shape)

    return Entry(shape, torch.float64 if width == 8 else torch.float32, values)
