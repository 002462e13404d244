"""Whether the package computes right on this machine: each op and the whole network against float64.

The reference is stock PyTorch in float64 on the CPU. Inputs are small integers times powers of two, exact in
every dtype and the same on every machine, so that one reference serves all dtypes and an error is the
arithmetic's alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .._difference import relative_difference
from ..models import VARIANTS, AlexNet, alexnet
from ..ops._backend import OPS, decide
from ..ops._register import RECORDS

if TYPE_CHECKING:
    from rich.table import Table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FP32_EPS = torch.finfo(torch.float32).eps
LRN = (5, 5e-4, 0.75, 2.0)
POOL = ([3, 3], [2, 2])
EVEN_LRN = (4, 1e-3, 0.6, 1.0)  # an even window looks further down than up, and its gradient the other way round

# The seed of each network's image, chosen so that no ReLU and no pooling window of the float64 run decides by less
# than 9e-6 of its layer's standard deviation: then fp32's rounding (1e-6) turns no decision, and the error of a
# gradient is rounding alone. The integers of a seed are the same on every machine, so the choice holds everywhere.
IMAGE_SEEDS = {"paper": 97, "caffe": 38, "caffenet": 28, "tutorial": 29, "torchvision": 29}


@dataclass(frozen=True)
class CheckRow:
    """One comparison: of the result and all gradients, ``tensor`` is the one nearest to its tolerance.

    Errors are relative to the reference: the largest over its largest value for an op, the norms' quotient for
    a network. ``stock_error`` is None where stock PyTorch has no kernel; ``note`` then says so.
    """

    name: str
    dtype: str
    layout: str
    backend: str
    tensor: str
    error: float
    stock_error: float | None
    tolerance: float
    ok: bool
    note: str = ""


def _integers(seed: int, shape: Sequence[int], spacing: float) -> Tensor:
    """float32 of uniform integers from -127 to 127 times ``spacing``: 7 bits and a sign, exact in bf16 and fp16."""
    count = math.prod(shape)
    # A large tensor repeats its numbers; the period is a prime, so that no two rows of a weight are alike.
    drawn = torch.randint(-127, 128, (min(count, 1_000_003),), generator=torch.Generator().manual_seed(seed))
    repeats = -(-count // len(drawn))
    return (drawn.float() * spacing).repeat(repeats)[:count].view(tuple(shape))


def network_weights(model: AlexNet) -> dict[str, Tensor]:
    """A start of about He's spread for each parameter of ``model``, exact in every dtype."""
    weights = {}
    for seed, (name, parameter) in enumerate(model.state_dict().items()):
        wanted = math.sqrt(2 / parameter[0].numel()) if name.endswith("weight") else 0.25
        spacing = 2.0 ** round(math.log2(wanted * math.sqrt(3) / 127))
        weights[name] = _integers(seed, parameter.shape, spacing)
    return weights


@dataclass(frozen=True)
class _Case:
    """An op at one shape of AlexNet: the shapes of its tensors, and the constants that follow them in the call.

    ``spacings`` are those of the tensors' integers, ``terms`` is the longest sum. ``pooled_from`` computes the values
    that a pooling window compares, where they are rounded before. Two values nearer than rounding may then trade
    places, and a gradient its place, so such a window gets no gradient.
    """

    name: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    spacings: tuple[float, ...]
    constants: tuple[Any, ...]
    terms: int
    pooled_from: Callable[..., Tensor] | None = None

    def ours(self, *tensors: Tensor) -> Tensor:
        return getattr(ops, self.op)(*tensors, *self.constants)

    def stock(self, *tensors: Tensor) -> Tensor:
        return RECORDS[self.op].stock(*tensors, *self.constants)


def _normalized(x: Tensor, bias: Tensor) -> Tensor:
    return F.local_response_norm(F.relu(x + bias[:, None, None]), *LRN)


