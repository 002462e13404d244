"""Each op beside a copy of the bytes it must move, stock and compiled stock; then the network's images a second.

A time is the median of turns that all contestants take one after another, the caches flushed in between.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from alexnet_ext import _library
from alexnet_ext.ops import _backend
from alexnet_ext.ops._tuning import Candidate
from benchmarks import harness
from tests import cases
from tests.cases import Case, Tensors

from ..common import SIZES, backends, choosing, each_backend, preferring, synchronize
from ..report import Finding

Run = Callable[[], object]
TURNS = 15
FLUSHED = 2**28
"""Bytes written between turns: more than an H100's 50 MB of L2."""


def median_ms(contestants: dict[str, Run], device: str) -> dict[str, float]:
    """The median of each; what raises (no kernel in stock) is left out, after its first turn."""
    running = {}
    for name, run in contestants.items():
        try:
            for _ in range(2):
                run()
            synchronize(device)
        except (RuntimeError, NotImplementedError) as error:
            print(f"{name} does not run: {error}")
            continue
        running[name] = run
    times: dict[str, list[float]] = {name: [] for name in running}
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    for _ in range(TURNS if device == "cuda" else 3):
        for name, run in running.items():
            flush.zero_()
            times[name].append(once_ms(run, device))
    return {name: statistics.median(found) for name, found in times.items()}


