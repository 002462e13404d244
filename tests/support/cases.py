"""What tests and benchmarks run: each op's cases, its stock equivalent, dtypes, layouts and the one tolerance table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ext import ops

Tensors = dict[str, Tensor | None]

OPS = (
    "local_response_norm",
    "relu_max_pool2d",
    "conv2d_bias_relu",
    "linear_bias_relu",
    "relu_lrn_max_pool2d",
    "relu_max_pool2d_lrn",
)
# The ops above have a gradient; one oracle compares them with float64. These have none and take no floating tensor.
WITHOUT_GRADIENT = ("augment",)
# The linear layer is for the CPU alone: on a GPU stock PyTorch's library is what there is to beat.
ON_GPU = tuple(op for op in OPS if op != "linear_bias_relu")
PRODUCTS = ("conv2d_bias_relu", "linear_bias_relu")
BLOCKS = ("relu_lrn_max_pool2d", "relu_max_pool2d_lrn")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "expanded", "expanded_batch", "offset")

# Error allowed, in units of eps * sqrt(summands) * max|exact|. fp32 and fp64 leave room for a power and for
# cancellation in a gradient; bf16 and fp16 are computed in fp32, so that one rounding is most of their error.
TOLERANCE = {torch.float64: 32.0, torch.float32: 16.0, torch.bfloat16: 2.0, torch.float16: 2.0}


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


def lrn(shape: tuple[int, ...], size: int = 5, alpha: float = 1.5, beta: float = 0.75, k: float = 2.0) -> Case:
    return Case(
        "local_response_norm", {"x": shape}, {"size": size, "alpha": alpha, "beta": beta, "k": k}
    )  # alpha far above AlexNet's 1e-4, under which a wrong window would hardly show


def pool(shape: tuple[int, ...], kernel_size: Any = 3, stride: Any = 2, **rest: Any) -> Case:
    constants = {"kernel_size": kernel_size, "stride": stride, "padding": 0, "dilation": 1, "ceil_mode": False}
    return Case("relu_max_pool2d", {"x": shape}, constants | rest)


def conv(shape: tuple[int, ...], out: int, kernel: tuple[int, int], bias: bool = True, **rest: Any) -> Case:
    constants = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | rest
    weight = (out, shape[-3] // constants["groups"], *kernel)
    return Case("conv2d_bias_relu", {"x": shape, "weight": weight, "bias": (out,) if bias else None}, constants)


def linear(shape: tuple[int, ...], outputs: int, bias: bool = True) -> Case:
    weight = (outputs, shape[-1])
    return Case("linear_bias_relu", {"x": shape, "weight": weight, "bias": (outputs,) if bias else None})


def block(op: str, shape: tuple[int, ...], bias: bool = True, **rest: Any) -> Case:
    constants = {"lrn_size": 5, "alpha": 1.5, "beta": 0.75, "k": 2.0, "kernel_size": 3, "stride": 2}
    return Case(op, {"x": shape, "bias": (shape[-3],) if bias else None}, constants | rest)


def augment(images: tuple[int, ...], size: int, space_to_depth: int = 1, dtype: torch.dtype = torch.float32) -> Case:
    batch = images[0]
    shapes = {"images": images, "offsets": (batch, 2), "flips": (batch,), "shifts": (batch, 3)}
    # ImageNet's deviations are near each other; unlike ones show a colour taken for another.
    constants = {"size": size, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.524, 0.125), "dtype": dtype}
    return Case("augment", shapes, constants | {"space_to_depth": space_to_depth})


# Channels and pixels one below, at and one above 8, 16, 32 and 64: the widths of vectors and of tiles.
TILE_SHAPES = (
    *((1, 7, 1, 9), (2, 8, 3, 5), (1, 9, 2, 4), (1, 15, 1, 17), (1, 16, 2, 8), (1, 17, 3, 5)),
    *((1, 31, 1, 33), (1, 32, 4, 8), (1, 33, 1, 31), (1, 63, 5, 13), (1, 64, 2, 32), (1, 65, 7, 9)),
)

LRN_CASES = (
    *(lrn(shape) for shape in ((2, 7, 5, 3), (1, 1, 1, 1), (3, 1, 2, 5), (1, 5, 1, 1), (0, 3, 2, 2), (2, 0, 2, 2))),
    *(lrn(shape) for shape in TILE_SHAPES),
    *(lrn((2, 6, 3, 5), size=size) for size in (1, 2, 3, 4, 7, 15, 33)),
    *(lrn((2, 7, 3, 5), beta=beta) for beta in (0.0, 0.5, 1.0, 2.0, -1.0, 0.3)),
    lrn((1, 8, 3, 5), size=4, alpha=1e-4, k=1.0),
)
LRN_OTHER_RANKS = (lrn((2, 9, 17)), lrn((2, 7, 2, 3, 5)), lrn((2, 6, 2, 3, 1, 5), size=4))

POOL_CASES = (
    *(pool(shape, 1, 1) for shape in ((1, 1, 1, 1), (0, 3, 4, 5))),
    *(pool((2, 3, 5, width)) for width in (3, 4, 15, 16, 17, 31, 32, 33, 34, 35, 65)),
    *(pool((2, channels, 5, 7)) for channels in (1, 7, 8, 9, 16, 31, 33, 65)),
    pool((2, 3, 13, 9), ceil_mode=True),
    pool((2, 3, 6, 8), 3, 2, ceil_mode=True),
    pool((2, 3, 9, 7), 3, 2, padding=1, ceil_mode=True),
    pool((2, 8, 6, 9), 3, 1, padding=1),
    pool((2, 5, 8, 6), 2, 2),
    pool((2, 3, 9, 11), (3, 2), (1, 2), padding=(1, 0)),
    pool((2, 3, 11, 9), (2, 3), (2, 1), padding=(0, 1), dilation=(3, 2)),
    pool((2, 3, 12, 10), 5, 3, padding=2),
    pool((2, 3, 9, 10), 2, 4),
    pool((1, 2, 16, 17), 15, 1, padding=7),
    pool((1, 2, 17, 19), (16, 15), 1),
    pool((3, 7, 6), 3, 2),
)

CONV_CASES = (
    conv((2, 4, 7, 5), 6, (3, 3), padding=1),
    conv((2, 4, 7, 5), 6, (3, 3), padding=1, groups=2),
    conv((2, 4, 7, 5), 6, (3, 3), bias=False, groups=2),
    conv((1, 1, 1, 1), 1, (1, 1)),
    conv((0, 2, 3, 4), 4, (3, 3), padding=1),
    conv((2, 4, 5, 6), 16, (1, 1), groups=2),
    conv((2, 3, 9, 8), 5, (3, 2), stride=(2, 1), padding=(1, 0)),
    conv((2, 3, 10, 9), 4, (2, 3), dilation=(3, 2), padding=(2, 1)),
    conv((2, 6, 6, 5), 6, (3, 3), padding=1, groups=6),
    conv((1, 3, 23, 27), 8, (11, 11), stride=4),
    conv((2, 8, 7, 9), 16, (5, 5), padding=2, groups=2),
    conv((1, 9, 4, 33), 7, (3, 3), padding=1),
    conv((4, 6, 5), 6, (3, 3), padding=1, groups=2),
    conv((2, 4, 7, 5), 6, (3, 3), padding=1, groups=2, relu=False),
    conv((2, 3, 9, 8), 5, (3, 2), bias=False, stride=(2, 1), relu=False),
    conv((0, 2, 3, 4), 4, (3, 3), relu=False),
)


# Rows about the 8 where forward turns to tiles, and about what a tile and its vectors hold; inputs and outputs about
# the blocks of 512, 128, 48 and 12.
LINEAR_CASES = (
    *(linear((rows, 33), 17) for rows in (0, 1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 49, 70)),
    *(linear((9, inputs), 14) for inputs in (1, 2, 127, 129, 511, 512, 513, 1030)),
    *(linear((5, inputs), 13) for inputs in (0, 1, 511, 513)),
    *(linear((17, 19), outputs) for outputs in (1, 11, 12, 13, 47, 48, 49, 127, 129, 260)),
    linear((12, 20), 9, bias=False),
    linear((3, 0), 4),
    linear((2, 3, 10), 6),
    linear((2, 3, 4, 5), 7, bias=False),
    linear((21,), 6),
)


# Rows of 3 * size values about what vectors hold; crops as large as the image; sides about the blocks of 4.
AUGMENT_CASES = tuple(
    augment(images, size, block)
    for block in (1, 4)
    for images, size in (
        *(((3, size + 2, size + 5, 3), size) for size in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 21, 22, 33)),
        *(((2, 5, 5, 3), 5), ((5, 20, 13, 3), 11), ((1, 9, 40, 3), 9)),
    )
)


def _block_cases(op: str) -> tuple[Case, ...]:
    return (
        block(op, (2, 6, 7, 5)),
        block(op, (2, 6, 7, 5), bias=False),
        block(op, (1, 1, 1, 1), kernel_size=1, stride=1),
        block(op, (0, 3, 4, 5)),
        *(block(op, (2, 3, 5, width)) for width in (3, 4, 15, 16, 17, 33, 34, 35)),
        *(block(op, (2, channels, 5, 7)) for channels in (1, 7, 8, 9, 17, 33, 64)),
        *(block(op, (2, 6, 5, 7), lrn_size=size) for size in (1, 2, 3, 4, 7, 15)),
        *(block(op, (2, 7, 5, 7), beta=beta) for beta in (0.0, 0.5, 1.0, 0.3)),
        block(op, (1, 70, 4, 5), lrn_size=7, kernel_size=2),
        block(op, (2, 5, 6, 9), kernel_size=(2, 3), stride=(1, 2)),
        block(op, (2, 5, 9, 8), kernel_size=2, stride=3),
        block(op, (1, 8, 7, 9), alpha=5e-4, lrn_size=5),
        block(op, (7, 6, 5), kernel_size=3, stride=1),
        block(op, (3, 9, 8), bias=False, lrn_size=4),
    )


CASES: dict[str, tuple[Case, ...]] = {
    "augment": AUGMENT_CASES,
    "local_response_norm": LRN_CASES,
    "relu_max_pool2d": POOL_CASES,
    "conv2d_bias_relu": CONV_CASES,
    "linear_bias_relu": LINEAR_CASES,
    **{op: _block_cases(op) for op in BLOCKS},
}

# One plain case an op, and the same without its bias, for tests that do not depend on the numbers. (Sizes that may vary
# differ from sizes that may not: torch.compile takes equal ones for one and the same.)
EXAMPLES = (
    lrn((2, 6, 5, 7), size=4),
    pool((2, 3, 9, 7), padding=1),
    conv((5, 4, 7, 9), 6, (3, 3), padding=1, groups=2),
    conv((5, 4, 7, 9), 6, (3, 3), bias=False),
    conv((5, 4, 7, 9), 6, (3, 3), bias=False, groups=2, relu=False),
    linear((10, 7), 6),
    linear((10, 7), 6, bias=False),
    *(block(op, (2, 6, 7, 9), lrn_size=4, bias=bias) for op in BLOCKS for bias in (True, False)),
)

# Large enough for Winograd's way on a CPU without AVX-512, in two parts: two images of 12 x 13 tiles, then one.
WINOGRAD = (
    conv((3, 96, 24, 25), 112, (3, 3), padding=1),
    conv((3, 192, 25, 21), 224, (3, 3), padding=(0, 2), groups=2, bias=False, relu=False),
)

AUGMENT_EXAMPLES = (augment((5, 12, 14, 3), 9), augment((5, 12, 14, 3), 9, 4))

# AlexNet's layers at batch 1: the benchmarks put their batch in front.
ALEXNET: dict[str, tuple[Case, ...]] = {
    "augment": tuple(augment((1, 256, 256, 3), 227, block) for block in (1, 4)),
    "local_response_norm": tuple(lrn((1, *s), alpha=5e-4) for s in ((96, 55, 55), (256, 27, 27))),
    "relu_max_pool2d": tuple(pool((1, *s)) for s in ((96, 55, 55), (256, 27, 27), (256, 13, 13))),
    "conv2d_bias_relu": (
        conv((1, 3, 227, 227), 96, (11, 11), stride=4),
        conv((1, 96, 27, 27), 256, (5, 5), padding=2, groups=2),
        conv((1, 256, 13, 13), 384, (3, 3), padding=1),
        conv((1, 384, 13, 13), 384, (3, 3), padding=1, groups=2),
        conv((1, 384, 13, 13), 256, (3, 3), padding=1, groups=2),
    ),
    "linear_bias_relu": (linear((1, 9216), 4096), linear((1, 4096), 4096)),
    **{op: tuple(block(op, (1, *s), alpha=5e-4) for s in ((96, 55, 55), (256, 27, 27))) for op in BLOCKS},
}


def _stock_lrn(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


def _stock_pool(
    x: Tensor, kernel_size: Any, stride: Any, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    return F.max_pool2d(F.relu(x), kernel_size, stride, padding, dilation, ceil_mode)


def _stock_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    relu: bool = True,
) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return F.relu(y) if relu else y


def _stock_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.relu(F.linear(x, weight, bias))


def is_covered(case: Case) -> bool:
    """Whether our kernels take a case: a winner is one byte, and LRN takes one unbatched image for (N, C, L)."""
    taps = torch.Size(pair(case.constants.get("kernel_size", 1))).numel()
    return taps <= 225 and (case.op not in BLOCKS or len(case.shapes["x"]) == 4)


def _activation(x: Tensor, bias: Tensor | None) -> Tensor:
    return F.relu(x if bias is None else x + bias[:, None, None])


def _stock_lrn_pool(
    x: Tensor, bias: Tensor | None, lrn_size: int, alpha: float, beta: float, k: float, kernel_size: Any, stride: Any
) -> Tensor:
    return F.max_pool2d(F.local_response_norm(_activation(x, bias), lrn_size, alpha, beta, k), kernel_size, stride)


def _stock_pool_lrn(
    x: Tensor, bias: Tensor | None, lrn_size: int, alpha: float, beta: float, k: float, kernel_size: Any, stride: Any
) -> Tensor:
    return F.local_response_norm(F.max_pool2d(_activation(x, bias), kernel_size, stride), lrn_size, alpha, beta, k)


def _stock_augment(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    shifts: Tensor,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    space_to_depth: int,
) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y = torch.empty(images.shape[0], 3, size, size, dtype=wide, device=images.device)
    for out, image, (top, left), flip in zip(y, images, offsets.tolist(), flips.tolist(), strict=True):
        crop = image[top : top + size, left : left + size].permute(2, 0, 1)
        out.copy_(crop.flip(2) if flip else crop)
    centre, deviation = (torch.tensor(values, dtype=wide, device=images.device) * 255 for values in (mean, std))
    y = ((y + (shifts - centre)[:, :, None, None]) / deviation[:, None, None]).to(dtype)
    missing = -size % space_to_depth
    y = F.pixel_unshuffle(F.pad(y, (0, missing, 0, missing)), space_to_depth) if space_to_depth > 1 else y
    return y.contiguous(memory_format=torch.channels_last)


STOCK: dict[str, Callable[..., Tensor]] = {
    "augment": _stock_augment,
    "local_response_norm": _stock_lrn,
    "relu_max_pool2d": _stock_pool,
    "conv2d_bias_relu": _stock_conv,
    "linear_bias_relu": _stock_linear,
    "relu_lrn_max_pool2d": _stock_lrn_pool,
    "relu_max_pool2d_lrn": _stock_pool_lrn,
}


def fused(case: Case, tensors: Tensors, backend: str = "auto") -> Tensor:
    return getattr(ops, case.op)(**tensors, **case.constants, backend=backend)


def stock(case: Case, tensors: Tensors) -> Tensor:
    return STOCK[case.op](**tensors, **case.constants)


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The case in this dtype where that is one of its constants; of the others ``make`` makes the tensors so."""
    return replace(case, constants=case.constants | {"dtype": dtype}) if "dtype" in case.constants else case


