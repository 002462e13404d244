"""The network: the paper's numbers, fused compared with stock, checkpoints, compilers and copies."""

from __future__ import annotations

import copy
import importlib
import pickle
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import alexnet_ext as ax
from alexnet_ext import ops
from alexnet_ext.layers import layer_rows
from alexnet_ext.models import AlexNet, alexnet, from_torchvision, summary
from alexnet_ext.ops._backend import Decision
from alexnet_ext.variants import stages

alexnet_module = importlib.import_module("alexnet_ext.models.alexnet")
VARIANTS = ("paper", "caffe", "caffenet", "tutorial", "torchvision")
LRN = {
    "paper": (5, 5e-4, 0.75, 2.0),
    "caffe": (5, 1e-4, 0.75, 1.0),
    "caffenet": (5, 1e-4, 0.75, 1.0),
    "tutorial": (5, 1e-4, 0.75, 2.0),
}
ORDER = {
    "paper": "conv1 relu1 norm1 pool1",
    "caffe": "conv1 relu1 norm1 pool1",
    "caffenet": "conv1 relu1 pool1 norm1",
    "tutorial": "conv1 pool1 norm1 relu1",
    "torchvision": "conv1 relu1 pool1",
}
# layer, kind, kernel, stride, padding, groups, output, parameters, multiply-adds
PAPER = [
    ("conv1", "convolution + ReLU + LRN", 11, 4, 0, 1, (96, 55, 55), 34_944, 105_415_200),
    ("pool1", "max pooling, overlapping", 3, 2, None, None, (96, 27, 27), 0, 0),
    ("conv2", "convolution + ReLU + LRN", 5, 1, 2, 2, (256, 27, 27), 307_456, 223_948_800),
    ("pool2", "max pooling, overlapping", 3, 2, None, None, (256, 13, 13), 0, 0),
    ("conv3", "convolution + ReLU", 3, 1, 1, 1, (384, 13, 13), 885_120, 149_520_384),
    ("conv4", "convolution + ReLU", 3, 1, 1, 2, (384, 13, 13), 663_936, 112_140_288),
    ("conv5", "convolution + ReLU", 3, 1, 1, 2, (256, 13, 13), 442_624, 74_760_192),
    ("pool5", "max pooling, overlapping", 3, 2, None, None, (256, 6, 6), 0, 0),
    ("fc6", "linear + ReLU + dropout 0.5", None, None, None, None, (4096,), 37_752_832, 37_748_736),
    ("fc7", "linear + ReLU + dropout 0.5", None, None, None, None, (4096,), 16_781_312, 16_777_216),
    ("fc8", "linear", None, None, None, None, (1000,), 4_097_000, 4_096_000),
]


def meta(*args: object, **kwargs: object) -> AlexNet:
    with torch.device("meta"):
        return alexnet(*args, **kwargs)  # type: ignore[arg-type]


def small(variant: str = "paper", image_size: int = 67) -> tuple[AlexNet, AlexNet]:
    """(fused, stock) on a small image, sharing their weights; fp64, so that rounding changes no ReLU and no winner."""
    stock = alexnet(variant, False, num_classes=10, image_size=image_size, init="kaiming").double().eval()
    fused = meta(variant, num_classes=10, image_size=image_size).eval()
    fused.load_state_dict(stock.state_dict(), assign=True)
    return fused, stock


