"""load_weights: files in other programs' formats, written here byte by byte, with known values; and broken ones."""

from __future__ import annotations

import builtins
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alexnet_ext.models import AlexNet, alexnet, load_weights
from alexnet_ext.models.weights import find_variant

SIDE, CLASSES = 67, 5  # the smallest image, 256 values before fc6
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
GROUPS = (1, 2, 1, 2, 2)
Weights = dict[str, Tensor]


def network(variant: str, image_size: int | None = SIDE, fused: bool = True) -> AlexNet:
    """All zeros."""
    with torch.device("meta"):
        model = alexnet(variant, fused, num_classes=CLASSES, image_size=image_size, init="torch").eval()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@cache
def weights(variant: str) -> Weights:
    """Distinct values for each tensor, cheap to make."""
    with torch.device("meta"):
        model = alexnet(variant, num_classes=CLASSES, image_size=SIDE)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    count = iter(range(1, 100))
    return {
        name: torch.linspace(-1, 1 + next(count), shape.numel()).view(shape) / shape[1:].numel()
        for name, shape in shapes.items()
    }


def tensor_name(layer: str, kind: str) -> str:
    return f"{'features' if layer.startswith('conv') else 'classifier'}.{layer}.{kind}"


# --- Caffe's wire format, written by hand -------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = b""
    while True:
        value, low = value >> 7, value & 127
        if not value:
            return out + bytes([low])
        out += bytes([low | 128])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def real(field: int, value: float) -> bytes:
    return varint(field << 3 | 5) + struct.pack("<f", value)


