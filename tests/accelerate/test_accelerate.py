"""accelerate and restore: options, refusals, and what must still work afterwards."""

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
from tests.support.networks import BLOCK, CONV, LRN, PAPER, POOL, fused, sequential


def test_the_report_is_a_table_and_json() -> None:
    report = ax.accelerate(sequential(*BLOCK, nn.Conv2d(6, 2, 1), nn.Tanh()))
    assert json.loads(json.dumps(report.as_dicts())) == [
        {"name": "0", "pattern": PAPER, "action": "fused", "reason": ""},
        {"name": "4", "pattern": "Conv2d", "action": "left alone", "reason": "Tanh follows it"},
    ]
    assert json.loads(json.dumps(report))[0] == ["0", PAPER, "fused", ""]
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
        assert fused(outer) == {PAPER: 1}
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
        ({}, {PAPER: 1}),
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
    "buffer_in_the_relu": (
        changed(lambda m: m[0].register_buffer("seen", torch.zeros(1)), nn.ReLU(), nn.MaxPool2d(2)),
        "0: it has parameters, buffers or modules of its own",
    ),
    "parameter_in_the_pool": (
        changed(lambda m: setattr(m[3], "scale", nn.Parameter(torch.ones(1))), *BLOCK),
        "3: it has parameters, buffers or modules of its own",
    ),
    "constants_that_are_learned": (
        changed(lambda m: setattr(m[2], "alpha", torch.tensor(1e-4)), *BLOCK),
        "2: its alpha, beta or k is a tensor",
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
    "writes_into_a_view_of_its_input": (
        lambda: sequential(nn.Flatten(2), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        "1: it writes into its input (inplace=True)",
    ),
    "writes_into_what_somebody_returns": (
        lambda: sequential(nn.Sequential(), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
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
