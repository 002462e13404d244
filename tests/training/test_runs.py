"""The course of a run: its start, the files it keeps, its end, and resumptions that it refuses."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_ext import cli, models
from alexnet_ext.data import CommandError, Synthetic
from alexnet_ext.training import checkpoint, schedule
from alexnet_ext.training import trainer as training
from alexnet_ext.training.evaluate import Evaluation
from alexnet_ext.training.interrupt import Interrupted
from alexnet_ext.training.log import read_metrics
from alexnet_ext.training.recipe import IMAGENET, SCHEDULES, Recipe, chosen, default
from alexnet_ext.training.run import from_weights
from alexnet_ext.training.state import load
from tests.cli.test_cli import SMALL, fails
from tests.training.test_training import SIZE, TINY, reporter, resumed, same, trainer


def striped(root: Path, count: int, classes: int) -> Path:
    """Image files with stripes; each class has a direction and a colour."""
    for i in range(count):
        path = root / f"kind {i % classes}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Synthetic(count, classes, 70, seed=2).image(i).permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(path)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on files of three classes, evaluated at each."""
    root = tmp_path_factory.mktemp("runs")
    data = striped(root / "data", 24, 3)
    options = ["--steps", "4", "--evaluate-every", "2", "--lr", "0.001", "--out", str(root / "run")]
    assert cli.run_command(["train", str(data), *SMALL, *options, "--quiet"]) == 0
    return root / "run"


