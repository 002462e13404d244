"""The convolution by CUTLASS, except its kernels: where it applies, their arguments, and what runs elsewhere."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ext import _library
from alexnet_ext.ops._race import Candidate
from tests.ops.conv2d_bias_relu.spec import LAYERS
from tests.ops.conv2d_bias_relu.test_candidates import convolve_by
from tests.support import cases, oracle
from tests.support.cases import Case, conv

cutlass = importlib.import_module("alexnet_ext.ops.conv2d_bias_relu.cutlass")
shared = importlib.import_module("alexnet_ext.ops.conv2d_bias_relu.shared")
FORWARD, OF_X, OF_WEIGHT = shared.Direction.FORWARD, shared.Direction.INPUT, shared.Direction.WEIGHT
BUILT = _library.Library("cutlass", "cuda", True)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all kernels except those of sm90 were built and tensors were on a GPU of 9.0, with TF32 allowed."""
    monkeypatch.setattr(cutlass, "CUTLASS", BUILT)
    monkeypatch.setattr(cutlass, "SM90", _library.Library("sm90", "cuda", False, "for 8.0 alone"))
    monkeypatch.setattr(cutlass, "capability", lambda _: (9, 0))
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutlass, "SM90", _library.Library("sm90", "cuda", True))


def applies(case: Case, wanted: int, dtype: torch.dtype = torch.bfloat16, sm90: bool = False) -> bool:
    x, weight = (torch.empty(case.shapes[name], dtype=dtype, device="meta") for name in ("x", "weight"))
    constants = (cases.pair(case.constants[name]) for name in ("stride", "padding", "dilation"))
    p = shared.Convolution(*map(list, constants), case.constants["groups"])
    return cutlass.applies(x, weight, p, wanted, sm90)


