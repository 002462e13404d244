"""accelerate on other people's models: values, gradients and a training step as before; layers left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alexnet_ext as ax
from tests.support import networks, oracle
from tests.support.networks import CAFFENET, CONV, LRN, PAPER, POOL, fused


def torchvision_model(name: str, **options: Any) -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    return getattr(torchvision.models, name)(weights=None, **options)


def torchvision_alexnet() -> nn.Module:
    model = torchvision_model("alexnet", num_classes=10)
    model.classifier[1], model.classifier[4] = nn.Linear(9216, 32), nn.Linear(32, 32)  # fc6 would take all the time
    model.classifier[6] = nn.Linear(32, 10)
    return model


def torchvision_vgg16() -> nn.Module:
    model = torchvision_model("vgg16", init_weights=False)
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    return model


def timm_vgg11() -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        model = timm.create_model("vgg11")
    model.pre_logits = timm.models.vgg.ConvMlp(512, 16, 1)
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    model.features.to_empty(device="cpu")
    for parameter in model.features.parameters():
        nn.init.normal_(parameter, std=0.03)
    return model


class Distance(nn.Module):
    """LPIPS as a function of one image: the distance to that image turned around."""

    def __init__(self) -> None:
        super().__init__()
        lpips = pytest.importorskip("lpips", reason="lpips is not installed")
        with pytest.warns(UserWarning, match="deprecated"):
            self.lpips = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, pnet_tune=True, verbose=False)
        for layer in self.lpips.lins:
            nn.init.uniform_(layer.model[-1].weight)  # weights of squares: all positive, like the trained ones

    def forward(self, x: Tensor) -> Tensor:
        return self.lpips(x, x.flip(-1)).flatten(1)


# model, side of its image, the patterns that method="modules" fuses
MODELS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    "alexnet": (torchvision_alexnet, 95, {CONV: 2, POOL: 3}),
    "vgg16": (torchvision_vgg16, 32, {CONV: 8, POOL: 5}),
    "squeezenet": (lambda: torchvision_model("squeezenet1_1", num_classes=10), 63, {CONV: 1, POOL: 1}),
    "googlenet": (lambda: torchvision_model("googlenet", num_classes=10, init_weights=False), 64, {}),
    "lpips": (Distance, 64, {CONV: 5}),
    "timm_vgg11": (timm_vgg11, 32, {CONV: 8}),  # its feature_info says that each ReLU before a pooling is read
    "caffenet": (lambda: networks.CaffeNet(10, 32, 99), 99, {CAFFENET: 2, CONV: 2, POOL: 1}),
    "zfnet": (lambda: networks.ZFNet(10, 32), 96, {POOL: 3, LRN: 2, CONV: 2}),
    "functional": (networks.Functional, 48, {}),
    "lrn_googlenet": (lambda: networks.GoogLeNet(10), 48, {LRN: 2, CONV: 6}),
}
MORE_BY_FX = {
    "functional": {CONV: 1, "relu -> max_pool2d": 1, "local_response_norm": 1},
    "squeezenet": {CONV: 25, POOL: 1},
    "lrn_googlenet": {CAFFENET: 1, PAPER: 1, CONV: 7},
}
each_model = pytest.mark.parametrize("name", MODELS)


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients, in training: dropout draws the same each time."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = model(x)
    y = y if isinstance(y, Tensor) else torch.cat(list(y), 1)  # googlenet and its auxiliary heads
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) + 0.1
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(y, [x, *parameters.values()], weights, allow_unused=True)
    named = zip(["x", *parameters], gradients, strict=True)
    return {"y": y.detach()} | {name: gradient for name, gradient in named if gradient is not None}


def assert_same(ours: dict[str, Tensor], exact: dict[str, Tensor], terms: int) -> None:
    assert ours.keys() == exact.keys()
    for name, value in exact.items():
        oracle.assert_accurate(name, ours[name], value, None, terms)


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "modules") for name in MODELS), *((name, "fx") for name in (*MORE_BY_FX, "lpips"))],
)
def test_models_compute_what_they_did(name: str, method: str) -> None:
    """In float64, so that rounding changes no ReLU and no winner; terms: the longest sum, through 25 layers."""
    build, side, expected = MODELS[name]
    model = build().double().train()
    stock, original = copy.deepcopy(model), list(model.modules())
    keys, parameters = list(model.state_dict()), list(model.parameters())
    optimizer, stock_optimizer = (torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in (model, stock))
    x = torch.randn(2, 3, side, side, dtype=torch.float64)

    report = ax.accelerate(model, method=method)
    assert fused(report) == (MORE_BY_FX.get(name, expected) if method == "fx" else expected)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(
        isinstance(m, nn.Identity) for m in set(model.modules()) - set(original) if "alexnet" not in type(m).__module__
    )
    results = run(model, x), run(stock, x)
    assert_same(*results, terms=25 * 9216)
    for step, found in ((optimizer, results[0]), (stock_optimizer, results[1])):
        for key, parameter in (model if step is optimizer else stock).named_parameters():
            parameter.grad = found.get(key)
        step.step()
    floating = [{n: t for n, t in m.state_dict().items() if t.is_floating_point()} for m in (model, stock)]
    assert_same(*floating, terms=25 * 9216)
    assert not torch.equal(next(iter(model.parameters())), next(iter(build().double().parameters())))

    ax.restore(model)
    assert all(a is b for a, b in zip(model.modules(), original, strict=True))
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        assert_same({"y": model.eval()(x)}, {"y": stock.eval()(x)}, terms=25 * 9216)


@each_model
def test_every_layer_left_alone_has_a_reason(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name][0]()
    stock = {n: m for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.LocalResponseNorm, nn.MaxPool2d)}
    report = ax.accelerate(model)
    named = {row.name for row in report}
    for row in report:
        assert bool(row.reason) == (row.action == "left alone"), row
    covered = {n for n in stock if n in named or type(model.get_submodule(n)) is nn.Identity}
    assert covered == set(stock)
    if name == "timm_vgg11":
        assert ("features.1", "ReLU -> MaxPool2d") not in {(r.name, r.pattern) for r in report}
        assert any(r.reason == "features.1: its output is read (feature_info)" for r in report)


def test_timm_reads_the_same_features() -> None:
    model = timm_vgg11().eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, intermediates_only=True)
    with ax.accelerated(model):
        torch.testing.assert_close(model.forward_intermediates(x, intermediates_only=True), expected)
