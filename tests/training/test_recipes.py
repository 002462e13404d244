"""What recipes add to a step: growing images, averaged weights, LARS, and the paper's own colours."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from alexnet_ext import cli
from alexnet_ext.data import Digits
from alexnet_ext.data.batches import Drawn
from alexnet_ext.data.folder import imagenet_preprocessing
from alexnet_ext.data.preprocessing import Preprocessing
from alexnet_ext.training import checkpoint
from alexnet_ext.training import run as running
from alexnet_ext.training import trainer as training
from alexnet_ext.training.evaluate import to_device
from alexnet_ext.training.interrupt import Interrupted
from alexnet_ext.training.recipe import FAST, RECIPES, Recipe, chosen
from alexnet_ext.training.step import Taken, TrainingStep
from alexnet_ext.training.trainer import Means
from tests.cli.test_cli import SMALL, fails
from tests.training.test_runs import striped
from tests.training.test_training import SIZE, TINY, reporter, split, trainer

CPU = torch.device("cpu")


def test_sides_grow_at_their_shares_of_the_steps() -> None:
    recipe = replace(TINY, grow="131:0.5,163:0.3")
    sides = [recipe.side_at(step, 10, 227) for step in range(10)]
    assert sides == [131] * 5 + [163] * 3 + [227] * 2
    assert replace(TINY, grow=None).side_at(0, 10, 227) == 227
    assert [recipe.side_at(step, 1, 227) for step in range(2)] == [227, 227]


def test_a_warm_up_may_be_a_share_of_the_steps() -> None:
    share, steps = replace(TINY, warmup=0.2), replace(TINY, warmup=8)
    assert [share.lr_at(step, 40) for step in range(40)] == [steps.lr_at(step, 40) for step in range(40)]


def test_a_run_grows_and_keeps_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = trainer(tmp_path / "run", replace(TINY, grow="75:0.4,71:0.3")), []
    right = run.model.forward
    monkeypatch.setattr(run.model, "forward", lambda x: seen.append((run.model.training, x.shape[-1])) or right(x))
    run.run(reporter())
    assert [side for trains, side in seen if trains] == [75] * 2 + [71] * 2 + [SIZE] * 2
    assert {side for trains, side in seen if not trains} == {SIZE}, "evaluated at the full size"
    assert run.model.config.image_size == SIZE


def ramps(count: int, side: int) -> Tensor:
    """uint8 (count, 3, side, side): red grows to the right, green to the bottom, blue is the image's number."""
    line = (torch.arange(side) + 0.5) / side * 255
    image = torch.stack([line.expand(side, side), line[:, None].expand(side, side), torch.zeros(side, side)])
    images = image.repeat(count, 1, 1, 1)
    images[:, 2] = torch.arange(count)[:, None, None]
    return images.round().to(torch.uint8)


@pytest.mark.parametrize("side", [131, 163, 300])
def test_a_smaller_image_shows_what_the_large_one_shows(side: int) -> None:
    """Not a smaller part of it: corners, mirroring, number and colours agree to a pixel's width."""
    full = imagenet_preprocessing(227)
    images = ramps(4, full.resize)
    drawn = Drawn(
        torch.tensor([[0, 29], [29, 0], [14, 15], [29, 29]]),
        torch.tensor([False, True, False, True]),
        torch.zeros(4, 3),
    )
    large, small = (to_device(images, at, CPU, drawn) for at in (full, full.at(side)))
    assert small.shape == (4, 3, side, side)
    wanted = nn.functional.interpolate(large, (side, side), mode="bilinear", antialias=True)
    pixel = 255 / side / 255 / min(full.std)
    assert (small - wanted).abs().max() < 1.5 * pixel
    assert torch.equal(small[:, 2, 0, 0], large[:, 2, 0, 0])


