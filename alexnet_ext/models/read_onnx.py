"""Reads the weights of an ONNX graph of AlexNet: its convolutions and linear layers, in the order of the graph."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from .._errors import path_text
from .._optional import missing
from ..variants import LRN
from .alexnet import AlexNet
from .contents import Contents, Entry, linear_or_conv

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
KINDS = {"LRN": "norm", "MaxPool": "pool"}


def read(file: Path, model: AlexNet) -> Contents:
    """Weights and biases by their place in the graph; their names do not matter."""
    try:
        import onnx
    except ImportError as error:
        raise missing("onnx", "onnx", "a .onnx file") from error
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(file)).graph
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{path_text(file)}: truncated or no ONNX file ({error})") from error
    constants = _constants(graph)
    layers = _layers(graph, constants, file)
    entries: dict[str, Entry] = {}
    for name, node in zip(LAYERS, layers, strict=True):
        entries |= _parameters(onnx, graph, constants, name, node, file)
    groups = tuple(_attributes(onnx, node).get("group", 1) for node in layers[:5])
    order, lrn = _after_conv1(onnx, graph)
    return Contents(entries, order=order, groups=groups, lrn=lrn)


def _constants(graph: Any) -> dict[str, Any]:
    """The tensors that a graph holds, by name."""
    constants: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = next((given.t for given in node.attribute if given.name == "value"), None)
    return constants


def _layers(graph: Any, constants: dict[str, Any], file: Path) -> list[Any]:
    """The nodes of ``LAYERS``. Raises ValueError for a graph of other layers."""
    shown = path_text(file)
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    kinds = [node.op_type for node in layers]
    if [kind == "Conv" for kind in kinds] != [True] * 5 + [False] * 3:
        raise ValueError(
            f"{shown}: not AlexNet's five convolutions and three linear layers, but {', '.join(kinds) or 'none'}"
        )
    if any(node.op_type == "Transpose" and node.input[0] not in constants for node in graph.node):
        raise ValueError(f"{shown}: it transposes activations, so that the order of fc6's inputs is unknown")
    return layers


def _attributes(onnx: Any, node: Any) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _parameters(onnx: Any, graph: Any, constants: dict[str, Any], name: str, node: Any, file: Path) -> dict[str, Entry]:
    """Weight and bias of the layer ``name``, which is ``node``."""
    given, layer = _attributes(onnx, node), linear_or_conv(name)
    if given.get("transA") or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        raise ValueError(f"{path_text(file)}: the Gemm of {name} has transA, alpha or beta")
    turned = node.op_type == "MatMul" or (node.op_type == "Gemm" and not given.get("transB"))
    weight = _entry(onnx, constants, node.input[1], turned, file)
    source = node.input[2] if len(node.input) > 2 else _added(graph, node, constants)
    if source:
        bias = _entry(onnx, constants, source, False, file)
    else:  # exporters leave out a bias of zeros
        bias = Entry(weight.shape[:1], torch.float32, partial(torch.zeros, weight.shape[:1]))
    return {f"{layer}.weight": weight, f"{layer}.bias": bias}


def _after_conv1(onnx: Any, graph: Any) -> tuple[tuple[str, ...] | None, LRN | None]:
    """The first two kinds of layers after conv1 (None where they are unknown), and the normalization's constants."""
    kinds = [KINDS[node.op_type] for node in graph.node if node.op_type in KINDS]
    norm = next((node for node in graph.node if node.op_type == "LRN"), None)
    if norm is not None:
        given = _attributes(onnx, norm)
        lrn = LRN(given["size"], given.get("alpha", 1e-4), given.get("beta", 0.75), given.get("bias", 1.0))
        return tuple(kinds[:2]), lrn
    # Without such a node there is no normalization, or one in pieces, which say nothing of the order.
    pieces = any(node.op_type in ("Pow", "AveragePool") for node in graph.node)
    return (None if pieces else tuple(kinds[:1])), None


def _added(graph: Any, node: Any, constants: dict[str, Any]) -> str:
    """The constant that an Add adds to a layer's result."""
    for other in graph.node:
        if other.op_type == "Add" and node.output[0] in other.input:
            return next((name for name in other.input if name in constants), "")
    return ""


def _entry(onnx: Any, constants: dict[str, Any], source: str, turned: bool, file: Path) -> Entry:
    if source not in constants:
        raise ValueError(f"{path_text(file)}: {source!a} is no initializer, its values are computed")
    tensor = constants[source]
    shape = tuple(tensor.dims)
    dtypes = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}

    def values() -> torch.Tensor:
        array = onnx.numpy_helper.to_array(tensor, str(file.parent))
        wide = array if array.dtype.kind == "f" else array.astype("float32")  # bf16 is a type of ml_dtypes
        value = torch.from_numpy(wide.copy())
        return value.t() if turned else value.view(shape)

    if not turned and len(shape) == 3 and shape[1:] == (1, 1):  # a (C, 1, 1) bias, applied by a separate Add node
        shape = shape[:1]
    return Entry(shape[::-1] if turned else shape, dtypes.get(tensor.data_type, torch.int64), values)
