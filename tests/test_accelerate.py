"""accelerate and restore: other people's models, their values and gradients as before, and what is left alone."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import alexnet_ext as ax

from . import models, oracle

BLOCK = (nn.Conv2d(4, 6, 3), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(3, 2))


def torchvision_model(name: str, **options: Any) -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    return getattr(torchvision.models, name)(weights=None, **options)


def torchvision_alexnet() -> nn.Module:
    model = torchvision_model("alexnet", num_classes=10)
    model.classifier[1], model.classifier[4] = nn.Linear(9216, 32), nn.Linear(32, 32)  # fc6 would be all the time
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
            nn.init.uniform_(layer.model[-1].weight)  # they weigh squares: all positive, as the trained ones are

    def forward(self, x: Tensor) -> Tensor:
        return self.lpips(x, x.flip(-1)).flatten(1)


# model, side of its image, what is fused by method="modules"
BLOCKS_PAPER, BLOCKS_CAFFENET = (
    "Conv2d -> ReLU -> LocalResponseNorm -> MaxPool2d",
    "Conv2d -> ReLU -> MaxPool2d -> LocalResponseNorm",
)
CONV, POOL, LRN = "Conv2d -> ReLU", "ReLU -> MaxPool2d", "LocalResponseNorm"
MODELS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    "alexnet": (torchvision_alexnet, 95, {CONV: 2, POOL: 3}),
    "vgg16": (torchvision_vgg16, 32, {CONV: 8, POOL: 5}),
    "squeezenet": (lambda: torchvision_model("squeezenet1_1", num_classes=10), 63, {CONV: 1, POOL: 1}),
    "googlenet": (lambda: torchvision_model("googlenet", num_classes=10, init_weights=False), 64, {}),
    "lpips": (Distance, 64, {CONV: 5}),
    "timm_vgg11": (timm_vgg11, 32, {CONV: 8}),  # its feature_info says that each ReLU before a pooling is read
    "caffenet": (lambda: models.CaffeNet(10, 32, 99), 99, {BLOCKS_CAFFENET: 2, CONV: 2, POOL: 1}),
    "zfnet": (lambda: models.ZFNet(10, 32), 96, {POOL: 3, LRN: 2, CONV: 2}),
    "lrn_googlenet": (lambda: models.GoogLeNet(10), 48, {LRN: 2, CONV: 6}),
}
MORE_BY_FX = {
    "squeezenet": {CONV: 25, POOL: 1},
    "lrn_googlenet": {BLOCKS_CAFFENET: 1, BLOCKS_PAPER: 1, CONV: 7},
}
each_model = pytest.mark.parametrize("name", MODELS)


def fused(report: ax.Report) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in report:
        if row.action == "fused":
            found[row.pattern] = found.get(row.pattern, 0) + 1
    return found


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
    [*((name, "modules") for name in MODELS), *((name, "fx") for name in (*MORE_BY_FX, "googlenet", "lpips"))],
)
def test_models_compute_what_they_did(name: str, method: str) -> None:
    """In float64, so that rounding turns no ReLU and no window; terms: the longest sum there is, through 25 layers."""
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


def sequential(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*map(copy.deepcopy, layers or BLOCK))


def test_the_report_is_a_table_and_json() -> None:
    report = ax.accelerate(sequential(*BLOCK, nn.Conv2d(6, 2, 1), nn.Tanh()))
    assert json.loads(json.dumps(report.as_dicts())) == [
        {"name": "0", "pattern": BLOCKS_PAPER, "action": "fused", "reason": ""},
        {"name": "4", "pattern": "Conv2d", "action": "left alone", "reason": "Tanh follows it"},
    ]
    assert json.loads(json.dumps(report))[0] == ["0", BLOCKS_PAPER, "fused", ""]
    assert [row.name for row in report] == ["0", "4"]
    header, first, second = str(report).splitlines()
    assert header.split() == ["name", "pattern", "action", "reason"]
    assert first.index("fused") == second.index("left alone") == header.index("action")


def test_twice_is_as_once_and_one_restore_undoes_it() -> None:
    model = sequential()
    before = list(model)
    ax.accelerate(model)
    after = list(model)
    report = ax.accelerate(model)
    assert [tuple(row) for row in report] == [("0", "Conv2dReLULRNMaxPool2d", "already fused", "")]
    assert all(a is b for a, b in zip(model, after, strict=True))
    ax.restore(model)
    assert all(a is b for a, b in zip(model, before, strict=True))
    ax.restore(model)
    assert all(a is b for a, b in zip(model, before, strict=True))


def test_nested_blocks_undo_what_they_did() -> None:
    model = sequential(*BLOCK, *BLOCK[:2])
    stock = list(model)
    with ax.accelerated(model, conv_relu=False) as outer:
        assert fused(outer) == {BLOCKS_PAPER: 1}
        with ax.accelerated(model) as inner:
            assert fused(inner) == {CONV: 1}
        assert type(model[0]) is ax.nn.Conv2dReLULRNMaxPool2d
        assert model[4] is stock[4]
        with pytest.raises(KeyError), ax.accelerated(model):
            raise KeyError
        assert model[4] is stock[4]
    assert all(a is b for a, b in zip(model, stock, strict=True))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {BLOCKS_PAPER: 1}),
        ({"fused_block": False}, {CONV: 1, LRN: 1}),
        ({"fused_block": False, "lrn": False}, {CONV: 1}),
        ({"fused_block": False, "conv_relu": False}, {LRN: 1}),
        ({"filter_fn": lambda module, name: name != "0"}, {LRN: 1}),
        ({"filter_fn": lambda module, name: not isinstance(module, nn.MaxPool2d)}, {CONV: 1, LRN: 1}),
        ({"filter_fn": lambda module, name: False}, {}),
    ],
)
def test_options(options: dict[str, Any], expected: dict[str, int]) -> None:
    model = sequential()
    x = torch.randn(1, 4, 9, 9)
    y = model(x)
    assert fused(ax.accelerate(model, strict=True, **options)) == expected
    torch.testing.assert_close(model(x), y)


def test_pool_options() -> None:
    pool = sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.MaxPool2d(2))
    report = ax.accelerate(pool, relu_pool=False)
    assert fused(report) == {CONV: 1}
    assert report[1] == ("2", POOL, "left alone", "relu_pool=False")


class Subclass(nn.Conv2d):
    pass


class ReadsTheReLU(nn.Module):
    feature_info = ({"module": "layers.1"},)

    def __init__(self) -> None:
        super().__init__()
        self.layers = sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.MaxPool2d(2))


def hooked(index: int) -> nn.Module:
    model = sequential()
    model[index].register_forward_hook(lambda *_: None)
    return model


def changed(change: Callable[[nn.Sequential], Any], *layers: nn.Module) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = sequential(*layers)
        change(model)
        return model

    return build


def shared_weight() -> nn.Module:
    model = sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    model[2].weight = model[0].weight
    return model


def shared_module() -> nn.Module:
    model = sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
    return nn.ModuleDict({"a": model, "b": nn.Sequential(model[0])})


LEFT_ALONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "hook_on_the_convolution": (lambda: hooked(0), "0: it has hooks"),
    "hook_on_the_relu": (lambda: hooked(1), "1: it has hooks"),
    "backward_hook": (
        changed(lambda m: m[0].register_full_backward_hook(lambda *_: None)),
        "0: it has hooks",
    ),
    "weight_norm": (changed(lambda m: parametrizations.weight_norm(m[0])), "0: it has parametrizations"),
    "pruned": (changed(lambda m: prune.random_unstructured(m[0], "weight", 0.5)), "0: it has hooks"),
    "subclass": (lambda: sequential(Subclass(4, 6, 3), nn.ReLU()), "0: Subclass is a subclass of Conv2d"),
    "lazy": (lambda: sequential(nn.LazyConv2d(6, 3), nn.ReLU()), "0: LazyConv2d is a subclass of Conv2d"),
    "return_indices": (
        lambda: sequential(nn.Tanh(), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)),
        "2: return_indices=True",
    ),
    "prepared_for_quantisation": (
        changed(lambda m: setattr(m[0], "qconfig", torch.ao.quantization.default_qconfig)),
        "0: it is quantised or prepared for it",
    ),
    "shared_weight": (shared_weight, "0: 0 and 2 share a parameter"),
    "shared_module": (shared_module, "a.0: it stands at a.0 and b.0"),
    "forward_replaced": (changed(lambda m: setattr(m[0], "forward", m[0].forward)), "0: its forward was replaced"),
    "compiled": (changed(lambda m: m[0].compile(backend="eager")), "0: its forward was replaced or compiled"),
    "somebody_reads_the_relu": (ReadsTheReLU, "layers.1: its output is read (feature_info)"),
    "writes_into_its_input": (
        lambda: sequential(nn.Identity(), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        "1: it writes into its input (inplace=True)",
    ),
}


@pytest.mark.parametrize("what", LEFT_ALONE)
def test_left_alone(what: str) -> None:
    build, reason = LEFT_ALONE[what]
    model = build()
    before = list(model.modules())
    with pytest.raises(RuntimeError, match="strict=True and left alone"):
        ax.accelerate(model, strict=True, lrn=False)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    report = ax.accelerate(model, lrn=False)
    assert any(row.action == "left alone" and row.reason.startswith(reason) for row in report), report
    named = dict(model.named_modules())
    assert any(named[row.name] is module for row in report for module in before)


def test_slices_that_are_read_are_not_joined() -> None:
    model = sequential(nn.Sequential(*BLOCK[:2]), nn.Sequential(nn.MaxPool2d(2), *BLOCK[:2]))
    report = ax.accelerate(model)
    assert fused(report) == {CONV: 2}
    assert report[1] == ("1.0", "MaxPool2d", "left alone", "no layer is known to precede it")


def test_a_sequential_with_a_forward_of_its_own_is_not_taken_apart() -> None:
    class Reads(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            outputs = [x]
            for layer in self:
                outputs.append(layer(outputs[-1]))
            return sum(y.mean() for y in outputs)

    model = Reads(*copy.deepcopy(BLOCK))
    assert fused(ax.accelerate(model)) == {LRN: 1}


def test_fx_minds_a_second_reader_and_both_modes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
            self.ra, self.rb, self.rc, self.rd = (nn.ReLU() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            x = self.ra(a) + a  # two readers
            x = self.rb(self.b(self.rb(self.b(x))))  # twice, and each time the same neighbours
            x = self.c(x)
            if self.training:
                x = x + 1
            return self.rd(self.d(self.rc(x)))

    model = Net().eval()
    x = torch.randn(2, 4, 5, 5)
    y = model(x)
    report = ax.accelerate(model, method="fx")
    assert [tuple(row)[:3] for row in report] == [
        ("a", "Conv2d", "left alone"),
        ("b", "Conv2d -> ReLU", "fused"),
        ("c", "Conv2d", "left alone"),
        ("d", "Conv2d -> ReLU", "fused"),
    ]
    assert not model.training
    torch.testing.assert_close(model(x), y)


def test_fx_says_what_it_cannot_trace() -> None:
    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    model = Net(*map(copy.deepcopy, BLOCK))
    with pytest.raises(RuntimeError, match="method='fx' cannot trace Net: symbolically traced variables"):
        ax.accelerate(model, method="fx")
    assert model.training
    assert type(model[2]) is nn.LocalResponseNorm


def test_scripted_traced_and_quantised_modules_are_named() -> None:
    scripted = nn.ModuleDict({"s": torch.jit.trace(sequential(), torch.randn(1, 4, 9, 9))})
    assert ax.accelerate(scripted)[0].reason == "it is scripted or traced by torch.jit"
    assert ax.accelerate(scripted["s"])[0][:3] == ("", "TopLevelTracedModule", "left alone")
    quantised = nn.ModuleDict({"q": torch.ao.nn.quantized.Conv2d(4, 4, 3)})
    assert ax.accelerate(quantised)[0].reason == "it is quantised or prepared for it"


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        ax.accelerate(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method must be 'modules' or 'fx', got 'ast'"):
        ax.accelerate(sequential(), method="ast")
    assert ax.accelerate(nn.LocalResponseNorm(5))[0].reason == "it is the model itself"


def test_modes_devices_dtypes_and_assigned_weights_are_those_of_now_after_restore() -> None:
    model = sequential(*BLOCK, *BLOCK[:2]).train()
    stock = list(model)
    ax.accelerate(model)
    model.eval()
    weights = {name: torch.randn_like(tensor).double() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    model[0].bias.requires_grad_(False)
    ax.restore(model)
    assert all(a is b for a, b in zip(model, stock, strict=True))
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    ax.accelerate(model)
    assert all(parameter.is_meta for parameter in model.to("meta").parameters())
    ax.restore(model)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_an_accelerated_model_run_and_restore(how: str) -> None:
    model = sequential()
    x = torch.randn(2, 4, 9, 9)
    ax.accelerate(model)
    y = model(x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        twin[0].weight.add_(1)
    ax.restore(twin)
    assert [type(layer) for layer in twin] == [type(layer) for layer in BLOCK]
    assert torch.equal(twin[0].weight, model[0].weight + 1)
    assert torch.equal(model(x), y)


def test_restore_refuses_what_was_changed_since() -> None:
    for change, message in (
        (lambda m: m.__setitem__(1, nn.Tanh()), "cannot restore '1': a Tanh stands there now"),
        (lambda m: m.insert(0, nn.Identity()), "cannot restore '0': its layer was moved to '1' since"),
        (
            lambda m: parametrizations.weight_norm(m[0]),
            "cannot restore '0': it is a ParametrizedConv2dReLULRNMaxPool2d now",
        ),
    ):
        model = sequential()
        ax.accelerate(model)
        change(model)
        with pytest.raises(RuntimeError, match=message):
            ax.restore(model)


def test_hooks_set_on_a_fused_layer_stay_and_see_its_output() -> None:
    model = sequential()
    ax.accelerate(model)
    shapes: list[torch.Size] = []
    handle = model[0].register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model(torch.randn(1, 4, 9, 9))
    ax.restore(model)
    model(torch.randn(1, 4, 9, 9))
    assert shapes == [(1, 6, 3, 3), (1, 6, 7, 7)]
    handle.remove()
    model(torch.randn(1, 4, 9, 9))
    assert len(shapes) == 2


def test_a_relu_that_stands_in_many_places_is_back_in_all_of_them() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(4, 4, 1), relu, nn.Conv2d(4, 4, 1), relu)
    with ax.accelerated(model) as report:
        assert fused(report) == {CONV: 2}
    assert model[1] is model[3] is relu


@pytest.mark.parametrize("order", ["before", "after"])
def test_torch_compile(order: str) -> None:
    torch._dynamo.reset()
    model = sequential(*BLOCK, nn.Flatten(), nn.Linear(54, 3))
    x = torch.randn(2, 4, 9, 9)
    y = model(x)
    if order == "after":
        ax.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    if order == "before":
        ax.accelerate(compiled)
        assert isinstance(model[0], ax.nn.Conv2dReLULRNMaxPool2d)
        torch.testing.assert_close(compiled(x), y)
    ax.restore(compiled)
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(compiled(x), y)
