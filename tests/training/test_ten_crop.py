"""The paper's test: the mean of the softmax over ten crops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from alexnet_ext import cli
from alexnet_ext.data import ImageFolder, PackedFolder
from alexnet_ext.data.folder import imagenet_preprocessing
from alexnet_ext.data.listing import list_images
from alexnet_ext.training.evaluate import BATCH, evaluate, ten_crops, with_room
from alexnet_ext.training.results import load
from tests.cli.test_cli import SMALL, fails
from tests.training.test_results import CLASSES, write_weights
from tests.training.test_runs import striped


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes, named as those of ``write_weights``."""
    root = striped(tmp_path_factory.mktemp("crops") / "data", 9, 3)
    for number, name in enumerate(CLASSES):
        (root / f"kind {number}").rename(root / name)
    return root


@pytest.fixture(scope="module")
def weights(data: Path) -> Path:
    return write_weights(data.parent / "net.safetensors")


def plain(model: nn.Module, dataset: ImageFolder) -> Tensor:
    """The probabilities of one image after another, from the paper's five patches and their reflections."""
    preprocessing, found = dataset.preprocessing, []
    resize, size = preprocessing.resize, preprocessing.size
    wide = ImageFolder(dataset.root, dataset.samples, dataset.classes, replace(preprocessing, size=resize))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    for index in range(len(wide)):
        image = wide[0, index].image
        assert image is not None
        assert image.shape == (3, resize, resize)
        x, end, middle = (image / 255 - mean) / std, resize - size, (resize - size) // 2
        places = ((0, 0), (0, end), (end, 0), (end, end), (middle, middle))
        crops = [x[:, top : top + size, left : left + size] for top, left in places]
        found.append(model(torch.stack([*crops, *(crop.flip(2) for crop in crops)])).softmax(1).mean(0))
    return torch.stack(found)


@torch.no_grad()
def test_ten_crops_are_a_plain_computation_of_stock_pytorch(
    data: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(data), "--weights", str(weights), "--json"]
    assert cli.run_command([*command, "--ten-crop"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, description = load(weights, None, True, torch.device("cpu"), pytest.fail)
    listed = list_images(data, CLASSES)
    expected = plain(model, ImageFolder(data, listed.samples, CLASSES, description.preprocessing))
    targets = torch.tensor([target for _, target in listed.samples])
    truth = expected.gather(1, targets[:, None])[:, 0]
    assert found["loss"] == pytest.approx(float(-truth.log().mean()), rel=1e-5)
    assert found["top1"] == pytest.approx(float((expected.argmax(1) == targets).double().mean()))
    assert cli.run_command(command) == 0
    assert json.loads(capsys.readouterr().out)["loss"] != pytest.approx(found["loss"], rel=1e-4), "one crop differs"


def test_the_papers_recipe_ends_with_ten_crops(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = [*SMALL, "--recipe", "paper", "--steps", "1", "--init", "kaiming", "--out", str(out)]
    assert cli.run_command(["train", str(data), *options]) == 0
    assert " by the mean of ten crops of each (top-5 100.0%), as in the paper" in capsys.readouterr().out
    assert cli.run_command(["evaluate", "--weights", str(out), "--last", "--ten-crop", "--json"]) == 0
    found, result = json.loads(capsys.readouterr().out), json.loads((out / "result.json").read_text())
    assert (result["ten_crop_top1"], result["ten_crop_top5"]) == (found["top1"], found["top5"])


class Counting(nn.Module):
    """Notes the sizes of its batches; its score is an image's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return x.mean((2, 3))


def test_packed_images_and_folders_alike_and_no_batch_is_larger(data: Path) -> None:
    packed = data.parent / "packed"
    assert cli.run_command(["prepare", str(data), str(packed), "--side", "76"]) == 0
    preprocessing = imagenet_preprocessing(67)
    train = ImageFolder.split(data, 67, 0).train
    results = []
    listed = ImageFolder(data, train.samples, train.classes, preprocessing)
    for dataset in (PackedFolder(packed, "train", preprocessing), listed):
        model = Counting()
        wide = with_room(dataset, preprocessing)
        assert dataset.preprocessing == preprocessing, "the images themselves stay as they were"
        results.append(evaluate(model, wide, preprocessing, device=torch.device("cpu"), ten_crop=True))
        assert len(model.sizes) == 10
        assert max(model.sizes) == len(dataset) <= BATCH
    for one, other in zip(results[0].probabilities, results[1].probabilities, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(results[0].targets, results[1].targets)


def test_crops_of_odd_room() -> None:
    images = torch.arange(2 * 7 * 9).view(2, 1, 7, 9)
    crops = list(ten_crops(images, 4))
    assert [int(crop[0, 0, 0, 0]) for crop in crops] == [0, 3, 5, 8, 27, 30, 32, 35, 11, 14]
    assert all(torch.equal(crop.flip(-1), mirrored) for crop, mirrored in zip(crops[::2], crops[1::2], strict=True))
    assert all(crop.shape == (2, 1, 4, 4) for crop in crops)


def test_images_without_room_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.run_command(["train", *SMALL, "--steps", "1", "--out", str(out), "--quiet"]) == 0
    line = fails(capsys, 2, "evaluate", "--weights", out, "--ten-crop")
    assert "--ten-crop: these images fill the network's input" in line
