"""relu_lrn_max_pool2d, as tests, benchmarks and planted faults know it (ops/blocks.py: what the other block shares)."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tests.ops import blocks
from tests.ops.blocks import LRN_BAD, POOL_BAD, activation
from tests.support import spec
from tests.support.spec import DY_BAD, EMULATOR, GATES, IN_TRITON, Case, Fault, Spec, Tensors, change, smaller


def normalized(x: Tensor, bias: Tensor | None, lrn_size: int, alpha: float, beta: float, k: float) -> Tensor:
    return F.local_response_norm(activation(x, bias), lrn_size, alpha, beta, k)


def stock(x: Tensor, bias: Tensor | None, *, kernel_size: Any, stride: Any, **lrn: Any) -> Tensor:
    return F.max_pool2d(normalized(x, bias, **lrn), kernel_size, stride)


def settled(case: Case, exact: Tensors, eps: float) -> Tensor | bool:
    constants = {name: case.constants[name] for name in ("lrn_size", "alpha", "beta", "k")}
    return blocks.settled(case, normalized(**exact, **constants), eps)


def moved(case: Case, width: int) -> tuple[int, int]:
    """The winners are a byte each; the backward normalizes x again."""
    elements, x = blocks.output_size(case), width * math.prod(case.shapes["x"])
    y, bias = width * elements, width * math.prod(case.shapes["bias"] or (0,))
    return x + bias + y + elements, y + x + elements + x


PATCHES = "csrc/relu_lrn_max_pool2d/relu_lrn_max_pool2d_patches.cuh"
LAUNCHER = "csrc/relu_lrn_max_pool2d/relu_lrn_max_pool2d_cuda.cu"
ROWS = "csrc/relu_lrn_max_pool2d/relu_lrn_max_pool2d_rows.cuh"
WALK = "csrc/relu_lrn_max_pool2d/relu_lrn_max_pool2d_walk.cuh"
CHANNELS_LAST = f"{EMULATOR} -k 'relu_lrn_max_pool2d and float32 and channels_last'"
TRITON = "alexnet_ext/ops/relu_lrn_max_pool2d/triton_kernels.py"
CONTIGUOUS = f"{EMULATOR} -k 'relu_lrn_max_pool2d and float32 and contiguous'"
TIES = f"{EMULATOR} -k 'winners_of_ties and float32 and channels_last'"
FAULTS = (
    Fault("Triton rows: the shared row's taps are the last row's", TRITON,
          "value, winner = last, last_tap", "value, winner = last, 6 + last_tap", f"{IN_TRITON} -k are_shared"),
    Fault("block: ReLU's mask dropped", "csrc/relu_lrn_max_pool2d/relu_lrn_max_pool2d_cpu.cpp",
          "mask<A>(gradient, activation, row_size);", "", "relu_lrn_max_pool2d"),
    Fault("block: bias left out of the recomputed activation",
          "csrc/relu_lrn_max_pool2d/relu_lrn_max_pool2d_cpu.cpp",
          "add_bias(row, static_cast<const T*>(bias), p.in);", "", "relu_lrn_max_pool2d"),
    Fault("CUDA: no barrier between filling a tile and pooling it",
          "csrc/relu_lrn_max_pool2d/relu_lrn_max_pool2d_kernels.cuh", "__syncthreads();\n    const int height",
          "const int height", CHANNELS_LAST),
    Fault("CUDA patches: one past the last adds to the bias gradient", PATCHES, ": least<T>(); };",
          ": vector_at(x, group); };", CHANNELS_LAST),
    Fault("CUDA patches: windows before the first column", PATCHES, "column > 0, column <", "true, column <",
          CHANNELS_LAST),
    Fault("CUDA patches: an odd column at the tap of an even one", PATCHES, "s = i % 2 ? 1 : w % 2", "s = w % 2",
          CHANNELS_LAST),
    Fault("CUDA rows: the last of equal values wins", ROWS, "if (v > value[i] ||", "if (v >= value[i] ||", TIES),
    Fault("CUDA rows: the first NaN wins", ROWS, "v > value[i] || v != v", "!(v <= value[i]) && value[i] == value[i]",
          TIES),
    Fault("CUDA rows: the third row's taps are the first's", ROWS, "6 + row.tap[i]", "row.tap[i]", TIES),
    Fault("CUDA rows: no barrier before the neighbour's column is read", ROWS, "__syncthreads();\n    get(", "get(",
          f"{EMULATOR} -k 'order and relu_lrn_max_pool2d and channels_last'"),
    Fault("CUDA walk: no barrier before other patches' inputs are read", WALK,
          "shared.put(values);\n    __syncthreads();", "shared.put(values);",
          f"{EMULATOR} -k 'order and relu_lrn_max_pool2d and contiguous'"),
    Fault("CUDA walk: ReLU's mask dropped", WALK, "inside[i] && !(walks[i].input() <= 0) ?", "inside[i] ?", CONTIGUOUS),
    Fault("CUDA walk: ReLU dropped backward", WALK, "relu(values[i][j]), gathered", "values[i][j], gathered",
          CONTIGUOUS),
    Fault("CUDA walk: a row takes its first run alone", WALK, "run < p.runs; run +=",
          "run < p.rows; run +=", f"{EMULATOR} -k 'relu_lrn_max_pool2d and many and contiguous'"),
    Fault("slower: narrow tiles, whose edges are read again", ROWS,
          "most = most_threads / kWarp * owners / lanes - 1;", "most = 3;",
          f"{GATES} -k 'relu_lrn_max_pool2d and forward'"),
    Fault("slower: the gradient by the general path", LAUNCHER, "if (lanes && has_patches(p)) {", "if (false) {",
          f"{GATES} -k 'relu_lrn_max_pool2d and backward'"),
)  # fmt: skip


SPEC = Spec(
    **blocks.common("relu_lrn_max_pool2d"),
    stock=stock,
    draw=spec.normal,
    backward_arguments=lambda dy, tensors, y, saved, constants: (dy, *tensors.values(), *saved, *constants),
    needs={"x": {"x"}, "bias": {"x"}},
    winners=True,
    saved=lambda x, y: x.nbytes + y.numel() + x.shape[1] * x.itemsize,  # the last a copy of bias
    moved=moved,
    target=10.0,
    copies=1.25,
    bad_backward_calls={
        **DY_BAD,
        **POOL_BAD,
        **LRN_BAD,
        "x_shape": change(1, lambda x: x[:, :-1]),
        "x_dtype": change(1, lambda x: x.half()),
        "bias_length": change(2, smaller),
        "winners_shape": change(3, smaller),
        "winners_dtype": change(3, lambda winners: winners.int()),
    },
    settled=settled,
    triton_kernels=frozenset({"relu_lrn_max_pool2d_forward_kernel", "relu_lrn_max_pool2d_backward_kernel"}),
    faults=FAULTS,
)
