"""Times each op, a copy of the bytes it must move, stock and compiled stock; each way to convolve, each direction.

fp32 products are TF32's, as PyTorch's convolutions are; cuDNN measures its algorithms first (``cudnn.benchmark``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ext import _library
from alexnet_ext.ops import _backend
from alexnet_ext.ops._race import Candidate
from benchmarks import harness
from tests.support import cases
from tests.support.cases import Case, Tensors

from ..common import SIZES, choosing, fused, ways
from ..report import Finding
from ..timing import Backward, Run, copy_of, copy_rate, median_ms, product_rate, warm_up
from . import Task

ALLOWED = {
    "local_response_norm": 1.15,
    "relu_max_pool2d": 1.15,
    "relu_lrn_max_pool2d": 1.25,
    "relu_max_pool2d_lrn": 1.25,
}
"""Times a copy of the same bytes: the target."""
OURS = ("native", "triton", "auto")


def run(task: Task) -> Iterator[Finding]:
    device = task.device
    torch.backends.cudnn.benchmark = True
    warm_up(device)
    rate = copy_rate(device)
    yield Finding(f"copy {task.part}".strip(), None, f"{rate / 1e6:.3g} GB/s, read and written")
    for op in filter(task.wants, cases.named("on_gpu")):
        yield from (op_findings if cases.SPECS[op].gradient else typed_findings)(op, device)
    if task.wants("convolution"):
        yield from convolution_findings(device)


def made(case: Case, dtype: torch.dtype, layout: str, device: str) -> Tensors:
    """As ``cases.make``, drawn on the device: a batch of 256 would take the CPU seconds."""
    tensors: Tensors = {}
    for name, shape in case.items():
        tensors[name] = None
        if shape is not None:
            values = torch.randn(shape, dtype=dtype, device=device)
            if name == "weight":
                values /= math.sqrt(math.prod(shape[1:]))
            if layout == "channels_last" and len(shape) == 4:
                values = values.contiguous(memory_format=torch.channels_last)
            tensors[name] = values.requires_grad_(name != "x" or shape[1] != 3)  # images need no gradient
    return tensors


def operations(case: Case, y: Tensor, directions: int = 1) -> int:
    """The multiplications and additions of a product."""
    return 2 * y.numel() * math.prod(case.shapes["weight"][1:]) * directions


def op_findings(op: str, device: str) -> Iterator[Finding]:
    sizes = SIZES[device]
    for dtype in sizes.dtypes:
        rate = product_rate(device, dtype) if op in cases.PRODUCTS else math.nan
        for layout, (index, case) in itertools.product(
            ("channels_last", "contiguous"), enumerate(cases.alexnet_cases(op, sizes.batch))
        ):
            # Compiling takes seconds: one layer for each op, dtype and layout (the first convolution with two towers).
            with_compiled = device == "cuda" and index == (op in cases.PRODUCTS)
            yield from case_findings(case, dtype, layout, device, rate, with_compiled)


def case_findings(
    case: Case, dtype: torch.dtype, layout: str, device: str, rate: float, with_compiled: bool
) -> Iterator[Finding]:
    tensors = made(case, dtype, layout, device)
    wanted = list(cases.wanting_grad(tensors).values())
    with torch.no_grad():
        y = cases.stock(case, tensors)
    dy = torch.randn_like(y)
    runs: dict[str, Callable[[], Tensor]] = {way: partial(fused, case, tensors, way) for way in ways(case.op, device)}
    runs["stock"] = partial(cases.stock, case, tensors)
    if with_compiled:
        torch._dynamo.reset()  # every case compiles the same function, which Dynamo stops doing at its cache limit
        compiled = torch.compile(partial(cases.stock, case), fullgraph=True, dynamic=False)
        runs["compiled stock"] = partial(compiled, tensors)
    for direction in ("forward", "backward"):
        backward = direction == "backward"
        moved = cases.bytes_moved(case, dtype.itemsize)[backward]
        contestants: dict[str, Any] = {
            name: Backward(run, wanted, dy) if backward else run for name, run in runs.items()
        }
        with torch.set_grad_enabled(backward):
            found = median_ms(contestants | {"copy": copy_of(moved, device)}, device)
        floor = found.pop("copy")
        if case.op in cases.PRODUCTS:
            floor = max(floor, operations(case, y, len(wanted) - 1 if backward else 1) / rate)
        name = f"{case.op} {harness.layer_name(case)} {cases.dtype_id(dtype)} {layout} {direction}"
        about = {"kind": "op", "op": case.op, "dtype": str(cases.dtype_id(dtype)), "layout": layout}
        yield Finding(name, None, numbers=compared(case.op, found, moved, floor), about=about)
        for missing in runs.keys() - found.keys():
            yield Finding(f"{name} by {missing}", False, "it does not run", about={"backend": missing})


def compared(op: str, found: dict[str, float], moved: int, floor: float) -> dict[str, Any]:
    ours = {name: found[name] for name in OURS if name in found}
    best = min(ours.values(), default=math.nan)
    compiled = found.get("compiled stock")
    return {
        "MB": moved / 1e6,
        "floor ms": floor,
        **{f"{name} ms": found.get(name) for name in (*OURS, "stock", "compiled stock")},
        "fastest": min(found, key=found.__getitem__, default=""),
        "% of floor": 100 * floor / best,
        "target": 100 / copies if (copies := cases.SPECS[op].copies) else None,
        "times stock": found["stock"] / best if "stock" in found else None,
        "times compiled": compiled / best if compiled else None,
    }


def convolution_findings(device: str) -> Iterator[Finding]:
    """Every way that the convolution may take, each direction for itself, beside stock's."""
    if "auto" not in _backend.kernels("conv2d_bias_relu", device):
        return
    for library in (_library.CUTLASS, _library.SM90):
        if not library.loaded:
            yield Finding(f"conv2d_bias_relu {library.name}", None, f"skipped: {library.reason}")
    sizes = SIZES[device]
    layers = cases.alexnet_cases("conv2d_bias_relu", sizes.batch)
    for dtype, layout, case in itertools.product(sizes.dtypes, ("channels_last", "contiguous"), layers):
        offered: dict[str, Sequence[Candidate]] = {}

        def note(what: str, given: Sequence[Candidate], offered: dict[str, Sequence[Candidate]] = offered) -> Candidate:
            offered[what.split(" x ")[0]] = given
            return given[0]

        tensors = made(case, dtype, layout, device)
        with choosing(note, device):
            y = cases.fused(case, tensors)
            y.sum().backward()
        for what, given in offered.items():
            runs: dict[str, Any] = {candidate.name: candidate.run for candidate in given}
            stock = stock_ways(case, tensors, y.detach(), what, device)
            with torch.no_grad():
                found = median_ms(runs | stock, device)
            ours = {name: ms for name, ms in found.items() if name in runs}
            theirs = {name: ms for name, ms in found.items() if name in stock}
            best = min(ours, key=ours.__getitem__)
            numbers: dict[str, Any] = {f"{name} ms": ms for name, ms in found.items()}
            numbers |= {"fastest": best, "TFLOP/s": operations(case, y) / ours[best] / 1e9}
            if theirs:
                numbers |= {"fastest stock": min(theirs, key=theirs.__getitem__)}
                numbers |= {"times stock": min(theirs.values()) / ours[best]}
            layer = f"{harness.layer_name(case)} {cases.dtype_id(dtype)} {layout}"
            yield Finding(f"{what} {layer}", None, numbers=numbers, about={"kind": "convolution"})
            for missing in runs.keys() - found.keys():
                detail = "it does not run, and is not chosen"
                yield Finding(f"{what} {layer} by {missing}", False, detail, about={"backend": "auto"})


