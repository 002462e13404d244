"""The ways among which a convolution is raced: each is right, and a race has those that apply."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from alexnet_ext.ops import _backend, _known, _race
from alexnet_ext.ops._race import Candidate
from tests.support import cases, oracle
from tests.support.cases import conv

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("known_files")

WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None
import torch
import torch.nn.functional as F
from alexnet_ext import _library
from alexnet_ext.ops import _backend
from alexnet_ext.ops.conv2d_bias_relu import candidates, cutlass
from alexnet_ext.ops.conv2d_bias_relu.shared import Convolution, Direction

assert not _library.TRITON.loaded
on_gpu = {"auto", "native"} if _library.LIBRARIES[1].loaded else set()
assert set(_backend.kernels("conv2d_bias_relu", "cuda")) == on_gpu


def forward(x, weight, bias, *constants):
    y = F.conv2d(x, weight, bias, *constants[:4])
    return (F.relu(y) if constants[4] else y).contiguous(memory_format=torch.channels_last)


def gradient(dz, x, weight, stride, padding, dilation, groups, wanted):
    mask = [wanted == 0, wanted == 1, False]
    constants = (None, stride, padding, dilation, False, [0, 0], groups, mask)
    return torch.ops.aten.convolution_backward(dz, x, weight, *constants)[wanted]


_backend.ORDER["cpu"]["auto"] = _backend.PROVEN
cutlass.CUTLASS = cutlass.SM90 = _library.Library("for a test", "cuda", True)
chosen = []
x = torch.randn(2, 16, 7, 6, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
weight, bias = torch.randn(32, 8, 3, 3, dtype=torch.float16) / 8, torch.randn(32, dtype=torch.float16)
p = Convolution([1, 1], [1, 1], [1, 1], 2)
exact = [t.double().requires_grad_() for t in (x, weight, bias)]
expected = F.relu(F.conv2d(*exact, padding=1, groups=2))
dy = torch.randn_like(expected).half()
gradients = torch.autograd.grad(expected, exact, dy.double())
with torch.library._scoped_library("alexnet_ext", "IMPL") as library:
    for name in ("cutlass", "sm90"):
        library.impl(f"conv2d_bias_relu_{name}", forward, "CPU")
        library.impl(f"conv2d_bias_relu_{name}_gradient", gradient, "CPU")
    for cutlass.capability in (lambda x: (8, 0), lambda x: (9, 0)):
        for name in [algorithm.name for algorithm in candidates.offered(x, weight, p, Direction.FORWARD)]:
            def fastest(what, device, given):
                chosen.append(name)
                return next(candidate for candidate in given if candidate.name == name)

            candidates.fastest = fastest
            y = candidates.forward(x, weight, bias, *p)
            found = candidates.backward(dy, x, weight, y, *p, [True, True, True])
            for ours, right in zip((y, *found), (expected, *gradients), strict=True):
                assert (ours - right).abs().max() <= 2**-8 * right.abs().max(), name
print(*dict.fromkeys(chosen), sep=", ")
"""


@pytest.mark.usefixtures("native")
def test_the_compiled_candidates_need_no_triton() -> None:
    """PyTorch's convolution stands for the kernels of CUTLASS, as for cuDNN's."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = "cudnn channels_last, cudnn contiguous, cudnn per tower, cutlass, cutlass sm90"
    assert done.stdout.splitlines()[-1] == said


interpreted = pytest.mark.usefixtures("interpreter")
LAYER = conv((2, 4, 6, 5), 6, (3, 3), padding=1, groups=2)


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A race is one call of each, without a warm-up."""
    monkeypatch.setattr(_race, "WARM_UP", 0.0)
    monkeypatch.setattr(_race, "ROUNDS", 1)
    monkeypatch.setattr(_race, "REPEATS", 1)


def convolve_by(pick: Callable[[str, list[Candidate]], Candidate], monkeypatch: pytest.MonkeyPatch) -> None:
    """``conv2d_bias_relu`` by ``pick(the call in words, all candidates)``, in place of a race."""
    folder = "alexnet_ext.ops.conv2d_bias_relu"
    candidates = importlib.import_module(f"{folder}.candidates")
    monkeypatch.setattr(candidates, "fastest", lambda what, device, given: pick(what, given))
    monkeypatch.setitem(_backend.ORDER["cpu"], "auto", _backend.PROVEN)
    op = torch.ops.alexnet_ext.conv2d_bias_relu_auto
    monkeypatch.setattr(importlib.import_module(f"{folder}.op"), "operator", lambda *_: op)


@interpreted
@pytest.mark.parametrize("winner", ["triton", "cudnn contiguous", "cudnn channels_last", "cudnn per tower"])
def test_every_candidate_computes_the_convolution(winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's convolution on the CPU plays cuDNN's."""
    taken = []

    def pick(what: str, given: list[Candidate]) -> Candidate:
        taken.append(what)
        return next(candidate for candidate in given if candidate.name == winner)

    convolve_by(pick, monkeypatch)
    for layout in ("contiguous", "channels_last"):
        oracle.assert_matches_float64(LAYER, cases.make(LAYER, layout=layout))
    assert [what.split(" x ")[0] for what in taken[:3]] == [
        f"conv2d_bias_relu {direction}" for direction in ("forward", "input gradient", "weight gradient")
    ]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=cases.dtype_id)
def test_the_persistent_forward_is_offered_last_and_on_tensor_cores_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = []

    def last(what: str, given: list[Candidate]) -> Candidate:
        offered.append([candidate.name for candidate in given])
        return given[-1]

    convolve_by(last, monkeypatch)
    oracle.assert_matches_float64(LAYER, cases.make(LAYER, dtype))
    forward, *gradients = offered[:3]
    assert ("triton persistent" in forward[-1:]) == (dtype == torch.float16)
    assert all("triton persistent" not in names for names in (forward[:-1], *gradients))


@interpreted
def test_a_direction_that_is_not_wanted_is_not_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    tensors = cases.make(LAYER)
    tensors["x"] = tensors["x"].detach()
    torch.ops.alexnet_ext.conv2d_bias_relu_auto(*cases.raw_forward(LAYER, tensors)).sum().backward()
    kept = [key.split(" x ")[0] for key in _known.on(CPU).races]
    assert kept == ["conv2d_bias_relu forward", "conv2d_bias_relu weight gradient"]
