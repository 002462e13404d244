"""``--detect-nan``: the layer, the operation, the step and the inputs that made a NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alexnet_ext.training import checkpoint
from alexnet_ext.training.finite import NotFinite
from alexnet_ext.training.step import TrainingStep
from alexnet_ext.training.trainer import Means, Trainer
from tests.training.test_step import CPU, PREPROCESSING, batch, network, step_of
from tests.training.test_training import TINY, reporter, split

RECIPE = replace(TINY, dropout=0.0)


class Planted(nn.Module):
    """A layer that returns ``function(x)``."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class BrokenGradient(torch.autograd.Function):
    """x, and 0 / 0 as the gradient of its first element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / torch.zeros(())


def planted(function: Callable[[Tensor], Tensor], recipe: Any = RECIPE, layer: str = "norm2") -> TrainingStep:
    model = network(recipe)
    model.features.add_module(layer, Planted(function))
    return TrainingStep(model, recipe, CPU, detect_nan=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_nan_in_a_forward_is_named(precision: str) -> None:
    taking = planted(lambda x: (x - x.max() - 1).sqrt() * 1, replace(RECIPE, precision=precision))
    with pytest.raises(
        NotFinite, match=r"^step 1: aten.sqrt in features.norm2 \(forward\) made a NaN from 2x.*: .* to -1"
    ):
        taking([batch(2)], PREPROCESSING, 0.01)


def test_an_infinity_in_a_gradient_is_named() -> None:
    with pytest.raises(NotFinite) as caught:
        planted(BrokenGradient.apply)([batch(2)], PREPROCESSING, 0.01)
    assert str(caught.value).startswith("step 1: aten.div in features.norm2 (backward, BrokenGradientBackward) made ")
    assert caught.value.code == 1


def test_the_gradient_of_the_loss_is_named() -> None:
    """Of a root at 0, outside of any layer."""
    taking = planted(lambda x: x)
    right = taking._loss

    def rooted(*given: Any) -> tuple[Tensor, Tensor]:
        logits, mean = right(*given)
        return logits, (mean - mean.detach()).sqrt()

    taking._loss = rooted  # type: ignore[method-assign]
    with pytest.raises(NotFinite, match=r"in the loss \(backward, SqrtBackward0\) made an infinity"):
        taking([batch(2)], PREPROCESSING, 0.01)


def test_an_update_beyond_all_numbers_is_named() -> None:
    taking = planted(lambda x: x)
    with pytest.raises(NotFinite, match=r"step 1: the update of features.conv1.weight left .*; try a lower --lr"):
        taking([batch(2)], PREPROCESSING, float("inf"))


def test_an_overflow_that_the_scaler_skips_is_none() -> None:
    """Clipping makes NaNs of infinite gradients, and the step is left out."""
    taking = step_of(replace(RECIPE, precision="fp16", clip_norm=1.0), detect_nan=True)
    before = {name: weight.clone() for name, weight in taking.weights().items()}
    taking.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    taking([batch(2)], PREPROCESSING, 0.01)
    assert taking.scaler.get_scale() == 2.0**59
    assert all(torch.equal(weight, before[name]) for name, weight in taking.weights().items())


def test_lars_on_a_layer_without_a_gradient_is_no_fault() -> None:
    """Its trust divides by 0, and 1 is taken in place of the result."""
    recipe = replace(RECIPE, optimizer="lars", weight_decay=0.0)
    taking = planted(lambda x: x * 0, recipe)
    taking([batch(2)], PREPROCESSING, 0.01)


@pytest.mark.parametrize("recipe", [TINY, replace(TINY, stock=True)], ids=["fused", "stock"])
def test_what_is_finite_trains_the_same_weights(recipe: Any) -> None:
    plain, watched = step_of(recipe), step_of(recipe, detect_nan=True)
    for taking in (plain, watched):
        torch.manual_seed(1)
        for seed in range(2):
            taking([batch(2, seed)], PREPROCESSING, 0.01)
    for name, weight in plain.weights().items():
        assert torch.equal(watched.weights()[name], weight), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.model.modules())


def test_a_run_ends_with_the_name_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    run = Trainer(replace(TINY, save_every=1), split(), tmp_path, Means(CPU, detect_nan=True))
    clean = run.take.model.features.conv3.forward
    run.take.model.features.conv3.forward = lambda x: clean(x) / (run.take.number < 3)
    with pytest.raises(NotFinite, match=r"^step 3: aten.div in features.conv3 \(forward\) made "):
        run.run(reporter())
    assert [path.name for path in checkpoint.generations(tmp_path)] == ["step-00000002", "step-00000001"]


def test_weights_that_give_a_nan_are_named_before_they_are_saved(tmp_path: Path) -> None:
    run = Trainer(replace(TINY, save_every=1), split(), tmp_path, Means(CPU, detect_nan=True))
    clean = run.take.model.classifier.fc8.forward
    run.take.model.classifier.fc8.forward = lambda x: clean(x) / run.take.model.training
    with pytest.raises(NotFinite, match=r"^step 1: aten.div in classifier.fc8 \(forward\) made "):
        run.run(reporter())
    assert checkpoint.generations(tmp_path) == []
