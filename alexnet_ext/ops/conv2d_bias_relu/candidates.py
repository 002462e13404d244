"""conv2d_bias_relu by what is fastest for the call, each direction for itself: products by cuDNN, Triton or CUTLASS.

``ALGORITHMS`` lists the ways there are. Those of the compiled library need no Triton. cuDNN is trusted, with the bias
and ReLU after it that the proof of ``"auto"`` covers; each other way has a proof of its own. On the CPU PyTorch's
convolution takes the place of cuDNN's, for tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._library import TRITON
from .._backend import kernels, preferred_candidate, proof_of
from .._known import layout_of
from .._layout import convolved_format
from .._race import Candidate, fastest
from . import cutlass, reference, shared
from .shared import Convolution, Direction, precision, zero_gradients

if TRITON.loaded:
    from . import configs, triton_kernels


def before_relu(dy: Tensor, y: Tensor, for_bias: bool, relu: bool) -> tuple[Tensor, Tensor]:
    """``shared.before_relu``: by the compiled kernel where that needs no copy, else by Triton's."""
    dense = all(t.is_contiguous(memory_format=torch.channels_last) for t in (dy, y))
    if relu and y.is_cuda and dense and "native" in kernels("conv2d_bias_relu", "cuda"):
        return torch.ops.alexnet_ext.conv2d_bias_relu_mask(dy, y, for_bias)
    other = triton_kernels if TRITON.loaded else shared
    return other.before_relu(dy, y, for_bias, relu)


