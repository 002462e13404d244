"""Block sizes of the convolution kernels by architecture: data, and what is searched where there is none.

Chosen so that they compile without spills within each chip's shared memory; not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

# By major compute capability, kernel and arithmetic: (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages).
TABLE: dict[int, dict[tuple[str, str], tuple[int, int, int, int, int]]] = {
    8: {
        ("product", "half"): (128, 128, 32, 8, 4),
        ("weight", "half"): (128, 128, 32, 8, 4),
        ("product", "tf32"): (128, 64, 32, 8, 3),
        ("weight", "tf32"): (64, 128, 32, 8, 3),
        ("product", "ieee"): (64, 64, 16, 8, 2),
        ("weight", "ieee"): (64, 64, 16, 8, 2),
        ("product", "fp64"): (32, 32, 16, 4, 2),
        ("weight", "fp64"): (32, 32, 16, 4, 2),
    },
    9: {
        ("product", "half"): (128, 128, 64, 8, 3),
        ("weight", "half"): (128, 128, 64, 8, 3),
        ("product", "tf32"): (128, 64, 32, 8, 3),
        ("weight", "tf32"): (64, 128, 32, 8, 3),
        ("product", "ieee"): (64, 64, 16, 8, 2),
        ("weight", "ieee"): (64, 64, 16, 8, 2),
        ("product", "fp64"): (32, 32, 16, 4, 2),
        ("weight", "fp64"): (32, 32, 16, 4, 2),
        ("persistent", "half"): (128, 128, 64, 8, 3),
        ("persistent", "tf32"): (128, 64, 32, 8, 3),
    },
}
# Half as wide: two blocks' addresses are kept at a time, and with them 128 columns spill on 10.0.
TABLE[10] = TABLE[9] | {("persistent", "half"): (128, 64, 64, 8, 3)}

CANDIDATES = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in ((128, 128, 32, 8, 3), (128, 64, 32, 4, 3), (64, 64, 32, 4, 3), (32, 32, 16, 4, 2))
]
"""The configurations that ``triton.autotune`` tries on an architecture without an entry."""


def kind(dtype: torch.dtype, precision: str) -> str:
    """The arithmetic of a product: ``half``, ``tf32``, ``ieee`` or ``fp64``."""
    return {torch.float32: precision, torch.float64: "fp64"}.get(dtype, "half")


def blocks(major: int, kernel: str, dtype: torch.dtype, precision: str, columns: int) -> dict[str, int]:
    """The table's entry, narrowed to products of fewer columns."""
    block_m, block_n, block_k, warps, stages = TABLE[major][kernel, kind(dtype, precision)]
    while block_n > 16 and block_n >= 2 * columns:
        block_n //= 2
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}


def architecture(x: Tensor) -> int:
    """Major compute capability of x's device; in the interpreter the newest that the table has."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else max(TABLE)


def has_persistent(x: Tensor, precision: str) -> bool:
    """Whether there is a persistent product for x: compute capability 9.0 and newer, on tensor cores."""
    return ("persistent", kind(x.dtype, precision)) in TABLE.get(architecture(x), {})


def resident(x: Tensor) -> int:
    """The number of persistent programs: one a multiprocessor, as each takes most of its shared memory."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def known(kernel: str, x: Tensor, precision: str, columns: int) -> dict[str, int] | None:
    """Block sizes for x's device; None where they are to be searched, which a CUDA graph's capture does not allow."""
    major = architecture(x)
    if major not in TABLE:
        if not torch.cuda.is_current_stream_capturing():
            return None
        major = 8  # what every later chip can run
    return blocks(major, kernel, x.dtype, precision, columns)
