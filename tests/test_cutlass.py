"""The convolution by CUTLASS, but for its kernels: where it applies, what they are given, and what runs elsewhere."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ext import _library
from alexnet_ext.ops import _backend
from alexnet_ext.ops._tuning import Candidate
from benchmarks.verify_gpu.stages import correctness, speed

from . import cases, cuda_budget, oracle
from .cases import Case, conv
from .test_triton_conv2d_bias_relu import LAYERS

cutlass = importlib.import_module("alexnet_ext.ops.conv2d_bias_relu.cutlass")
FORWARD, OF_X, OF_WEIGHT = None, 0, 1
BUILT = _library.Library("cutlass", "cuda", True)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernels were built and tensors lay on a GPU of compute capability 9.0, with TF32 allowed."""
    monkeypatch.setattr(cutlass, "CUTLASS", BUILT)
    monkeypatch.setattr(cutlass, "capability", lambda _: (9, 0))
    torch.backends.cudnn.allow_tf32 = True


def applies(case: Case, wanted: int | None, dtype: torch.dtype = torch.bfloat16) -> bool:
    x, weight = (torch.empty(case.shapes[name], dtype=dtype, device="meta") for name in ("x", "weight"))
    constants = (cases.pair(case.constants[name]) for name in ("stride", "padding", "dilation"))
    return cutlass.applies(x, weight, *map(list, constants), case.constants["groups"], wanted)


@pytest.mark.parametrize("wanted", [FORWARD, OF_X, OF_WEIGHT])
@pytest.mark.parametrize("case", cases.params(cases.ALEXNET["conv2d_bias_relu"]))
def test_it_applies_to_alexnet(case: Case, wanted: int | None) -> None:
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
        (conv((2, 16, 9, 9), 32, (3, 3), groups=4), set()),  # of 4 channels: 8 bytes
        (conv((2, 32, 9, 9), 16, (3, 3), groups=4), set()),
        (conv((2, 17, 9, 9), 32, (3, 3)), set()),
        (conv((2, 3, 9, 9), 32, (3, 3)), set()),  # stride 1 gives no more channels
        (conv((2, 3, 9, 9), 32, (3, 3), stride=2), set()),  # 12 channels
        (conv((2, 2, 9, 9), 32, (3, 3), stride=2), {FORWARD, OF_X, OF_WEIGHT}),  # 8 channels at stride 1
        (conv((2, 3, 90, 90), 32, (3, 65), stride=(2, 4)), {FORWARD, OF_X, OF_WEIGHT}),  # 65 taps become 17
        (conv((2, 16, 40, 9), 32, (32, 3)), {FORWARD, OF_X, OF_WEIGHT}),
        (conv((2, 16, 40, 9), 32, (33, 3)), set()),
        (conv((0, 16, 9, 9), 32, (3, 3)), set()),
        (conv((1024, 64, 127, 128), 64, (3, 3), padding=1), {FORWARD, OF_X, OF_WEIGHT}),
        (conv((1024, 64, 128, 128), 64, (3, 3), padding=1), set()),  # x has 2**31 bytes
        (conv((1024, 16, 128, 128), 64, (3, 3), padding=1), set()),  # y has
    ],
    ids=lambda value: value.id if isinstance(value, Case) else "",
)
def test_where_it_applies(case: Case, directions: set[int | None]) -> None:
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


# ---- as a candidate: stock PyTorch stands for the kernels, with their schemas and in need of what they need


def stock_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *constants: Any) -> Tensor:
    check_operands(x, weight, constants)
    return F.relu(F.conv2d(x, weight, bias, *constants)).contiguous(memory_format=torch.channels_last)


