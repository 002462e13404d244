"""A first layer rewritten to stride 1: its values, how often they are moved, and what the backward keeps of it."""

from __future__ import annotations

import importlib
import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import alexnet_ext as ax
from alexnet_ext.nn import Conv2dReLU
from alexnet_ext.ops import conv2d_bias_relu
from alexnet_ext.selfcheck.calls import calls_of
from alexnet_ext.selfcheck.races import Setting, in_training
from tests.ops.conv2d_bias_relu.test_candidates import convolve_by
from tests.support import cases

space_to_depth = importlib.import_module("alexnet_ext.ops.conv2d_bias_relu.space_to_depth")
shared = importlib.import_module("alexnet_ext.ops.conv2d_bias_relu.shared")
CPU = torch.device("cpu")


class Written(TorchDispatchMode):
    """Counts the values that operators write, by whether they are zeros or others."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::new_zeros", "aten::zeros", "aten::zero_", "aten::fill_"):
            self.zeros += result.numel()
        elif name != "aten::new_empty" and not func.is_view:
            self.moved += result.numel()
        return result


def convolution(stride: tuple[int, int], padding: tuple[int, int]) -> Any:
    return shared.Convolution(list(stride), list(padding), [1, 1], 1)


def by_phases(x: Tensor, before: tuple[int, int], blocks: list[int], stride: tuple[int, int]) -> Tensor:
    """Each place in a block as channels of its own, from x between zeros."""
    top, left = before
    below, right = (blocks[i] * stride[i] - before[i] - x.shape[2 + i] for i in (0, 1))
    padded = F.pad(x, (left, right, top, below))
    places = itertools.product(range(stride[0]), range(stride[1]))
    return torch.cat([padded[:, :, i :: stride[0], j :: stride[1]] for i, j in places], 1)


@cases.each_layout
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((227, 227), (11, 11), (4, 4), (0, 0)),
        ((224, 224), (11, 11), (4, 4), (2, 2)),
        ((21, 18), (3, 4), (3, 2), (2, 5)),
        ((9, 10), (2, 3), (4, 5), (1, 0)),  # the last pixels belong to no window
        ((3, 2), (5, 4), (4, 3), (1, 1)),  # within one block
        ((8, 12), (4, 4), (4, 4), (0, 0)),  # whole blocks alone
        ((1, 1), (9, 9), (2, 2), (6, 5)),  # more padding than image
    ],
    ids=str,
)
def test_each_value_is_moved_once(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], layout: str
) -> None:
    x, weight = torch.randn(2, 3, *size), torch.randn(4, 3, *kernel)
    x[0, 0, 0, :] = -0.0
    x[1, 2, -1, -1] = torch.nan
    x = cases.lay_out(x, layout)
    with Written() as written:
        rewrite = space_to_depth.SpaceToDepth(x, weight, convolution(stride, padding))
        found = rewrite.images(x)
    expected = by_phases(x, padding, rewrite.blocks, stride)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert written.moved <= x.numel()
    assert written.zeros <= found.numel()
    half = rewrite.images(x, torch.bfloat16)
    torch.testing.assert_close(half, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)
    folded = rewrite.weights(weight)
    assert torch.equal(folded, by_phases(weight, (0, 0), rewrite.taps, stride))
    assert folded.is_contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.nan_to_num().double(), weight.double(), None, stride, padding)
    torch.testing.assert_close(F.conv2d(found.nan_to_num().double(), folded.double()), exact)


FIRST = cases.conv((2, 3, 23, 19), 8, (7, 6), stride=(4, 3), padding=(2, 0))


def tensors_of(dtype: torch.dtype, wanted: tuple[str, ...] = ("weight", "bias")) -> cases.Tensors:
    tensors = cases.make(FIRST, dtype, "channels_last", requires_grad=False)
    return {name: tensor.requires_grad_(name in wanted) for name, tensor in tensors.items()}


@pytest.fixture
def rewrites(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype | None]:
    """The dtype requested of each rewrite of images so far."""
    found: list[torch.dtype | None] = []
    images = space_to_depth.SpaceToDepth.images
    monkeypatch.setattr(
        space_to_depth.SpaceToDepth, "images", lambda self, x, dtype=None: found.append(dtype) or images(self, x, dtype)
    )
    return found


def run(tensors: cases.Tensors, context: AbstractContextManager[Any]) -> tuple[Tensor, list[Tensor]]:
    """The result, and what its backward keeps."""
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with context, hooks:
        y = conv2d_bias_relu(**tensors, **FIRST.constants, backend="triton")
    return y, saved


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("autocast", [False, True])
def test_training_keeps_the_images_rewritten(autocast: bool, rewrites: list[torch.dtype | None]) -> None:
    """Once for both directions; under autocast from fp32 in the same pass."""
    tensors = tensors_of(torch.float32 if autocast else torch.float16)
    y, saved = run(tensors, torch.autocast("cpu", torch.float16) if autocast else nullcontext())
    assert y.dtype == torch.float16
    assert rewrites == [torch.float16]
    kept = [t for t in saved if t.dim() == 4 and t.shape[0] == 2]
    assert [tuple(t.shape) for t in kept] == [(2, 36, 7, 6), tuple(y.shape)]
    assert {t.dtype for t in kept} == {torch.float16}
    tensors["x"].zero_()  # no longer needed
    dy = torch.randn(y.shape).half()
    found = torch.autograd.grad(y, (tensors["weight"], tensors["bias"]), dy)
    assert rewrites == [torch.float16]
    exact = {name: t.detach().half().double().requires_grad_() for name, t in tensors_of(tensors["x"].dtype).items()}
    expected = torch.autograd.grad(cases.stock(FIRST, exact), (exact["weight"], exact["bias"]), dy.double())
    for ours, theirs, name in zip(found, expected, ("weight", "bias"), strict=True):
        assert ours.dtype == tensors[name].dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=4e-3, atol=4e-3 * theirs.abs().max().item())


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("dtype", "wanted", "layout"),
    [
        (torch.float16, ("x", "weight"), "channels_last"),
        (torch.float16, ("bias",), "channels_last"),
        (torch.float16, ("weight",), "contiguous"),
        (torch.float32, ("weight",), "channels_last"),
    ],
)
def test_elsewhere_images_are_kept_as_they_are(dtype: torch.dtype, wanted: tuple[str, ...], layout: str) -> None:
    tensors = tensors_of(dtype, wanted)
    tensors["x"] = cases.lay_out(tensors["x"].detach(), layout).requires_grad_("x" in wanted)
    y, saved = run(tensors, nullcontext())
    assert all(t.shape[1] != 36 for t in saved if t.dim() == 4)
    assert y.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    exact = {name: t.detach().double().requires_grad_(name in wanted) for name, t in tensors.items()}
    dy, names = torch.randn(y.shape).to(dtype), list(wanted)
    found = torch.autograd.grad(y, [tensors[name] for name in names], dy)
    expected = torch.autograd.grad(cases.stock(FIRST, exact), [exact[name] for name in names], dy.double())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=4e-3, atol=4e-3 * theirs.abs().max().item())


@pytest.mark.usefixtures("interpreter")
def test_it_goes_through_compile_and_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the op that chooses at run time, whose insides torch.compile does not see."""
    convolve_by(lambda _, given: given[0], monkeypatch)
    tensors = tensors_of(torch.float16)

    def convolve(x: Tensor) -> Tensor:
        return conv2d_bias_relu(x, tensors["weight"], tensors["bias"], **FIRST.constants)

    x, weight = tensors["x"], tensors["weight"]
    eager = convolve(x)
    (expected,) = torch.autograd.grad(eager.sum(), weight)
    torch._dynamo.reset()
    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, eager)
    assert torch.equal(torch.autograd.grad(compiled.sum(), weight)[0], expected)
    both = torch.vmap(convolve)(torch.stack([x, -x]))
    assert torch.equal(both, torch.stack([eager, convolve(-x)]))


