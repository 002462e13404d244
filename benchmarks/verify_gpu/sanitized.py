"""``python -m benchmarks.verify_gpu.sanitized WAY``, under compute-sanitizer: each op once forward and backward.

By ``native`` and ``triton`` in both layouts; by ``auto`` each candidate of the convolution except cuDNN.
"""

import sys
from collections.abc import Iterator
from functools import partial

import torch

from alexnet_ext.ops import _backend
from tests.support import cases
from tests.support.cases import Case, conv

from .common import choosing, examples, gradients
from .stages.correctness import candidate_names, named

# Two towers whose channels fit CUTLASS's 16-byte accesses; a first layer.
CONVOLUTIONS = (conv((2, 32, 9, 9), 64, (3, 3), padding=1, groups=2), conv((2, 3, 35, 39), 32, (11, 11), stride=4))


def calls(way: str) -> Iterator[tuple[str, partial[object]]]:
    for layout in ("channels_last", "contiguous"):
        if way != "auto":
            for case, _ in examples("cuda", lambda found: found == way):
                yield (
                    f"{case.id} {layout}",
                    partial(gradients, case, cases.make(case, layout=layout, device="cuda"), way),
                )
        elif "auto" in _backend.kernels("conv2d_bias_relu", "cuda"):
            for case in CONVOLUTIONS:
                yield from candidates(case, layout)


def candidates(case: Case, layout: str) -> Iterator[tuple[str, partial[object]]]:
    tensors = cases.make(case, torch.bfloat16, layout, device="cuda")
    for name in candidate_names(case, torch.bfloat16, layout, "cuda"):
        if not name.startswith("cudnn"):
            yield f"{case.id} {layout} {name}", partial(chosen, name, case, tensors)


def chosen(name: str, case: Case, tensors: cases.Tensors) -> None:
    with choosing(named(name), "cuda"):
        gradients(case, tensors, "auto")


if __name__ == "__main__":
    for name, call in calls(sys.argv[1]):
        call()
        torch.cuda.synchronize()
        print(f"ran {name}", flush=True)
