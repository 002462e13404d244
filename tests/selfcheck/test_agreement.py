"""Right kernels agree with stock PyTorch at a model's shapes, and what is proven is what a training calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import alexnet_ext as ax
from alexnet_ext.models import alexnet
from alexnet_ext.ops import _backend, _known, _race
from alexnet_ext.selfcheck.calls import calls_of, units_of
from alexnet_ext.selfcheck.prove import setting

CPU = torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)


def network() -> nn.Module:
    with torch.device("meta"):
        return alexnet("paper", image_size=67, init="torch")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_right_kernels_agree_with_stock_in_every_dtype(dtype: torch.dtype) -> None:
    """A winner that rounding swaps moves a gradient by all of its value; the norms hardly notice."""
    found = [call for call in calls_of(network(), (4, 3, 67, 67), dtype) if call.op not in ("augment", "sgd_step")]
    assert {call.op for call in found} >= {"relu_lrn_max_pool2d", "relu_max_pool2d", "relu_max_pool2d_lrn"}
    for call in found:
        arguments = call.made(CPU, dtype, torch.channels_last)
        ours, theirs = (call.run(name, arguments) for name in ("native", "stock"))
        assert _race.agree_as_layers(ours, theirs), (call.op, call.shape)
        for i in range(len(theirs)):
            wrong = [x.clone() for x in ours]
            wrong[i] = wrong[i] * 1.5
            assert not _race.agree_as_layers(wrong, theirs), (call.op, i)


@pytest.mark.usefixtures("native")
def test_images_of_both_stores_are_raced() -> None:
    found = [call for call in calls_of(network(), (4, 3, 67, 67), torch.float32) if call.op == "augment"]
    assert {call.shape for call in found} == {(4, 3, 67, 67), (4, 1, 102, 68)}, "RGB, and I420 of even sides"
    for call in found:
        arguments = call.made(CPU, torch.float32, torch.channels_last)
        assert _race.agree_as_layers(*(call.run(name, arguments) for name in ("native", "stock")))


def test_an_op_in_place_is_compared_with_values_of_its_own() -> None:
    (step,) = (call for call in calls_of(nn.Linear(3, 2), (1, 3, 3, 3), torch.bfloat16) if call.op == "sgd_step")
    arguments = step.made(CPU, torch.bfloat16, torch.channels_last)
    parameters = [x.clone() for x in arguments[0]]
    assert all(x.any() for x in parameters)
    assert step.run("stock", arguments)[0] is arguments[0][0]
    assert not torch.equal(arguments[0][0], parameters[0])


def test_the_models_input_has_no_gradient() -> None:
    first, *others = [call for call in calls_of(network(), (2, 3, 67, 67), torch.float32) if call.layer]
    made = [call.made(CPU, torch.float32, torch.channels_last)[0].requires_grad for call in (first, *others)]
    assert made == [False, *[True] * len(others)]


@pytest.mark.usefixtures("as_gpu")
def test_what_is_proven_is_what_training_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers stack images as planes; under autocast the parameters' gradients are fp32."""
    asked = set[_known.Unit]()

    def noted(op: str, backend: str, device: torch.device, dtype: torch.dtype, layout: str) -> _known.Proof:
        asked.add(_known.Unit(op, backend, _known.name_of(dtype), layout))
        return _known.Proof("proven")

    monkeypatch.setattr(_backend, "proof_of", noted)
    dtype = torch.bfloat16
    model = alexnet("paper", image_size=67, num_classes=3).to(memory_format=torch.channels_last)
    sgd = ax.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randint(256, (2, 3, 80, 80), dtype=torch.uint8)
    drawn = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool), torch.zeros(2, 3)
    colours = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    x = ax.ops.augment(images.permute(0, 2, 3, 1), *drawn, 67, **colours, dtype=dtype)
    with torch.autocast("cpu", dtype):
        model(x).sum().backward()
    sgd.step()
    wanted = set(units_of(calls_of(network(), (2, 3, 67, 67), dtype), "cpu", dtype, torch.channels_last))
    assert {unit.op for unit in asked} >= {"augment", "conv2d_bias_relu", "linear_bias_relu", "sgd_step"}
    assert {unit for unit in asked if unit.backend == "native"} <= wanted


@pytest.mark.usefixtures("as_gpu")
def test_without_a_layout_the_models_own_is_taken() -> None:
    layer = nn.Conv2d(3, 4, 3)
    assert setting("cpu", None, None, layer).layout == torch.contiguous_format
    assert setting("cpu", None, None, layer.to(memory_format=torch.channels_last)).layout == torch.channels_last
    assert setting("cpu", None, None, None).layout == torch.channels_last


def test_what_was_proven_after_a_race_takes_part_in_another(known_files: object) -> None:
    runs = list[str]()

    def candidate(name: str) -> _race.Candidate:
        return _race.Candidate(name, lambda: runs.append(name) or [torch.ones(2)])

    _race.fastest("call", CPU, [candidate("a"), candidate("b")])
    runs.clear()
    _race.fastest("call", CPU, [candidate("a"), candidate("b")])
    assert runs == []
    _race.fastest("call", CPU, [candidate("a"), candidate("b"), candidate("c")])
    assert set(runs) == {"a", "b", "c"}
