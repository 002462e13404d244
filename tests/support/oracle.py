"""Holds an op against stock PyTorch in float64, values and all gradients, on the inputs as rounded to its dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.support import specs
from tests.support.spec import Case, Tensors, lay_out
from tests.support.specs import SPECS

Apply = Callable[[Tensor], Tensor]

# Error allowed, in units of eps * sqrt(summands) * max|exact|. fp32 and fp64 leave room for a power and for
# cancellation in a gradient; bf16 and fp16 are computed in fp32, so that one rounding is most of their error.
TOLERANCE = {torch.float64: 32.0, torch.float32: 16.0, torch.bfloat16: 2.0, torch.float16: 2.0}
ENOUGH = 64
"""Of fewer distinct values stock's largest error is luck, and no yardstick."""


def widened(tensors: Tensors) -> Tensors:
    """Contiguous float64 copies on the CPU, which require a gradient where the originals do."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().double().contiguous().requires_grad_(tensor.requires_grad)

    return {name: None if tensor is None else wide(tensor) for name, tensor in tensors.items()}


def assert_matches_float64(
    case: Case, tensors: Tensors, backend: str = "auto", then: Apply | None = None, dy_layout: str = "contiguous"
) -> Tensor:
    """Run the op forward and backward and compare with float64; returns the op's output.

    ``then`` is applied to the output before the gradient flows back (a slice, a sum: what changes the layout of
    the gradient the op sees), ``dy_layout`` lays out that gradient itself. Stock in the same dtype is the
    yardstick where it has a kernel: our error may be twice its error. Outputs whose gradient depends on a
    rounding get none, see ``settled``. Of an op without a gradient the output alone is compared.
    """
    spec = SPECS[case.op]
    if not spec.gradient:
        return assert_values_match_float64(case, tensors, backend)
    dtype = tensors["x"].dtype
    then = then or (lambda y: y)
    exact_inputs = widened(tensors)
    exact = specs.stock(case, exact_inputs)
    with torch.no_grad():
        mask = settled(case, exact_inputs, dtype).double()
        mask = then(mask) == then(torch.ones_like(mask))
        weights = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        dy = torch.where(mask, weights, 0.0).to(dtype)
        placed = lay_out(dy.to(tensors["x"].device), dy_layout)
        dy = placed.cpu()

    def gradients(y: Tensor, inputs: Tensors, dy: Tensor) -> dict[str, Tensor]:
        wanted = specs.wanting_grad(inputs)
        if not wanted:
            return {}
        found = torch.autograd.grad(then(y), list(wanted.values()), dy.to(y.dtype))
        return dict(zip(wanted, found, strict=True))

    ours = specs.fused(case, tensors, backend)
    assert ours.dtype == dtype
    results = {"y": ours, **gradients(ours, tensors, placed)}
    expected = {"y": exact, **gradients(exact, exact_inputs, dy)}
    try:
        compared = specs.stock(case, tensors)
        stock = {"y": compared, **gradients(compared, tensors, placed)}
    except NotImplementedError:  # bf16 and fp16 LRN has no CPU kernel in stock
        stock = {}
    if spec.product:
        parts = {name: None if tensor is None else tensor.detach().abs() for name, tensor in exact_inputs.items()}
        parts = {n: t if t is None else t.requires_grad_(tensors[n].requires_grad) for n, t in parts.items()}
        whole = specs.stock(case, parts)
        terms = {"y": whole, **gradients(whole, parts, dy.abs())}
    else:
        terms = terms_of_gradients(case, expected, dy)
    for name, result in results.items():
        magnitude = terms[name].max().item() if name in terms and result.numel() else 0.0
        # oneDNN's order of summation, and so the error of stock's products, differs by CPU.
        least = 3 if spec.product else 0
        assert_accurate(name, result, expected[name], stock.get(name), spec.summands(case, name), magnitude, least)
        if name != "y":
            assert result.dtype == tensors[name].dtype, name
    return ours


def assert_gradients_of(case: Case, wanted: Sequence[str]) -> None:
    """Run the op with gradients wanted of these of its tensors: they have them, as float64 has, and no other."""
    tensors = specs.make(case, requires_grad=False)
    for name in wanted:
        tensors[name].requires_grad_()
    exact = widened(tensors)
    y, expected = specs.fused(case, tensors), specs.stock(case, exact)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.sum().backward()
        expected.sum().backward()
    for name, tensor in tensors.items():
        if name in wanted:
            torch.testing.assert_close(tensor.grad, exact[name].grad.float())
        else:
            assert tensor.grad is None


def assert_values_match_float64(case: Case, tensors: Tensors, backend: str = "auto") -> Tensor:
    """``assert_matches_float64`` of an op without a gradient, whose dtype is a constant."""
    dtype = case.constants["dtype"]
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    exact, stock = (specs.stock(specs.in_dtype(case, one), on_cpu) for one in (torch.float64, dtype))
    ours = specs.fused(case, tensors, backend)
    assert ours.dtype == stock.dtype
    assert ours.dim() != 4 or ours.is_contiguous(memory_format=torch.channels_last)
    spec = SPECS[case.op]
    assert_accurate("y", ours, exact, stock, spec.summands(case, "y"), spec.magnitude(case))
    return ours


def terms_of_gradients(case: Case, expected: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """What LRN's and the blocks' gradients are made of, in magnitude, where it may cancel.

    A bias's gradient is the sum of x's. An element's own part and its neighbours' may cancel in x's: among many
    elements the largest does not, among few it may.
    """
    terms = {}
    if "x" in expected and dy.numel():
        if "bias" in expected:
            terms["bias"] = expected["x"].abs().flatten(-2).sum(-1).view(-1, case.shapes["bias"][0]).sum(0)
        if expected["x"].numel() < ENOUGH:
            terms["x"] = dy.double().abs().max() * SPECS[case.op].magnitude(case)
    return terms


def assert_accurate(
    name: str,
    ours: Tensor,
    exact: Tensor,
    stock: Tensor | None,
    terms: int,
    magnitude: float = 0.0,
    least: int = 0,
) -> None:
    """At most twice stock's error plus one ulp (or ``least`` ulps), and never above the cap of the tolerance table.

    The cap is relative to the largest exact value times sqrt(terms), or to the largest sum of the terms' absolute
    values (``magnitude``) where that is more.
    """
    assert ours.shape == exact.shape, f"{name}: shape {ours.shape}, expected {exact.shape}"
    ours, exact = ours.detach().cpu(), exact.detach()
    assert torch.equal(ours.isnan(), exact.isnan()), f"{name}: NaN in other places"
    if exact.numel() == 0:
        return
    largest = exact.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    eps = torch.finfo(ours.dtype).eps
    error = _largest_error(ours, exact)
    scale = max(math.sqrt(terms) * largest, magnitude)
    cap = TOLERANCE[ours.dtype] * eps * scale + torch.finfo(ours.dtype).smallest_normal
    assert error <= cap, f"{name}: error {error:.3g} of {largest:.3g} in {ours.dtype}, at most {cap:.3g}"
    if stock is not None and ours.dtype != torch.float64 and exact.unique().numel() >= ENOUGH:
        ulp = eps * largest
        reach = max(2 * _largest_error(stock.detach().cpu(), exact) + ulp, least * ulp)
        assert error <= reach, f"{name}: error {error:.3g}, twice stock's and an ulp is {reach:.3g}"


def _largest_error(values: Tensor, exact: Tensor) -> float:
    same = (values.double() == exact) | exact.isnan()
    return torch.where(same, 0.0, (values.double() - exact).abs()).max().item()


def settled(case: Case, exact: Tensors, dtype: torch.dtype) -> Tensor:
    """Outputs whose gradient rounding cannot send elsewhere, as a mask: see ``Spec.settled``."""
    found = SPECS[case.op].settled(case, exact, 8 * torch.finfo(dtype).eps)
    shape = specs.stock(case, exact).shape
    return torch.full(shape, found) if isinstance(found, bool) else found