@pytest.mark.parametrize("wanted", [FORWARD, OF_X, OF_WEIGHT])
@pytest.mark.parametrize("case", cases.params(cases.ALEXNET["conv2d_bias_relu"]))
def test_it_applies_to_alexnet(case: Case, wanted: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert applies(case, wanted, dtype)


PLAIN = conv((2, 16, 9, 9), 32, (3, 3), padding=1, groups=2)


@pytest.mark.parametrize(
    ("case", "directions"),
    [
        (PLAIN, {FORWARD, OF_X, OF_WEIGHT}),
        (conv((2, 16, 9, 9), 32, (3, 3), dilation=2), {FORWARD, OF_X, OF_WEIGHT}),
        (conv((2, 16, 9, 9), 32, (3, 3), stride=2), {FORWARD, OF_WEIGHT}),
        (conv((2, 16, 9, 9), 32, (3, 3), stride=(1, 2)), {FORWARD, OF_WEIGHT}),
        (conv((2, 16, 9, 9), 32, (3, 3), groups=4), set()),  # 4 channels a group: 8 bytes
        (conv((2, 32, 9, 9), 16, (3, 3), groups=4), set()),
        (conv((2, 17, 9, 9), 32, (3, 3)), set()),
        (conv((2, 3, 9, 9), 32, (3, 3)), set()),  # space-to-depth at stride 1 adds no channels
        (conv((2, 3, 9, 9), 32, (3, 3), stride=2), set()),  # 12 channels
        (conv((2, 2, 9, 9), 32, (3, 3), stride=2), {FORWARD, OF_X, OF_WEIGHT}),  # 8 channels at stride 1
        (conv((2, 3, 90, 90), 32, (3, 65), stride=(2, 4)), {FORWARD, OF_X, OF_WEIGHT}),  # 65 taps become 17
        (conv((2, 16, 40, 9), 32, (32, 3)), {FORWARD, OF_X, OF_WEIGHT}),
        (conv((2, 16, 40, 9), 32, (33, 3)), set()),
        (conv((0, 16, 9, 9), 32, (3, 3)), set()),
        (conv((1024, 64, 127, 128), 64, (3, 3), padding=1), {FORWARD, OF_X, OF_WEIGHT}),
        (conv((1024, 64, 128, 128), 64, (3, 3), padding=1), set()),  # x has 2**31 bytes
        (conv((1024, 16, 128, 128), 64, (3, 3), padding=1), set()),  # y has 2**31 bytes
    ],
    ids=lambda value: value.id if isinstance(value, Case) else "",
)
def test_where_it_applies(case: Case, directions: set[int]) -> None:
    assert {wanted for wanted in (FORWARD, OF_X, OF_WEIGHT) if applies(case, wanted)} == directions


def test_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {dtype for dtype in cases.DTYPES if applies(PLAIN, FORWARD, dtype)}
    assert found == {torch.bfloat16, torch.float16, torch.float32}
    torch.backends.cudnn.allow_tf32 = False
    assert not applies(PLAIN, FORWARD, torch.float32)
    assert applies(PLAIN, FORWARD)
    four = conv((2, 4, 9, 9), 8, (3, 3))  # 16 bytes of fp32
    assert not applies(four, FORWARD)
    torch.backends.cudnn.allow_tf32 = True
    assert applies(four, FORWARD, torch.float32)


def test_devices_and_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((0, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(cutlass, "capability", lambda _, found=capability: found)
        assert applies(PLAIN, FORWARD) == expected
    monkeypatch.setattr(cutlass, "CUTLASS", _library.Library("cutlass", "cuda", False, "no headers"))
    assert not applies(PLAIN, FORWARD)
    monkeypatch.undo()
    assert cutlass.capability(torch.ones(1)) == (0, 0)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", cases.params(cases.ALEXNET["conv2d_bias_relu"]))
def test_sm90_applies_to_alexnet(case: Case) -> None:
    for dtype, gradients in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        assert applies(case, FORWARD, dtype, sm90=True)
        assert {applies(case, wanted, dtype, sm90=True) for wanted in (OF_X, OF_WEIGHT)} == {gradients}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (PLAIN, True),
        (conv((2, 16, 9, 9), 32, (3, 3), stride=2), False),
        (conv((2, 16, 9, 9), 32, (3, 3), groups=4), False),
        (conv((2, 16, 9, 140), 32, (3, 2), dilation=(1, 127)), True),
        (conv((2, 16, 9, 140), 32, (3, 2), dilation=(1, 128)), False),
        (conv((2, 16, 140, 9), 32, (2, 3), dilation=(128, 1)), False),
        (conv((2, 16, 9, 9), 32, (3, 3), padding=(1, 127)), True),
        (conv((2, 16, 9, 9), 32, (3, 3), padding=(128, 1)), False),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else "",
)
def test_where_sm90_applies(case: Case, expected: bool) -> None:
    assert {applies(case, wanted, sm90=True) for wanted in (FORWARD, OF_X, OF_WEIGHT)} == {expected}


def test_sm90_is_for_its_own_devices_and_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not applies(PLAIN, FORWARD, sm90=True)
    monkeypatch.setattr(cutlass, "SM90", _library.Library("sm90", "cuda", True))
    for capability in ((0, 0), (8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(cutlass, "capability", lambda _, found=capability: found)
        assert not applies(PLAIN, FORWARD, sm90=True)
    monkeypatch.setattr(cutlass, "capability", lambda _: (9, 0))
    assert applies(PLAIN, FORWARD, sm90=True)


@pytest.mark.usefixtures("hopper")
def test_products_of_two_bytes_leave_9_0_to_sm90(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, expected in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True)):
        assert {applies(PLAIN, wanted, dtype) for wanted in (FORWARD, OF_X, OF_WEIGHT)} == {expected}
    for capability in ((8, 0), (10, 0)):
        monkeypatch.setattr(cutlass, "capability", lambda _, found=capability: found)
        assert applies(PLAIN, FORWARD)


# ---- as a candidate: stock PyTorch plays the kernels, with their schemas and requirements


def stock_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *constants: Any) -> Tensor:
    *constants, relu = constants
    check_operands(x, weight, constants)
    y = F.conv2d(x, weight, bias, *constants)
    return (F.relu(y) if relu else y).contiguous(memory_format=torch.channels_last)


def stock_gradient(dz: Tensor, x: Tensor, weight: Tensor, *constants: Any) -> Tensor:
    *constants, wanted = constants
    check_operands(x, weight, constants)
    assert wanted != OF_X or constants[0] == [1, 1]
    mask = [wanted == OF_X, wanted == OF_WEIGHT, False]
    stride, padding, dilation, groups = constants
    arguments = (None, stride, padding, dilation, False, [0, 0], groups, mask)
    return torch.ops.aten.convolution_backward(dz, x, weight, *arguments)[wanted].clone()


def stock_sm90_forward(x: Tensor, weight: Tensor, *given: Any) -> Tensor:
    assert given[1] == [1, 1]
    return stock_forward(x, weight, *given)


def stock_sm90_gradient(dz: Tensor, x: Tensor, weight: Tensor, *given: Any) -> Tensor:
    assert x.element_size() == 2
    assert given[0] == [1, 1]
    return stock_gradient(dz, x, weight, *given)


def check_operands(x: Tensor, weight: Tensor, constants: Any) -> None:
    groups = constants[3]
    assert all(count // groups * x.element_size() % 16 == 0 for count in (x.shape[1], weight.shape[0]))


@pytest.fixture
def kernels() -> Iterator[None]:
    if not _library.LIBRARIES[0].loaded:
        pytest.skip(f"the schemas are in the CPU library: {_library.LIBRARIES[0].reason}")
    with torch.library._scoped_library("alexnet_ext", "IMPL") as library:
        library.impl("conv2d_bias_relu_cutlass", stock_forward, "CPU")
        library.impl("conv2d_bias_relu_cutlass_gradient", stock_gradient, "CPU")
        library.impl("conv2d_bias_relu_sm90", stock_sm90_forward, "CPU")
        library.impl("conv2d_bias_relu_sm90_gradient", stock_sm90_gradient, "CPU")
        yield


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the candidates of each call; the last one runs."""
    names: list[list[str]] = []

    def last(what: str, given: list[Candidate]) -> Candidate:
        names.append([candidate.name for candidate in given])
        return given[-1]

    convolve_by(last, monkeypatch)
    return names


@pytest.mark.usefixtures("interpreter", "kernels")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", cases.params(LAYERS))
def test_it_is_offered_last_in_every_direction_and_right(case: Case, layout: str, offered: list[list[str]]) -> None:
    dtype = torch.float16 if layout == "contiguous" else torch.float32
    y = oracle.assert_matches_float64(case, cases.make(case, dtype, layout))
    assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    assert len(offered) >= 3
    assert all(names[-1] == "cutlass" and names.count("cutlass") == 1 for names in offered)


@pytest.mark.usefixtures("interpreter", "kernels", "hopper")
@pytest.mark.parametrize("case", cases.params(LAYERS))
def test_sm90_is_offered_in_its_place(case: Case, offered: list[list[str]]) -> None:
    """Except in TF32, which has no gradients there."""
    oracle.assert_matches_float64(case, cases.make(case, torch.float16))
    assert len(offered) >= 3
    assert all(names[-1] == "cutlass sm90" and "cutlass" not in names for names in offered)
    offered.clear()
    oracle.assert_matches_float64(case, cases.make(case, torch.float32))
    assert [names[-2:] for names in offered[:1]] == [["cutlass", "cutlass sm90"]]
    assert {names[-1] for names in offered[1:3]} == {"cutlass"}


@pytest.mark.usefixtures("interpreter", "kernels")
@pytest.mark.parametrize(
    ("case", "dtype", "directions"),
    [
        (PLAIN, torch.float64, 0),
        (conv((2, 6, 5, 5), 8, (3, 3)), torch.float16, 0),
        (conv((2, 16, 6, 5), 16, (3, 3), stride=2, padding=1), torch.float16, 2),
    ],
)
def test_where_it_does_not_apply_another_one_runs(
    case: Case, dtype: torch.dtype, directions: int, offered: list[list[str]]
) -> None:
    oracle.assert_matches_float64(case, cases.make(case, dtype))
    assert sum("cutlass" in names for names in offered[:3]) == directions


# ---- what is known of the build


def test_the_library_says_why_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    cpu, cuda = _library.Library("cpu", "cpu", True), _library.Library("cuda", "cuda", False, "no nvcc")
    monkeypatch.setattr(_library, "LIBRARIES", (cpu, cuda))
    assert _library._find_cutlass("cutlass").reason == "it is part of the CUDA library"
    monkeypatch.setattr(_library, "LIBRARIES", (cpu, _library.Library("cuda", "cuda", True)))
    monkeypatch.setattr(_library, "has_kernel", lambda op, device: (op, device) == ("conv2d_bias_relu_cutlass", "cuda"))
    assert _library._find_cutlass("cutlass") == BUILT
    assert not _library._find_cutlass("sm90").loaded
    monkeypatch.setattr(_library, "has_kernel", lambda op, device: False)
    assert _library._find_cutlass("cutlass").remedy == _library.REBUILD
    for name in ("cutlass", "sm90"):
        record = {f"{name}_reason": f"no {name} in sight", f"{name}_remedy": "find it"}
        (tmp_path / "build_info.json").write_text(json.dumps(record))
        assert _library._find_cutlass(name) == _library.Library(name, "cuda", False, f"no {name} in sight", "find it")