def _convolution(name: str, groups: int, batch: int) -> _Case:
    shapes = ((batch, 384, 13, 13), (384, 384 // groups, 3, 3), (384,))
    spacings = (0.5, 2.0**-10, 2.0**-3)
    return _Case(f"conv2d_bias_relu, {name}", "conv2d_bias_relu", shapes, spacings, (1, 1, 1, groups), 384 * 9)


# Values to 63.5, or the sum of x and a bias of the same spacing, which then is exact in bf16 too: LRN divides by up to
# a fifth more or less from place to place, and no sum of squares overflows fp16.
CASES = (
    _Case("local_response_norm, n = 5", "local_response_norm", ((1, 96, 55, 55),), (0.5,), LRN, terms=5),
    _Case("local_response_norm, n = 4", "local_response_norm", ((2, 256, 13, 13),), (0.5,), EVEN_LRN, terms=4),
    _Case("relu_max_pool2d", "relu_max_pool2d", ((2, 256, 13, 13),), (0.5,), (*POOL, [0, 0], [1, 1], False), terms=4),
    _convolution("one tower", 1, batch=8),  # its many tiles go by Winograd in fp32 on a CPU without AVX-512
    _convolution("two towers", 2, batch=1),
    _Case(
        "linear_bias_relu",
        "linear_bias_relu",
        ((32, 1024), (512, 1024), (512,)),
        (0.5, 2.0**-10, 2.0**-3),
        (),
        terms=1024,
    ),
    _Case(
        "relu_lrn_max_pool2d",
        "relu_lrn_max_pool2d",
        ((1, 96, 55, 55), (96,)),
        (0.25, 0.25),
        (*LRN, *POOL),
        terms=55 * 55,
        pooled_from=_normalized,
    ),
    _Case(
        "relu_max_pool2d_lrn",
        "relu_max_pool2d_lrn",
        ((1, 96, 55, 55), (96,)),
        (0.25, 0.25),
        (*LRN, *POOL),
        terms=55 * 55,
    ),
)


def check(
    device: torch.device | str | None = None,
    *,
    op_names: Sequence[str] = OPS,
    variants: Sequence[str] = tuple(VARIANTS),
    dtypes: Sequence[str] = tuple(DTYPES),
) -> Iterator[CheckRow]:
    """Compare ops and networks, values and all gradients, with float64 and with stock PyTorch in the same dtype.

    Ops run in fp32, bf16 and fp16, contiguous and channels-last, at AlexNet's shapes. So does the paper's network
    (bf16 and fp16 under autocast); the other variants run in fp32. Rows come as they are computed; hand them to
    ``verdict`` and ``check_table``. TF32 and reduced-precision matmuls are off meanwhile.

    A row passes when each of its errors is at most ``2 * stock_error`` and a rounding, and under a cap that does
    not depend on stock: accumulating in fp32 or wider meets it.

    Args:
        device: ``"cpu"``, ``"cuda"``, ...; None is the GPU where there is one.
        op_names, variants: what to check; empty for none.
        dtypes: of ``"fp32"``, ``"bf16"`` and ``"fp16"``.

    Raises:
        ValueError: an unknown op, variant or dtype.
    """
    names = (("op_names", op_names, OPS), ("variants", variants, tuple(VARIANTS)), ("dtypes", dtypes, tuple(DTYPES)))
    for kind, asked, known in names:
        for name in asked:
            if name not in known:
                raise ValueError(f"{kind} must be of {', '.join(known)}, got {name!r}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _rows(torch.device(device), op_names, variants, dtypes)


def _rows(
    device: torch.device, op_names: Sequence[str], variants: Sequence[str], dtypes: Sequence[str]
) -> Iterator[CheckRow]:
    for case in CASES:
        if case.op in op_names:
            yield from _op_rows(case, device, dtypes)
    if "augment" in op_names:
        yield from _augment_rows(device, dtypes)
    if "sgd_step" in op_names:
        yield from _sgd_rows(device, dtypes)
    for variant in variants:
        # The variants share their layers: the paper's shows what a dtype or a layout does to them.
        chosen = dtypes if variant == "paper" else [name for name in dtypes if name == "fp32"]
        if chosen:
            yield from _network_rows(variant, device, chosen)


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """fp32 means fp32: no TF32, no bf16 inside fp32 matmuls."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _with_gradients(run: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """[y, gradient of each input] by the exact arithmetic, on the CPU."""
    with _exact_arithmetic(), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = run(*leaves)
        gradients = torch.autograd.grad(y, leaves, dy.to(y.device, y.dtype))
    return [t.detach().cpu() for t in (y, *gradients)]


def _op_rows(case: _Case, device: torch.device, dtypes: Sequence[str]) -> Iterator[CheckRow]:
    exact = [
        _integers(i, shape, spacing) for i, (shape, spacing) in enumerate(zip(case.shapes, case.spacings, strict=True))
    ]
    wide = [x.double() for x in exact]
    dy = _integers(9, case.stock(*wide).shape, 2.0**-7)
    if case.pooled_from is not None:
        dy = dy * _decided(case.pooled_from(*wide)).view_as(dy)
    reference = _with_gradients(case.stock, wide, dy)
    names = ["y", "dx", *(["dweight", "dbias"] if len(case.shapes) == 3 else ["dbias"])][: len(reference)]
    backend = _backend_of([case.op], device)
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        eps = torch.finfo(dtype).eps
        # Results are rounded to the dtype, sums are kept in fp32: k * eps * sqrt(K) has two parts.
        slack = eps + FP32_EPS * math.sqrt(case.terms) / 8
        cap = 4 * (eps + FP32_EPS * math.sqrt(case.terms))
        for layout, memory_format in LAYOUTS.items():
            inputs = [x.to(device, dtype) for x in exact]
            if inputs[0].dim() == 4:
                inputs[0] = inputs[0].contiguous(memory_format=memory_format)
            elif layout != "contiguous":
                continue
            yield _row(
                (case.name, dtype_name, layout, backend),
                names,
                partial(_with_gradients, case.ours, inputs, dy),
                _baseline(partial(_with_gradients, case.stock, inputs, dy), reference, math.inf),
                reference,
                math.inf,
                [(slack, cap)] * len(reference),
            )


def _augment_rows(device: torch.device, dtypes: Sequence[str]) -> Iterator[CheckRow]:
    """As above for ``augment``, which takes bytes and has no gradient; the layout is the images'."""
    images = (_integers(0, (2, 256, 256, 3), 1.0) + 128).to(torch.uint8)
    drawn = (torch.tensor([[0, 29], [17, 3]]), torch.tensor([False, True]), _integers(1, (2, 3), 0.25))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    backend = _backend_of(["augment"], device)

    def stock(dtype: torch.dtype) -> list[Tensor]:
        return [RECORDS["augment"].stock(images, *drawn, 227, mean, std, dtype, 1)]

    def ours(layout: str, dtype: torch.dtype) -> list[Tensor]:
        placed = images.to(device)
        if layout == "contiguous":
            placed = placed.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        offsets, flips, shifts = (t.to(device) for t in drawn)
        return [ops.augment(placed, offsets, flips, shifts, 227, mean=mean, std=std, dtype=dtype).cpu()]

    reference = stock(torch.float64)
    for dtype_name, layout in itertools.product(dtypes, LAYOUTS):
        dtype = DTYPES[dtype_name]
        eps = torch.finfo(dtype).eps
        yield _row(
            ("augment", dtype_name, layout, backend),
            ["y"],
            partial(ours, layout, dtype),
            _baseline(partial(stock, dtype), reference, math.inf),
            reference,
            math.inf,
            [(eps, 4 * (eps + FP32_EPS))],
        )


def _sgd_rows(device: torch.device, dtypes: Sequence[str]) -> Iterator[CheckRow]:
    """As above for ``sgd_step``: what two steps make of parameters, momenta and weights."""
    sizes, names = ((1024, 96, 5), (96,), (40_001,)), ("parameters", "momenta", "weights")
    spacings = {"gradients": 2.0**-10, "parameters": 2.0**-7, "momenta": 2.0**-10, "weights": 0.0}
    constants = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 5e-4, "nesterov": False, "maximize": False}
    backend = _backend_of(["sgd_step"], device)

    def stepped(step: Callable[..., None], dtype: torch.dtype, wide: torch.dtype) -> list[Tensor]:
        dtypes = dict.fromkeys(names, wide) | {"gradients": dtype, "weights": dtype}
        lists = {
            name: [_integers(i, size, spacing).to(device, dtypes[name]) for i, size in enumerate(sizes)]
            for name, spacing in spacings.items()
        }
        if dtype == wide:
            lists["weights"] = []
        for first_step in (True, False):
            step(**lists, lr=0.01, first_step=first_step, **constants)
        results = lists["parameters"], lists["momenta"], lists["weights"] or lists["parameters"]
        return [torch.cat([t.flatten() for t in tensors]).cpu() for tensors in results]

    def stock(**arguments: Any) -> None:
        RECORDS["sgd_step"].stock(**arguments, lr_tensor=None, grad_scale=None, found_inf=None)

    reference = stepped(stock, torch.float64, torch.float64)
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        eps = torch.finfo(dtype).eps
        yield _row(
            ("sgd_step", dtype_name, "contiguous", backend),
            names,
            partial(stepped, ops.sgd_step, dtype, torch.float32),
            _baseline(partial(stepped, stock, dtype, torch.float32), reference, math.inf),
            reference,
            math.inf,
            [(FP32_EPS, 16 * FP32_EPS), (FP32_EPS, 16 * FP32_EPS), (eps, 16 * eps)],
        )


def _decided(values: Tensor) -> Tensor:
    """Which windows (3, stride 2) have a winner beyond doubt in bf16, or no positive value at all."""
    taps = F.unfold(values.flatten(0, 1)[:, None], 3, stride=2)
    first, second = taps.topk(2, dim=1).values.unbind(1)
    return (first - second > 4 * torch.finfo(torch.bfloat16).eps * first) | (first <= 0)


def _network_rows(variant: str, device: torch.device, dtypes: Sequence[str]) -> Iterator[CheckRow]:
    model = _build(variant, fused=False)
    weights = network_weights(model)
    size = model.config.image_size
    image, dy = _integers(IMAGE_SEEDS[variant], (1, 3, size, size), 0.25), _integers(9, (1, 1000), 2.0**-10)
    names = ["y", "dx", *(f"d {name}" for name in weights)]
    reference = _run_network(model, {name: w.double() for name, w in weights.items()}, image.double(), dy)
    backend = _backend_of(OPS, device)
    layouts = list(LAYOUTS) if variant == "paper" else ["contiguous"]
    placed_weights = {name: w.to(device) for name, w in weights.items()}
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        eps = torch.finfo(dtype).eps
        # Rounding turns about eps of the decisions of ReLU and pooling, and each moves the gradient by all of its
        # own share: in the norm that is about sqrt(eps). In fp32 the images leave no decision to rounding.
        exact = dtype == torch.float32
        gradients = (8 * eps, 64 * eps) if exact else (2 * math.sqrt(eps), 8 * math.sqrt(eps))
        limits = [(8 * eps, 64 * eps), *[gradients] * (len(names) - 1)]

        def run(fused: bool, layout: str, dtype: torch.dtype = dtype) -> list[Tensor]:
            placed = image.to(device).contiguous(memory_format=LAYOUTS[layout])
            return _run_network(_build(variant, fused), placed_weights, placed, dy, dtype)

        baseline = _baseline(partial(run, False, "contiguous"), reference, 2)
        for layout in layouts:
            label = (f"alexnet, {variant}", dtype_name, layout, backend)
            yield _row(label, names, partial(run, True, layout), baseline, reference, 2, limits)


def _build(variant: str, fused: bool) -> AlexNet:
    """Without weights, and as at test time: dropout would differ between any two runs."""
    with torch.device("meta"):
        return alexnet(variant, fused, init="torch").eval()


def _run_network(
    model: AlexNet, weights: dict[str, Tensor], image: Tensor, dy: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    lowered = dtype is not None and dtype != torch.float32
    if image.is_contiguous(memory_format=torch.channels_last):
        weights = {
            name: w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for name, w in weights.items()
        }

    def run(x: Tensor, *values: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype if lowered else None, enabled=lowered):
            return torch.func.functional_call(model, dict(zip(weights, values, strict=True)), (x,))

    return _with_gradients(run, [image, *weights.values()], dy)


def _backend_of(op_names: Sequence[str], device: torch.device) -> str:
    return " + ".join(dict.fromkeys(decide(op, device).backend for op in op_names))


def _errors(results: list[Tensor], reference: list[Tensor], order: float) -> list[float]:
    """Relative to the largest value of the reference (``order`` infinity), or to its norm (2)."""
    return [relative_difference(x, exact, order) for x, exact in zip(results, reference, strict=True)]


def _baseline(
    stock: Callable[[], list[Tensor]], reference: list[Tensor], order: float
) -> tuple[Sequence[float | None], str]:
    """Stock's errors; where it has no kernel for the dtype, Nones and what it said."""
    try:
        return _errors(stock(), reference, order), ""
    except RuntimeError as error:  # NotImplementedError is one
        return [None] * len(reference), f"stock: {str(error).splitlines()[0]}"


def _row(
    label: tuple[str, str, str, str],
    names: Sequence[str],
    ours: Callable[[], list[Tensor]],
    baseline: tuple[Sequence[float | None], str],
    reference: list[Tensor],
    order: float,
    limits: Sequence[tuple[float, float]],
) -> CheckRow:
    """Run ours and judge each tensor by its (slack, cap); where stock has no error to go by, by the cap alone."""
    stock_errors, note = baseline
    try:
        errors = _errors(ours(), reference, order)
    except Exception as error:  # whatever it is, it is this row's verdict and not the end of the check
        return CheckRow(*label, "", math.nan, None, 0.0, False, f"{type(error).__name__}: {error}")
    tolerances = [
        cap if e is None or not math.isfinite(e) else min(2 * e + slack, cap)
        for e, (slack, cap) in zip(stock_errors, limits, strict=True)
    ]
    worst = max(range(len(reference)), key=lambda i: errors[i] / tolerances[i])
    ok = all(e <= tolerance for e, tolerance in zip(errors, tolerances, strict=True))
    return CheckRow(*label, names[worst], errors[worst], stock_errors[worst], tolerances[worst], ok, note)


def verdict(rows: Sequence[CheckRow]) -> tuple[bool, str]:
    """Whether all rows passed, and a sentence that says so; nothing compared is not a pass."""
    failed = [row for row in rows if not row.ok]
    if not rows:
        return False, "nothing was compared"
    if failed:
        names = ", ".join(dict.fromkeys(row.name for row in failed))
        return False, f"{len(failed)} of {len(rows)} comparisons failed: {names}"
    return True, f"all {len(rows)} comparisons are within tolerance"


def check_table(rows: Sequence[CheckRow]) -> Table:
    """The rows as a ``rich.table.Table`` to print, with the verdict and the notes below."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    table = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        title="Errors against float64",
        # A Text, for in a str rich would read an error's brackets as markup.
        caption=Text("\n".join([verdict(rows)[1], *(f"[{i}] {note}" for i, note in enumerate(notes, 1))])),
    )
    for heading in ("what", "dtype", "layout", "runs", "worst"):
        table.add_column(heading, overflow="fold")
    for heading in ("error", "stock's", "tolerance"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        mark = f"[{notes.index(row.note) + 1}]" if row.note else ""
        table.add_row(
            row.name,
            row.dtype,
            row.layout,
            row.backend,
            row.tensor,
            f"{row.error:.1e}",
            "none" if row.stock_error is None else f"{row.stock_error:.1e}",
            f"{row.tolerance:.1e}",
            f"{'ok' if row.ok else 'FAILED'} {mark}".rstrip(),
            style="" if row.ok else "bold red",
        )
    return table