def nested(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def old_blob(tensor: Tensor) -> bytes:
    """num, channels, height, width: always four."""
    shape = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    sides = b"".join(number(field, side) for field, side in enumerate(shape, 1))
    return sides + nested(5, tensor.numpy().astype("<f4").tobytes())


def new_blob(tensor: Tensor) -> bytes:
    shape = nested(1, b"".join(varint(side) for side in tensor.shape))
    return nested(5, tensor.numpy().astype("<f4").tobytes()) + nested(7, shape)


def caffemodel(values: Weights, order: tuple[str, str], form: str, alpha: float = 1e-4) -> bytes:
    """A file as Caffe writes it: V1 ``layers`` with numbered types, or ``layer`` with named ones."""
    old = form == "V1"
    types = {"conv": 4, "fc": 14, "relu": 18, "norm": 15, "pool": 17}
    names = {"conv": "Convolution", "fc": "InnerProduct", "relu": "ReLU", "norm": "LRN", "pool": "Pooling"}

    def layer(name: str, *more: bytes) -> bytes:
        kind = name.rstrip("0123456789")
        if old:
            return nested(2, nested(4, name.encode()) + number(5, types[kind]) + b"".join(more))
        return nested(100, nested(1, name.encode()) + nested(2, names[kind].encode()) + b"".join(more))

    blob, field = (old_blob, 6) if old else (new_blob, 7)
    net = nested(1, b"AlexNet")
    for name in LAYERS:
        parts = [nested(field, blob(values[tensor_name(name, kind)])) for kind in ("weight", "bias")]
        index = int(name[-1])
        if name.startswith("conv"):
            parts.append(nested(10 if old else 106, number(1, 1) + number(5, GROUPS[index - 1])))
        net += layer(name, *parts) + layer(f"relu{index}")
        for kind in order if index <= 2 else ():
            constants = number(1, 5) + real(2, alpha) + real(3, 0.75)
            net += layer(f"{kind}{index}", *([nested(18 if old else 118, constants)] if kind == "norm" else []))
    return net


@pytest.mark.parametrize("form", ["V1", "new"])
@pytest.mark.parametrize(("variant", "order"), [("caffe", ("norm", "pool")), ("caffenet", ("pool", "norm"))])
def test_caffemodel(tmp_path: Path, variant: str, order: tuple[str, str], form: str) -> None:
    """The network on red, green, blue equals Caffe's on blue, green, red."""
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    values = weights(variant)
    file = tmp_path / "bvlc.caffemodel"
    file.write_bytes(caffemodel(values, order, form))
    model = network(variant)
    preprocessing = load_weights(model, file)
    expected = values | {"features.conv1.weight": values["features.conv1.weight"].flip(1)}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    image = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8)
    colours = torch.tensor([104.00699, 116.66877, 122.67891]).view(3, 1, 1)
    theirs = network(variant, fused=False)
    theirs.load_state_dict(values)
    with torch.no_grad():
        y = theirs(image.flip(1).float() - colours)
        torch.testing.assert_close(model(preprocessing(image)), y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    load_weights(model, file, bgr=False)
    assert torch.equal(model.features.conv1.weight, values["features.conv1.weight"])


def test_caffe_refuses_another_variant_and_broken_files(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    values, file = weights("caffe"), tmp_path / "net.caffemodel"
    good = caffemodel(values, ("norm", "pool"), "new")
    file.write_bytes(good)
    refuses(network("caffenet"), file, "conv1 is followed by norm and pool")
    refuses(network("paper"), file, "it is of variant 'caffe or caffenet'; its LRN")
    file.write_bytes(caffemodel(values, ("norm", "pool"), "V1", alpha=5e-4))
    refuses(network("caffe"), file, "its LRN(size=5, alpha=0.000")
    file.write_bytes(good[:-1000])
    refuses(network("caffe"), file, "net.caffemodel: truncated or no .caffemodel")
    short = values | {"classifier.fc8.bias": values["classifier.fc8.bias"][:-1]}
    file.write_bytes(caffemodel(short, ("norm", "pool"), "new"))
    refuses(network("caffe"), file, "classifier.fc8.bias is [4], expected [5]")
    less = nested(100, nested(1, b"conv1") + nested(2, b"Convolution") + nested(7, number(1, 9) + nested(5, b"1234")))
    file.write_bytes(less)
    refuses(network("caffe"), file, "features.conv1.weight holds 4 bytes, [9, 0, 0, 0] has another size")


def refuses(model: AlexNet, file: Path, message: str, error: type[Exception] = ValueError) -> None:
    """The error is one line with ``message``, and every value of the model (of ``network``) is still zero."""
    with pytest.raises(error) as caught:
        load_weights(model, file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(tensor.any() for tensor in model.state_dict().values())


# --- PyTorch and safetensors ---------------------------------------------------------------------------------------


def torchvision_names(values: Weights) -> Weights:
    numbers = dict(zip(LAYERS, ("0", "3", "6", "8", "10", "1", "4", "6"), strict=True))
    return {
        f"{name.split('.')[0]}.{numbers[name.split('.')[1]]}.{name.split('.')[2]}": tensor
        for name, tensor in values.items()
    }


@pytest.fixture(scope="module")
def torchvision_weights() -> Weights:
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in alexnet("torchvision", num_classes=CLASSES).state_dict().items()}
    return {name: torch.full(shape, 0.01 * i) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_torchvision_state_dict(tmp_path: Path, torchvision_weights: Weights, legacy: bool) -> None:
    file = tmp_path / "alexnet-owt.pth"
    torch.save(torchvision_names(torchvision_weights), file, _use_new_zipfile_serialization=not legacy)
    model = network("torchvision", image_size=None).half()
    preprocessing = load_weights(model, file)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, torchvision_weights[name].half())
    assert preprocessing.mean == (0.485, 0.456, 0.406)
    refuses(network("paper"), file, "'paper': it is of variant 'torchvision'; features.conv1.weight is [64, 3, 11, 11]")


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_own_names(tmp_path: Path, ending: str) -> None:
    from safetensors.torch import save_file

    values, file = weights("paper"), tmp_path / f"weights.{ending}"
    (torch.save if ending == "pth" else save_file)(values, file)
    model = network("paper")
    assert load_weights(model, file) is None
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def prefixed(values: Weights, prefix: str) -> Weights:
    return {f"{prefix}{name}": tensor for name, tensor in values.items()}


CHECKPOINTS: dict[str, Callable[[Weights], Any]] = {
    "example of ImageNet": lambda w: {"epoch": 3, "arch": "alexnet", "state_dict": w, "optimizer": {"state": {}}},
    "DataParallel": lambda w: {"model": prefixed(w, "module.")},
    "compiled": lambda w: prefixed(w, "_orig_mod."),
    "Lightning": lambda w: {"state_dict": prefixed(w, "model.net."), "pytorch-lightning_version": "2.5"},
    "parallel convolutions": lambda w: {n.replace("features.", "features.module."): t for n, t in w.items()},
}


@pytest.mark.parametrize("ending", ["pth", "ckpt", "pth.tar"])
@pytest.mark.parametrize("names", [torchvision_names, dict], ids=["torchvision", "own"])
@pytest.mark.parametrize("wrap", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_checkpoints_of_training_scripts(
    tmp_path: Path, wrap: Callable[[Weights], Any], names: Callable[[Weights], Weights], ending: str
) -> None:
    variant = "torchvision" if names is torchvision_names else "paper"
    model, file = network(variant), tmp_path / f"model.{ending}"
    values = {n: torch.full(t.shape, 0.01 * i) for i, (n, t) in enumerate(model.state_dict().items(), 1)}
    torch.save(wrap(names(values)), file)
    assert find_variant(file) == variant
    load_weights(model, file)
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


def test_the_variant_is_the_one_whose_convolutions_fit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "x.caffemodel"
    for variant, order in (("caffenet", ("pool", "norm")), ("caffe", ("norm", "pool"))):
        file.write_bytes(caffemodel(weights("caffe"), order, "V1"))
        assert find_variant(file) == variant
    convolutions = torchvision_names(network("torchvision").state_dict())
    save_file(convolutions, tmp_path / "x.safetensors")
    assert find_variant(tmp_path / "x.safetensors") == "torchvision"
    torch.save({"features.conv1.weight": torch.ones(7)}, tmp_path / "x.pth")
    assert find_variant(tmp_path / "x.pth") == "torchvision", "none fits: the usual one, whose refusal is reported"
    with pytest.raises(ValueError, match=r"x\.bin: expected a \.safetensors"):
        find_variant(tmp_path / "x.bin")


def test_own_safetensors_say_their_variant(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    header = (
        '{"config": {"variant": "caffe"}, "preprocessing": '
        '{"size": 67, "resize": 80, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}'
    )
    file = tmp_path / "run.safetensors"
    save_file(weights("caffe"), file, metadata={"alexnet_ext": header})
    assert load_weights(network("caffe"), file).mean == (0.1, 0.2, 0.3)
    refuses(network("paper"), file, "does not fit variant 'paper': it is of variant 'caffe'")
    for wrong in ("[1]", "[" * 100_000, header.replace("80", "0")):
        save_file({"a": torch.ones(1)}, file, metadata={"alexnet_ext": wrong})
        refuses(network("caffe"), file, "its header does not describe a network")


def test_what_does_not_fit_is_listed_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    values = dict(weights("paper"))
    del values["features.conv1.bias"]
    values["extra\n"] = torch.ones(1)
    values["classifier.fc8.bias"] = torch.ones(7)
    values["features.conv2.bias"] = values["features.conv2.bias"].long()
    torch.save(values, file)
    refuses(
        network("paper"),
        file,
        "does not fit variant 'paper': missing features.conv1.bias; unknown extra\\n; features.conv2.bias is of "
        "torch.int64, expected floating-point numbers; classifier.fc8.bias is [7], expected [5]",
    )


class Payload:
    ran: list[str] = []  # noqa: RUF012

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Payload.ran.append, ("run",)


def test_pickles_that_hold_code_are_not_run(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    torch.save({"features.0.weight": Payload()}, file)
    refuses(network("paper"), file, "damaged, or more than tensors: weights_only=True refuses it")
    file.write_bytes(pickle.dumps(Payload()))
    refuses(network("paper"), file, "a.pth: ")
    assert Payload.ran == []


def test_broken_torch_files(tmp_path: Path) -> None:
    file, whole = tmp_path / "a.pth", tmp_path / "whole.pth"
    torch.save(weights("paper"), whole)
    file.write_bytes(whole.read_bytes()[:100_000])
    refuses(network("paper"), file, "a.pth: ")
    file.write_bytes(b"")
    refuses(network("paper"), file, "a.pth: ")
    torch.save([torch.ones(1)], file)
    refuses(network("paper"), file, "not a state_dict, a dictionary of tensors by name")
    huge = weights("paper") | {"classifier.fc7.weight": torch.zeros(1).expand(4096, 4096)}
    torch.save(huge, file)
    refuses(network("paper"), file, "classifier.fc7.weight of shape [4096, 4096] is not stored value by value")
    torch.save({"features.0.weight": torch.ones(1), "features.1.weight": torch.ones(1)}, file)
    refuses(network("paper"), file, "'features.1.weight' is not in")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    refuses(network("paper"), file, "declares 10,000,000 bytes, more than it has")
    safetensors = tmp_path / "a.safetensors"
    safetensors.write_bytes(b"\xff" * 100)
    refuses(network("paper"), safetensors, "a damaged safetensors file")


def test_files_that_are_not_there_and_other_arguments(tmp_path: Path) -> None:
    model = network("paper")
    refuses(model, tmp_path / "none.pth", "No such file", FileNotFoundError)
    refuses(model, tmp_path / "a.h5", "a.h5: expected a .safetensors, .pth, .pt, .caffemodel or .onnx file")
    with pytest.raises(TypeError, match="got Linear"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "a.pth")  # type: ignore[arg-type]
    torch.save(weights("paper"), tmp_path / "a.pth")
    meta = network("paper").to("meta")
    with pytest.raises(ValueError, match="the model is on the meta device"):
        load_weights(meta, tmp_path / "a.pth")


@pytest.mark.parametrize(("package", "ending", "extra"), [("google", "caffemodel", "caffe"), ("onnx", "onnx", "onnx")])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, ending: str, extra: str
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / f"a.{ending}").write_bytes(b"")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"pip install 'alexnet_ext\[{extra}\]'"):
        load_weights(network("paper"), tmp_path / f"a.{ending}")


# --- ONNX ----------------------------------------------------------------------------------------------------------


def onnx_graph(values: Weights, form: str) -> Any:
    """AlexNet's layers with weights and the nodes between them, in the forms that exporters write: ``transB``, weights
    transposed beforehand, or MatMul and Add."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    make, nodes, constants, last = onnx.helper.make_node, [], [], "x"
    for index, name in enumerate(LAYERS, 1):
        weight, bias = (values[tensor_name(name, kind)].numpy() for kind in ("weight", "bias"))
        weight = weight if name.startswith("conv") or form == "transB" else np.ascontiguousarray(weight.T)
        for kind, value in (("w", weight), ("b", bias)):
            constants.append(onnx.numpy_helper.from_array(value, f"{kind}{index}"))
        given = [last, f"w{index}", f"b{index}"]
        if name.startswith("conv"):
            nodes.append(make("Conv", given, [f"y{index}"], group=GROUPS[index - 1]))
        elif form == "MatMul":
            nodes.append(make("MatMul", given[:2], [f"z{index}"]))
            nodes.append(make("Add", [f"b{index}", f"z{index}"], [f"y{index}"]))
        else:
            nodes.append(make("Gemm", given, [f"y{index}"], transB=int(form == "transB")))
        last = f"y{index}"
        if index <= 2:
            nodes.append(make("LRN", [last], [f"n{index}"], size=5, alpha=1e-4, beta=0.75, bias=1.0))
            nodes.append(make("MaxPool", [f"n{index}"], [f"p{index}"], kernel_shape=[3, 3], strides=[2, 2]))
            last = f"p{index}"
        if index == 5:
            nodes.append(make("Flatten", [last], ["flat"]))
            last = "flat"
    info = onnx.helper.make_tensor_value_info
    value_type = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes, "AlexNet", [info("x", value_type, [1, 3, SIDE, SIDE])], [info(last, value_type, None)], constants
    )
    return onnx.helper.make_model(graph)


@pytest.mark.parametrize("form", ["transB", "transposed", "MatMul"])
def test_onnx(tmp_path: Path, form: str) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    values, file = weights("caffe"), tmp_path / "bvlcalexnet.onnx"
    onnx.save(onnx_graph(values, form), file)
    model = network("caffe")
    assert load_weights(model, file) is None
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    load_weights(model, file, bgr=True)
    assert torch.equal(model.features.conv1.weight, values["features.conv1.weight"].flip(1))


def test_onnx_refuses(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    file = tmp_path / "a.onnx"
    graph = onnx_graph(weights("caffe"), "transB")
    onnx.save(graph, file)
    refuses(network("caffenet"), file, "conv1 is followed by norm and pool")
    refuses(network("paper"), file, "its LRN(size=5, alpha=9.99")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    refuses(network("caffe"), file, "truncated or no ONNX file")
    graph.graph.node[0].attribute[0].i = 2
    onnx.save(graph, file)
    refuses(network("caffe"), file, "its convolutions have groups [2, 2, 1, 2, 2], expected [1, 2, 1, 2, 2]")
    flatten = next(node for node in graph.graph.node if node.op_type == "Flatten")
    flatten.op_type = "Transpose"
    onnx.save(graph, file)
    refuses(network("caffe"), file, "it transposes activations")
    del graph.graph.node[-1]
    onnx.save(graph, file)
    refuses(network("caffe"), file, "not AlexNet's five convolutions and three linear layers")