def test_images_without_crops_are_scaled_without_aliasing() -> None:
    """A checkerboard of single pixels becomes grey in half its size, and no checkerboard or plane."""
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    images = board.to(torch.uint8).expand(1, 3, 64, 64)
    plain = Preprocessing(64, 64, (0.0,) * 3, (1.0,) * 3).at(32)
    assert (plain(images)[..., 2:-2, 2:-2] - 0.5).abs().max() < 0.01
    digit = Digits.split()[0].images[:1]
    assert torch.equal(Digits.preprocessing(227).at(99)(digit), Digits.preprocessing(99)(digit))


def test_the_average_is_evaluated_and_kept_and_the_weights_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(TINY, ema=0.5, dropout=0.0)
    run, plain = trainer(tmp_path / "run", recipe), trainer(tmp_path / "plain", replace(recipe, ema=None))
    history: list[list[Tensor]] = []
    right = TrainingStep.__call__

    def recording(take: TrainingStep, *arguments: Any) -> Taken:
        taken = right(take, *arguments)
        history.append([p.detach().double().clone() for p in take.model.parameters()])
        return taken

    with monkeypatch.context() as patched:
        patched.setattr(TrainingStep, "__call__", recording)
        plain.run(reporter())
    result = run.run(reporter())
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True))
    expected = history[0]
    for step, weights in enumerate(history[1:], 1):
        decay = min(0.5, step / (step + 9))
        expected = [decay * a + (1 - decay) * w for a, w in zip(expected, weights, strict=True)]
    kept = checkpoint.read_weights(checkpoint.newest(run.out, pytest.fail) / checkpoint.WEIGHTS)[1]
    for name, value, average in zip(kept, expected, run.final.parameters(), strict=True):
        torch.testing.assert_close(average.double(), value, rtol=1e-5, atol=1e-6)
        assert torch.equal(kept[name], dict(run.final.named_parameters())[name])
    assert result.loss == pytest.approx(float(evaluated_loss(run)), rel=1e-5)


def evaluated_loss(run: training.Trainer) -> Tensor:
    """That of the averaged weights on the held-out images."""
    images = torch.stack([run.split.held_out[0, i].image for i in range(len(run.split.held_out))])  # type: ignore[misc]
    targets = torch.tensor([run.split.held_out[0, i].target for i in range(len(images))])
    with torch.no_grad():
        return nn.functional.cross_entropy(run.final.eval()(run.split.preprocessing(images)), targets)


def test_an_average_begins_at_the_weights_of_the_file_that_a_run_starts_from(tmp_path: Path) -> None:
    first = trainer(tmp_path / "first")
    first.run(reporter())
    other = trainer(tmp_path / "other", replace(TINY, ema=0.9, seed=5))
    other.start_from(checkpoint.find_weights(tmp_path / "first", pytest.fail, last=True))
    with pytest.raises(Interrupted):
        other.run(reporter(), stop_at=0)
    kept = checkpoint.read_weights(checkpoint.newest(other.out, pytest.fail) / checkpoint.WEIGHTS)[1]
    assert all(torch.equal(kept[name], weight) for name, weight in first.model.state_dict().items())


def test_a_recipe_saved_before_the_newer_fields_is_the_same_run() -> None:
    old = dataclasses.asdict(replace(TINY, warmup=20))
    for field in ("optimizer", "ema", "grow", "normalize"):
        del old[field]
    old["warmup"] = 20
    found = Recipe.from_dict(json.loads(json.dumps(old)))
    assert found == replace(TINY, warmup=20)
    assert (found.optimizer, found.ema, found.grow, found.normalize) == ("sgd", None, None, True)
    for recipe in RECIPES.values():
        assert Recipe.from_dict(json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


def test_the_papers_update_rule_is_sgds_as_long_as_the_rate_stays() -> None:
    """v = 0.9 v - 0.0005 rate w - rate g, w = w + v. Where the rate falls to a tenth, v alone differs: by 9 times the
    last v in the end, less a tenth."""
    weight = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.01, momentum=0.9, weight_decay=5e-4)
    w, v = weight.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for step in range(50):
        gradient = torch.tensor([1.0, -0.5], dtype=torch.float64) * (step % 3)
        weight.grad = gradient.clone()
        optimizer.step()
        v = 0.9 * v - 0.0005 * 0.01 * w - 0.01 * gradient
        w = w + v
    torch.testing.assert_close(weight.detach(), w)
    optimizer.param_groups[0].update(lr=0.001, weight_decay=0.0)
    last = v.clone()
    for _ in range(300):
        weight.grad = torch.zeros(2, dtype=torch.float64)
        optimizer.step()
        v = 0.9 * v
        w = w + v
    torch.testing.assert_close(w - weight.detach(), last * 9 * 0.9)