def given(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_weights(checkpoint.find_weights(path, pytest.fail, last=True))[1]


# The start of a run.


def test_a_small_folder_is_learnt_by_default(tmp_path: Path) -> None:
    data = striped(tmp_path / "data", 120, 3)
    arguments = ["train", str(data), "--image-size", "67", "--steps", "40", "--batch-size", "16", "--quiet"]
    assert cli.run_command([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["top1"] > 0.8


@pytest.mark.parametrize("classes", [3, 5])
def test_weights_of_a_run_start_another(trained: Path, tmp_path: Path, classes: int) -> None:
    data = striped(tmp_path / "data", 20, classes)
    options = ["--steps", "1", "--lr", "0", "--batch-size", "2", "--weights", str(trained), "--quiet"]
    assert cli.run_command(["train", str(data), *options, "--out", str(tmp_path / "run")]) == 0
    before, after = (
        checkpoint.read_weights(checkpoint.find_weights(path, pytest.fail))[1] for path in (trained, tmp_path / "run")
    )
    last = {"classifier.fc8.weight", "classifier.fc8.bias"} if classes != 3 else set()
    assert {n for n in before if before[n].shape != after[n].shape or not torch.equal(before[n], after[n])} == last
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (recipe["image_size"], recipe["model"]) == (67, "paper"), "the variant and the input are the weights' own"


@pytest.mark.parametrize("ending", ["pth", "onnx"])
def test_weights_of_other_programs_start_a_run(trained: Path, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"net.{ending}"
    if ending == "pth":
        torch.save(given(trained), file)
    else:
        pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
        assert cli.run_command(["export", "--format", "onnx", "--weights", str(trained), "--out", str(file)]) == 0
    data = striped(tmp_path / "data", 12, 4)
    options = [*SMALL, "--steps", "1", "--lr", "0", "--weights", str(file), "--quiet"]
    assert cli.run_command(["train", str(data), *options, "--out", str(tmp_path / "run")]) == 0
    after = given(tmp_path / "run")
    source = checkpoint.read_weights(checkpoint.find_weights(trained, pytest.fail, last=ending == "pth"))[1]
    for name in ("features.conv1.weight", "classifier.fc7.bias"):
        torch.testing.assert_close(after[name], source[name])


def test_weights_bring_their_preprocessing_and_a_lower_rate(tmp_path: Path) -> None:
    for variant in ("torchvision", "paper"):
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in models.alexnet(variant).state_dict().items()}
        file = tmp_path / "net.pth"
        torch.save({name: torch.zeros(shape) for name, shape in shapes.items() if "conv" in name}, file)
        assert from_weights(file, pytest.fail) == {"weights": str(file), "model": variant}
    assert chosen({"weights": "net.pth"}).lr == 0.001
    assert chosen({"weights": "net.pth", "lr": 0.02}).lr == 0.02
    run = trainer(tmp_path / "run", replace(TINY, image_size=SIZE))
    mean = models.alexnet("paper", num_classes=3, image_size=SIZE, init="kaiming")
    description = replace(run.description, preprocessing=replace(run.split.preprocessing, mean=(0.1, 0.2, 0.3)))
    checkpoint.write_weights(tmp_path / "net.safetensors", mean, description)
    run.start_from(tmp_path / "net.safetensors")
    assert run.split.preprocessing.mean == (0.1, 0.2, 0.3) == run.description.preprocessing.mean
    assert torch.equal(run.start, mean.features.conv1.weight)


def test_weights_that_do_not_fit_are_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = striped(tmp_path / "data", 12, 3), tmp_path / "run"
    line = fails(capsys, 1, "train", data, "--image-size", "99", "--weights", trained, "--out", out)
    assert "does not fit variant 'paper': classifier.fc6.weight is [4096, 256]" in line
    (tmp_path / "x.pth").write_text("no weights")
    assert "x.pth: " in fails(capsys, 1, "train", data, *SMALL, "--weights", tmp_path / "x.pth", "--out", out)
    assert "missing: no such file" in fails(capsys, 2, "train", data, "--weights", tmp_path / "missing", "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("name", ["features", "classifier.fc6", "conv2"])
def test_frozen_weights_stay(tmp_path: Path, name: str) -> None:
    run = trainer(tmp_path / "run", replace(TINY, freeze=name, steps=2))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.run(reporter())
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if f".{name}." not in f".{n}"}
    again = resumed(run.out, replace(TINY, freeze=name, steps=2))
    assert len(again.take.optimizer.state_dict()["state"]) == len(changed)
    with pytest.raises(ValueError, match=r"--freeze conv: expected features, classifier or one of conv1, .*, fc8"):
        trainer(tmp_path / "other", replace(TINY, freeze="conv"))


# Its course.


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up(tmp_path: Path, name: str) -> None:
    run = trainer(tmp_path / "run", replace(TINY, schedule=name, warmup=3, lr=0.008, steps=5))
    run.run(reporter())
    rates = [line["lr"] for line in read_metrics(run.out / "metrics.jsonl") if line["kind"] == "train"]
    assert rates[:4] == pytest.approx([0.002, 0.004, 0.006, 0.008])


def test_a_plateau_is_of_images_and_not_of_tiny_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's patience is for epochs of 1.2 million images. Here 12 epochs of 5 images pass; then the 4 images of a
    step are enough."""
    recipe = replace(TINY, schedule="plateau", warmup=0, lr=1e-6, epochs=12)
    assert rates(trainer(tmp_path / "run", recipe)) == {1e-6}
    monkeypatch.setattr(schedule, "PLATEAU_IMAGES", 4)
    assert len(rates(trainer(tmp_path / "short", recipe))) > 1


def rates(run: training.Trainer) -> set[float]:
    run.run(reporter())
    return {line["lr"] for line in read_metrics(run.out / "metrics.jsonl") if line["kind"] == "train"}


def test_a_loss_that_stays_that_of_guessing_is_told_once(tmp_path: Path) -> None:
    """After 100 steps and the warm-up; a shorter run is warned at its end."""
    for number, (steps, loss, told) in enumerate(((300, 1.09, [102]), (60, 1.2, [60]), (300, 0.9, []), (9, 1.1, []))):
        run, heard = trainer(tmp_path / str(number), replace(TINY, init="paper", steps=steps)), []
        for step in range(1, steps + 1):
            text = io.StringIO()
            run._tell_chance(loss, step, reporter(text))
            if text.getvalue():
                heard.append(step)
                words = f"the loss is still {loss:.2f}, that of guessing among 3 classes is 1.10; try --init kaiming, "
                assert words in text.getvalue()
        assert heard == told


def test_accumulated_batches_are_one_large_one(tmp_path: Path) -> None:
    recipe = replace(TINY, dropout=0.0, stock=True, steps=3, schedule="constant")
    large = trainer(tmp_path / "large", replace(recipe, batch_size=4))
    parts = trainer(tmp_path / "parts", replace(recipe, batch_size=2, accumulate=2))
    assert large.total == parts.total
    assert large.epoch_steps == parts.epoch_steps == 2
    for run in (large, parts):
        run.run(reporter())
    for a, b in zip(large.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(Interrupted):
        trainer(tmp_path / "broken", parts.recipe).run(reporter(), stop_at=1)
    again = resumed(tmp_path / "broken", parts.recipe)
    again.run(reporter())
    assert same(parts, again)


def test_gradients_are_clipped_and_labels_smoothed(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", replace(TINY, clip_norm=1e-3, momentum=0.0, weight_decay=0.0, warmup=0, steps=1))
    before = [p.detach().clone() for p in run.model.parameters()]
    run.run(reporter())
    squares = sum(float((p.detach() - b).square().sum()) for p, b in zip(run.model.parameters(), before, strict=True))
    assert math.sqrt(squares) == pytest.approx(run.recipe.lr * 1e-3, rel=0.02)
    losses = []
    for smoothing in (0.0, 0.3):
        run = trainer(tmp_path / f"{smoothing}", replace(TINY, label_smoothing=smoothing, steps=1))
        run.run(reporter())
        losses.append(read_metrics(run.out / "metrics.jsonl")[0]["loss"])
    assert losses[0] != losses[1]


def test_seeds_that_differ_give_runs_that_differ(tmp_path: Path) -> None:
    losses = set()
    for seed in (0, 2**32, 2**32 + 1, 2**63):
        run = trainer(tmp_path / str(seed), replace(TINY, seed=seed, steps=1))
        run.run(reporter())
        losses.add(read_metrics(run.out / "metrics.jsonl")[0]["loss"])
    assert len(losses) == 4


# The files that it keeps, and its end.


def test_weights_that_give_no_loss_become_no_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", replace(TINY, lr=1e30, warmup=0, steps=9, save_every=1))
    with pytest.raises(CommandError, match=r"the loss is (nan|inf)"):
        run.run(reporter())
    assert all(torch.stack([w.isfinite().all() for w in given(path).values()]).all() for path in saved(run.out))
    assert [path.name for path in saved(run.out)] == ["step-00000000"] or not saved(run.out)
    for line in (run.out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def saved(run: Path) -> list[Path]:
    return checkpoint.generations(run)


def test_checkpoints_are_saved_and_kept_as_asked(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", replace(TINY, save_every=2, keep=3, epochs=3))
    run.run(reporter())
    assert [path.name for path in saved(run.out)] == ["step-00000009", "step-00000008", "step-00000006"]


def scripted(monkeypatch: pytest.MonkeyPatch, shares: list[float]) -> None:
    """Evaluations of four images that end as ``shares`` say."""
    left = iter(shares)

    def evaluate(*_: Any, **__: Any) -> Evaluation:
        right = torch.arange(4) < 4 * next(left)
        zeros = torch.zeros(4, dtype=torch.int64)
        return Evaluation(
            1.0, 1.0, torch.arange(4), zeros, (~right).long()[:, None], right[:, None].float(), right.float()
        )

    monkeypatch.setattr(training, "evaluate", evaluate)


def test_the_best_weights_are_kept_beside_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.25, 0.75, 0.5, 0.75, 0.5, 0.25])
    run = trainer(tmp_path / "run", replace(TINY, evaluate_every=1, evaluate_limit=4, save_every=1, keep=1))
    run.run(reporter())
    best, last = (checkpoint.find_weights(run.out, pytest.fail, last=last) for last in (False, True))
    assert best.parent == run.out / "best" / "step-00000004", "of equals the later"
    assert last.parent == run.out / "checkpoints" / "step-00000006"
    assert checkpoint.read_best(run.out) == (4, 0.75)
    descriptions = [checkpoint.read_weights(path)[0].step for path in (best, last)]
    assert descriptions == [4, 6]
    with best.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\xff")
    told: list[str] = []
    assert checkpoint.find_weights(run.out, told.append) == last
    assert "going to the newest checkpoint" in told[0]


def test_the_best_that_is_the_newest_has_no_second_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.25, 0.5, 0.75])
    run = trainer(tmp_path / "run", replace(TINY, evaluate_every=2, evaluate_limit=4))
    run.run(reporter())
    assert checkpoint.find_weights(run.out, pytest.fail) == saved(run.out)[0] / checkpoint.WEIGHTS
    best = run.out / "best" / "step-00000006"
    assert not (best / checkpoint.WEIGHTS).exists()
    assert checkpoint.find_weights(best, pytest.fail) == checkpoint.find_weights(run.out, pytest.fail)
    again = resumed(run.out, replace(run.recipe, epochs=3))
    assert (again.best.step, again.best.top1) == (6, 0.75), "of the last evaluation, after the checkpoint was saved"
    scripted(monkeypatch, [0.5, 0.25, 0.25])
    again.run(reporter())
    assert checkpoint.find_weights(run.out, pytest.fail) == best / checkpoint.WEIGHTS
    assert checkpoint.find_weights(best, pytest.fail) == best / checkpoint.WEIGHTS


def test_patience_ends_a_run_also_one_that_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(TINY, evaluate_every=1, evaluate_limit=4, epochs=9, patience=3)
    shares = [0.25, 0.5, 0.25, 0.5, 0.25, 0.5]
    scripted(monkeypatch, shares)
    straight = trainer(tmp_path / "straight", recipe)
    straight.run(reporter())
    assert straight.step == 5, "the second evaluation was the best, three were no better"
    scripted(monkeypatch, shares)
    with pytest.raises(Interrupted) as stopped:
        trainer(tmp_path / "broken", recipe).run(reporter(), stop_at=4)
    assert stopped.value.told().endswith(f"go on: alexnet train --resume {tmp_path}/broken")
    again = resumed(tmp_path / "broken", recipe)
    scripted(monkeypatch, shares[3:])
    again.run(reporter())
    assert again.step == 5
    assert same(straight, again)


# Refusals.


def test_recipes_that_no_run_can_have() -> None:
    for option, value in (
        *(("lr", value) for value in (math.inf, math.nan, -1.0)),
        *(("momentum", 1.0), ("dropout", 1.0), ("weight_decay", math.inf), ("clip_norm", math.nan), ("clip_norm", 0.0)),
        *(("steps", 0), ("accumulate", 0), ("keep", 0), ("patience", 0), ("seed", 2**64), ("batch_size", 1.5)),
    ):
        name = option.replace("_", "-")
        with pytest.raises(CommandError, match=f"--{name} .*: expected a (whole|finite) number of at least"):
            chosen({option: value})
        with pytest.raises(ValueError, match=f"{option} must be"):
            Recipe("digits", **{option: value})
    with pytest.raises(ValueError, match="schedule must be one of cosine"):
        replace(IMAGENET, schedule="steps")
    assert default("/images").augment is True


def test_resuming_is_refused_in_words(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume = ("train", "--resume", trained)
    assert "--stock: the run in" in fails(capsys, 2, *resume, "--stock")
    assert fails(capsys, 2, *resume, "--clip-norm", "1").endswith(" has none")
    assert "--lr 0.5: the run in" in fails(capsys, 2, *resume, "--lr", "0.5")
    assert "--weights and --resume" in fails(capsys, 2, *resume, "--weights", trained)
    data = tmp_path / "data"
    shutil.copytree(trained.parent / "data", data)
    striped(data, 8, 4)
    line = fails(capsys, 1, *resume, data, "--steps", "9")
    assert line.endswith("was trained on 3 classes, and " + f"{data} now has a new class kind 3")


def test_a_checkpoint_folder_is_gone_on_from(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = saved(run)[0]
    assert cli.run_command(["train", "--resume", str(newest), "--steps", "5", "--save-every", "1", "--quiet"]) == 0
    assert [path.name for path in saved(run)] == ["step-00000005", "step-00000004"]
    assert "step-00000005 beside it is newer" in fails(capsys, 2, "train", "--resume", newest)
    for best in checkpoint.generations(run, checkpoint.BEST):
        assert "weights alone" in fails(capsys, 2, "train", "--resume", best)
    times = json.loads((run / "result.json").read_text())["seconds"]
    assert times > json.loads((trained / "result.json").read_text())["seconds"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("step", -1), ("step", 10**9), ("batch", 99), ("epoch", -1), ("evaluated", 77), ("seconds", math.nan)],
        *[("best", {"top1": 7.0, "step": 1, "waited": 0}), ("random", {"numpy": 1}), ("skipped", 5), ("start", None)],
        *[("plateau", {}), ("classes", None), ("images", "many"), ("recipe", {"data": "digits", "lr": math.inf})],
    ],
)
def test_a_state_of_impossible_values_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    path = saved(run)[0]
    state = checkpoint.read_state(path / checkpoint.STATE)
    torch.save(state | {name: value}, path / checkpoint.STATE)
    checkpoint._write_record(path, {"step": 4}, (checkpoint.WEIGHTS, checkpoint.STATE))
    assert path.name in fails(capsys, 1, "train", "--resume", run, "--steps", "6")


def test_a_rate_that_no_state_can_have(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trainer(tmp_path / "run").run(reporter(), stop_at=1)
    path = saved(tmp_path / "run")[0]
    state, (_, weights) = (
        checkpoint.read_state(path / checkpoint.STATE),
        checkpoint.read_weights(path / "model.safetensors"),
    )
    for lr in (-1.0, math.nan, 5.0, "x"):
        state["optimizer"]["param_groups"][0]["lr"] = lr
        with pytest.raises(CommandError, match="not a trainer's state"):
            load(trainer(tmp_path / "other"), path, state, weights)
