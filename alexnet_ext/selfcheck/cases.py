"""Calls of the ops with known inputs and limits of error: what `alexnet check` compares, and how a kernel is proven.

The reference is stock PyTorch in float64 on the CPU. Inputs are small integers times powers of two, exact in every
dtype and the same on every machine, so that one reference serves all dtypes and an error is the arithmetic's alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops._checks import pair
from ..ops._register import RECORDS
from ..ops.conv2d_bias_relu.space_to_depth import to_depth, weight_to_depth

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
IMAGES = tuple(LAYOUTS)
ANY = (*LAYOUTS, "strided")
"""Strided tensors have gaps: every second column of a larger one."""
GRADS = ("dense", "permuted", "expanded")
"""How the gradient of a result is stored.

``dense``: as the result is. ``permuted``: the same values, first dimension innermost, with gaps. ``expanded``: one
value for each index of the second dimension, with strides of 0 along all others.
"""
DENSE = GRADS[:2]
"""Of large results: one in doubt would leave a whole channel without an expanded gradient."""
FP32_EPS = torch.finfo(torch.float32).eps
UNSURE = 4 * torch.finfo(torch.bfloat16).eps
"""Values nearer to one another than this share may trade places where they are rounded."""
LRN = (5, 5e-4, 0.75, 2.0)
EVEN_LRN = (4, 1e-3, 0.6, 1.0)  # an even window looks further down than up, and its gradient the other way round
POOL = ([3, 3], [2, 2])


def integers(seed: int, shape: Sequence[int], spacing: float) -> Tensor:
    """float32 of uniform integers from -127 to 127 times ``spacing``: 7 bits and a sign, exact in bf16 and fp16."""
    count = math.prod(shape)
    # A large tensor repeats its numbers; the period is a prime, so that no two rows of a weight are alike.
    drawn = torch.randint(-127, 128, (min(count, 1_000_003),), generator=torch.Generator().manual_seed(seed))
    repeats = -(-count // max(len(drawn), 1))
    return (drawn.float() * spacing).repeat(repeats)[:count].view(tuple(shape))


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """fp32 means fp32: no TF32, no bf16 inside fp32 matmuls."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def with_gradients(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor, grad: str = "dense", first: int = 0
) -> list[Tensor]:
    """[y, gradient of each input from ``first`` on], on the CPU.

    ``dy`` expands to y, and is stored as ``GRADS`` says.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(i >= first) for i, x in enumerate(inputs)]
        y = run(*leaves)
        dy = dy.to(y.device, y.dtype).expand_as(y)
        if grad == "dense":
            dy = torch.empty_like(y).copy_(dy)
        elif grad == "permuted":
            order = tuple(reversed(range(dy.dim())))
            dy = _stored(dy.permute(order), "strided").permute(order)
        gradients = torch.autograd.grad(y, leaves[first:], dy)
    return [t.detach().cpu() for t in (y, *gradients)]


def _stored(x: Tensor, layout: str) -> Tensor:
    """The values of x in this layout; what lies in gaps is not to be read."""
    if layout == "strided":
        gaps = torch.full((*x.shape, 2), math.nan if x.is_floating_point() else 255, dtype=x.dtype, device=x.device)
        gaps[..., 0] = x
        return gaps[..., 0]
    return x.contiguous(memory_format=LAYOUTS[layout]) if x.dim() == 4 else x


class Case:
    """A call of an op whose inputs and reference are known; subclasses say which, and how it runs.

    ``results`` names what a run returns. ``layouts`` (of ``ANY``) and ``grads`` (of ``GRADS``) are those that
    the op can be run with.
    """

    name: str
    op: str
    layouts: tuple[str, ...]
    grads: tuple[str, ...] = ("dense",)

    @property
    def results(self) -> tuple[str, ...]:
        raise NotImplementedError

    def limits(self, dtype: torch.dtype) -> list[tuple[float, float]]:
        """(slack, cap) of each result's error, relative to the reference's largest value.

        An error may be twice stock PyTorch's and a slack, and at most the cap.
        """
        raise NotImplementedError

    def ours(self, device: torch.device, dtype: torch.dtype, layout: str, grad: str = "dense") -> list[Tensor]:
        """The results, on the CPU, by ``backend="auto"``."""
        return self._run(True, device, dtype, layout, grad)

    def stock(self, device: torch.device, dtype: torch.dtype, layout: str, grad: str = "dense") -> list[Tensor]:
        """The results, on the CPU, by stock PyTorch. RuntimeError where it has no kernel."""
        return self._run(False, device, dtype, layout, grad)

    def reference(self, grad: str = "dense") -> list[Tensor]:
        """The results in float64, computed once; not to be written."""
        return _reference(self, "dense" if grad == "permuted" else grad)

    def _run(self, fused: bool, device: torch.device, dtype: torch.dtype, layout: str, grad: str) -> list[Tensor]:
        raise NotImplementedError


@functools.cache
def _reference(case: Case, grad: str) -> list[Tensor]:
    return case.stock(torch.device("cpu"), torch.float64, "contiguous", grad)


@dataclass(frozen=True, eq=False)
class OpCase(Case):
    """An op with a gradient: the shapes of its tensors, and the constants that follow them in the call.

    ``spacings`` are those of the tensors' integers, ``terms`` is the longest sum. ``settled`` says, of the call's
    tensors and constants, which results depend on no comparison of two values that rounding may swap: a pooling
    window's, or a ReLU's. The other results get no gradient. With ``first_layer`` x has none, as images have none.
    """

    name: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    spacings: tuple[float, ...]
    constants: tuple[Any, ...]
    terms: int
    settled: Callable[..., Tensor] | None = None
    layouts: tuple[str, ...] = IMAGES
    keywords: Mapping[str, Any] = field(default_factory=dict)
    first_layer: bool = False
    grads: tuple[str, ...] = GRADS

    @property
    def results(self) -> tuple[str, ...]:
        parameters = ["dweight" if len(shape) > 1 else "dbias" for shape in self.shapes[1:]]
        return ("y", *([] if self.first_layer else ["dx"]), *parameters)

    def limits(self, dtype: torch.dtype) -> list[tuple[float, float]]:
        eps = torch.finfo(dtype).eps
        # Results are rounded to the dtype, sums are kept in fp32 or wider: k * eps * sqrt(K) has two parts.
        sums = min(eps, FP32_EPS) * math.sqrt(self.terms)
        return [(eps + sums / 8, 4 * (eps + sums))] * len(self.results)

    def call(self, fused: bool, *tensors: Tensor) -> Tensor:
        """The op, or stock PyTorch, with the case's constants."""
        run = getattr(ops, self.op) if fused else RECORDS[self.op].stock
        y: Tensor = run(*tensors, *self.constants, **self.keywords)
        return y

    @cached_property
    def _inputs(self) -> list[Tensor]:
        given = zip(self.shapes, self.spacings, strict=True)
        return [integers(i, shape, spacing) for i, (shape, spacing) in enumerate(given)]

    @cached_property
    def _dy(self) -> dict[str, Tensor]:
        """The gradient of the result, for each value of ``grad``; it expands to the result."""
        wide = [x.double() for x in self._inputs]
        shape = self.call(False, *wide).shape
        dy = integers(9, shape, 2.0**-7)
        settled = torch.ones(shape, dtype=torch.bool)
        if self.settled is not None:
            settled = self.settled(*wide, *self.constants).view(shape)
        others = [i for i in range(len(shape)) if i != 1]
        one = dy[tuple(slice(0, 1 if i in others else None) for i in range(len(shape)))]
        dy = dy * settled
        return {"dense": dy, "permuted": dy, "expanded": one * torch.amin(settled, others, keepdim=True)}

    def _run(self, fused: bool, device: torch.device, dtype: torch.dtype, layout: str, grad: str) -> list[Tensor]:
        inputs = [x.to(device, dtype) for x in self._inputs]
        # Channels-last is x alone, which is what decides how results are stored. Gaps are in all tensors.
        placed = [_stored(x, layout if i == 0 or layout == "strided" else "contiguous") for i, x in enumerate(inputs)]
        return with_gradients(partial(self.call, fused), placed, self._dy[grad], grad, int(self.first_layer))