def test_the_papers_images_have_their_mean_subtracted_and_nothing_else(tmp_path: Path) -> None:
    data = striped(tmp_path / "data", 24, 3)
    run = tmp_path / "run"
    options = ["--recipe", "paper", *SMALL, "--steps", "1", "--out", str(run), "--quiet"]
    assert cli.run_command(["train", str(data), *options]) == 0
    described = checkpoint.read_description(checkpoint.find_weights(run, pytest.fail, last=True))
    assert described is not None
    image = torch.full((1, 3, SIZE, SIZE), 200, dtype=torch.uint8)
    values = described.preprocessing(image)[0, :, 0, 0]
    torch.testing.assert_close(values, 200 - 255 * torch.tensor(described.preprocessing.mean))
    assert cli.run_command(["train", "--resume", str(run), "--steps", "2", "--quiet"]) == 0


def test_the_fast_recipe_trains_a_folder_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = striped(tmp_path / "data", 24, 3)
    run = tmp_path / "run"
    options = [
        "--recipe",
        "fast",
        *SMALL,
        "--image-size",
        "75",
        "--grow",
        "71:0.5",
        "--steps",
        "2",
        "--out",
        str(run),
        "--quiet",
    ]
    assert cli.run_command(["train", str(data), *options, "--optimizer", "lars", "--batch-size", "8"]) == 0
    saved = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    assert (saved["optimizer"], saved["ema"], saved["label_smoothing"]) == ("lars", FAST.ema, FAST.label_smoothing)
    assert cli.run_command(["train", "--resume", str(run), "--steps", "3", "--quiet"]) == 0
    assert "--optimizer sgd: the run in" in fails(capsys, 2, "train", "--resume", run, "--optimizer", "sgd")
    assert "--ema 0.5: the run in" in fails(capsys, 2, "train", "--resume", run, "--ema", "0.5")
    assert "--grow 71:0.2: the run in" in fails(capsys, 2, "train", "--resume", run, "--grow", "71:0.2")
    line = fails(capsys, 2, "train", data, *SMALL, "--grow", "31:0.5", "--out", tmp_path / "other")
    assert "image_size=31 is too small for variant 'paper'" in line
    line = fails(capsys, 2, "train", data, *SMALL, "--grow", "67:0.5", "--out", tmp_path / "other")
    assert "--grow 67: expected sides below the network's 67" in line


def test_the_fast_recipe_grows_only_to_larger_images() -> None:
    assert chosen({}, "fast").grow == chosen({"image_size": 164}, "fast").grow == FAST.grow
    assert chosen({"image_size": 163}, "fast").grow is None
    assert chosen({"image_size": 112, "grow": "67:0.5"}, "fast").grow == "67:0.5"


def test_kernels_are_proven_for_the_network_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each side it is the one network, whose fc6 has the weights of the largest."""
    proven: list[tuple[int, ...]] = []

    def prove(network: nn.Module, shape: tuple[int, ...], *_: Any) -> None:
        x = torch.empty(shape, device="meta")
        proven.append((shape[-1], network.get_parameter("classifier.fc6.weight").shape[1], *network(x).shape))

    monkeypatch.setattr(running, "prove_kernels", prove)
    recipe = replace(TINY, image_size=131, grow="71:0.3,75:0.3")
    running._trainer(recipe, split(), tmp_path, Means(CPU), Console())
    inputs = proven[-1][1]
    assert proven == [(side, inputs, 2, 1000) for side in (71, 75, 131)]