@dataclass(frozen=True)
class Algorithm:
    """A way to compute a convolution: its name in the choices file, where it applies, how it runs."""

    name: str
    layout: torch.memory_format | None = None  # of its operands, where that does not depend on the call

    def applies(self, x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> bool:
        return True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, p: Convolution, relu: bool) -> Tensor:
        """The result, in any memory format."""
        raise NotImplementedError

    def gradient(self, dz: Tensor, x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> Tensor:
        """The gradient of x or weight, in any memory format. ``dz``, channels-last, is that before the ReLU."""
        raise NotImplementedError


class CuDNN(Algorithm):
    """PyTorch's convolution in one memory format; bias and ReLU by the compiled kernel, in one pass in place.

    Where that is not built, PyTorch adds the bias and takes the ReLU.
    """

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, p: Convolution, relu: bool) -> Tensor:
        layout = self.layout or convolved_format(x, weight)
        native = kernels("conv2d_bias_relu", x.device.type).get("native")
        run: Any = getattr(torch.ops.alexnet_ext, native) if native else reference.conv2d_bias_relu
        return run(x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout), bias, *p, relu)

    def gradient(self, dz: Tensor, x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> Tensor:
        layout = self.layout or convolved_format(x, weight)
        given = (tensor.contiguous(memory_format=layout) for tensor in (dz, x, weight))
        mask = [direction == Direction.INPUT, direction == Direction.WEIGHT, False]
        constants = (p.stride, p.padding, p.dilation, False, [0, 0], p.groups)
        return torch.ops.aten.convolution_backward(*given, None, *constants, mask)[direction]


class CuDNNByTower(CuDNN):
    """The same one group at a time, in the memory format of the call."""

    def applies(self, x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> bool:
        return p.groups > 1

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, p: Convolution, relu: bool) -> Tensor:
        biases = [None] * p.groups if bias is None else bias.tensor_split(p.groups)
        parts = zip(x.tensor_split(p.groups, 1), weight.tensor_split(p.groups), biases, strict=True)
        alone = p._replace(groups=1)
        return torch.cat([super(CuDNNByTower, self).forward(*part, alone, relu) for part in parts], 1)

    def gradient(self, dz: Tensor, x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> Tensor:
        operands = (dz.tensor_split(p.groups, 1), x.tensor_split(p.groups, 1), weight.tensor_split(p.groups))
        alone = p._replace(groups=1)
        parts = [super(CuDNNByTower, self).gradient(*part, alone, direction) for part in zip(*operands, strict=True)]
        return torch.cat(parts, 1 if direction == Direction.INPUT else 0)


class Triton(Algorithm):
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, p: Convolution, relu: bool) -> Tensor:
        return triton_kernels.forward(x, weight, bias, *p, relu)

    def gradient(self, dz: Tensor, x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> Tensor:
        return triton_kernels.gradient(dz, x, weight, p, direction)


class TritonPersistent(Algorithm):
    def applies(self, x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> bool:
        return direction == Direction.FORWARD and configs.has_persistent(x, precision(x.dtype))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, p: Convolution, relu: bool) -> Tensor:
        return triton_kernels.forward(x, weight, bias, *p, relu, persistent=True)


@dataclass(frozen=True)
class Cutlass(Algorithm):
    sm90: bool = False

    def applies(self, x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> bool:
        return cutlass.applies(x, weight, p, direction, self.sm90)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, p: Convolution, relu: bool) -> Tensor:
        return cutlass.forward(x, weight, bias, p, relu, self.sm90)

    def gradient(self, dz: Tensor, x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> Tensor:
        return cutlass.gradient(dz, x, weight, p, direction, self.sm90)


ALGORITHMS: tuple[Algorithm, ...] = (
    *([Triton("triton")] if TRITON.loaded else []),
    CuDNN("cudnn contiguous", torch.contiguous_format),
    CuDNN("cudnn channels_last", torch.channels_last),
    CuDNNByTower("cudnn per tower"),
    *([TritonPersistent("triton persistent")] if TRITON.loaded else []),
    Cutlass("cutlass"),
    Cutlass("cutlass sm90", sm90=True),
)


NAMES = tuple(algorithm.name for algorithm in ALGORITHMS if not isinstance(algorithm, CuDNN))
"""Those that need a proof."""
taken: Counter[str] = Counter()
"""How often each was run because ``preferring`` asked for it."""


def offered(x: Tensor, weight: Tensor, p: Convolution, direction: Direction) -> list[Algorithm]:
    """The proven algorithms that apply; first, as the trusted one, cuDNN in the memory format that is there already.

    Where ``preferring`` asks for one of them, it is the only one, wherever it applies.
    """
    layout = convolved_format(x, weight)
    found = [algorithm for algorithm in ALGORITHMS if algorithm.applies(x, weight, p, direction)]
    asked = preferred_candidate(x.device.type)
    if asked:
        only = [algorithm for algorithm in found if algorithm.name == asked]
        taken[asked] += len(only)
        found = only or found
    else:
        found = [algorithm for algorithm in found if _is_proven(algorithm, x)]
    return sorted(found, key=lambda algorithm: algorithm.layout != layout)


def _is_proven(algorithm: Algorithm, x: Tensor) -> bool:
    if isinstance(algorithm, CuDNN):
        return True
    name = f"auto {algorithm.name}"
    return proof_of("conv2d_bias_relu", name, x.device, x.dtype, layout_of(x)).state == "proven"


def title(direction: Direction, relu: bool) -> str:
    if direction == Direction.FORWARD:
        return "forward" if relu else "forward without relu"
    return "input gradient" if direction == Direction.INPUT else "weight gradient"


def describe(x: Tensor, weight: Tensor, p: Convolution, direction: Direction, relu: bool) -> str:
    """The call in words: all that its speed depends on."""
    layout = "channels_last" if convolved_format(x, weight) == torch.channels_last else "contiguous"
    return (
        f"conv2d_bias_relu {title(direction, relu)} x {list(x.shape)} weight {list(weight.shape)} "
        f"stride, padding, dilation, groups {list(p)} {x.dtype} {precision(x.dtype)} {layout}"
    )


def _run_fastest(
    x: Tensor,
    weight: Tensor,
    p: Convolution,
    direction: Direction,
    relu: bool,
    run: Callable[[Algorithm], Tensor],
) -> Tensor:
    """``run`` of the fastest algorithm, in the memory format that a convolution of these operands has."""
    given = [Candidate(a.name, partial(lambda a: [run(a)], a)) for a in offered(x, weight, p, direction)]
    (result,) = fastest(describe(x, weight, p, direction, relu), x.device, given).run()
    return result.contiguous(memory_format=convolved_format(x, weight))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool = True,
) -> Tensor:
    p = Convolution(stride, padding, dilation, groups)
    if x.numel() == 0 or weight.numel() == 0:
        y = reference.conv2d_bias_relu(x, weight, bias, *p, relu)
        return y.contiguous(memory_format=convolved_format(x, weight))
    return _run_fastest(x, weight, p, Direction.FORWARD, relu, lambda a: a.forward(x, weight, bias, p, relu))


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_mask: list[bool],
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    p = Convolution(stride, padding, dilation, groups)
    if y.numel() == 0:
        return zero_gradients(x, weight, output_mask)
    dz, dbias = before_relu(dy, y, output_mask[2], relu)

    def of(direction: Direction) -> Tensor:
        if not output_mask[direction]:
            return x.new_empty(0)
        if weight.numel() == 0:
            return torch.zeros_like((x, weight)[direction])
        return _run_fastest(x, weight, p, direction, relu, lambda a: a.gradient(dz, x, weight, p, direction))

    return of(Direction.INPUT), of(Direction.WEIGHT), dbias if output_mask[2] else x.new_empty(0)
