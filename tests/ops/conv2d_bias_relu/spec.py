"""conv2d_bias_relu, as tests, benchmarks and planted faults know it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import spec
from tests.support.spec import (
    BF16,
    DY_BAD,
    EMULATOR,
    FP16,
    FP32,
    FP64,
    X_BAD,
    Case,
    Draw,
    Fault,
    Run,
    Spec,
    Tensors,
    bad_bias,
    change,
    flat,
    smaller,
)

WINOGRAD = "csrc/conv2d_bias_relu/cpu/winograd_cpu.cpp"
WINOGRAD_CONVOLUTION = "csrc/conv2d_bias_relu/cpu/winograd_convolution.h"
CUTLASS = "csrc/conv2d_bias_relu/cutlass/conv2d_cutlass.cuh"
PTX = "tests/gpu_on_cpu/test_ptx.py::test_"
SM90 = "csrc/conv2d_bias_relu/sm90/conv2d_sm90.cuh"
SM90_PTX = "tests/gpu_on_cpu/test_ptx_hopper.py::test_"
SM90_WEIGHT = "csrc/conv2d_bias_relu/sm90/weight_gradient_sm90.cuh"
FIRST_LAYER = "alexnet_ext/ops/conv2d_bias_relu/space_to_depth.py"
CUTLASS_APPLIES = "alexnet_ext/ops/conv2d_bias_relu/cutlass.py"


def conv(shape: tuple[int, ...], out: int, kernel: tuple[int, int], bias: bool = True, **rest: Any) -> Case:
    constants = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | rest
    weight = (out, shape[-3] // constants["groups"], *kernel)
    return Case("conv2d_bias_relu", {"x": shape, "weight": weight, "bias": (out,) if bias else None}, constants)


def stock(
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


def fuzz(draw: Draw) -> Case:
    from hypothesis import assume

    from tests.support.drawing import booleans, draw_shape, integers, pair_within, sampled

    batch, _, height, width = draw_shape(draw)
    groups, dilation, stride = draw(sampled([1, 2, 3])), pair_within(draw, 1, (2, 2)), pair_within(draw, 1, (3, 3))
    kernel = pair_within(draw, 1, (5, 5))
    padding, sizes = [], [height, width]
    for i in (0, 1):
        # Every window must touch the image: of one in the padding alone oneDNN's convolution with a bias crashes on
        # channels-last inputs, under torch.nn as well (oneDNN#5942, pytorch#195394).
        reach = dilation[i] * (kernel[i] - 1)
        padding.append(draw(integers(0, min(3, reach))))
        sizes[i] = max(sizes[i], reach + 1 - 2 * padding[i])
        image, taps = range(padding[i], padding[i] + sizes[i]), range(0, reach + 1, dilation[i])
        starts = range(0, sizes[i] + 2 * padding[i] - reach, stride[i])
        assume(all(any(start + tap in image for tap in taps) for start in starts))
    each_in, each_out = draw(integers(1, 9)), draw(integers(1, 9))
    shape = (batch, groups * each_in, *sizes)
    options = {"stride": stride, "padding": tuple(padding), "dilation": dilation, "groups": groups}
    options["relu"] = draw(booleans())
    return conv(shape, groups * each_out, kernel, draw(booleans()), **options)


def backward_arguments(dy: Tensor, tensors: Tensors, y: Tensor, saved: list[Tensor], constants: Any) -> tuple[Any, ...]:
    wanted = [True, True, tensors["bias"] is not None]
    return dy, tensors["x"], tensors["weight"], y, *constants[:4], wanted, *constants[4:]


def moved(case: Case, width: int) -> tuple[int, int]:
    """y tells where ReLU was open; gradients are as large as what they are of, and images need none."""
    tensors = {n: None if s is None else torch.empty(s, device="meta") for n, s in case.items()}
    y = width * stock(**tensors, **case.constants).numel()
    given = {name: width * tensor.numel() for name, tensor in tensors.items() if tensor is not None}
    wanted = sum(size for name, size in given.items() if name != "x" or case.shapes["x"][-3] != 3)
    return sum(given.values()) + y, 2 * y + sum(given.values()) + wanted


def summands(case: Case, name: str) -> int:
    weight, taps = case.shapes["weight"], math.prod(case.shapes["weight"][2:])
    pixels = spec.of_images(case)
    return {"y": weight[1] * taps, "x": weight[0] * taps, "weight": pixels, "bias": pixels}[name]


def settled(case: Case, exact: Tensors, eps: float) -> Tensor | bool:
    constants = case.constants
    if not constants.get("relu", True):
        return True
    linear = constants | {"relu": False}
    value = stock(**exact, **linear)
    scale = stock(**{n: t if t is None else t.abs() for n, t in exact.items()}, **linear)
    return ~(value.abs() <= eps * scale) | (scale == 0)


# Large enough for Winograd's way on a CPU without AVX-512, in two parts: two images of 12 x 13 tiles, then one.
WINOGRAD_CASES = (
    conv((3, 96, 24, 25), 112, (3, 3), padding=1),
    conv((3, 192, 25, 21), 224, (3, 3), padding=(0, 2), groups=2, bias=False, relu=False),
)
# AlexNet's five at reduced size and width, for Triton's interpreter.
LAYERS = (
    conv((2, 3, 35, 39), 24, (11, 11), stride=4),
    conv((1, 48, 9, 7), 32, (5, 5), padding=2, groups=2),
    conv((1, 32, 6, 7), 48, (3, 3), padding=1),
    conv((1, 48, 6, 7), 48, (3, 3), padding=1, groups=2),
    conv((1, 48, 6, 7), 32, (3, 3), padding=1, groups=2),
)

# 48 channels a group; two parts of the weight gradient, the last a pixel shorter; a stride, whose gradient is
# spread; dilation; a first layer, which is rewritten; no bias and no ReLU.
COMPILED = (
    conv((1, 96, 7, 9), 32, (5, 5), padding=2, groups=2),
    conv((1, 16, 37, 31), 24, (3, 3), padding=1),
    conv((1, 17, 11, 8), 19, (3, 3), stride=(3, 2), padding=1),
    conv((2, 3, 10, 9), 4, (2, 3), dilation=(3, 2), padding=(2, 1)),
    conv((2, 3, 35, 39), 24, (11, 11), stride=4),
    conv((2, 8, 7, 5), 16, (3, 3), padding=1, groups=2, bias=False, relu=False),
)
WIDE = conv((1, 24, 9, 11), 136, (3, 3), padding=1)
ORDERED_BY = (
    *("cp.async.wait_group", "cp.async.wait_group bar.sync", "wgmma.wait_group bar.sync", "fence.proxy.async"),
    *("wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"),
)


def compiled(full: bool) -> Iterator[Run]:
    grouped, parted, strided, _, first, _ = COMPILED
    yield from (Run(case, BF16) for case in COMPILED)
    yield from (Run(case, FP32, tf32=True) for case in (grouped, strided))
    yield from (Run(grouped, dtype) for dtype in (FP16, FP32))
    yield Run(strided, FP64)
    yield Run(grouped, BF16, dy_layout="channels_last", askew=True)
    yield Run(strided, BF16, "sliced", "expanded_batch", wide=True)
    yield Run(replace(grouped, shapes=grouped.shapes | {"x": (1, 96, 5, 5)}), BF16, nan=True)
    if full:
        yield from (Run(case, dtype) for case in COMPILED for dtype in (FP16, FP32, FP64))
        yield from (Run(case, FP32, tf32=True) for case in (parted, first))
        yield Run(grouped, BF16, "contiguous", "sliced")
        orders = ("forward", "backward")
        yield from (Run(grouped, dtype, order=order) for dtype in (BF16, FP32) for order in orders)


def persistent(grid: str) -> Iterator[Run]:
    """Of the second layer the programs have two or three blocks each; the wide one fills all columns of a block."""
    if grid != "quick":
        yield Run(COMPILED[1], BF16, persistent=True)
        yield Run(COMPILED[0], FP32, tf32=True, persistent=True)
    if grid != "sample":
        yield Run(WIDE, FP16, persistent=True)
        yield Run(WIDE, FP32, tf32=True)


def unordered() -> Iterator[Run]:
    """Forward alone, without what keeps warps, copies and products in order: each fails."""
    yield from (Run(COMPILED[1], BF16, persistent=True, order="forward", missing=name) for name in ORDERED_BY)


def runs(grid: str, capability: int) -> Iterator[Run]:
    if capability >= 90:
        yield from persistent(grid)
    yield from unordered() if grid == "sample" else compiled(grid == "full")


def to_depth_and_back(weight: Tensor, step: int) -> list[Tensor]:
    """A first layer's weight turned to depth, and a multiple of it turned back in each memory format."""
    ops = torch.ops.alexnet_ext
    deep = ops.conv2d_bias_relu_to_depth(weight, step)
    back = (ops.conv2d_bias_relu_from_depth(deep * 2, step, *weight.shape[2:], last) for last in (True, False))
    return [deep, *back]