def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The result and the gradients of the image and of all parameters except the matrices of fc6 and fc7."""
    x = x.clone().requires_grad_()
    y = model(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    wanted = [p for name, p in model.named_parameters() if not name.endswith(("fc6.weight", "fc7.weight"))]
    return [y.detach(), *torch.autograd.grad(y, [x, *wanted], dy)]


def assert_equal(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        scale = float(b.abs().max())
        assert scale > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("fused", [True, False])
def test_paper_table(fused: bool) -> None:
    rows = summary.summary(meta("paper", fused))
    assert [tuple(vars(row).values()) for row in rows] == PAPER
    total = summary.total(rows)
    assert (total.parameters, total.multiply_adds) == (60_965_224, 724_406_816)
    assert round(summary.training_flops(rows) / 1e9, 2) == 4.14


@pytest.mark.parametrize("variant", VARIANTS)
def test_summary_counts_the_model_itself(variant: str) -> None:
    fused, stock = (summary.summary(meta(variant, fused)) for fused in (True, False))
    assert fused == stock
    model = meta(variant)
    assert summary.total(fused).parameters == sum(p.numel() for p in model.parameters())
    model.features.conv3.bias = None
    counted = {row.layer: row.parameters for row in summary.summary(model)}
    assert counted["conv3"] == {row.layer: row.parameters for row in fused}["conv3"] - 384


@pytest.mark.parametrize("image_size", [None, 224, 67, 71])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layer_table_is_what_the_layers_put_out(variant: str, image_size: int | None) -> None:
    """The table is computed; here PyTorch's own layers give the shapes."""
    stock = meta(variant, False, image_size=image_size, num_classes=10).eval()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in stock.named_modules():
        layer.register_forward_hook(
            lambda _m, _x, y, name=name: shapes.update({name.split(".")[-1]: tuple(y.shape[1:])})
        )
    side = stock.config.image_size
    stock(torch.empty(1, 3, side, side, device="meta"))
    for row in layer_rows(stock.config):
        assert row.output == shapes[row.layer], row
    counted = {row.layer: row.parameters for row in layer_rows(stock.config)}
    assert counted == {row.layer: row.parameters for row in summary.summary(stock)}


def test_summary_of_relatives() -> None:
    kinds = {variant: {r.layer: r.kind for r in summary.summary(meta(variant))} for variant in VARIANTS}
    assert kinds["caffenet"]["pool1"] == "max pooling, overlapping + LRN"
    assert kinds["tutorial"]["pool2"] == "max pooling, overlapping + LRN + ReLU"
    assert kinds["torchvision"]["fc6"] == "dropout 0.5 + linear + ReLU"
    assert kinds["torchvision"]["avgpool"] == "average pooling"
    rows = summary.summary(meta("torchvision"))
    assert summary.total(rows).parameters == 61_100_840


def test_summary_renders_and_refuses() -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary.render(meta("paper")))
    text = console.export_text()
    assert "60,965,224" in text
    assert "724,406,816" in text
    assert "0.724 G multiply-adds" in text
    assert "256 x 27 x 27" in text
    assert "…" not in text, "the table must fit 80 columns"
    with pytest.raises(TypeError, match="got Linear"):
        summary.summary(nn.Linear(2, 2))  # type: ignore[arg-type]


# At size 71 pooling rounded up differs from pooling rounded down.
@pytest.mark.parametrize("image_size", [None, 227, 224, 71])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_and_stock_have_one_structure(variant: str, image_size: int | None) -> None:
    fused, stock = (meta(variant, fused, image_size=image_size) for fused in (True, False))
    assert list(dict(fused.named_modules())) == list(dict(stock.named_modules()))
    assert len(fused.features) == len(stock.features)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (fused, stock)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    assert fused.config == stock.config
    leaves = [m for m in stock.modules() if not list(m.children())]
    assert all(type(m).__module__.startswith("torch.nn.") for m in leaves)
    assert any(isinstance(m, nn.Identity) for m in fused.modules())
    assert [name for name in dict(stock.features.named_children()) if name.endswith("1")] == ORDER[variant].split()


@pytest.mark.parametrize("variant", LRN)
def test_lrn_constants(variant: str) -> None:
    for index in (1, 2):
        norm = meta(variant, False).features.get_submodule(f"norm{index}")
        assert (norm.size, norm.alpha, norm.beta, norm.k) == LRN[variant]
        conv, norm = (meta(variant).features.get_submodule(f"{kind}{index}") for kind in ("conv", "norm"))
        held = (norm.size, norm.alpha, norm.beta, norm.k) if variant == "tutorial" else conv.norm
        assert held == LRN[variant]