@pytest.mark.usefixtures("native")
def test_tune_measures_what_training_convolves() -> None:
    """The key of a choice is that of the call in training."""
    layer = torch.nn.Sequential(Conv2dReLU(3, 8, (7, 6), (4, 3), (2, 0)))
    (call, *_) = calls_of(layer, (2, 3, 23, 19), torch.float32)
    assert not list(in_training(call, Setting(CPU, torch.float32, torch.channels_last)))
    assert not list(in_training(call, Setting(CPU, torch.float16, torch.contiguous_format)))
    (first,) = in_training(call, Setting(CPU, torch.float16, torch.channels_last))
    x, weight, bias, *constants = first.made(CPU, torch.float16, torch.channels_last)
    assert (x.shape, weight.shape, bias.shape) == ((2, 36, 7, 6), (8, 36, 2, 2), (8,))
    assert constants == [[1, 1], [0, 0], [1, 1], 1, True]
    assert not list(in_training(first, Setting(CPU, torch.float16, torch.channels_last)))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "step"), [((5, 3, 11, 11), 4), ((2, 2, 4, 3), 2), ((1, 2, 3, 7), 3)])
def test_a_weight_for_images_with_depth(shape: tuple[int, ...], step: int, layout: str) -> None:
    """Values and gradients of two orders are those of the stock functions; the gradient has the weight's strides."""
    weight = cases.lay_out(torch.randn(shape, dtype=torch.float64), layout).requires_grad_()
    found = space_to_depth.weight_to_depth(weight, step)
    assert "to_depth" in type(found.grad_fn).__name__
    expected = F.pixel_unshuffle(F.pad(weight, (0, -shape[3] % step, 0, -shape[2] % step)), step)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    dy = torch.randn_like(expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, weight, dy) for y in (found, expected))
    assert torch.equal(ours, theirs)
    assert ours.stride() == weight.stride()
    assert torch.autograd.gradgradcheck(lambda w: space_to_depth.weight_to_depth(w, step) ** 2, weight)
    run = torch.compile(space_to_depth.weight_to_depth, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(weight, step), expected)
    mapped = torch.vmap(lambda w: space_to_depth.weight_to_depth(w, step))(torch.stack([weight, -weight]))
    assert torch.equal(mapped, torch.stack([expected, -expected]))


def test_a_weight_with_depth_runs_stock_where_no_compiled_op_does() -> None:
    weight = torch.randn(2, 3, 5, 5, requires_grad=True)
    with ax.use_backend("stock"):
        found = space_to_depth.weight_to_depth(weight, 2)
    assert "to_depth" not in type(found.grad_fn).__name__
    grad = torch.func.grad(lambda w: space_to_depth.weight_to_depth(w, 2).square().sum())(weight.detach())
    assert torch.equal(grad, 2 * weight)
