"""What tests, benchmarks, planted faults and CI must know of an op: a ``Spec``, one in each tests/ops/<op>/spec.py.

A field has no default, so that a spec which lacks one fails at import, as does one that leaves a suite without work.
Nothing here needs pytest or hypothesis: benchmarks and .ci/smoke.py read specs too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor | None]
Draw = Callable[[Any], Any]
Arguments = tuple[Any, ...]
Changes = dict[str, Callable[[Arguments], Arguments]]

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = (FP64, FP32, BF16, FP16)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded", "expanded_batch", "offset")
EMULATOR = "tests/gpu_on_cpu/test_emulator.py"
IN_TRITON = "tests/gpu_on_cpu/test_triton.py"
CITIZEN = "tests/ops/test_citizen.py"
RUNTIME = "tests/ops/test_runtime.py"
GATES = "tests/benchmarks/test_predict_gates.py -m slow"  # of kernels that got slower

# Channels and pixels one below, at and one above 8, 16, 32 and 64: the widths of vectors and of tiles.
TILE_SHAPES = (
    *((1, 7, 1, 9), (2, 8, 3, 5), (1, 9, 2, 4), (1, 15, 1, 17), (1, 16, 2, 8), (1, 17, 3, 5)),
    *((1, 31, 1, 33), (1, 32, 4, 8), (1, 33, 1, 31), (1, 63, 5, 13), (1, 64, 2, 32), (1, 65, 7, 9)),
)
# One dimension beyond 65,535, the most blocks that a GPU counts in two of its three dimensions.
MANY = ((70_000, 3, 1, 2), (1, 70_000, 2, 1), (2, 3, 1, 70_001), (1, 1, 70_001, 3))


@dataclass(frozen=True)
class Case:
    """One call of an op: the shapes of its tensors by name (None: the optional bias left out), and its constants."""

    op: str
    shapes: dict[str, tuple[int, ...] | None]
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        shapes = "-".join(f"{name}{'x'.join(map(str, shape)) if shape else shape}" for name, shape in self.items())
        values = "-".join(f"{name}{value}".replace(" ", "") for name, value in self.constants.items())
        return f"{self.op}-{shapes}-{values}"

    def items(self) -> Iterable[tuple[str, tuple[int, ...] | None]]:
        return self.shapes.items()


@dataclass(frozen=True)
class Fault:
    """A planted fault: an exact replacement of text in ``file``, which holds ``old`` this many ``times``.

    ``test`` must notice it: a name for its C++ test (tests/ops/*/test_<name>.cpp), or pytest's arguments.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    times: int = 1


@dataclass(frozen=True)
class Run:
    """A case for Triton's kernels as compiled, and how it is run (tests/gpu_on_cpu/triton_compiled.py).

    ``wide``: with offsets of 64 bits; ``askew``: x at no multiple of 16 bytes; ``nan``: some of x is; ``order``: of a
    block's warps, by which a missing barrier shows; ``persistent``: the forward, by few programs;
    ``missing``: instructions that are left out.
    """

    case: Case
    dtype: torch.dtype
    layout: str = "channels_last"
    dy_layout: str = "contiguous"
    tf32: bool = False
    wide: bool = False
    askew: bool = False
    nan: bool = False
    persistent: bool = False
    order: str = "together"
    missing: str = ""

    @property
    def id(self) -> str:
        what = [str(self.dtype).removeprefix("torch."), self.layout, self.dy_layout, self.order, self.missing]
        what += [name for name in ("tf32", "wide", "askew", "nan", "persistent") if getattr(self, name)]
        return " ".join((self.case.id, *what))


Runs = Callable[[str, int], Iterator[Run]]
"""The runs of a grid ("quick", "full", or "sample": those of the plain suite for 9.0) for 8.0 (80) or 9.0 (90)."""


def sampled_on_hopper(runs: Callable[[bool], Iterator[Run]]) -> Runs:
    """runs(full); for 9.0, whose code differs little, the first six of the quick ones."""

    def chosen(grid: str, capability: int) -> Iterator[Run]:
        every = runs(grid == "full")
        return every if capability < 90 or grid == "full" else islice(every, 6)

    return chosen


def memory_bound_runs(*made: Callable[[tuple[int, ...]], Case]) -> Runs:
    """Many dtypes and layouts of an op's first way to make a case from a shape, one of each of the others."""
    first, *others = made
    shapes = ((2, 96, 9, 7), (1, 17, 5, 5))
    many = ((1, 256, 5, 3), (1, 272, 3, 5))  # channels: all in one tile, and in tiles that overlap
    layouts = ("channels_last", "contiguous")

    def runs(full: bool) -> Iterator[Run]:
        yield Run(first(shapes[0]), BF16)
        yield Run(first(shapes[0]), BF16, "contiguous")
        yield Run(first(shapes[1]), FP32, order="backward")
        yield Run(first(shapes[1]), FP32, "contiguous")
        yield from (Run(first(shape), BF16) for shape in many)
        yield Run(first(shapes[0]), BF16, dy_layout="expanded_batch", wide=True)
        yield Run(first(shapes[0]), BF16, askew=True)
        yield Run(first(shapes[1]), BF16, nan=True)
        yield from (Run(other(shapes[1]), FP32, layouts[1 - i % 2]) for i, other in enumerate(others))
        if full:
            yield from (Run(first(shape), FP32, layout) for shape in (shapes[0], *many) for layout in layouts)
            yield from (Run(first(shape), BF16, layout) for shape in (shapes[1], *many) for layout in layouts)
            yield from (Run(first(shape), dtype) for shape in shapes for dtype in (FP16, FP64))
            yield Run(first(shapes[1]), FP16, "sliced", "channels_last")
            yield from (Run(first(shapes[0]), BF16, order=order) for order in ("forward", "backward"))

    return sampled_on_hopper(runs)


def normal(case: Case, generator: torch.Generator) -> Tensors:
    """Normal random values; a weight is scaled so that y is about as large as x."""
    tensors: Tensors = {}
    for name, shape in case.items():
        if shape is None:
            tensors[name] = None
            continue
        tensors[name] = torch.randn(shape, generator=generator, dtype=FP64)
        if name == "weight":
            tensors[name] /= math.sqrt(max(1, math.prod(shape[1:])))
    return tensors


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout (the expanded ones repeat a column or a batch item)."""
    nan = torch.nan if values.is_floating_point() else -1
    if values.dim() < 2 and layout in ("channels_last", "transposed"):
        layout = "contiguous"  # a vector has one dimension to lay out
    match layout:
        case "contiguous":
            return values.clone(memory_format=torch.contiguous_format)
        case "channels_last":
            last = (0, *range(2, values.dim()), 1)
            first = (0, values.dim() - 1, *range(1, values.dim() - 1))
            return values.permute(last).clone(memory_format=torch.contiguous_format).permute(first)
        case "transposed":
            return values.mT.clone(memory_format=torch.contiguous_format).mT
        case "sliced":
            around = values.new_full([2 * size + 1 for size in values.shape], nan)
            return around[tuple(slice(1, None, 2) for _ in values.shape)].copy_(values)
        case "expanded":
            return values[..., :1].clone().expand(values.shape)
        case "expanded_batch":
            return values[:1].clone().expand(values.shape)
        case "offset":
            around = values.new_full((values.numel() + 1,), nan)
            return around[1:].view(values.shape).copy_(values)
    raise ValueError(f"no layout {layout!r}")


def pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def of_images(case: Case) -> int:
    """N x H x W of x: what a bias's gradient sums over."""
    x = case.shapes["x"]
    return max(1, math.prod(x[:-3]) * math.prod(x[-2:]))


def everywhere(case: Case, exact: Tensors, eps: float) -> bool:
    """``settled`` of an op whose gradients no rounding sends elsewhere."""
    return True


# ---- wrong calls of the raw ops


def change(position: int, value: Any) -> Callable[[Arguments], Arguments]:
    """The arguments with one replaced; a function is applied to the old one."""
    return lambda given: (
        *given[:position],
        value(given[position]) if callable(value) else value,
        *given[position + 1 :],
    )


def smaller(tensor: Tensor) -> Tensor:
    return tensor[..., :-1]


def flat(tensor: Tensor) -> Tensor:
    return tensor.flatten()


X_BAD: Changes = {
    "x_int": change(0, lambda x: x.int()),
    "x_complex": change(0, lambda x: x.to(torch.complex64)),
    "x_rank1": change(0, flat),
}
DY_BAD: Changes = {
    "dy_shape": change(0, smaller),
    "dy_rank": change(0, flat),
    "dy_dtype": change(0, lambda dy: dy.double()),
}


def bad_bias(position: int) -> Changes:
    return {
        "bias_length": change(position, smaller),
        "bias_rank": change(position, lambda b: b[:, None]),
        "bias_dtype": change(position, lambda b: b.half()),
    }


# ---- the declaration


@dataclass(frozen=True)
class InPlace:
    """How an op that updates lists of tensors is called, and what tests compare."""

    copies: Callable[[Case, Tensors], Tensors]
    """A case's tensors in its dtypes. Those that are written are copies."""
    call: Callable[[Callable[..., None], Case, Tensors], None]
    """Calls the op, or stock, on such copies."""
    result: Callable[[Case, Tensors], Tensor]
    """All that was written, in one tensor."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """An op, as everything outside the package knows it. () or None where a field does not apply."""

    name: str
    gradient: bool
    """Whether it has one; without, what it owes PyTorch is in its own test."""
    on_gpu: bool
    """Whether it has CUDA kernels."""
    in_triton: bool
    """Whether it has Triton kernels."""
    product: bool
    """A sum of products: the oracle adds up absolute values, autocast casts it, its arithmetic may bound it."""
    in_place: InPlace | None
    """Of an op that returns nothing."""
    stock: Callable[..., Any]
    """The same in PyTorch's own operators, with the op's signature: the tests' oracle, and what benchmarks compare."""
    draw: Callable[[Case, torch.Generator], Tensors]
    """A case's tensors, of float64 where a dtype may be chosen for them; the first is the one that is laid out."""

    cases: tuple[Case, ...]
    """Every odd size and constant, for the op's own test and a GPU."""
    examples: tuple[Case, ...]
    """One plain case, and the same without its bias. (Sizes that may vary differ from sizes that may not, because
    torch.compile takes equal ones for one and the same.)"""
    edges: tuple[Case, ...]
    """An empty batch, and one value."""
    small: tuple[Case, ...]
    """So small that a whole Hessian is compared."""
    large: tuple[Case, ...]
    """Large enough to be split between threads."""
    many: tuple[Case, ...]
    """One dimension beyond 65,535: a case for each of ``MANY``."""
    alexnet: tuple[Case, ...]
    """AlexNet's layers at batch 1: benchmarks put their batch in front."""

    backward_arguments: Callable[[Tensor, Tensors, Tensor, list[Tensor], Arguments], Arguments] | None
    """Of the raw backward, from dy, the tensors, y, what else the forward returned, and its constants."""
    needs: dict[str, set[str]]
    """Which of its arguments and whether its result ("y") the backward needs, by the gradient wanted."""
    winners: bool
    """Whether it saves a byte an output element: which tap of its window won."""
    saved: Callable[[Tensor, Tensor], int] | None
    """Bytes saved for the backward, parameters apart, from x and y."""

    moved: Callable[[Case, int], tuple[int, int]]
    """Bytes that forward and backward must read and write at least, in values of this many bytes."""
    target: float | None
    """How many times faster than stock on a CPU."""
    copies: float | None
    """How many times the time of a copy of ``moved`` a GPU may take."""

    bad_calls: Changes
    bad_backward_calls: Changes
    """Changes of the first example's arguments, each of which must raise RuntimeError."""
    fuzz: Callable[[Draw], Case] | None
    """Draws a case by hypothesis, which it imports itself (tests/support/drawing.py)."""

    summands: Callable[[Case, str], int]
    """How many products the longest sum behind a result has, by its name: "y", or an argument's for its gradient."""
    settled: Callable[[Case, Tensors, float], Tensor | bool]
    """Outputs whose gradient rounding cannot send elsewhere, from float64's tensors and what counts as rounding.

    A pre-activation within rounding of 0 may fall on either side of ReLU, and two values of a window within rounding
    of each other may each win it: both answers are right.
    """
    magnitude: Callable[[Case], float]
    """How large one term is where few may cancel: of y, or of x's gradient for a dy of 1."""

    emulated: tuple[Case, ...]
    """For the CUDA kernels' source: small and odd, about vectors of 8 channels and blocks of 256 threads."""
    emulated_orders: tuple[Case, ...]
    """Those whose lanes run in three orders, to the same bits."""
    emulated_many: tuple[Case, ...]
    """Many blocks, tiles that images end within, threads and blocks that take more than one turn."""
    ptx: tuple[Case, ...]
    """For what nvcc makes of them: every kernel of the op's file is launched, in one dtype and layout or another."""
    runs: Runs | None
    """For what Triton makes of its kernels."""
    triton_kernels: frozenset[str]
    """The names of those kernels, all of which ``runs`` must launch."""

    faults: tuple[Fault, ...]
    """Planted in the op's own files."""

    def __post_init__(self) -> None:
        always = ("cases", "examples", "alexnet", "faults")
        with_gradient = ("edges", "small", "backward_arguments", "needs", "saved", "fuzz")
        with_gradient += ("bad_calls", "bad_backward_calls")
        needed = always + with_gradient * self.gradient + ("emulated", "ptx") * self.on_gpu
        needed += ("runs", "triton_kernels") * self.in_triton
        needed += ("emulated_orders", "large") * (self.gradient and self.on_gpu)
        if empty := [name for name in needed if not getattr(self, name)]:
            raise ValueError(f"the spec of {self.name} has nothing in {', '.join(empty)}: a suite would leave it out")
        given = (self.cases, self.examples, self.edges, self.small, self.large, self.many, self.alexnet)
        if strangers := {case.op for cases in given for case in cases} - {self.name}:
            raise ValueError(f"the spec of {self.name} has cases of {', '.join(sorted(strangers))}")