@dataclass(frozen=True, eq=False)
class DepthCase(Case):
    """A weight for images with depth, which a first layer may take: part of every proof of the convolution."""

    name: str
    shape: tuple[int, ...]
    step: int
    layouts: tuple[str, ...] = ANY
    op: str = "conv2d_bias_relu"

    grads = GRADS
    results = ("y", "dx")

    def limits(self, dtype: torch.dtype) -> list[tuple[float, float]]:
        return [(torch.finfo(dtype).eps, 4 * torch.finfo(dtype).eps)] * 2

    def _run(self, fused: bool, device: torch.device, dtype: torch.dtype, layout: str, grad: str) -> list[Tensor]:
        weight = _stored(integers(0, self.shape, 2.0**-10).to(device, dtype), layout)
        run = partial(weight_to_depth if fused else to_depth, step=self.step)
        dy = integers(9, run(weight).shape, 2.0**-7)
        return with_gradients(run, [weight], dy[:1, :, :1, :1] if grad == "expanded" else dy, grad)


@dataclass(frozen=True, eq=False)
class AugmentCase(Case):
    """``augment``, which takes bytes and has no gradient; the layout is the images'. ``shape`` is their (N, H, W).

    ``subsampled``: they are I420, whose H and W are even."""

    name: str
    shape: tuple[int, int, int]
    offsets: tuple[tuple[int, int], ...]
    flips: tuple[bool, ...]
    size: int
    space_to_depth: int = 1
    layouts: tuple[str, ...] = IMAGES
    subsampled: bool = False
    op: str = "augment"

    @property
    def results(self) -> tuple[str, ...]:
        return ("y",)

    def limits(self, dtype: torch.dtype) -> list[tuple[float, float]]:
        eps = torch.finfo(dtype).eps
        return [(eps, 4 * (eps + min(eps, FP32_EPS)))]

    def _run(self, fused: bool, device: torch.device, dtype: torch.dtype, layout: str, grad: str) -> list[Tensor]:
        batch, height, width = self.shape
        shape = (batch, height // 2 * 3, width) if self.subsampled else (*self.shape, 3)
        images = (integers(0, shape, 1.0) + 128).to(device, torch.uint8)
        if self.subsampled:
            images = _stored(images, layout)
        else:
            images = _stored(images.permute(0, 3, 1, 2), layout).permute(0, 2, 3, 1)
        drawn = (torch.tensor(self.offsets), torch.tensor(self.flips), integers(1, (self.shape[0], 3), 0.25))
        tensors = (images, *(t.to(device) for t in drawn))
        keywords: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "dtype": dtype}
        run: Any = ops.augment if fused else RECORDS["augment"].stock
        return [run(*tensors, self.size, **keywords, space_to_depth=self.space_to_depth).cpu()]


