"""Whether the package computes right on this machine: each op and the whole network against float64.

The ops' inputs, references and limits are those of ``cases.CASES``; the networks' are here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._difference import relative_difference
from ..models import VARIANTS, AlexNet, alexnet
from ..ops._backend import OPS, decide
from .cases import CASES, DTYPES, LAYOUTS, Case, exact_arithmetic, integers, with_gradients

if TYPE_CHECKING:
    from rich.table import Table

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


def network_weights(model: AlexNet) -> dict[str, Tensor]:
    """A start of about He's spread for each parameter of ``model``, exact in every dtype."""
    weights = {}
    for seed, (name, parameter) in enumerate(model.state_dict().items()):
        wanted = math.sqrt(2 / parameter[0].numel()) if name.endswith("weight") else 0.25
        spacing = 2.0 ** round(math.log2(wanted * math.sqrt(3) / 127))
        weights[name] = integers(seed, parameter.shape, spacing)
    return weights


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
            yield from _case_rows(case, device, dtypes)
    for variant in variants:
        # The variants share their layers: the paper's shows what a dtype or a layout does to them.
        chosen = dtypes if variant == "paper" else [name for name in dtypes if name == "fp32"]
        if chosen:
            yield from _network_rows(variant, device, chosen)


def _case_rows(case: Case, device: torch.device, dtypes: Sequence[str]) -> Iterator[CheckRow]:
    for dtype in dtypes:
        for layout in case.layouts:
            yield case_row(case, device, dtype, layout)


def case_row(case: Case, device: torch.device, dtype_name: str, layout: str, grad: str = "dense") -> CheckRow:
    """The case in this dtype (of ``DTYPES``), layout and kind of gradient, compared with its reference and stock."""
    given = (device, DTYPES[dtype_name], layout, grad)
    reference = case.reference(grad)
    return _row(
        (case.name, dtype_name, layout, _backend_of([case.op], device)),
        case.results,
        partial(case.ours, *given),
        _baseline(partial(case.stock, *given), reference, math.inf),
        reference,
        math.inf,
        case.limits(given[1]),
    )


def _network_rows(variant: str, device: torch.device, dtypes: Sequence[str]) -> Iterator[CheckRow]:
    model = _build(variant, fused=False)
    weights = network_weights(model)
    size = model.config.image_size
    image, dy = integers(IMAGE_SEEDS[variant], (1, 3, size, size), 0.25), integers(9, (1, 1000), 2.0**-10)
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

    return with_gradients(run, [image, *weights.values()], dy)


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
        with exact_arithmetic():
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
        with exact_arithmetic():
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