FAULTS = (
    Fault("ReLU: NaN turned to 0", "csrc/conv2d_bias_relu/conv2d_bias_relu_cpu.cpp", "widen(values[i]) <= 0 ?",
          "!(widen(values[i]) > 0) ?", "conv2d_bias_relu"),
    Fault("Winograd: infinity passes for finite", WINOGRAD, "void look(const V& v) { zeros_ += v * 0.0f; }",
          "void look(const V&) {}", "winograd"),
    Fault("Winograd: tiles of the gradient overwrite one another", WINOGRAD, "load(to) + tile[q]", "tile[q]",
          "winograd"),
    Fault("Winograd: padding of the rows taken for the columns'", WINOGRAD, "w = j * 2 - p.padding[1]",
          "w = j * 2 - p.padding[0]", "winograd"),
    Fault("Winograd: a reference to the products is never given back", WINOGRAD_CONVOLUTION,
          "torch::stable::detail::to<Tensor>(stack[0]);", "", "tests/ops/test_runtime.py -k 'given_back and 96'"),
    Fault("Winograd: weight's gradient of the first images alone", WINOGRAD, "part < parts", "part < 1",
          "tests/ops/conv2d_bias_relu/test_conv2d_bias_relu.py -k 'many_tiles and padding1'"),
    Fault("boundary: the mask takes any gradient for dense", "csrc/conv2d_bias_relu/conv2d_bias_relu_ops.cpp",
          "gradient = with_strides_of(dz, dy)", "gradient = dy",
          "tests/ops/test_citizen.py -k 'gradients_of_any_layout and conv2d_bias_relu and float32'"),
    Fault("conv: the mask of a ReLU that was left out", "csrc/conv2d_bias_relu/conv2d_bias_relu_ops.cpp",
          "relu ? masked(dy, y) : dy", "masked(dy, y)",
          "tests/ops/conv2d_bias_relu/test_conv2d_bias_relu.py -k 'values_and_gradients and reluFalse and float32'"),
    Fault("CUDA: one plane's bias added to the next", "csrc/conv2d_bias_relu/conv2d_bias_relu_kernels.cuh",
          "j < left ? own : next", "own", f"{EMULATOR} -k 'conv2d_bias_relu and float32'"),
    Fault("CUDA: a weight with depth takes the next row's taps for zeros", "csrc/conv2d_bias_relu/conv2d_depth_cuda.cu",
          "row < w.height && column < w.width", "row < w.height", f"{EMULATOR} -k turned_to_depth"),
    Fault("CUTLASS: a group's strides for the whole tensor's", CUTLASS, "p.height, p.width, p.channels)",
          "p.height, p.width, p.group_channels())", f"{PTX}forward[bf16]"),
    Fault("CUTLASS: a ReLU that loses NaN", CUTLASS, "sums[i] < least ? least : sums[i]",
          "sums[i] > least ? sums[i] : least", f"{PTX}forward[bf16]"),
    Fault("CUTLASS: taps in reverse order", CUTLASS, "Mode::kCrossCorrelation", "Mode::kConvolution",
          f"{PTX}forward[bf16]"),
    Fault("CUTLASS: every pixel with a bias of its own", CUTLASS, "first.y, {0, 0, 0})", "first.y, layout_of_y(p))",
          f"{PTX}forward[bf16]"),
    Fault("CUTLASS: each group with the first one's bias", CUTLASS, "slice<E>(bias, first.y,", "slice<E>(bias, 0,",
          f"{PTX}forward[bf16]"),
    Fault("CUTLASS: pixels summed up once a split", CUTLASS, "problem_of_group(p, weight_gradient_splits(p))",
          "problem_of_group(p)", f"{PTX}weight_gradient[bf16]"),
    Fault("CUTLASS: gradients of weights in the first group's place", CUTLASS, "(dweight) + first.weight", "(dweight)",
          f"{PTX}weight_gradient[bf16]"),
    Fault("CUTLASS for 9.0: a group's strides for the whole tensor's", SM90,
          "strides(p.out_height, p.out_width, p.filters)", "strides(p.out_height, p.out_width, p.group_filters())",
          f"{SM90_PTX}input_gradient[f16]"),
    Fault("CUTLASS for 9.0: padding of rows for columns", SM90, "padding{n(p.padding[0]), n(p.padding[1])}",
          "padding{n(p.padding[1]), n(p.padding[0])}", f"{SM90_PTX}input_gradient[f16]"),
    Fault("space to depth: the edge's pixels at the block's corner", FIRST_LAYER, "first % self.stride[i]", "0",
          "tests/ops/conv2d_bias_relu/test_space_to_depth.py -k moved_once"),
    Fault("space to depth: again for the backward", "alexnet_ext/ops/conv2d_bias_relu/op.py",
          "and weight.requires_grad", "and not weight.requires_grad",
          "tests/ops/conv2d_bias_relu/test_space_to_depth.py -k training_keeps"),
    Fault("9.0: boxes freed while they are multiplied", SM90_WEIGHT, "warpgroup_wait<1>", "warpgroup_wait<2>",
          f"{SM90_PTX}weight_gradient[bf16]"),
    Fault("9.0: the next group's channels stored", SM90_WEIGHT, "channel + n < work.channels", "true",
          f"{SM90_PTX}weight_gradient[bf16]"),
    Fault("9.0: the next step's pixel below its image", SM90_WEIGHT, "row -= work.out_height, ++image", "++image",
          f"{SM90_PTX}weight_gradient[bf16]"),
    Fault("9.0: steps of a row's pixels alone", SM90_WEIGHT, "row += by.row", "row += 0",
          f"{SM90_PTX}weight_gradient[bf16]"),
    Fault("CUTLASS for 9.0: elsewhere", CUTLASS_APPLIES, "capability(x) == HOPPER", "capability(x) >= HOPPER",
          "tests/ops/conv2d_bias_relu/test_cutlass.py -k own_devices"),
    Fault("CUTLASS: TF32 where the flags forbid it", CUTLASS_APPLIES, 'precision(x.dtype) != "tf32"',
          "x.dtype != torch.float32", "tests/ops/conv2d_bias_relu/test_cutlass.py -k dtypes"),
    Fault("CUTLASS: the gradient of x with a stride", CUTLASS_APPLIES,
          "direction != Direction.INPUT or stride == [1, 1]", "True",
          "tests/ops/conv2d_bias_relu/test_cutlass.py -k where_it_applies"),
)  # fmt: skip