def once_ms(run: Run, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def copy_rate(device: str) -> float:
    """Bytes a millisecond, read and written, of a copy of half a gigabyte."""
    source = torch.ones(2**28 if device == "cuda" else 2**25, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms({"copy": lambda: target.copy_(source)}, device)["copy"]


def forward_bytes(case: Case, tensors: Tensors, y: Tensor) -> int:
    """What forward must move: x read, y written, a byte an output element for the winners."""
    kept = y.numel() if "pool" in case.op else 0
    kept += y.nbytes if case.op == "relu_max_pool2d_lrn" else 0
    x = tensors["x"]
    return (x.nbytes if x is not None else 0) + y.nbytes + kept


def backward_bytes(case: Case, tensors: Tensors, y: Tensor) -> int:
    """dy, what was saved, and dx."""
    x = tensors["x"]
    size = x.nbytes if x is not None else 0
    return (
        y.nbytes
        + size
        + {"local_response_norm": size, "relu_max_pool2d": y.numel()}.get(
            case.op, y.numel() + (size if case.op == "relu_lrn_max_pool2d" else y.nbytes)
        )
    )


def op_findings(device: str, rate: float) -> Iterator[Finding]:
    sizes = SIZES[device]
    ops = [*(op for op in cases.OPS if op not in cases.PRODUCTS), "conv2d_bias_relu"]
    for dtype, layout, op in itertools.product(sizes.dtypes, ("channels_last", "contiguous"), ops):
        for index, case in enumerate(harness.alexnet_cases(op, sizes.batch)):
            # Compiling takes seconds: once an op, dtype and layout.
            yield from case_findings(case, dtype, layout, device, rate, with_compiled=index == 0 and device == "cuda")


def case_findings(
    case: Case, dtype: torch.dtype, layout: str, device: str, rate: float, with_compiled: bool
) -> Iterator[Finding]:
    tensors = cases.make(case, dtype, layout, device=device)
    if case.shapes["x"][1] == 3:  # images need no gradient
        tensors["x"].requires_grad_(False)
    wanted = list(cases.wanting_grad(tensors).values())
    with torch.no_grad():
        y = cases.stock(case, {n: None if t is None else t.float() for n, t in tensors.items()}).to(dtype)
    dy = torch.randn_like(y)
    ours = backends(case.op, device)
    runs: dict[str, Callable[[], Tensor]] = {name: partial(cases.fused, case, tensors, name) for name in ours}
    runs["stock"] = partial(cases.stock, case, tensors)
    if with_compiled:
        runs["compiled stock"] = partial(torch.compile(partial(cases.stock, case), dynamic=False), tensors)
    for direction in ("forward", "forward + backward"):
        found = median_ms({name: once(run, wanted, dy, direction) for name, run in runs.items()}, device)
        floor = None
        if case.op not in cases.PRODUCTS:
            moved = forward_bytes(case, tensors, y)
            moved += backward_bytes(case, tensors, y) if direction != "forward" else 0
            floor = moved / rate
        name = f"{case.op} {harness.layer_name(case)} {cases.dtype_id(dtype)} {layout} {direction}"
        yield Finding(name, None, numbers=compared(found, floor))


def compared(found: dict[str, float], floor: float | None) -> dict[str, float | None]:
    best = min((found[name] for name in ("native", "triton") if name in found), default=math.nan)
    numbers = {f"{name} ms": found.get(name) for name in ("native", "triton", "stock", "compiled stock")}
    numbers["floor ms"] = floor
    numbers["% of floor rate"] = 100 * floor / best if floor else None
    numbers["times stock"] = found["stock"] / best if "stock" in found else None
    return numbers


def convolution_findings(device: str) -> Iterator[Finding]:
    """Every way that the convolution may take, each direction for itself."""
    if not _backend.has_kernel("measured", "conv2d_bias_relu", device):
        return
    for library in (_library.CUTLASS, _library.SM90):
        if not library.loaded:
            yield Finding(f"conv2d_bias_relu {library.name}", None, f"skipped: {library.reason}")
    sizes = SIZES[device]
    layers = harness.alexnet_cases("conv2d_bias_relu", sizes.batch)
    for dtype, layout, case in itertools.product(sizes.dtypes, ("channels_last", "contiguous"), layers):
        offered: dict[str, Sequence[Candidate]] = {}

        def note(what: str, given: Sequence[Candidate], offered: dict[str, Sequence[Candidate]] = offered) -> Candidate:
            offered[what.split(" x ")[0]] = given
            return given[0]

        tensors = cases.make(case, dtype, layout, device=device)
        with choosing(note, device):
            cases.fused(case, tensors).sum().backward()
        for what, given in offered.items():
            with torch.no_grad():
                found = median_ms({candidate.name: candidate.run for candidate in given}, device)
            name = f"{what} {harness.layer_name(case)} {cases.dtype_id(dtype)} {layout}"
            yield Finding(name, None, numbers={f"{candidate} ms": ms for candidate, ms in found.items()})


def augment_findings(device: str, rate: float) -> Iterator[Finding]:
    """Beside PyTorch's own operators, which is `backend="stock"` here: a loop over images would wait for each."""
    sizes = SIZES[device]
    for dtype, case in itertools.product(sizes.dtypes, harness.alexnet_cases("augment", sizes.batch)):
        typed = cases.in_dtype(case, dtype)
        tensors = cases.make(typed, device=device)
        runs: dict[str, Run] = {
            name: partial(cases.fused, typed, tensors, name) for name in (*backends("augment", device), "stock")
        }
        if device == "cuda":
            runs["compiled stock"] = partial(torch.compile(partial(cases.fused, typed, backend="stock")), tensors)
        floor = harness.bytes_moved(typed) / rate
        name = f"augment {harness.layer_name(case)} {cases.dtype_id(dtype)}"
        yield Finding(name, None, numbers=compared(median_ms(runs, device), floor))


def once(run: Callable[[], Tensor], wanted: list[Tensor], dy: Tensor, direction: str) -> Run:
    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        torch.autograd.grad(run(), wanted, dy)

    return forward if direction == "forward" else both


def network_findings(device: str) -> Iterator[Finding]:
    sizes = SIZES[device]
    dtype = sizes.dtypes[0]
    for kind, batch in itertools.product(harness.NETWORK, sizes.network_batches):
        contestants = [("stock", "contiguous"), ("stock", "channels_last")]
        contestants += [(backend, "channels_last") for backend in each_backend(device)]
        runs: dict[str, Run] = {}
        for backend, layout in contestants:
            step = harness.network_run(kind, backend != "stock", batch, layout, device == "cuda", device, dtype)
            runs[f"{backend} {layout}"] = partial(preferred_step, step, backend, device)
        found = median_ms(runs, device)
        numbers = {f"{name} images/s": 1e3 * batch / ms for name, ms in found.items()}
        yield Finding(f"AlexNet {kind}, batch {batch}, {cases.dtype_id(dtype)}", None, numbers=numbers)


def preferred_step(step: Run, backend: str, device: str) -> None:
    with preferring(backend, device):
        step()


def run(device: str) -> Iterator[Finding]:
    rate = copy_rate(device)
    yield Finding("copy", None, f"{rate / 1e6:.3g} GB/s, read and written")
    yield from network_findings(device)
    yield from op_findings(device, rate)
    yield from convolution_findings(device)
    yield from augment_findings(device, rate)
