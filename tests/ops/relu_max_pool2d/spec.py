"""relu_max_pool2d, as tests, benchmarks and planted faults know it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import spec
from tests.support.spec import (
    DY_BAD,
    EMULATOR,
    GATES,
    IN_TRITON,
    MANY,
    X_BAD,
    Case,
    Draw,
    Fault,
    Spec,
    change,
    flat,
    smaller,
)

POOL = "csrc/relu_max_pool2d/relu_max_pool2d_rows.h"
WINDOW, KERNELS = (f"csrc/relu_max_pool2d/relu_max_pool2d_{name}.cuh" for name in ("window", "kernels"))
TRITON = "alexnet_ext/ops/relu_max_pool2d/triton_kernels.py"
LAUNCHER = "csrc/relu_max_pool2d/relu_max_pool2d_cuda.cu"
BITS = EMULATOR + " -k 'to_the_bit and {} and not augment'"


def pool(shape: tuple[int, ...], kernel_size: Any = 3, stride: Any = 2, **rest: Any) -> Case:
    constants = {"kernel_size": kernel_size, "stride": stride, "padding": 0, "dilation": 1, "ceil_mode": False}
    return Case("relu_max_pool2d", {"x": shape}, constants | rest)


def stock(
    x: Tensor, kernel_size: Any, stride: Any, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    return F.max_pool2d(F.relu(x), kernel_size, stride, padding, dilation, ceil_mode)


def fuzz(draw: Draw) -> Case:
    from tests.support.drawing import booleans, draw_shape, pair_within

    shape = draw_shape(draw)
    dilation = pair_within(draw, 1, (3, 3))
    reach = [(shape[2 + i] - 1) // dilation[i] + 1 for i in (0, 1)]
    kernel = pair_within(draw, 1, (min(reach[0], 5), min(reach[1], 5)))
    padding = pair_within(draw, 0, (kernel[0] // 2, kernel[1] // 2))
    stride = pair_within(draw, 1, (4, 4))
    return pool(shape, kernel, stride, padding=padding, dilation=dilation, ceil_mode=draw(booleans()))


def moved(case: Case, width: int) -> tuple[int, int]:
    """The winners are a byte each."""
    elements = stock(torch.empty(case.shapes["x"], device="meta"), **case.constants).numel()
    x, y = width * math.prod(case.shapes["x"]), width * elements
    return x + y + elements, y + elements + x


FAULTS = (
    Fault("pool: >= for >, the last of equal values wins", POOL, "(v > value) | (v != v)", "(v >= value) | (v != v)",
          "relu_max_pool2d"),
    Fault("pool: NaN skipped", POOL, "(v > value) | (v != v)", "(v > value)", "relu_max_pool2d"),
    # 0 instead of -inf would be right here: the maximum starts at ReLU's 0.
    Fault("pool: padding holds a value that can win", POOL, "to[i] = -INFINITY", "to[i] = 1", "relu_max_pool2d"),
    Fault("pool: window without a winner gives tap 0", POOL, "broadcast<Int<A>>(kNoWinner)", "broadcast<Int<A>>(0)",
          "relu_max_pool2d"),
    Fault("pool: zero loses its sign", POOL, "value = floor ? (v == 0 ? v : Vec<A>{}) : v;",
          "value = floor ? Vec<A>{} : v;", "relu_max_pool2d"),
    Fault("pool: row stride taken for the column's", POOL, "oh * pool_.stride[0] - pool_.padding[0]",
          "oh * pool_.stride[1] - pool_.padding[0]", "relu_max_pool2d"),
    Fault("pool: dilation of columns ignored", POOL, "first + s * dilation", "first + s", "relu_max_pool2d"),
    Fault("pool: padding of rows ignored backward", POOL, "ih + pool_.padding[0] - r", "ih - r", "relu_max_pool2d"),
    Fault("pool: rows of the unit before are kept", POOL, "cache_.clear();\n    for (int64_t oh",
          "for (int64_t oh", "relu_max_pool2d"),
    Fault("pool: even and odd columns of the gradient traded", POOL, "*even = sums + columns_.residue[0] * apart",
          "*even = sums + columns_.residue[1] * apart", "relu_max_pool2d"),
    Fault("pool: rows used where they stand though a vector is cut", "csrc/relu_max_pool2d/relu_max_pool2d_cpu.cpp",
          "s.channels_last && s.channels % kLanes<A> == 0", "s.channels_last", "relu_max_pool2d"),
    Fault("pool: last group of planes not cut short", "csrc/relu_max_pool2d/relu_max_pool2d_cpu.cpp",
          "left < kPlanes ? left : kPlanes", "kPlanes", "relu_max_pool2d"),
    Fault("pool: bands overlap", "csrc/relu_max_pool2d/relu_max_pool2d.h",
          "first + rows < s.height ? first + rows : s.height", "s.height", "relu_lrn_max_pool2d"),
    Fault("boundary: ceil_mode ignored", "csrc/relu_max_pool2d/relu_max_pool2d.h",
          "if (ceil_mode) reach += pool.stride[i] - 1;", "",
          "tests/ops/relu_max_pool2d/test_relu_max_pool2d.py -k sizes"),
    Fault("boundary: a last window in the right padding is kept", "csrc/relu_max_pool2d/relu_max_pool2d.h",
          "ceil_mode && (length - 1) * pool.stride[i] >= side + pool.padding[i] ? length - 1 : length", "length",
          "tests/ops/relu_max_pool2d/test_relu_max_pool2d.py -k sizes"),
    Fault("CUDA: NaN skipped", "csrc/relu_max_pool2d/relu_max_pool2d_window.cuh", "|| v[i] != v[i]", "",
          f"{EMULATOR} -k 'to_the_bit and float32 and not augment'"),
    Fault("CUDA: taps in descending order", KERNELS, "best.take(taps[t], kInside ? t : window.number[t])",
          "best.take(taps[8 - t], kInside ? 8 - t : window.number[8 - t])", BITS.format("float32")),
    Fault("CUDA: a tap at the border under a number outside", WINDOW, "(row - top) * 3", "t / 3 * 3",
          BITS.format("bfloat16")),
    Fault("CUDA: a packed number replaces a NaN", WINDOW, "__hmin2(pair(value_[i]), pair(kInf))", "pair(value_[i])",
          BITS.format("bfloat16")),
    Fault("CUDA: a packed zero loses its sign", WINDOW, "words[i] & __heq2_mask(pair(words[i]), pair(0))", "0",
          BITS.format("float16")),
    Fault("CUDA: the middle of a window taken for its first tap", WINDOW, "r == 1 ? 1 : 2 - 2 * a", "2 - 2 * a",
          BITS.format("bfloat16")),
    Fault("CUDA: a patch's first row of windows and of inputs lost", WINDOW, "return row >= 0 &&", "return row > 0 &&",
          BITS.format("float32")),
    Fault("CUDA: too few patches with padding", WINDOW, "p.in.width) + p.pool.padding[i], 2)", "p.in.width), 2)",
          BITS.format("float64")),
    Fault("Triton patches: rows of windows in descending order", TRITON, "DOWN + (REACH_H - i) * WINDOW[2]",
          "DOWN + i * WINDOW[2]", f"{IN_TRITON} -k 'to_the_bit and float32'"),
    Fault("Triton patches: too few with padding", TRITON, "return (size - 1 + padding)", "return (size - 1)",
          f"{IN_TRITON} -k 'to_the_bit and float32'"),
    Fault("slower: Triton's gradient by single pixels", TRITON, "(1, 1) if reach > 1", "(1, 1) if reach > 0",
          f"{GATES} -k triton"),
    Fault("CUDA: a thread's images past the last", KERNELS, "if (at.image * kTogether<V> + i < s.images) f(", "f(",
          BITS.format("float32")),
    Fault("CUDA: a window over the edge taken for one inside", LAUNCHER,
          "pooled_length(p.in.height, pool, 0, false) == p.out.height &&", "", BITS.format("float32")),
)  # fmt: skip


SPEC = Spec(
    name="relu_max_pool2d",
    gradient=True,
    on_gpu=True,
    in_triton=True,
    product=False,
    in_place=None,
    stock=stock,
    draw=spec.normal,
    cases=(
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
    ),
    examples=(pool((2, 3, 9, 7), padding=1),),
    edges=(pool((0, 3, 7, 5)), pool((1, 1, 1, 1), 1, 1)),
    small=(pool((1, 2, 3, 4), 2, 1),),
    large=(pool((4, 24, 33, 31)),),
    many=tuple(pool(shape, 1, 1) for shape in MANY),
    alexnet=tuple(pool((1, *shape)) for shape in ((96, 55, 55), (256, 27, 27), (256, 13, 13))),
    backward_arguments=lambda dy, tensors, y, saved, constants: (dy, *saved, *tensors["x"].shape[2:], *constants[:-1]),
    needs={"x": set()},
    winners=True,
    saved=lambda x, y: y.numel(),
    moved=moved,
    target=2.0,
    copies=1.15,
    bad_calls={
        **X_BAD,
        "kernel0": change(1, [0, 3]),
        "kernel_huge": change(1, [2**40, 3]),
        "kernel_too_many_taps": change(1, [16, 16]),
        "kernel_beyond_x": change(1, [15, 3]),
        "stride0": change(2, [1, 0]),
        "stride_negative": change(2, [-1, 1]),
        "padding_negative": change(3, [-1, 0]),
        "padding_above_half": change(3, [2, 0]),
        "dilation0": change(4, [0, 1]),
        "dilation_huge": change(4, [2**62, 1]),
        "empty_channels": change(0, lambda x: x[:, :0]),
    },
    bad_backward_calls={
        "dy_shape": DY_BAD["dy_shape"],
        "dy_rank": DY_BAD["dy_rank"],
        "dy_int": change(0, lambda dy: dy.int()),
        "winners_shape": change(1, smaller),
        "winners_rank": change(1, flat),
        "winners_dtype": change(1, lambda winners: winners.long()),
        "height0": change(2, 0),
        "height_negative": change(2, -7),
        "height_huge": change(2, 2**40),
        "width_of_another_x": change(3, 40),
        "kernel0": change(4, [0, 3]),
        "stride0": change(5, [0, 1]),
        "padding_negative": change(6, [-1, 0]),
        "dilation0": change(7, [0, 1]),
    },
    fuzz=fuzz,
    summands=lambda case, name: math.prod(spec.pair(case.constants["kernel_size"])) if name == "x" else 1,
    settled=spec.everywhere,
    magnitude=lambda case: 1.0,
    emulated=(
        pool((0, 3, 4, 5), 1, 1),
        pool((2, 8, 5, 7)),
        pool((2, 3, 13, 9), ceil_mode=True),
        pool((2, 3, 6, 9), 3, 2, ceil_mode=True),
        pool((1, 16, 6, 8), 3, 2, padding=1, ceil_mode=True),
        pool((2, 3, 9, 11), (3, 2), (1, 2), padding=(1, 0)),
        pool((1, 8, 11, 9), (2, 3), (2, 1), padding=(0, 1), dilation=(3, 2)),
        pool((2, 5, 8, 6), 2, 2),
        pool((1, 8, 9, 10), 2, 4),
        pool((1, 1, 16, 17), 15, 1, padding=7),
        pool((3, 7, 6), 3, 2),
        pool((2, 40, 9, 17)),
    ),
    emulated_orders=(pool((2, 24, 9, 7), padding=1), pool((2, 5, 9, 7), 2, 2)),
    emulated_many=(pool((70_000, 1, 2, 3), 2, 1),),
    ptx=(
        *(pool((1, 8, 9, 10), 2, 4), pool((2, 5, 8, 6), 2, 2), pool((3, 7, 6), 3, 2)),
        *(pool((1, 16, 6, 8), 3, 2, padding=1, ceil_mode=True), pool((1, 8, 11, 9), (2, 3), (2, 1), dilation=(3, 2))),
    ),
    runs=spec.memory_bound_runs(
        pool,
        lambda shape: pool(shape, (2, 3), (2, 1), padding=(0, 1), dilation=(2, 1)),
        lambda shape: pool(shape, 2, 2, ceil_mode=True),
    ),
    triton_kernels=frozenset({"relu_max_pool2d_forward_kernel", "relu_max_pool2d_backward_kernel"}),
    faults=FAULTS,
)