SPEC = Spec(
    name="conv2d_bias_relu",
    gradient=True,
    on_gpu=True,
    in_triton=True,
    product=True,
    in_place=None,
    stock=stock,
    draw=spec.normal,
    cases=(
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
    ),
    examples=(
        conv((5, 4, 7, 9), 6, (3, 3), padding=1, groups=2),
        conv((5, 4, 7, 9), 6, (3, 3), bias=False),
        conv((5, 4, 7, 9), 6, (3, 3), bias=False, groups=2, relu=False),
    ),
    edges=(conv((0, 2, 5, 4), 4, (3, 3)), conv((1, 1, 1, 1), 1, (1, 1))),
    small=tuple(conv((1, 2, 3, 3), 2, (2, 2), bias=bias, relu=bias) for bias in (True, False)),
    large=(conv((4, 8, 33, 31), 16, (3, 3), groups=2),),
    many=(),
    alexnet=(
        conv((1, 3, 227, 227), 96, (11, 11), stride=4),
        conv((1, 96, 27, 27), 256, (5, 5), padding=2, groups=2),
        conv((1, 256, 13, 13), 384, (3, 3), padding=1),
        conv((1, 384, 13, 13), 384, (3, 3), padding=1, groups=2),
        conv((1, 384, 13, 13), 256, (3, 3), padding=1, groups=2),
    ),
    backward_arguments=backward_arguments,
    needs={"x": {"weight", "y"}, "weight": {"x", "y"}, "bias": {"y"}},
    winners=False,
    saved=lambda x, y: x.nbytes + y.nbytes,
    moved=moved,
    target=None,
    copies=None,
    bad_calls={
        **X_BAD,
        **bad_bias(2),
        "weight_dtype": change(1, lambda w: w.double()),
        "weight_rank": change(1, flat),
        "weight_channels": change(1, lambda w: w[:, :1]),
        "stride0": change(3, [0, 1]),
        "padding_negative": change(4, [-1, 0]),
        "dilation0": change(5, [0, 1]),
        "groups0": change(6, 0),
        "groups3": change(6, 3),
    },
    bad_backward_calls={
        **DY_BAD,
        "x_channels": change(1, lambda x: x[:, :2]),
        "weight_rank": change(2, flat),
        "y_shape": change(3, smaller),
        "y_dtype": change(3, lambda y: y.half()),
        "stride0": change(4, [0, 1]),
        "groups0": change(7, 0),
    },
    fuzz=fuzz,
    summands=summands,
    settled=settled,
    magnitude=lambda case: 1.0,
    emulated=(
        conv((2, 4, 7, 5), 6, (3, 3), padding=1, groups=2),
        conv((2, 4, 7, 5), 6, (3, 3), bias=False),
        conv((1, 1, 1, 1), 1, (1, 1)),
        conv((0, 2, 3, 4), 4, (3, 3), padding=1),
        conv((2, 4, 5, 6), 16, (1, 1), groups=2),  # planes of 30: vectors reach from one into the next
        conv((3, 3, 15, 13), 24, (3, 2), stride=(2, 1), padding=(1, 0)),
        conv((2, 8, 3, 3), 40, (1, 1)),
    ),
    emulated_orders=(conv((3, 4, 9, 7), 24, (3, 3)), conv((3, 4, 9, 7), 9, (3, 3))),
    emulated_many=(conv((1, 3, 101, 97), 64, (1, 1)),),  # more rows of sums than are added up in one round
    ptx=(
        conv((1, 1, 1, 1), 1, (1, 1)),
        conv((2, 8, 3, 3), 40, (1, 1)),
        conv((2, 4, 7, 5), 6, (3, 3), groups=2, bias=False),
    ),
    runs=runs,
    triton_kernels=frozenset(f"conv2d_bias_relu_{name}_kernel" for name in ("product", "weight", "mask")),
    faults=FAULTS,
)
