"""local_response_norm, as tests, benchmarks and planted faults know it."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from tests.support import spec
from tests.support.spec import DY_BAD, EMULATOR, IN_TRITON, MANY, TILE_SHAPES, X_BAD, Case, Draw, Fault, Spec, change

LRN = "csrc/local_response_norm/local_response_norm_rows.h"
PAIRS = "csrc/local_response_norm/local_response_norm_pairs.cuh"
CUDA_LRN = "csrc/local_response_norm/local_response_norm_window.cuh"


def lrn(shape: tuple[int, ...], size: int = 5, alpha: float = 1.5, beta: float = 0.75, k: float = 2.0) -> Case:
    return Case(
        "local_response_norm", {"x": shape}, {"size": size, "alpha": alpha, "beta": beta, "k": k}
    )  # alpha far above AlexNet's 1e-4, under which a wrong window would hardly show


def stock(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return F.local_response_norm(x, size, alpha, beta, k)


def fuzz(draw: Draw) -> Case:
    from tests.support.drawing import alphas, betas, draw_shape, sampled, windows

    shape = draw_shape(draw, draw(sampled([3, 4, 4, 4, 5, 6])))
    return lrn(shape, draw(windows), draw(alphas), draw(betas), draw(sampled([1.0, 2.0, 0.5])))


def moved(case: Case, width: int) -> tuple[int, int]:
    x = width * math.prod(case.shapes["x"])
    return 2 * x, 3 * x  # read x, write y; read dy and x, write dx


OTHER_RANKS = (lrn((2, 9, 17)), lrn((2, 7, 2, 3, 5)), lrn((2, 6, 2, 3, 1, 5), size=4))
BAD = {"size0": change(-4, 0), "size_negative": change(-4, -3)}


FAULTS = (
    Fault("Triton LRN: the next lane's channels not read", "alexnet_ext/ops/local_response_norm/triton_kernels.py",
          "else shifted(parts[i % n], i // n)", "else parts[i % n]", f"{IN_TRITON} -k reach_far"),
    Fault("LRN: window of even n mirrored", LRN, "return data - before_ * step;", "return data - after_ * step;",
          "local_response_norm"),
    Fault("LRN: window shifted by one", LRN, "window(windows + f, step)", "window(windows + f + step, step)",
          "local_response_norm", 2),
    Fault("LRN: last channel of the window left out", LRN, "j <= before_ + after_", "j < before_ + after_",
          "local_response_norm"),
    Fault("LRN: backward's mirror dropped", LRN, "terms + f - after_ * step", "terms + f - before_ * step",
          "local_response_norm"),
    Fault("LRN: alpha not divided by n", LRN, "static_cast<A>(lrn_.alpha / static_cast<double>(lrn_.size))",
          "static_cast<A>(lrn_.alpha)", "local_response_norm", 2),
    Fault("LRN: backward's factor not divided by n", LRN,
          "2 * lrn_.alpha * lrn_.beta / static_cast<double>(lrn_.size)", "2 * lrn_.alpha * lrn_.beta",
          "local_response_norm"),
    Fault("LRN: 0 * inf flows through beta = 0", LRN, "if (lrn_.beta == 0)", "if (false)", "local_response_norm"),
    Fault("LRN: last tile not cut short", "csrc/local_response_norm/local_response_norm_cpu.cpp",
          "left < kLrnTile ? left : kLrnTile", "kLrnTile", "local_response_norm"),
    Fault("boundary: LRN takes any gradient for dense", "csrc/local_response_norm/local_response_norm_plan.h",
          "launch(p, with_strides_of(dx, dy), in, dx);", "launch(p, dy, in, dx);",
          "tests/ops/test_citizen.py -k 'gradients_of_any_layout and local_response_norm and float32'"),
    Fault("CUDA: no barrier before neighbours' terms are added up",
          CUDA_LRN, "__syncthreads();\n    const auto add", "const auto add",
          f"{EMULATOR} -k 'order and local_response_norm'"),
    Fault("CUDA: no barrier before the next neighbours' terms", CUDA_LRN,
          "add(own.lane - before + total, total);\n    __syncthreads();", "add(own.lane - before + total, total);",
          f"{EMULATOR} -k 'order and 70x'"),
    Fault("CUDA: the last term of a window left out", CUDA_LRN, "own.lane + after + 1", "own.lane + after",
          f"{EMULATOR} -k 'values and relu_lrn_max_pool2d and float64 and channels_last'"),
    Fault("CUDA: terms in front of a block's channels left out", CUDA_LRN,
          "add(own.lane - before + total, total);", "",
          f"{EMULATOR} -k 'values and relu_max_pool2d_lrn and float64 and contiguous'"),
    Fault("CUDA: outer lanes of a warp write too", CUDA_LRN,
          "lane > 0 && lane < kWarp - 1 && v < vectors", "v < vectors",
          f"{EMULATOR} -k 'order and local_response_norm'"),
    Fault("CUDA: the window reaches into the next pixel", CUDA_LRN, "last ? 0 : behind", "behind",
          f"{EMULATOR} -k 'values and local_response_norm and float32 and channels_last'"),
    Fault("CUDA: a scale that is subnormal taken for 0", CUDA_LRN, " && lrn.k >= 0x1p-126", "",
          f"{EMULATOR} -k 'subnormal and 1e-40'"),
    Fault("CUDA: a scale that alpha makes subnormal taken for 0", CUDA_LRN, " && lrn.alpha >= 0", "",
          f"{EMULATOR} -k 'subnormal and 1.2e-38'"),
    Fault("CUDA: chunks of channels without their ends", CUDA_LRN, "c = first - kDelay;", "c = first;",
          f"{EMULATOR} -k 'values and local_response_norm and float32 and contiguous'"),
    Fault("CUDA: pairs of channels, a neighbour across the end of a pixel", PAIRS, "(last ? 0 : after)", "after",
          f"{EMULATOR} -k 'relu_lrn_max_pool2d and float32 and channels_last'"),
)  # fmt: skip


SPEC = Spec(
    name="local_response_norm",
    gradient=True,
    on_gpu=True,
    in_triton=True,
    product=False,
    in_place=None,
    stock=stock,
    draw=spec.normal,
    cases=(
        *(lrn(shape) for shape in ((2, 7, 5, 3), (1, 1, 1, 1), (3, 1, 2, 5), (1, 5, 1, 1), (0, 3, 2, 2), (2, 0, 2, 2))),
        *(lrn(shape) for shape in TILE_SHAPES),
        *(lrn((2, 6, 3, 5), size=size) for size in (1, 2, 3, 4, 7, 15, 33)),
        *(lrn((2, 7, 3, 5), beta=beta) for beta in (0.0, 0.5, 1.0, 2.0, -1.0, 0.3)),
        lrn((1, 8, 3, 5), size=4, alpha=1e-4, k=1.0),
    ),
    examples=(lrn((2, 6, 5, 7), size=4),),
    edges=(lrn((0, 3, 4, 5)), lrn((1, 1, 1, 1))),
    small=(lrn((1, 3, 1, 2), size=2),),
    large=(lrn((4, 24, 33, 31)),),
    many=tuple(lrn(shape) for shape in MANY),
    alexnet=tuple(lrn((1, *shape), alpha=5e-4) for shape in ((96, 55, 55), (256, 27, 27))),
    backward_arguments=lambda dy, tensors, y, saved, constants: (dy, tensors["x"], *constants),
    needs={"x": {"x"}},
    winners=False,
    saved=lambda x, y: x.nbytes,
    moved=moved,
    target=10.0,
    copies=1.15,
    bad_calls=X_BAD | BAD,
    bad_backward_calls=DY_BAD | BAD | {"x_dtype": change(1, lambda x: x.half())},
    fuzz=fuzz,
    summands=lambda case, name: case.constants["size"],
    settled=spec.everywhere,
    magnitude=lambda case: case.constants["k"] ** -case.constants["beta"],
    # Vectors of 8 channels and warps of 32 lanes, blocks of 256 threads: one below, at and one above; several blocks.
    emulated=(
        *(lrn((2, channels, 3, 5)) for channels in (1, 7, 8, 9, 16, 40)),
        *(lrn((1, 8, 1, pixels)) for pixels in (29, 30, 31, 61)),
        *(lrn((2, 24, 3, 5), size=size) for size in (1, 2, 3, 4, 7, 15)),
        *(lrn((2, 16, 3, 5), beta=beta) for beta in (0.0, 0.5, 1.0, 0.3)),
        *(lrn((2, channels, 2, 3), size) for channels, size in ((65, 4), (130, 9), (150, 100), (70, 300))),
        *(lrn(shape) for shape in ((0, 3, 2, 2), (2, 0, 2, 2), (2, 264, 2, 2), (3, 16, 17, 11))),
    ),
    emulated_orders=(lrn((3, 48, 3, 5)), lrn((2, 24, 3, 5), size=4)),
    emulated_many=(lrn((70_000, 1, 1, 1)),),
    ptx=(
        *(lrn((1, 8, 1, 30)), lrn((2, 7, 3, 5)), lrn((2, 24, 3, 5), size=3), lrn((2, 24, 3, 5), size=7)),
        *(lrn((2, 16, 3, 5), beta=0.3), lrn((1, 130, 2, 3), size=4)),
    ),
    runs=spec.memory_bound_runs(
        lrn, *(lambda shape, beta=beta: lrn(shape, beta=beta) for beta in (0.3, 0.5, 1.0, 2.0, -1.0))
    ),
    triton_kernels=frozenset({"local_response_norm_forward_kernel", "local_response_norm_backward_kernel"}),
    faults=FAULTS,
)