def test_fused_layers() -> None:
    layers = meta("paper").features
    assert isinstance(layers.conv1, ax.nn.Conv2dReLULRNMaxPool2d)
    assert isinstance(layers.conv2, ax.nn.Conv2dReLULRNMaxPool2d)
    assert isinstance(layers.conv3, ax.nn.Conv2dReLU)
    assert isinstance(layers.conv4, ax.nn.Conv2dReLU)
    assert type(layers.conv5) is ax.nn.Conv2d  # pooling applies its ReLU
    assert isinstance(layers.pool5, ax.nn.ReLUMaxPool2d)
    assert isinstance(meta("paper").classifier.fc6, ax.nn.LinearReLU)
    assert isinstance(meta("paper").classifier.fc7, ax.nn.LinearReLU)
    assert isinstance(meta("caffe").features.conv1, ax.nn.Conv2dReLULRNMaxPool2d)
    assert isinstance(meta("caffenet").features.conv2, ax.nn.Conv2dReLUMaxPool2dLRN)
    assert isinstance(meta("torchvision").features.pool1, ax.nn.ReLUMaxPool2d)
    assert isinstance(meta("tutorial").features.norm1, ax.nn.LocalResponseNorm)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_equals_stock(variant: str) -> None:
    fused, stock = small(variant, image_size=99)
    x = 50 * torch.randn(2, 3, 99, 99, dtype=torch.float64)
    expected = run(stock, x)
    assert_equal(run(fused, x), expected)
    fused = fused.to(memory_format=torch.channels_last)
    assert_equal(run(fused, x.to(memory_format=torch.channels_last)), expected)


def test_one_seed_gives_fused_and_stock_the_same_start() -> None:
    starts = []
    for fused in (True, False):
        torch.manual_seed(3)
        starts.append(alexnet("paper", fused, num_classes=10, image_size=67))
    for a, b in zip(*(model.parameters() for model in starts), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["paper", "caffe", "caffenet", "tutorial"])
def test_full_size(variant: str) -> None:
    x = torch.zeros(1, 3, 224, 224, device="meta")
    model = meta(variant, image_size=224)
    assert model.features.conv1.padding == (2, 2)
    assert model(x).shape == (1, 1000)
    assert meta(variant)(torch.zeros(2, 3, 227, 227, device="meta")).shape == (2, 1000)
    assert meta(variant).config.image_size == 227
    assert meta(variant).features.conv1.padding == (0, 0)
    assert model.classifier.fc6.in_features == meta(variant).classifier.fc6.in_features == 9216


def test_caffe_rounds_pooling_up() -> None:
    """At 71 conv1 returns 16; pooling makes 7 of it rounding down and 8 rounding up, which no fused block supports."""
    fused, stock = small("caffe", image_size=71)
    assert type(fused.features.conv1) is ax.nn.Conv2dReLU
    assert type(fused.features.norm1) is ax.nn.LocalResponseNorm
    assert fused.features.pool1.ceil_mode
    x = torch.randn(1, 3, 71, 71, dtype=torch.float64)
    assert fused.features(x).shape == stock.features(x).shape == (1, 256, 2, 2)
    assert meta("paper", image_size=71).double().features(x.to("meta")).shape == (1, 256, 1, 1)
    assert_equal(run(fused, x), run(stock, x))


def test_torchvision_weights() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet(weights=None).eval()
    with torch.device("meta"):
        ours = alexnet("torchvision").eval()
    ours.load_state_dict(from_torchvision(theirs.state_dict()), assign=True)
    assert sum(p.numel() for p in ours.parameters()) == 61_100_840
    with torch.no_grad():
        for size in (224, 260):  # the average pool takes any size
            x = torch.randn(1, 3, size, size)
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(KeyError, match=r"features\.1\.weight"):
        from_torchvision({"features.1.weight": torch.zeros(1)})


def test_paper_start() -> None:
    model = alexnet("paper", image_size=67, num_classes=10)
    layers = {n.split(".")[-1]: m for n, m in model.named_modules() if hasattr(m, "weight")}
    assert list(layers) == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    for name, layer in layers.items():
        weight = layer.weight.detach()
        assert abs(float(weight.mean())) < 5 * 0.01 / weight.numel() ** 0.5
        assert abs(float(weight.std()) - 0.01) < 5 * 0.01 / (2 * weight.numel()) ** 0.5
        one = name in ("conv2", "conv4", "conv5", "fc6", "fc7")
        assert torch.equal(layer.bias, torch.full_like(layer.bias, float(one)))


def test_other_starts() -> None:
    kaiming = alexnet("paper", image_size=67, num_classes=10, init="kaiming")
    fc7, conv4 = kaiming.classifier.fc7, kaiming.features.conv4
    assert float(fc7.weight.detach().std()) == pytest.approx((2 / 4096) ** 0.5, rel=0.01)
    assert float(conv4.weight.detach().std()) == pytest.approx((2 / (192 * 9)) ** 0.5, rel=0.01)
    assert not any(p.any() for name, p in kaiming.named_parameters() if name.endswith("bias"))
    default = alexnet("paper", image_size=67, num_classes=10, init="torch").classifier.fc7
    assert float(default.weight.detach().abs().max()) == pytest.approx(1 / 64, rel=1e-3)
    assert default.bias.detach().abs().max() > 0


