"""The Triton convolution in Triton's interpreter (fp32, fp64 and fp16: it gets products of bf16 wrong)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.ops.conv2d_bias_relu.spec import LAYERS
from tests.support import cases, oracle
from tests.support.cases import Case, conv

kernels = pytest.importorskip(
    "alexnet_ext.ops.conv2d_bias_relu.triton_kernels", reason="Triton is not installed", exc_type=ImportError
)
pytestmark = pytest.mark.usefixtures("interpreter")

# What else a convolution may be than AlexNet's five.
OTHERS = (
    conv((2, 9, 7, 6), 6, (3, 3), padding=1, groups=3),
    conv((1, 5, 9, 8), 7, (3, 2), stride=(2, 1), padding=(1, 0)),
    conv((1, 17, 11, 8), 19, (3, 3), stride=(3, 2), padding=1),
    conv((1, 3, 13, 14), 5, (4, 3), stride=(3, 2), padding=(2, 1)),
    conv((1, 1, 9, 9), 2, (2, 2), stride=4),
    conv((1, 4, 6, 6), 3, (1, 1), padding=2),
    conv((1, 16, 5, 5), 16, (1, 1), stride=2),
)


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, ("contiguous", "channels_last")[i % 2], id=case.id)
        for i, case in enumerate(LAYERS + OTHERS + cases.CASES["conv2d_bias_relu"])
    ],
)
def test_fp32(case: Case, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, layout=layout), "triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=cases.dtype_id)
@pytest.mark.parametrize("case", cases.params((LAYERS[0], LAYERS[1], OTHERS[1])))
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    oracle.assert_matches_float64(case, cases.make(case, dtype), "triton")


@pytest.mark.parametrize("programs", [1, 5])
@pytest.mark.parametrize("case", cases.params((LAYERS[1], LAYERS[2], OTHERS[0])))
def test_the_persistent_forward_is_the_other_one_to_the_bit(
    case: Case, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few programs share the blocks of y: each has several, and some have more than others."""
    blocks = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(kernels.configs, "known", lambda *_: blocks)
    monkeypatch.setattr(kernels.configs, "resident", lambda _: programs)
    given = cases.raw_forward(case, cases.make(case, torch.float16, requires_grad=False))
    expected = kernels.forward(*given)
    tiles = -(-expected[:, 0].numel() // 16) * -(-expected.shape[1] // case.constants["groups"] // 16)
    assert tiles * case.constants["groups"] > programs
    assert torch.equal(kernels.forward(*given, persistent=True), expected)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded_batch"])
def test_other_layouts(layout: str) -> None:
    oracle.assert_matches_float64(OTHERS[0], cases.make(OTHERS[0], layout=layout), "triton")


@pytest.mark.parametrize("weight_layout", ["channels_last", "sliced", "expanded"])
def test_weights_of_any_layout(weight_layout: str) -> None:
    tensors = cases.make(OTHERS[0])
    tensors["weight"] = cases.lay_out(tensors["weight"].detach(), weight_layout).requires_grad_()
    oracle.assert_matches_float64(OTHERS[0], tensors, "triton")


def test_small_integers_are_exact() -> None:
    """Every direction; each sum is exact in any order."""
    for case in (LAYERS[0], LAYERS[3], OTHERS[2]):
        generator = torch.Generator().manual_seed(0)
        tensors = {
            name: torch.randint(-3, 4, shape, generator=generator).float().requires_grad_()
            for name, shape in case.items()
        }
        inputs = list(tensors.values())
        ours, stock = cases.fused(case, tensors, "triton"), cases.stock(case, tensors)
        assert torch.equal(ours, stock)
        dy = torch.randint(-3, 4, ours.shape, generator=generator).float()
        for a, b in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(stock, inputs, dy), strict=True):
            assert torch.equal(a, b)


def test_towers_do_not_leak_and_nan_keeps_its_gradient() -> None:
    tensors = cases.make(LAYERS[3])
    with torch.no_grad():
        tensors["x"][:, 0, 2, 3] = torch.nan
    ours, stock = cases.fused(LAYERS[3], tensors, "triton"), cases.stock(LAYERS[3], tensors)
    assert torch.equal(ours.isnan(), stock.isnan())
    assert ours[:, 24:].isfinite().all()
    dy = torch.ones_like(ours)
    ours, stock = (torch.autograd.grad(y, tensors["bias"], dy)[0] for y in (ours, stock))
    torch.testing.assert_close(ours, stock)


