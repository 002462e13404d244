"""sgd_step, as tests, benchmarks and planted faults know it: it updates lists of tensors in place.

A case has one tensor for each list, which is cut into tensors of ``sizes``: neighbours in memory, and so at addresses
that 16 does not divide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.spec import EMULATOR, FP32, FP64, Case, Fault, InPlace, Spec, Tensors

CPU = "csrc/sgd_step/sgd_step_cpu.cpp"
CUDA = "csrc/sgd_step/sgd_step_kernels.cuh"
LISTS = ("gradients", "parameters", "momenta", "weights")
# The weights and biases of the paper's network.
PAPER = (34848, 96, 307200, 256, 884736, 384, 663552, 384, 442368, 256, 37748736, 4096, 16777216, 4096, 4096000, 1000)


def sgd(sizes: tuple[int, ...], dtype: torch.dtype = FP32, **constants: Any) -> Case:
    """Of rate, momentum and decay that are no powers of two, so that each product is rounded."""
    given = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.03, "nesterov": False}
    given |= {"maximize": False, "first_step": False}
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(LISTS, (sum(sizes),))
    return Case("sgd_step", shapes, {"sizes": sizes, "dtype": dtype} | given | constants)


def stock(
    parameters: list[Tensor],
    momenta: list[Tensor],
    gradients: list[Tensor],
    weights: list[Tensor],
    first_step: bool,
    **constants: Any,
) -> None:
    """PyTorch's own optimizer, and a copy of its parameters."""
    optimizer = torch.optim.SGD(parameters, **constants)
    for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        parameter.grad = gradient.to(parameter.dtype)
        if momenta and not first_step:
            optimizer.state[parameter]["momentum_buffer"] = momenta[i]
    optimizer.step()
    for i, parameter in enumerate(parameters):
        parameter.grad = None
        if momenta and first_step:
            momenta[i].copy_(optimizer.state[parameter]["momentum_buffer"])
        if weights:
            weights[i].copy_(parameter)


def draw(case: Case, generator: torch.Generator) -> Tensors:
    """Gradients are multiples of 1/64, exact in every dtype."""
    shape, dtype = case.shapes["gradients"], case.constants["dtype"]
    whole = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    tensors: Tensors = {"gradients": whole.to(dtype) / 64}
    for name in ("parameters", "momenta"):
        tensors[name] = torch.randn(shape, generator=generator, dtype=wide(dtype))
    return tensors | {"weights": torch.zeros(shape, dtype=dtype)}


def wide(dtype: torch.dtype) -> torch.dtype:
    return FP64 if dtype == FP64 else FP32


def copies(case: Case, tensors: Tensors) -> Tensors:
    dtype = case.constants["dtype"]
    dtypes = {"gradients": dtype, "parameters": wide(dtype), "momenta": wide(dtype), "weights": dtype}
    return {name: tensors[name].to(dtypes[name], copy=name != "gradients") for name in LISTS}


def call(function: Callable[..., None], case: Case, tensors: Tensors) -> None:
    constants = {name: value for name, value in case.constants.items() if name not in ("sizes", "dtype")}
    lists = {name: list(values.split(case.constants["sizes"])) for name, values in tensors.items()}
    if case.constants["momentum"] == 0:
        lists["momenta"] = []
    if case.constants["dtype"] in (FP32, FP64):
        lists["weights"] = []
    function(**lists, **constants)


def result(case: Case, tensors: Tensors) -> Tensor:
    """Parameters, momenta, and how far weights are from the parameters as PyTorch rounds them."""
    parameters, momenta, weights = (tensors[name] for name in LISTS[1:])
    off = torch.zeros_like(parameters)
    if weights.dtype != parameters.dtype:
        off = weights.to(parameters.dtype) - parameters.to(weights.dtype).to(parameters.dtype)
    return torch.cat([parameters, momenta, off])


def moved(case: Case, width: int) -> tuple[int, int]:
    """The gradient read, parameter and momentum read and written, the weight written where there is one."""
    dtype = case.constants["dtype"]
    weight = dtype.itemsize if dtype.itemsize == 2 else 0
    return case.shapes["gradients"][0] * (dtype.itemsize + weight + 4 * wide(dtype).itemsize), 0


VARIATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"first_step": True},
    {"first_step": True, "dampening": 0.2},
    {"nesterov": True},
    {"dampening": 0.2, "maximize": True},
    {"momentum": 0.0},
    {"weight_decay": 0.0, "nesterov": True, "maximize": True},
    {"momentum": 0.0, "weight_decay": 0.0},
)
# Momentum, rate and decay whose products are not rounded. A fused multiply-add then gives the bits of a product and a
# sum, which the portable CPU kernel computes.
EXACT = {"lr": 0.25, "momentum": 0.5, "weight_decay": 2.0**-6}
EXACT_VARIATIONS = tuple(
    EXACT | {name: value if value in (0, True) else 0.5 for name, value in variation.items()}
    for variation in VARIATIONS
)
# About vectors of 2, 4 and 8 elements, and chunks of 256 of them.
AROUND_VECTORS = (1, 8, 3, 16, 7, 0, 2, 9, 64, 15, 17, 65)
AROUND_CHUNKS = (2048, 511, 513, 1024, 1, 2047, 2049, 4096)


FAULTS = (
    Fault("sgd: what momentum keeps is not made smaller", CPU, "c.mu * m[i])", "m[i])", "sgd_step"),
    Fault("sgd: decay away from zero", CPU, "fused(c.decay, p[i], u[i])", "fused(-c.decay, p[i], u[i])", "sgd_step"),
    Fault("sgd: what a block has no room for is left out", CPU, "i < to; i += kBlock", "i + kBlock <= to; i += kBlock",
          "sgd_step"),
    Fault("sgd: a weight is cut off, not rounded", CPU, "store_row<T>(w, p, n)",
          "for (int64_t i = 0; i < n; ++i) "
          "w[i] = narrow<T>(from_bits(to_bits(static_cast<float>(p[i])) & 0xffffe000u))", "sgd_step"),
    Fault("sgd: dampening at the first step too", CPU, "if (c.first_step)", "if (false)", "sgd_step"),
    Fault("boundary: sgd takes any gradient for dense", "csrc/sgd_step/sgd_step_plan.h",
          "if (!same_strides(gradient, parameter))", "if (false)", "tests/ops/sgd_step/test_sgd_step.py -k strides"),
    Fault("CUDA: sgd leaves out what fills no vector", CUDA, "j < tensor.size && j < i + V", "j < tensor.size && j < i",
          f"{EMULATOR} -k 'sgd_step and float32'"),
    Fault("CUDA: sgd takes a chunk for the tensor's before", CUDA, "first[middle] <= chunk", "first[middle] < chunk",
          f"{EMULATOR} -k 'sgd_step and float32'"),
    Fault("CUDA: sgd writes a weight without its step", CUDA, "static_cast<T*>(tensor.weight) + i, p)",
          "static_cast<T*>(tensor.weight) + i, u)", f"{EMULATOR} -k 'sgd_step and bfloat16'"),
)  # fmt: skip


SPEC = Spec(
    name="sgd_step",
    gradient=False,
    on_gpu=True,
    in_triton=False,
    product=False,
    in_place=InPlace(copies, call, result),
    stock=stock,
    draw=draw,
    cases=(
        *(sgd(AROUND_VECTORS, **constants) for constants in VARIATIONS),
        sgd((511, 512, 513, 1)),
        sgd((16383, 16384, 16385, 40000)),
        sgd((3,) * 70, nesterov=True),
    ),
    examples=(sgd((5, 17, 8), **EXACT), sgd((5, 17, 8), **EXACT, first_step=True)),
    edges=(),
    small=(),
    large=(),
    many=(),
    alexnet=(sgd(PAPER),),
    backward_arguments=None,
    needs={},
    winners=False,
    saved=None,
    moved=moved,
    target=None,
    copies=None,
    bad_calls={},
    bad_backward_calls={},
    fuzz=None,
    summands=lambda case, name: 1,
    settled=lambda case, exact, eps: True,
    magnitude=lambda case: 1.0,
    emulated=(
        *(sgd(AROUND_VECTORS, **constants) for constants in EXACT_VARIATIONS),
        sgd(AROUND_CHUNKS, **EXACT),
    ),
    emulated_orders=(),
    emulated_many=(),
    ptx=(*(sgd(AROUND_VECTORS, **constants) for constants in EXACT_VARIATIONS), sgd((1, 2049, 520), **EXACT)),
    runs=None,
    triton_kernels=frozenset(),
    faults=FAULTS,
)