def stock_gradient(dz: Tensor, x: Tensor, weight: Tensor, *constants: Any) -> Tensor:
    *constants, wanted = constants
    check_operands(x, weight, constants)
    assert wanted != OF_X or constants[0] == [1, 1]
    mask = [wanted == OF_X, wanted == OF_WEIGHT, False]
    stride, padding, dilation, groups = constants
    arguments = (None, stride, padding, dilation, False, [0, 0], groups, mask)
    return torch.ops.aten.convolution_backward(dz, x, weight, *arguments)[wanted].clone()


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
        yield


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of the candidates of each call, of which the last one runs."""
    names: list[list[str]] = []

    def last(what: str, device: torch.device, given: list[Candidate]) -> Candidate:
        names.append([candidate.name for candidate in given])
        return given[-1]

    folder = "alexnet_ext.ops.conv2d_bias_relu"
    monkeypatch.setattr(importlib.import_module(f"{folder}.measured"), "fastest", last)
    measured = torch.ops.alexnet_ext.conv2d_bias_relu_measured
    monkeypatch.setattr(importlib.import_module(f"{folder}.op"), "operator", lambda *_: measured)
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


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
@pytest.mark.parametrize("case", cases.params(LAYERS))
def test_what_a_gpu_will_be_asked(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of ``benchmarks.verify_gpu`` passes for what is right, and fails for a ReLU that loses NaN."""
    correctness.compare_cutlass(case, dtype, "cpu")
    right = cutlass.forward
    monkeypatch.setattr(cutlass, "forward", lambda *given: right(*given).nan_to_num(0))
    with pytest.raises(AssertionError, match="NaN in other places"):
        correctness.compare_cutlass(case, dtype, "cpu")


@pytest.mark.usefixtures("interpreter", "kernels")
def test_every_candidate_will_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = speed.SIZES["cpu"]._replace(dtypes=(torch.float16,))
    monkeypatch.setitem(speed.SIZES, "cpu", sizes)
    monkeypatch.setattr(speed.harness, "alexnet_cases", lambda op, batch: [LAYERS[3]])
    monkeypatch.setattr(
        speed, "median_ms", lambda runs, device: {name: float(bool(run())) for name, run in runs.items()}
    )
    monkeypatch.setitem(_backend.MEASURED, "conv2d_bias_relu", {"cpu": True, "cuda": True})
    findings = list(speed.convolution_findings("cpu"))
    assert len(findings) == 6
    assert all({"cudnn channels_last ms", "triton ms", "cutlass ms"} <= set(finding.numbers) for finding in findings)


# ---- what the kernels would read, asked of CUTLASS on the host


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.skipif(not cuda_budget.cutlass_include(), reason="CUTLASS's headers (nvidia-cutlass) are not installed")
def test_blocks_read_what_the_convolution_and_its_gradients_are_made_of(tmp_path: Path) -> None:
    root, program = cuda_budget.ROOT, tmp_path / "cutlass_reads"
    sources = (root / "tests/cpp/cutlass_reads.cu", root / "csrc/common/isa.cpp")
    folders = (f"-I{root / 'csrc'}", f"-I{root / 'tests' / 'cpp'}", "-isystem", cuda_budget.cutlass_include())
    flags = (*cuda_budget.FLAGS, "-arch=sm_80")
    cuda_budget.run("nvcc", *flags, *folders, "-o", str(program), *map(str, sources))
    assert "0 failures" in cuda_budget.run(str(program))


# ---- what is known of the build


def test_the_library_says_why_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    cpu, cuda = _library.Library("cpu", "cpu", True), _library.Library("cuda", "cuda", False, "no nvcc")
    monkeypatch.setattr(_library, "LIBRARIES", (cpu, cuda))
    assert _library._find_cutlass().reason == "it is part of the CUDA library"
    monkeypatch.setattr(_library, "LIBRARIES", (cpu, _library.Library("cuda", "cuda", True)))
    monkeypatch.setattr(_library, "has_kernel", lambda op, device: (op, device) == ("conv2d_bias_relu_cutlass", "cuda"))
    assert _library._find_cutlass() == BUILT
    monkeypatch.setattr(_library, "has_kernel", lambda op, device: False)
    assert _library._find_cutlass().remedy == _library.REBUILD
    record = {"cutlass_reason": "no headers in sight", "cutlass_remedy": "find them"}
    (tmp_path / "build_info.json").write_text(json.dumps(record))
    found = _library._find_cutlass()
    assert (found.loaded, found.reason, found.remedy) == (False, "no headers in sight", "find them")
