"""Networks of tanh and sigmoid, to compare with ReLU as the paper's figure 1 does."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ext import cli, layers, models, nn
from alexnet_ext.data import Digits
from alexnet_ext.models import alexnet
from alexnet_ext.training import checkpoint
from alexnet_ext.training.recipe import chosen
from alexnet_ext.variants import config_of
from tests.cli.test_cli import SMALL, fails

FUNCTIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}


def plain(weights: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    """The paper's network in functions of PyTorch, with another function in place of ReLU."""
    function = FUNCTIONS[name]
    for index, (stride, padding, groups) in enumerate(((4, 0, 1), (1, 2, 2), (1, 1, 1), (1, 1, 2), (1, 1, 2)), 1):
        layer = f"features.conv{index}."
        x = F.conv2d(x, weights[f"{layer}weight"], weights[f"{layer}bias"], stride, padding, groups=groups)
        x = function(x)
        if index <= 2:
            x = F.local_response_norm(x, 5, 5e-4, 0.75, 2.0)
        if index in (1, 2, 5):
            x = F.max_pool2d(x, 3, 2)
    x = x.flatten(1)
    for index in (6, 7, 8):
        layer = f"classifier.fc{index}."
        x = F.linear(x, weights[f"{layer}weight"], weights[f"{layer}bias"])
        x = function(x) if index < 8 else x
    return x


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_a_network_of_another_activation_is_plain_pytorch(name: str) -> None:
    torch.manual_seed(0)
    model = alexnet("paper", num_classes=4, image_size=67, init="kaiming", activation=name).double().eval()
    assert not model.fused, "the fused layers contain ReLU"
    assert not any(isinstance(module, nn._Fused) for module in model.modules())
    x = torch.randn(2, 3, 67, 67, dtype=torch.float64)
    assert torch.allclose(model(x), plain(model.state_dict(), x, name), rtol=1e-10, atol=1e-12)


def test_tables_name_the_activation_and_others_are_refused() -> None:
    rows = layers.layer_rows(config_of("paper", 10, 67, 0.5, "tanh"))
    assert rows[0].kind == "convolution + tanh + LRN"
    assert [row.kind for row in rows[-3:]] == [*["linear + tanh + dropout 0.5"] * 2, "linear"]
    with pytest.raises(ValueError, match=r"activation must be one of relu, tanh, sigmoid, got 'gelu'"):
        alexnet("paper", activation="gelu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with tanh."""
    out = tmp_path_factory.mktemp("activation") / "run"
    assert cli.run_command(["train", *SMALL, "--steps", "2", "--activation", "tanh", "--out", str(out), "--quiet"]) == 0
    return out


def test_a_run_keeps_its_activation(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads((run / "recipe.json").read_text())["activation"] == "tanh"
    model, description = checkpoint.load_model(checkpoint.find_weights(run, pytest.fail), None, fused=True)
    assert description.config.activation == "tanh"
    assert isinstance(model.get_submodule("features.relu1"), torch.nn.Tanh)
    again, further = tmp_path / "again", tmp_path / "further"
    shutil.copytree(run, again)
    assert "--activation sigmoid" in fails(capsys, 2, "train", "--resume", again, "--activation", "sigmoid")
    assert cli.run_command(["train", "--resume", str(again), "--steps", "3", "--quiet"]) == 0
    start = ["train", "--batch-size", "2", "--steps", "1", "--weights", str(run), "--out", str(further)]
    assert cli.run_command(start) == 0
    assert json.loads((further / "recipe.json").read_text())["activation"] == "tanh", "the weights' own"
    assert "the fused layers contain ReLU: with tanh they are stock PyTorch" in capsys.readouterr().out


def test_weights_of_another_activation_do_not_fit(run: Path) -> None:
    weights = checkpoint.find_weights(run, pytest.fail)
    models.load_weights(alexnet("paper", num_classes=10, image_size=67, activation="tanh"), weights)
    with pytest.raises(ValueError, match="its activation is tanh, expected relu"):
        models.load_weights(alexnet("paper", num_classes=10, image_size=67), weights)


def test_a_checkpoint_without_the_field_is_of_relu() -> None:
    config = models.AlexNetConfig("paper", 10, 67, 0.5)
    description = checkpoint.Description(config, tuple("0123456789"), Digits.preprocessing(67), "digits", 0)
    values = json.loads(description.to_json())
    assert values["config"].pop("activation") == "relu"
    assert checkpoint.Description.from_json(json.dumps(values)) == description
    recipe = dataclasses.asdict(chosen({}))
    assert recipe.pop("activation") == "relu"
    assert type(chosen({})).from_dict(recipe) == chosen({})
