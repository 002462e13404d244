"""Holds an op against stock PyTorch in float64, values and all gradients, on the inputs as rounded to its dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import cases
from tests.support.cases import Case, Tensors

Apply = Callable[[Tensor], Tensor]

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
    if case.op in cases.WITHOUT_GRADIENT:
        return assert_augmented(case, tensors, backend)
    dtype = tensors["x"].dtype
    then = then or (lambda y: y)
    exact_inputs = widened(tensors)
    exact = cases.stock(case, exact_inputs)
    with torch.no_grad():
        mask = settled(case, exact_inputs, dtype).double()
        mask = then(mask) == then(torch.ones_like(mask))
        weights = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        dy = torch.where(mask, weights, 0.0).to(dtype)
        placed = cases.lay_out(dy.to(tensors["x"].device), dy_layout)
        dy = placed.cpu()

    def gradients(y: Tensor, inputs: Tensors, dy: Tensor) -> dict[str, Tensor]:
        wanted = cases.wanting_grad(inputs)
        if not wanted:
            return {}
        found = torch.autograd.grad(then(y), list(wanted.values()), dy.to(y.dtype))
        return dict(zip(wanted, found, strict=True))

    ours = cases.fused(case, tensors, backend)
    assert ours.dtype == dtype
    results = {"y": ours, **gradients(ours, tensors, placed)}
    expected = {"y": exact, **gradients(exact, exact_inputs, dy)}
    try:
        compared = cases.stock(case, tensors)
        stock = {"y": compared, **gradients(compared, tensors, placed)}
    except NotImplementedError:  # bf16 and fp16 LRN has no CPU kernel in stock
        stock = {}
    if case.op in cases.PRODUCTS:
        parts = {name: None if tensor is None else tensor.detach().abs() for name, tensor in exact_inputs.items()}
        parts = {n: t if t is None else t.requires_grad_(tensors[n].requires_grad) for n, t in parts.items()}
        whole = cases.stock(case, parts)
        terms = {"y": whole, **gradients(whole, parts, dy.abs())}
    else:
        terms = terms_of_gradients(case, expected, dy)
    for name, result in results.items():
        magnitude = terms[name].max().item() if name in terms and result.numel() else 0.0
        # oneDNN's order of summation, and so stock's error, differs by CPU: allow products at least 3 ulps.
        least = 3 if case.op in cases.PRODUCTS else 0
        assert_accurate(name, result, expected[name], stock.get(name), summands(case, name), magnitude, least)
        if name != "y":
            assert result.dtype == tensors[name].dtype, name
    return ours


def assert_gradients_of(case: Case, wanted: Sequence[str]) -> None:
    """Run the op with gradients wanted of these of its tensors: they have them, as float64 has, and no other."""
    tensors = cases.make(case, requires_grad=False)
    for name in wanted:
        tensors[name].requires_grad_()
    exact = widened(tensors)
    y, expected = cases.fused(case, tensors), cases.stock(case, exact)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.sum().backward()
        expected.sum().backward()
    for name, tensor in tensors.items():
        if name in wanted:
            torch.testing.assert_close(tensor.grad, exact[name].grad.float())
        else:
            assert tensor.grad is None


def assert_augmented(case: Case, tensors: Tensors, backend: str = "auto") -> Tensor:
    """``assert_matches_float64`` of ``augment``, whose dtype is a constant."""
    constants = case.constants
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    exact, stock = (cases.stock(cases.in_dtype(case, dtype), on_cpu) for dtype in (torch.float64, constants["dtype"]))
    ours = cases.fused(case, tensors, backend)
    assert ours.dtype == constants["dtype"]
    assert ours.is_contiguous(memory_format=torch.channels_last)
    # A byte and a mean may cancel.
    assert_accurate("y", ours, exact, stock, 1, 1 / min(constants["std"]))
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
            terms["x"] = dy.double().abs().max() * case.constants.get("k", 1.0) ** -case.constants.get("beta", 0.0)
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
    cap = cases.TOLERANCE[ours.dtype] * eps * scale + torch.finfo(ours.dtype).smallest_normal
    assert error <= cap, f"{name}: error {error:.3g} of {largest:.3g} in {ours.dtype}, at most {cap:.3g}"
    if stock is not None and ours.dtype != torch.float64 and exact.unique().numel() >= ENOUGH:
        ulp = eps * largest
        reach = max(2 * _largest_error(stock.detach().cpu(), exact) + ulp, least * ulp)
        assert error <= reach, f"{name}: error {error:.3g}, twice stock's and an ulp is {reach:.3g}"


def _largest_error(values: Tensor, exact: Tensor) -> float:
    same = (values.double() == exact) | exact.isnan()
    return torch.where(same, 0.0, (values.double() - exact).abs()).max().item()


def summands(case: Case, name: str) -> int:
    """How many products the longest sum behind a result has."""
    x = case.shapes["x"]
    if case.op == "linear_bias_relu":
        outputs, inputs = case.shapes["weight"]
        rows = max(1, math.prod(x[:-1]))
        return {"y": max(1, inputs), "x": outputs, "weight": rows, "bias": rows}[name]
    batch_and_pixels = math.prod(x[:-3]) * math.prod(x[-2:])
    if name == "bias":
        return max(1, batch_and_pixels)
    if case.op == "conv2d_bias_relu":
        weight = case.shapes["weight"]
        taps = math.prod(weight[2:])
        return {"y": weight[1] * taps, "x": weight[0] * taps, "weight": max(1, batch_and_pixels)}[name]
    window = case.constants.get("size", case.constants.get("lrn_size", 1))
    taps = math.prod(cases.pair(case.constants.get("kernel_size", 1)))
    return window * (taps if name == "x" else 1)


def settled(case: Case, exact: Tensors, dtype: torch.dtype) -> Tensor:
    """Outputs whose gradient rounding cannot send elsewhere, as a mask.

    A pre-activation within rounding of 0 may fall on either side of ReLU, and two values of a window within
    rounding of each other may each win it: both answers are right.
    """
    eps = 8 * torch.finfo(dtype).eps
    c = case.constants
    if not c.get("relu", True):
        return torch.ones(cases.stock(case, exact).shape, dtype=torch.bool)
    if case.op in cases.PRODUCTS:
        product = F.linear if case.op == "linear_bias_relu" else F.conv2d
        options = [c[name] for name in ("stride", "padding", "dilation", "groups") if name in c]
        bias = exact["bias"]
        value = product(exact["x"], exact["weight"], bias, *options)
        scale = product(exact["x"].abs(), exact["weight"].abs(), None if bias is None else bias.abs(), *options)
        return ~(value.abs() <= eps * scale) | (scale == 0)
    if case.op not in cases.BLOCKS:
        return torch.ones(cases.stock(case, exact).shape, dtype=torch.bool)
    z = exact["x"] if exact["bias"] is None else exact["x"] + exact["bias"][:, None, None]
    values = F.relu(z)
    if case.op == "relu_lrn_max_pool2d":
        values = F.local_response_norm(values, c["lrn_size"], c["alpha"], c["beta"], c["k"])
    (height, width), (down, right) = cases.pair(c["kernel_size"]), cases.pair(c["stride"])
    windows = values.unfold(-2, height, down).unfold(-2, width, right).flatten(-2)
    if windows.shape[-1] == 1:
        return torch.ones(windows.shape[:-1], dtype=torch.bool)
    first, second = windows.topk(2).values.unbind(-1)
    open_windows = (first - second <= eps * first.abs()) & (first != 0)
    if case.op == "relu_max_pool2d_lrn":  # an output's gradient goes on to its neighbouring channels' windows
        reach = c["lrn_size"] // 2
        beside = F.pad(open_windows.movedim(1, -1), (reach, reach))
        open_windows = beside.unfold(-1, 2 * reach + 1, 1).any(-1).movedim(-1, 1)
    return ~open_windows