def test_the_weight_gradient_is_split_and_added_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    case = conv((2, 4, 12, 11), 6, (3, 3), padding=1)
    whole = cases.make(case)
    oracle.assert_matches_float64(case, whole, "triton")
    parts = []
    monkeypatch.setattr(kernels, "split", lambda pixels, *_: parts.append(pixels) or (5, -(-pixels // 5)))
    oracle.assert_matches_float64(case, whole, "triton")
    assert parts


@pytest.mark.parametrize("shape", [(93_312, 128, 1200, 2), (387_200, 96, 432, 1), (21_632, 384, 2304, 1), (7, 1, 1, 1)])
def test_parts_cover_the_pixels(shape: tuple[int, int, int, int]) -> None:
    parts, of_each = kernels.split(*shape)
    assert (parts - 1) * of_each < shape[0] <= parts * of_each


@pytest.fixture
def precisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The precision requested of each product; afterwards PyTorch's flags are as before."""
    asked: list[str] = []
    monkeypatch.setattr(
        kernels, "precision", lambda dtype, read=kernels.precision: asked.append(read(dtype)) or asked[-1]
    )
    before = torch.backends.cudnn.conv.fp32_precision
    yield asked
    torch.backends.cudnn.conv.fp32_precision = before


def test_tf32_as_the_flags_say_at_forward_and_at_backward(precisions: list[str]) -> None:
    tensors = cases.make(OTHERS[0])
    torch.backends.cudnn.allow_tf32 = True
    y = cases.fused(OTHERS[0], tensors, "triton")
    assert precisions == ["tf32"]
    torch.backends.cudnn.allow_tf32 = False
    y.sum().backward()
    assert set(precisions[1:]) == {"ieee"}
    precisions.clear()
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    y = cases.fused(OTHERS[0], tensors, "triton")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    y.sum().backward()
    assert precisions == ["tf32", "ieee", "ieee"]


def test_only_fp32_has_a_choice_of_precision() -> None:
    torch.backends.cudnn.allow_tf32 = True
    assert [kernels.precision(dtype) for dtype in cases.DTYPES] == ["ieee", "tf32", "ieee", "ieee"]


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_what_is_wanted_is_computed(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {name: tensor.detach() for name, tensor in cases.make(OTHERS[0]).items()}
    tensors[wanted].requires_grad_()
    y = cases.fused(OTHERS[0], tensors, "triton")
    called = []
    for name in ("product", "weight_gradient"):
        run = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, run=run: called.append(name) or run(*a))
    (gradient,) = torch.autograd.grad(y.sum(), [tensors[wanted]])
    assert gradient.shape == tensors[wanted].shape
    assert called == {"x": ["product"], "weight": ["weight_gradient"], "bias": []}[wanted]


def test_every_architecture_has_an_entry_for_each_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # undoes the fixture's blocks
    table = kernels.configs.TABLE
    assert set(table) == {8, 9, 10}
    for entries in table.values():
        expected = {(k, a) for k in ("product", "weight") for a in ("half", "tf32", "ieee", "fp64")}
        if entries is not table[8]:
            expected |= {("persistent", "half"), ("persistent", "tf32")}
        assert set(entries) == expected
    x = torch.empty(1)
    narrow = kernels.configs.known("product", x, "tf32", 5)
    assert narrow["BLOCK_N"] == 16
    monkeypatch.setattr(kernels.configs, "architecture", lambda _: 12)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert kernels.configs.known("product", x, "tf32", 5) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert kernels.configs.known("product", x, "tf32", 5) == kernels.configs.blocks(8, "product", x.dtype, "tf32", 5)
    monkeypatch.undo()


def test_an_architecture_without_an_entry_is_autotuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.configs, "known", lambda *_: None)
    for tuned in (kernels._product_tuned, kernels._weight_tuned):
        assert len(tuned.configs) > 1
        monkeypatch.setattr(tuned, "configs", tuned.configs[-1:])  # the interpreter has no clock to choose by
    oracle.assert_matches_float64(OTHERS[0], cases.make(OTHERS[0]), "triton")