def make(
    case: Case,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    requires_grad: bool = True,
    seed: int = 0,
    scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensors:
    """The case's tensors, normal random; ``layout`` is x's. Rounded to dtype once, so that all oracles see the same.

    Of ``augment``, whose dtype is the result's, a constant: bytes and what is drawn for them; ``layout`` is images'.
    """
    generator = torch.Generator().manual_seed(seed)
    if case.op == "augment":
        drawn = _drawn(case, generator)
        return {n: lay_out(t.to(device), layout if n == "images" else "contiguous") for n, t in drawn.items()}
    tensors: Tensors = {}
    for name, shape in case.items():
        if shape is None:
            tensors[name] = None
            continue
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        if name == "weight":
            values /= math.sqrt(max(1, math.prod(shape[1:])))
        placed = values.to(dtype).to(device)
        tensors[name] = lay_out(placed, layout if name == "x" else "contiguous").requires_grad_(requires_grad)
    return tensors


def _drawn(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    batch, height, width, _ = shape = case.shapes["images"]
    most = [side - case.constants["size"] for side in (height, width)]
    offsets = torch.stack([torch.randint(0, n + 1, (batch,), generator=generator) for n in most], 1)
    offsets[: batch // 3] = 0
    offsets[batch // 3 : batch * 2 // 3] = torch.tensor(most)
    return {
        "images": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        "offsets": offsets,
        "flips": torch.arange(batch) % 2 == 1,
        "shifts": torch.randn(batch, 3, generator=generator) * 20,
    }


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


def wanting_grad(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}


def params(cases: Iterable[Case]) -> list[Any]:
    """Cases for parametrize, with their ids."""
    return [pytest.param(case, id=case.id) for case in cases]


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_example = pytest.mark.parametrize("case", params(EXAMPLES))


def runs_ours(y: Tensor) -> bool:
    """Whether one of the package's operators is among those that y was computed by."""
    nodes = [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if "alexnet_ext" in type(node).__name__:  # PyTorch 2.11 tells neither name() nor next_functions of such a node
            return True
        nodes += [following for following, _ in node.next_functions if following is not None]
    return False


def pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def raw_forward(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.alexnet_ext.<op>``."""
    pairs = ("kernel_size", "stride", "padding", "dilation")
    constants = (pair(value) if name in pairs else value for name, value in case.constants.items())
    return (*tensors.values(), *constants)


def raw_backward(case: Case, tensors: Tensors) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.alexnet_ext.<op>_backward`` after a forward of the same tensors, dy random."""
    x, bias = tensors["x"], tensors.get("bias")
    arguments = raw_forward(case, tensors)
    constants = arguments[len(tensors) :]
    with torch.no_grad():
        outputs = getattr(torch.ops.alexnet_ext, case.op)(*arguments)
    y, *saved = outputs if isinstance(outputs, tuple) else (outputs,)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    match case.op:
        case "local_response_norm":
            return dy, x, *constants
        case "relu_max_pool2d":
            return dy, *saved, *x.shape[2:], *constants[:-1]
        case "conv2d_bias_relu":
            return dy, x, tensors["weight"], y, *constants[:4], [True, True, bias is not None], *constants[4:]
        case "linear_bias_relu":
            return dy, x, tensors["weight"], y, [True, True, bias is not None]
        case "relu_lrn_max_pool2d":
            return dy, x, bias, *saved, *constants
    return dy, *saved, *x.shape[2:], *constants