def test_dropout() -> None:
    model = alexnet("paper", image_size=67, num_classes=10, init="kaiming", dropout=0.25)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.25, 0.25]
    assert list(dict(model.classifier.named_children())) == ["fc6", "relu6", "drop6", "fc7", "relu7", "drop7", "fc8"]
    names = list(dict(meta("torchvision").classifier.named_children()))
    assert names == ["drop6", "fc6", "relu6", "drop7", "fc7", "relu7", "fc8"]
    x = torch.randn(1, 3, 67, 67)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "vgg"}, "variant must be one of paper, caffe, caffenet, tutorial, torchvision, got 'vgg'"),
        ({"init": "xavier"}, "init must be one of paper, kaiming, torch, got 'xavier'"),
        ({"num_classes": 0}, "num_classes must be an int of at least 1, got 0"),
        ({"image_size": 2.5}, "image_size must be an int of at least 1, got 2.5"),
        ({"image_size": 2**32}, "image_size must be at most 16,777,216, got 4,294,967,296"),
        ({"num_classes": 10**20}, "num_classes must be at most 16,777,216, got 100,000,000,000,000,000,000"),
        ({"dropout": 1.5}, "dropout must be between 0 and 1, got 1.5"),
        ({"image_size": 66}, "image_size=66 is too small for variant 'paper'"),
        ({"image_size": 5}, "image_size=5 is too small for variant 'paper': conv1"),
        ({"variant": "torchvision", "image_size": 40}, "image_size=40 is too small for variant 'torchvision'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        meta(**arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("shape", [(3, 227, 227), (1, 1, 227, 227), (1, 3, 224, 224), (1, 3, 227, 228), (3,)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError) as caught:
        meta("paper")(torch.empty(shape, device="meta"))
    assert str(caught.value) == f"x has shape {list(shape)}, expected (N, 3, 227, 227)"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("variant", "size", "side"), [("paper", 99, 67), ("caffe", 83, 99), ("tutorial", 83, 75)])
def test_images_of_other_sides_go_through_pool5s_windows_adapted(
    variant: str, size: int, side: int, fused: bool
) -> None:
    """The same as a plain network of that size whose pool5 is adaptive, with the same weights."""
    model = ax.models.alexnet(variant, num_classes=3, image_size=size, dropout=0, fused=fused).double()
    model.take_sides([side])
    plain = ax.models.alexnet(variant, num_classes=3, image_size=side, dropout=0, fused=False).double()
    plain.features.pool5 = nn.AdaptiveMaxPool2d(stages(model.config)[-1].output)
    plain.classifier = nn.Sequential(*(layer for layer in copy.deepcopy(model.classifier)))
    plain.features.load_state_dict(model.features.state_dict())
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    results = [(y := net(x), *torch.autograd.grad(y.square().sum(), list(net.parameters()))) for net in (model, plain)]
    torch.testing.assert_close(results[0], results[1])
    assert model(torch.zeros(1, 3, size, size, dtype=torch.float64)).shape == (1, 3)
    with pytest.raises(RuntimeError, match=rf"expected \(N, 3, {size}, {size}\)"):
        model(torch.zeros(1, 3, side + 4, side + 4, dtype=torch.float64))


def test_adapted_windows_at_227_are_pool5s_own() -> None:
    x = torch.randn(2, 256, 13, 13)
    assert torch.equal(nn.AdaptiveMaxPool2d(stages(meta("paper").config)[-1].output)(x), nn.MaxPool2d(3, 2)(x))


def test_sides_that_leave_nothing_are_refused() -> None:
    model = meta("paper")
    with pytest.raises(ValueError, match="image_size=51 is too small for variant 'paper'"):
        model.take_sides([131, 51])
    assert model.sides == (227,)


def test_config_builds_the_network_again() -> None:
    model = meta("caffenet", num_classes=7, image_size=131, dropout=0.1, activation="tanh")
    assert asdict(model.config) == {
        "variant": "caffenet",
        "num_classes": 7,
        "image_size": 131,
        "dropout": 0.1,
        "activation": "tanh",
    }
    again = meta(**asdict(model.config))
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]
    assert "variant='caffenet', num_classes=7, image_size=131, dropout=0.1" in repr(model)
    assert meta("torchvision").config.image_size == 224