@dataclass(frozen=True, eq=False)
class SgdCase(Case):
    """``sgd_step``: what two steps make of parameters, momenta and weights, each list as one tensor.

    What a list without tensors has for a result is the parameters. Strided are the gradients, which are only read.
    """

    name: str
    sizes: tuple[tuple[int, ...], ...]
    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    weights: bool = True
    layouts: tuple[str, ...] = ("contiguous",)
    op: str = "sgd_step"

    @property
    def results(self) -> tuple[str, ...]:
        return ("parameters", "momenta", "weights")

    def limits(self, dtype: torch.dtype) -> list[tuple[float, float]]:
        eps = torch.finfo(dtype).eps
        wide = min(eps, FP32_EPS)
        return [(wide, 16 * wide), (wide, 16 * wide), (eps, 16 * eps)]

    def _run(self, fused: bool, device: torch.device, dtype: torch.dtype, layout: str, grad: str) -> list[Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def made(spacing: float, dtype: torch.dtype, layout: str) -> list[Tensor]:
            return [_stored(integers(i, s, spacing).to(device, dtype), layout) for i, s in enumerate(self.sizes)]

        dense = "contiguous" if layout == "strided" else layout
        lists = {
            "parameters": made(2.0**-7, wide, dense),
            "momenta": made(2.0**-10, wide, dense) if self.momentum else [],
            "gradients": made(2.0**-10, dtype, layout),
            "weights": made(0.0, dtype, dense) if self.weights and dtype != wide else [],
        }
        constants = {name: getattr(self, name) for name in ("momentum", "dampening", "nesterov", "maximize")}
        run: Any = ops.sgd_step
        if not fused:
            run = partial(RECORDS["sgd_step"].stock, lr_tensor=None, grad_scale=None, found_inf=None)
        for first_step in (True, False):
            run(**lists, lr=0.01, weight_decay=5e-4, first_step=first_step, **constants)
        results = (lists[name] or lists["parameters"] for name in self.results)
        return [torch.cat([t.flatten() for t in tensors]).cpu() for tensors in results]


def _settled_pooling(
    x: Tensor, bias: Tensor | None, size: int, alpha: float, beta: float, k: float, kernel_size: Any, stride: Any
) -> Tensor:
    """Which windows of normalized values have a winner beyond doubt in bf16, or no positive value at all."""
    activation = F.relu(x if bias is None else x + bias[:, None, None])
    values = F.local_response_norm(activation, size, alpha, beta, k)
    taps = F.unfold(values.flatten(0, 1)[:, None], kernel_size, stride=stride)
    first, second = taps.topk(2, dim=1).values.unbind(1)
    return (first - second > UNSURE * first) | (first <= 0)


def _settled_relu(
    product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, *constants: Any
) -> Tensor:
    """Which sums keep their sign where the product is rounded to bf16 before the bias is added."""
    z = product(x, weight, bias, *constants)
    if bias is None:
        return z != 0
    return z.abs() > UNSURE * bias.abs().view(-1, *[1] * (z.dim() - 2))


def _convolution(name: str, groups: int, batch: int) -> OpCase:
    shapes = ((batch, 384, 13, 13), (384, 384 // groups, 3, 3), (384,))
    spacings = (0.5, 2.0**-10, 2.0**-3)
    return OpCase(f"conv2d_bias_relu, {name}", "conv2d_bias_relu", shapes, spacings, (1, 1, 1, groups), 384 * 9)


# Values to 63.5, or the sum of x and a bias of the same spacing, which then is exact in bf16 too: LRN divides by up to
# a fifth more or less from place to place, and no sum of squares overflows fp16.
CASES: tuple[Case, ...] = (
    OpCase("local_response_norm, n = 5", "local_response_norm", ((1, 96, 55, 55),), (0.5,), LRN, terms=5),
    OpCase("local_response_norm, n = 4", "local_response_norm", ((2, 256, 13, 13),), (0.5,), EVEN_LRN, terms=4),
    OpCase("relu_max_pool2d", "relu_max_pool2d", ((2, 256, 13, 13),), (0.5,), (*POOL, [0, 0], [1, 1], False), terms=4),
    _convolution("one tower", 1, batch=8),  # its many tiles go by Winograd in fp32 on a CPU without AVX-512
    _convolution("two towers", 2, batch=1),
    OpCase(
        "linear_bias_relu",
        "linear_bias_relu",
        ((32, 1024), (512, 1024), (512,)),
        (0.5, 2.0**-10, 2.0**-3),
        (),
        terms=1024,
        layouts=("contiguous",),
    ),
    OpCase(
        "relu_lrn_max_pool2d",
        "relu_lrn_max_pool2d",
        ((1, 96, 55, 55), (96,)),
        (0.25, 0.25),
        (*LRN, *POOL),
        terms=55 * 55,
        settled=_settled_pooling,
    ),
    OpCase(
        "relu_max_pool2d_lrn",
        "relu_max_pool2d_lrn",
        ((1, 96, 55, 55), (96,)),
        (0.25, 0.25),
        (*LRN, *POOL),
        terms=55 * 55,
    ),
    AugmentCase("augment", (2, 256, 256), ((0, 29), (17, 3)), (False, True), 227),
    SgdCase("sgd_step", ((1024, 96, 5), (96,), (40_001,))),
)
"""Each op at shapes of AlexNet."""


def _small(
    op: str, shapes: tuple[tuple[int, ...], ...], spacing: tuple[float, ...], constants: tuple[Any, ...], **more: Any
) -> OpCase:
    """A case whose name is its call."""
    said = [*shapes, *constants, *(f"{name}={value}" for name, value in more.get("keywords", {}).items())]
    return OpCase(f"{op}, {', '.join(map(str, said))}", op, shapes, spacing, constants, layouts=ANY, **more)


def _small_lrn(shape: tuple[int, ...], *lrn: Any) -> OpCase:
    return _small("local_response_norm", (shape,), (0.5,), lrn, terms=lrn[0])


def _small_pool(
    shape: tuple[int, ...], kernel: Any, stride: Any, padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> OpCase:
    sizes = [pair("", size, 0) for size in (kernel, stride, padding, dilation)]
    return _small("relu_max_pool2d", (shape,), (0.5,), (*sizes, ceil), terms=math.prod(sizes[0]))


def _small_block(op: str, shape: tuple[int, ...], *constants: Any, bias: bool = True, **more: Any) -> OpCase:
    shapes, constants = ((shape, shape[1:2]), constants) if bias else ((shape,), (None, *constants))
    settled = _settled_pooling if op == "relu_lrn_max_pool2d" else None
    terms = math.prod(shape) // shape[1]
    return _small(op, shapes, (0.25,) * len(shapes), constants, terms=terms, settled=settled, **more)


def _small_product(
    op: str, x: tuple[int, ...], weight: tuple[int, ...], *given: Any, bias: bool = True, **more: Any
) -> OpCase:
    shapes, constants = ((x, weight, weight[:1]), given) if bias else ((x, weight), (None, *given))
    settled = partial(_settled_relu, F.linear if op == "linear_bias_relu" else F.conv2d)
    terms = max(math.prod(weight), math.prod(x) // x[1])  # forward and the gradient of x; those of weight and bias
    spacing = (0.5, 2.0**-10, 2.0**-5)[: len(shapes)]
    return _small(op, shapes, spacing, constants, terms=terms, settled=settled, **more)


_conv = partial(_small_product, "conv2d_bias_relu")
_linear = partial(_small_product, "linear_bias_relu")
_BEFORE_BLOCK: dict[str, Any] = {"bias": False, "keywords": {"relu": False}}
_BLOCKS = ("relu_lrn_max_pool2d", "relu_max_pool2d_lrn")

# Odd sizes next to those that vectors, tiles and tensor cores are made for: channels of 1 to 96, sides of 1 to 27.
SMALL: tuple[Case, ...] = (
    _small_lrn((1, 1, 1, 1), *LRN),
    _small_lrn((3, 3, 5, 7), *LRN),
    _small_lrn((1, 5, 9, 4), *EVEN_LRN),
    _small_lrn((3, 9, 3, 15), 3, 1e-3, 0.5, 1.0),
    _small_lrn((1, 17, 13, 5), 7, 1e-3, 1.0, 2.0),
    _small_lrn((1, 96, 5, 3), *LRN),
    _small_lrn((3, 5, 2, 3), 8, 1e-3, 0.75, 1.0),
    _small_lrn((1, 40, 4, 6), 2, 1e-3, 0.75, 1.0),
    _small_pool((1, 1, 2, 2), 2, 1),
    _small_pool((3, 3, 5, 7), 2, 1),
    _small_pool((1, 5, 9, 4), 3, 2, 1),
    _small_pool((3, 9, 7, 15), 3, 2),
    _small_pool((1, 17, 8, 6), 3, 2, ceil=True),
    _small_pool((1, 96, 5, 7), 3, 2),
    _small_pool((1, 8, 11, 9), (2, 3), (2, 1), (0, 1), (3, 2)),
    _small_pool((1, 16, 6, 8), 3, 2, 1, 1, True),
    *(
        _small_block(op, *given)
        for op in _BLOCKS
        for given in (
            ((1, 1, 3, 3), *LRN, 3, 2),
            ((3, 3, 4, 5), *LRN, 3, 2),
            ((1, 5, 3, 4), *EVEN_LRN, 2, 1),
            ((3, 9, 4, 3), 3, 1e-3, 0.5, 1.0, 3, 2),
            ((1, 17, 5, 7), *LRN, (2, 3), (1, 2)),
            ((1, 96, 5, 3), *LRN, 3, 2),
            ((1, 96, 7, 9), *LRN, *POOL),
            ((1, 8, 5, 5), 9, 1e-3, 0.75, 1.0, 3, 2),
        )
    ),
    *(_small_block(op, (1, 16, 7, 5), *LRN, *POOL, bias=False) for op in _BLOCKS),
    # More than one block of threads, and more rounds than blocks.
    *(_small_block(op, (2, channels, 37, 41), *LRN, *POOL, grads=DENSE) for op in _BLOCKS for channels in (2, 8)),
    _conv((1, 3, 5, 7), (5, 3, 3, 3), 1, 1, 1, 1),
    _conv((3, 1, 9, 4), (3, 1, 1, 1), 1, 0, 1, 1),
    _conv((3, 16, 7, 9), (24, 16, 3, 3), 1, 1, 1, 1),
    _conv((1, 32, 13, 5), (16, 16, 3, 3), 1, 1, 1, 2),
    _conv((3, 18, 11, 7), (34, 9, 3, 3), 2, 1, 1, 2),
    _conv((1, 96, 6, 7), (96, 96, 1, 1), 1, 0, 1, 1),
    _conv((1, 96, 9, 11), (64, 48, 5, 5), 1, 2, 1, 2, **_BEFORE_BLOCK),
    _conv((1, 8, 15, 13), (16, 8, 3, 3), 1, 2, 2, 1),
    _conv((3, 5, 13, 10), (7, 5, 3, 2), (2, 1), (1, 0), (1, 3), 1),
    _conv((3, 3, 19, 15), (9, 3, 11, 11), 4, 2, 1, 1),
    _conv((1, 3, 23, 27), (16, 3, 11, 11), 4, 0, 1, 1, first_layer=True, **_BEFORE_BLOCK),
    DepthCase("conv2d_bias_relu, weight to depth", (9, 3, 11, 11), 4),
    DepthCase("conv2d_bias_relu, odd weight to depth", (5, 2, 4, 3), 3),
    _linear((1, 5), (3, 5)),
    _linear((3, 17), (9, 17)),
    _linear((3, 96), (5, 96), bias=False),
    _linear((33, 64), (96, 64)),
    _linear((130, 24), (72, 24)),
    _linear((1025, 8), (16, 8), grads=DENSE),
    AugmentCase("augment, crops of 1", (1, 3, 2), ((2, 1),), (True,), 1, layouts=ANY),
    AugmentCase("augment, crops of 7", (3, 9, 11), ((0, 4), (2, 0), (1, 3)), (False, True, True), 7, layouts=ANY),
    AugmentCase("augment, crops of 9 by 4", (3, 13, 16), ((4, 7), (0, 0), (3, 2)), (True, False, True), 9, 4, ANY),
    AugmentCase("augment, crops of 8 by 4", (1, 8, 15), ((0, 7),), (False,), 8, 4, ANY),
    AugmentCase(
        "augment, YUV", (3, 10, 12), ((0, 5), (3, 0), (1, 2)), (False, True, True), 7, layouts=ANY, subsampled=True
    ),
    AugmentCase("augment, YUV by 4", (3, 14, 16), ((5, 7), (0, 0), (3, 2)), (True, False, True), 9, 4, ANY, True),
    SgdCase("sgd_step, sizes", ((5, 3, 3, 3), (0,), (17,), (1,), (257,)), layouts=ANY),
    SgdCase("sgd_step, many", tuple((n,) for n in range(70)), dampening=0.1, layouts=ANY),
    SgdCase("sgd_step, Nesterov", ((33,), (7, 9), (2, 3, 5, 4)), nesterov=True, maximize=True, layouts=ANY),
    SgdCase("sgd_step, no weights", ((1001,), (3, 5, 1, 1)), dampening=0.5, weights=False, layouts=ANY),
    SgdCase("sgd_step, no momentum", ((1001,), (96, 3, 3, 3)), momentum=0.0, layouts=ANY),
)
"""Every kind of call of each op, in sizes that take milliseconds: what a kernel has to get right to be proven."""
