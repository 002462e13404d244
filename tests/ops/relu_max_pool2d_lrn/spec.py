"""relu_max_pool2d_lrn, as tests, benchmarks and planted faults know it (ops/blocks.py: what the other block shares)."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tests.ops import blocks
from tests.ops.blocks import LRN_BAD, POOL_BAD, activation
from tests.support import spec
from tests.support.spec import DY_BAD, EMULATOR, Case, Fault, Spec, Tensors, change, smaller


def stock(
    x: Tensor, bias: Tensor | None, lrn_size: int, alpha: float, beta: float, k: float, kernel_size: Any, stride: Any
) -> Tensor:
    return F.local_response_norm(F.max_pool2d(activation(x, bias), kernel_size, stride), lrn_size, alpha, beta, k)


def settled(case: Case, exact: Tensors, eps: float) -> Tensor | bool:
    found = blocks.settled(case, activation(**exact), eps)
    if found is True:
        return True
    # An output's gradient goes on to its neighbouring channels' windows.
    reach = case.constants["lrn_size"] // 2
    beside = F.pad(~found.movedim(1, -1), (reach, reach))
    return ~beside.unfold(-1, 2 * reach + 1, 1).any(-1).movedim(-1, 1)


def moved(case: Case, width: int) -> tuple[int, int]:
    """The winners are a byte each; what is pooled is kept for the backward."""
    elements, x = blocks.output_size(case), width * math.prod(case.shapes["x"])
    y, bias = width * elements, width * math.prod(case.shapes["bias"] or (0,))
    return x + bias + y + y + elements, y + y + elements + x


KERNELS = "csrc/relu_max_pool2d_lrn/relu_max_pool2d_lrn_kernels.cuh"
FAULTS = (
    Fault("CUDA: no barrier before a block's next tile",
          KERNELS, "__syncthreads();\n  }\n  sum_owners",
          "}\n  sum_owners", f"{EMULATOR} -k 'relu_max_pool2d_lrn and (order or many)'"),
    Fault("CUDA: a patch's taps transposed", KERNELS,
          "patch_tap(a, r) * 3 + patch_tap(b, s)", "patch_tap(b, s) * 3 + patch_tap(a, r)",
          f"{EMULATOR} -k 'relu_max_pool2d_lrn and (order or many)'"),
    Fault("CUDA walk: the winner of another channel", KERNELS, "const int winner = late[0];",
          "const int winner = best.tap[j];", f"{EMULATOR} -k 'relu_max_pool2d_lrn and float32 and contiguous'"),
    Fault("CUDA walk: the bias sums take what no input won", KERNELS, "owns && byte_of<kRun>(taps, j) != kNoWinner",
          "owns", f"{EMULATOR} -k 'relu_max_pool2d_lrn and float32 and contiguous'"),
)  # fmt: skip


SPEC = Spec(
    **blocks.common("relu_max_pool2d_lrn"),
    stock=stock,
    draw=spec.normal,
    backward_arguments=lambda dy, tensors, y, saved, constants: (dy, *saved, *tensors["x"].shape[2:], *constants),
    needs={"x": set(), "bias": set()},
    winners=True,
    saved=lambda x, y: y.nbytes + y.numel(),
    moved=moved,
    target=None,
    copies=1.25,
    bad_backward_calls={
        **DY_BAD,
        **POOL_BAD,
        **LRN_BAD,
        "pooled_shape": change(1, smaller),
        "pooled_dtype": change(1, lambda pooled: pooled.half()),
        "winners_shape": change(2, smaller),
        "winners_dtype": change(2, lambda winners: winners.int()),
        "height0": change(3, 0),
        "width_of_another_x": change(4, 40),
    },
    settled=settled,
    # The gradient of pooling, then normalization, is that of each.
    triton_kernels=frozenset(
        {
            "relu_max_pool2d_lrn_forward_kernel",
            "local_response_norm_backward_kernel",
            "relu_max_pool2d_backward_kernel",
        }
    ),
    faults=FAULTS,
)