def test_copies() -> None:
    model = alexnet("paper", num_classes=10, image_size=67, init="kaiming").eval()
    x = torch.randn(1, 3, 67, 67)
    with torch.no_grad():
        y = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), y)
            assert (twin.config, twin.fused) == (model.config, True)
            twin.features.conv1.bias.add_(1)
            assert not torch.equal(twin(x), y)
        assert torch.equal(model(x), y), "a copy shares no weights"


def test_meta_device_allocates_nothing() -> None:
    model = meta("paper")
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(4, 3, 227, 227, device="meta")).shape == (4, 1000)


@pytest.mark.parametrize("variant", ["paper", "caffenet"])
def test_compiles_without_graph_breaks(variant: str) -> None:
    torch._dynamo.reset()
    model, _ = small(variant)
    x = torch.randn(2, 3, 67, 67, dtype=torch.float64)
    assert_equal(run(torch.compile(model, fullgraph=True, backend="aot_eager"), x), run(model, x))


@pytest.mark.parametrize(("variant", "size"), [("paper", 67), ("paper", 71), ("caffe", 67), ("caffenet", 67)])
def test_where_images_are_rewritten_the_model_takes_them_so(
    variant: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU's backend would have it: equal logits and gradients, by the same parameters."""
    monkeypatch.setattr(alexnet_module, "decide", lambda *_, **__: Decision("auto", "as on a GPU"))
    model = ax.models.alexnet(variant, num_classes=3, image_size=size, dropout=0).double()
    images = torch.randint(0, 256, (2, size + 5, size + 6, 3), dtype=torch.uint8)
    drawn = torch.tensor([[0, 6], [5, 1]]), torch.tensor([True, False]), torch.randn(2, 3)
    colours: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "dtype": torch.float64}
    plain, deep = (ops.augment(images, *drawn, size, **colours, space_to_depth=depth) for depth in (1, 4))
    with pytest.raises(RuntimeError, match=rf"expected \(N, 3, {size}, {size}\)"):
        model(deep)
    assert model.take_depth(torch.device("cpu"), torch.bfloat16) == 4
    parameters = list(model.parameters())
    results = [(y := model(x), *torch.autograd.grad(y.square().sum(), parameters)) for x in (plain, deep)]
    torch.testing.assert_close(results[1], results[0])
    model.take_sides([size + 8])
    assert model.take_depth(torch.device("cpu"), torch.bfloat16) == 4
    larger = F.interpolate(plain, (size + 8, size + 8))
    deeper = F.pixel_unshuffle(F.pad(larger, (0, 1, 0, 1)), 4)
    torch.testing.assert_close(model(deeper), model(larger))
    model.take_sides([size + 8, size + 6])  # there conv1 leaves less than of blocks
    assert model.take_depth(torch.device("cpu"), torch.bfloat16) == 1
    for wrong in (deep[:, :, 1:], deep[:, :47], plain[:, :, 1:]):
        with pytest.raises(RuntimeError, match="x has shape"):
            model(wrong)


def test_elsewhere_the_model_takes_plain_images(monkeypatch: pytest.MonkeyPatch) -> None:
    device, half = torch.device("cpu"), torch.bfloat16
    assert ax.models.alexnet(image_size=67).take_depth(device, half) == 1  # the compiled op
    monkeypatch.setattr(alexnet_module, "decide", lambda *_, **__: Decision("auto", "as on a GPU"))
    assert ax.models.alexnet(image_size=67).take_depth(device, torch.float32) == 1
    assert ax.models.alexnet(image_size=67, fused=False).take_depth(device, half) == 1
    with torch.device("meta"):
        assert ax.models.alexnet().take_depth(device, half) == 4
    for variant, size in (("paper", 69), ("paper", 224), ("torchvision", None), ("tutorial", 67)):
        model = ax.models.alexnet(variant, image_size=size)
        assert model.take_depth(device, half) == 1, (variant, size)
    for reason in ("native", "stock"):
        monkeypatch.setattr(alexnet_module, "decide", lambda *_, found=reason, **__: Decision(found, ""))
        assert ax.models.alexnet(image_size=67).take_depth(device, half) == 1
