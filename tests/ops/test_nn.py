"""alexnet_ext.nn: the constructors, state_dict, repr and results of the torch.nn layers that they replace."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alexnet_ext as ax
from alexnet_ext.nn import stock_kind
from tests.support import cases

Pair = tuple[Callable[[], nn.Module], Callable[[], nn.Module]]


def conv_then(*layers: nn.Module, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, **options), *layers)


LRN, POOL = nn.LocalResponseNorm(5, 0.5, 0.75, 2.0), nn.MaxPool2d(3, 2)

PAIRS: dict[str, Pair] = {
    "lrn": (lambda: ax.nn.LocalResponseNorm(5, 0.1, 0.75, 2.0), lambda: nn.LocalResponseNorm(5, 0.1, 0.75, 2.0)),
    "lrn_defaults": (lambda: ax.nn.LocalResponseNorm(3), lambda: nn.LocalResponseNorm(3)),
    "pool": (lambda: ax.nn.ReLUMaxPool2d(3, 2, 1), lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))),
    "pool_stride_none": (lambda: ax.nn.ReLUMaxPool2d(2), lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))),
    "pool_ceil": (
        lambda: ax.nn.ReLUMaxPool2d((3, 2), 2, ceil_mode=True),
        lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d((3, 2), 2, ceil_mode=True)),
    ),
    "conv_positional": (
        lambda: ax.nn.Conv2dReLU(4, 6, 3, 2, 1, 1, 2, False),
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, 1, 2, False), nn.ReLU()),
    ),
    **{
        f"conv_{mode}": (
            lambda mode=mode: ax.nn.Conv2dReLU(4, 6, 3, padding=(2, 1), groups=2, padding_mode=mode),
            lambda mode=mode: nn.Sequential(nn.Conv2d(4, 6, 3, padding=(2, 1), groups=2, padding_mode=mode), nn.ReLU()),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "conv_without_relu": (lambda: ax.nn.Conv2d(4, 6, 3, 2, 1, groups=2), lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2)),
    "conv_same": (
        lambda: ax.nn.Conv2dReLU(4, 6, (2, 4), padding="same"),
        lambda: nn.Sequential(nn.Conv2d(4, 6, (2, 4), padding="same"), nn.ReLU()),
    ),
    "conv_same_reflect": (
        lambda: ax.nn.Conv2dReLU(4, 6, (2, 3), padding="same", padding_mode="reflect"),
        lambda: nn.Sequential(nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="reflect"), nn.ReLU()),
    ),
    "linear": (
        lambda: ax.nn.LinearReLU(11, 6),
        lambda: nn.Sequential(nn.Linear(11, 6), nn.ReLU()),
    ),
    "linear_no_bias": (
        lambda: ax.nn.LinearReLU(11, 5, False),
        lambda: nn.Sequential(nn.Linear(11, 5, False), nn.ReLU()),
    ),
    "conv_relu_lrn_pool": (
        lambda: ax.nn.Conv2dReLULRNMaxPool2d(4, 6, 3, padding=1, groups=2, norm=LRN, pool=POOL),
        lambda: conv_then(nn.ReLU(), LRN, POOL, groups=2),
    ),
    "conv_relu_pool_lrn": (
        lambda: ax.nn.Conv2dReLUMaxPool2dLRN(4, 6, 3, padding=1, bias=False, norm=LRN, pool=POOL),
        lambda: conv_then(nn.ReLU(), POOL, LRN, bias=False),
    ),
}
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def layer(stock: nn.Module) -> nn.Module:
    """The torch.nn layer whose name, arguments and parameters ours has."""
    if not isinstance(stock, nn.Sequential):
        return stock
    return next(part for part in stock if isinstance(part, (nn.Conv2d, nn.Linear, nn.MaxPool2d)))


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@each_pair
def test_results_and_gradients(pair: Pair, memory_format: torch.memory_format) -> None:
    ours, stock = pair[0](), pair[1]()
    ours.load_state_dict(layer(stock).state_dict())
    x = torch.randn(2, 4, 9, 11).to(memory_format=memory_format)
    ours, stock = ours.to(memory_format=memory_format), stock.to(memory_format=memory_format)
    torch.testing.assert_close(results(ours, x), results(stock, x), rtol=1e-4, atol=1e-5)


@each_pair
def test_state_dict_loads_both_ways(pair: Pair) -> None:
    ours, stock = pair[0](), layer(pair[1]())
    shapes = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    ours.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(ours.state_dict(), strict=True)


@each_pair
def test_is_a_layer_of_its_kind_and_says_so(pair: Pair) -> None:
    ours, stock = pair[0](), layer(pair[1]())
    # A layer that computes more is no instance: code that converts or folds instances would lose the rest.
    assert isinstance(ours, type(stock)) == isinstance(stock, nn.LocalResponseNorm)
    assert stock_kind(ours) is (type(ours) if isinstance(stock, nn.LocalResponseNorm) else type(stock))
    assert repr(ours).startswith(repr(stock).replace(type(stock).__name__, type(ours).__name__)[:-1])


def test_repr() -> None:
    assert repr(ax.nn.LocalResponseNorm(5, 0.1, k=2.0)) == "LocalResponseNorm(5, alpha=0.1, beta=0.75, k=2.0)"
    block = ax.nn.Conv2dReLULRNMaxPool2d(3, 96, 11, 4, norm=LRN, pool=POOL)
    assert "lrn=(5, 0.5, 0.75, 2.0), pool=(3, 2)" in repr(block)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@each_pair
def test_copies_and_pickles(pair: Pair) -> None:
    ours = pair[0]()
    x = torch.randn(2, 4, 9, 11)
    expected = ours(x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    )
    for other in copies:
        assert torch.equal(other(x), expected)
        assert repr(other) == repr(ours)


@each_pair
def test_module_hooks_fire(pair: Pair) -> None:
    ours = pair[0]()
    seen: list[str] = []
    ours.register_forward_hook(lambda *_: seen.append("forward"))
    ours.register_full_backward_hook(lambda *_: seen.append("backward"))
    ours(torch.randn(2, 4, 9, 11, requires_grad=True)).sum().backward()
    assert seen == ["forward", "backward"]


def test_device_and_dtype_arguments() -> None:
    assert torch.nn.utils.skip_init(ax.nn.LinearReLU, 3, 2).weight.shape == (2, 3)
    conv = ax.nn.Conv2dReLU(4, 6, 3)
    before = conv.weight.clone()
    conv.reset_parameters()
    assert not torch.equal(conv.weight, before)
    conv = ax.nn.Conv2dReLU(4, 6, 3, device="meta", dtype=torch.bfloat16)
    assert (conv.weight.device.type, conv.bias.dtype) == ("meta", torch.bfloat16)
    assert ax.nn.Conv2dReLU(4, 6, 3).to(torch.float64)(torch.randn(1, 4, 5, 5).double()).dtype == torch.float64


@each_pair
def test_unbatched_input(pair: Pair) -> None:
    ours, stock = pair[0](), pair[1]()
    if isinstance(ours, nn.LocalResponseNorm):
        with pytest.raises(ValueError, match="expected 3D or higher"):
            ours(torch.randn(4, 9))
        return
    ours.load_state_dict(layer(stock).state_dict())
    x = torch.randn(4, 9, 11)
    torch.testing.assert_close(ours(x), stock(x))
    if not hasattr(ours, "norm"):  # LRN reads three dimensions as (N, C, L)
        assert torch.equal(ours(x), ours(x[None])[0])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ax.nn.ReLUMaxPool2d(3, 2, return_indices=True), ValueError, "return_indices=True is not supported"),
        (lambda: ax.nn.Conv2dReLU(3, 6, 3, groups=2), ValueError, "in_channels must be divisible by groups"),
        (lambda: ax.nn.Conv2dReLU(4, 5, 3, groups=2), ValueError, "out_channels must be divisible by groups"),
        (lambda: ax.nn.Conv2dReLU(4, 6, 3, groups=0), ValueError, "groups must be a positive integer"),
        (lambda: ax.nn.Conv2dReLU(4, 6, 3, 2, padding="same"), ValueError, "padding='same' is not supported"),
        (lambda: block_with(pool=nn.MaxPool2d(3, 2, 1)), ValueError, "pool must have no padding"),
        (lambda: block_with(pool=nn.MaxPool2d(3, 2, dilation=2)), ValueError, "pool must have no padding"),
        (lambda: block_with(pool=nn.MaxPool2d(3, 2, ceil_mode=True)), ValueError, "pool must have no padding"),
        (lambda: block_with(pool=nn.MaxPool2d(3, 2, return_indices=True)), ValueError, "pool must have no padding"),
    ],
)
def test_bad_constructors(build: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def block_with(pool: nn.MaxPool2d) -> nn.Module:
    return ax.nn.Conv2dReLULRNMaxPool2d(4, 6, 3, norm=LRN, pool=pool)


def test_relu_in_place_may_follow_the_fused_layers() -> None:
    """An in-place layer after one of ours finds the output unsaved or raises; it never corrupts a gradient."""
    x = torch.randn(2, 4, 9, 11, requires_grad=True)
    for build in (PAIRS["lrn"][0], PAIRS["pool"][0], PAIRS["conv_relu_lrn_pool"][0]):
        module = build()
        (expected,) = torch.autograd.grad(torch.relu(module(x)).sum(), x)
        (found,) = torch.autograd.grad(module(x).relu_().sum(), x)
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@each_pair
def test_torch_jit_traces_and_says_that_it_cannot_script(pair: Pair) -> None:
    model = nn.Sequential(pair[0]())
    with pytest.raises(RuntimeError, match=f"torch.jit.script cannot compile {type(model[0]).__name__}: use torch.jit"):
        torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, torch.randn(2, 4, 9, 11)), file)
    file.seek(0)
    traced, x = torch.jit.load(file), torch.randn(3, 4, 12, 11)
    torch.testing.assert_close(results(traced, x), results(model, x), rtol=0, atol=0)


@pytest.mark.usefixtures("native")
@each_pair
def test_use_backend_holds_inside_modules(pair: Pair) -> None:
    module, x = pair[0](), torch.randn(2, 4, 9, 11, requires_grad=True)

    assert cases.runs_ours(module(x))
    with ax.use_backend("stock"):
        assert not cases.runs_ours(module(x))
        with ax.use_backend("native"):
            assert cases.runs_ours(module(x))
        assert not cases.runs_ours(module(x))
    assert cases.runs_ours(module(x))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("kind", [ax.nn.Conv2dReLULRNMaxPool2d, ax.nn.Conv2dReLUMaxPool2dLRN])
def test_the_convolution_of_a_block_is_ours_too(kind: type[nn.Conv2d]) -> None:
    """It saves its input and weight only, not its result: it has no ReLU whose mask the gradient would need."""
    block = kind(4, 6, 3, groups=2, norm=nn.LocalResponseNorm(5), pool=nn.MaxPool2d(2))
    x, saved = torch.randn(2, 4, 9, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = block.convolution(x)
    assert cases.runs_ours(y)
    assert sorted(saved) == sorted([x.shape, block.weight.shape])
    torch.testing.assert_close(y, F.conv2d(x, block.weight, groups=2))


def test_use_backend_is_undone_by_an_error() -> None:
    with pytest.raises(KeyError), ax.use_backend("stock"):
        raise KeyError
    assert ax.ops._backend.current() == "auto"
    with pytest.raises(ValueError, match="backend must be one of auto, native, triton, stock, got 'cuda'"):
        ax.use_backend("cuda")


def test_a_small_network_learns_the_same_with_and_without() -> None:
    """Ten steps of SGD in float64: fused and stock layers give the same weights."""

    def losses(convolution: nn.Module) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(6 * 3 * 3, 3)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        x, target = torch.randn(8, 4, 7, 7).double(), torch.randint(0, 3, (8,))
        found = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    ours = losses(ax.nn.Conv2dReLULRNMaxPool2d(4, 6, 3, padding=1, norm=LRN, pool=POOL))
    stock = losses(conv_then(nn.ReLU(), LRN, POOL))
    assert ours == pytest.approx(stock, rel=1e-9)
    assert ours[-1] < ours[0] / 2


@cases.each_dtype
def test_dtypes(dtype: torch.dtype) -> None:
    for build, _ in PAIRS.values():
        module = build().to(dtype)
        assert module(torch.randn(1, 4, 9, 11).to(dtype)).dtype == dtype