def stock_ways(case: Case, tensors: Tensors, y: Tensor, what: str, device: str) -> dict[str, Run]:
    """The ways of stock PyTorch in this layout: as it is, a tower on each of two streams, one tower with zeros.

    In stock's favour, the towers' results stay apart and the zeros exist already.
    """
    x, weight, bias = (None if t is None else t.detach() for t in tensors.values())
    stride, padding, dilation = (cases.pair(case.constants[name]) for name in ("stride", "padding", "dilation"))
    groups = case.constants["groups"]
    wanted = 0 if "input gradient" in what else 1 if "weight gradient" in what else None
    dz = torch.randn_like(y) * (y > 0)

    def whole(x: Tensor, weight: Tensor, bias: Tensor | None, dz: Tensor, groups: int) -> list[Tensor]:
        if wanted is None:
            return [F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))]
        mask = [wanted == 0, wanted == 1, False]
        found = torch.ops.aten.convolution_backward(
            dz, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return [found[wanted]]

    found: dict[str, Run] = {"stock": partial(whole, x, weight, bias, dz, groups)}
    if groups > 1:
        biases = [None] * groups if bias is None else bias.tensor_split(groups)
        parts = [t.tensor_split(groups, dim) for t, dim in ((x, 1), (weight, 0), (dz, 1))]
        towers = [
            partial(whole, own_x, own_weight, own_bias, own_dz, 1)
            for own_x, own_weight, own_bias, own_dz in zip(*parts[:2], biases, parts[2], strict=True)
        ]
        if device == "cuda":
            found["stock two streams"] = partial(beside, towers, [torch.cuda.Stream() for _ in towers])
        dense = torch.zeros(weight.shape[0], x.shape[1], *weight.shape[2:], dtype=weight.dtype, device=device)
        for tower, own in enumerate(weight.tensor_split(groups)):
            dense.tensor_split(groups)[tower].tensor_split(groups, 1)[tower].copy_(own)
        if x.is_contiguous(memory_format=torch.channels_last):
            dense = dense.contiguous(memory_format=torch.channels_last)
        found["stock dense with zeros"] = partial(whole, x, dense, bias, dz, 1)
    return found


def beside(towers: Sequence[Run], streams: Sequence[torch.cuda.Stream]) -> list[Tensor]:
    current, results = torch.cuda.current_stream(), []
    for tower, stream in zip(towers, streams, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results += tower()
    for stream in streams:
        current.wait_stream(stream)
    return results


def typed_findings(op: str, device: str) -> Iterator[Finding]:
    """Of an op whose dtype is a constant, without a gradient. Stock is PyTorch's own operators, `backend="stock"`: a
    loop over images would wait for each."""
    sizes = SIZES[device]
    for dtype, case in itertools.product(sizes.dtypes, cases.alexnet_cases(op, sizes.batch)):
        typed = cases.in_dtype(case, dtype)
        tensors = cases.make(typed, device=device)
        stock = cases.repeated(typed, tensors, "stock")
        runs: dict[str, Run] = {way: cases.repeated(typed, tensors, way) for way in ways(op, device)} | {"stock": stock}
        if device == "cuda":
            torch._dynamo.reset()
            runs["compiled stock"] = torch.compile(stock, dynamic=False)
        moved = sum(cases.bytes_moved(typed))
        found = median_ms(runs | {"copy": copy_of(moved, device)}, device)
        floor = found.pop("copy")
        about = {"kind": "op", "op": op, "dtype": str(cases.dtype_id(dtype)), "layout": harness.layer_name(case)}
        name = f"{op} {harness.layer_name(case)} {cases.dtype_id(dtype)}"
        yield Finding(name, None, numbers=compared(op, found, moved, floor), about=about)
