"""Training: recipes, exact resumption, broken images, evaluation, the log and the pictures."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from alexnet_ext.data import BadImage, CommandError, ImageFolder, Split, Synthetic
from alexnet_ext.data.batches import Sample
from alexnet_ext.data.folder import imagenet_preprocessing
from alexnet_ext.ops._backend import Decision
from alexnet_ext.training import checkpoint, pictures
from alexnet_ext.training import evaluate as evaluation
from alexnet_ext.training.evaluate import evaluate
from alexnet_ext.training.interrupt import Interrupted
from alexnet_ext.training.log import Log, read_metrics
from alexnet_ext.training.predict import predict
from alexnet_ext.training.process import random_state, set_random_state
from alexnet_ext.training.progress import Reporter
from alexnet_ext.training.recipe import DIGITS, IMAGENET, SCHEDULES, Recipe, chosen, default
from alexnet_ext.training.schedule import Schedule
from alexnet_ext.training.state import load
from alexnet_ext.training.trainer import Means, Trainer

SIZE = 67  # the smallest input for the paper's five stages
TINY = Recipe(
    "synthetic", init="kaiming", image_size=SIZE, batch_size=2, epochs=2, lr=0.01, warmup=2, schedule="cosine"
)


def split(images: int = 5, held_out: int = 3) -> Split:
    return Split(Synthetic(images, 3, SIZE), Synthetic(held_out, 3, SIZE, seed=1), Synthetic.preprocessing(SIZE))


def trainer(out: Path, recipe: Recipe = TINY, data: Split | None = None, workers: int = 0) -> Trainer:
    out.mkdir(exist_ok=True)
    return Trainer(recipe, data or split(), out, Means(torch.device("cpu"), workers))


def reporter(text: io.StringIO | None = None) -> Reporter:
    return Reporter(10, 0, Console(file=text or io.StringIO(), width=200))


def resumed(out: Path, recipe: Recipe, data: Split | None = None, workers: int = 0) -> Trainer:
    path = checkpoint.newest(out, lambda text: pytest.fail(text))
    _, weights = checkpoint.read_weights(path / checkpoint.WEIGHTS)
    again = trainer(out, recipe, data, workers)
    load(again, path, checkpoint.read_state(path / checkpoint.STATE), weights)
    return again


def same(one: Trainer, other: Trainer) -> bool:
    """Whether weights, their average and momentum are equal in every bit."""
    pairs = list(zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True))
    pairs += list(zip(one.final.state_dict().values(), other.final.state_dict().values(), strict=True))
    momenta = [[t.take.optimizer.state[p]["momentum_buffer"] for p in t.model.parameters()] for t in (one, other)]
    return all(torch.equal(a, b) for a, b in [*pairs, *zip(*momenta, strict=True)])


def augmented_split(root: Path) -> Split:
    """The same with files, with random crops, mirroring and colours."""
    names = [f"{index}.png" for index in range(8)]
    for index, name in enumerate(names):
        Image.fromarray(Synthetic(8, 3, 80).image(index).permute(1, 2, 0).numpy()).save(root / name)
    samples, preprocessing = [(str(root / name), i % 3) for i, name in enumerate(names)], imagenet_preprocessing(SIZE)
    train = ImageFolder(root, samples[:5], ("a", "b", "c"), preprocessing, augment=True, seed=3)
    return Split(train, ImageFolder(root, samples[5:], train.classes, preprocessing), preprocessing)


@pytest.mark.parametrize(
    ("stops", "changes", "workers", "make_split"),
    [
        ((2, 4), {}, 0, lambda _: split()),
        ((3,), {"schedule": "plateau"}, 2, lambda _: split()),
        ((1, 2), {}, 2, augmented_split),
        ((1, 4), {"optimizer": "lars", "ema": 0.6, "grow": "71:0.3,75:0.3", "warmup": 0.4}, 0, augmented_split),
    ],
    ids=["mid-epoch", "between epochs", "augmented, twice in an epoch", "fast"],
)
def test_interrupted_and_resumed_is_bit_for_bit_the_straight_run(
    tmp_path: Path,
    stops: tuple[int, ...],
    changes: dict[str, Any],
    workers: int,
    make_split: Callable[[Path], Split],
) -> None:
    # 5 images in batches of 2: epochs of 3 steps, evaluated after each; dropout draws from torch's generator.
    recipe, data = replace(TINY, **changes), make_split(tmp_path)
    straight = trainer(tmp_path / "straight", recipe, data)
    expected = straight.run(reporter())
    assert straight.step == 6
    again = trainer(tmp_path / "broken", recipe, data, workers)
    for stop in stops:
        with pytest.raises(Interrupted):
            again.run(reporter(), stop_at=stop)
        random.seed(99)
        torch.manual_seed(99)
        again = resumed(tmp_path / "broken", recipe, data, workers)
        assert again.step == stop
    assert not same(straight, again), "the checkpoint is not yet the end"
    result = again.run(reporter())
    assert same(straight, again)
    assert torch.equal(result.probabilities, expected.probabilities)
    assert again.schedule.plateau.state_dict() == straight.schedule.plateau.state_dict()
    assert torch.equal(again.start, straight.start)
    logged, expected_log = (
        [
            {name: value for name, value in line.items() if name not in ("seconds", "images_per_second")}
            for line in read_metrics(path)
            if line["kind"] != "span"  # how long, and how many saves
        ]
        for path in (tmp_path / "broken" / "metrics.jsonl", tmp_path / "straight" / "metrics.jsonl")
    )
    assert logged == expected_log


def test_a_batch_of_files_is_augmented_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, seen = evaluation.augment, []

    def counting(images: Tensor, *drawn: Any, **rest: Any) -> Tensor:
        seen.append(images.shape)
        return right(images, *drawn, **rest)

    monkeypatch.setattr(evaluation, "augment", counting)
    trainer(tmp_path / "run", replace(TINY, epochs=1), augmented_split(tmp_path)).run(reporter())
    resize = imagenet_preprocessing(SIZE).resize
    expected = [(batch, resize, resize, 3) for batch in (2, 2, 1, 1)]  # the last one again, before it is saved
    assert seen == expected, "and the held-out images not at all"


def test_images_come_as_conv1_takes_them_and_train_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewritten by augment, where conv1 would have to; evaluated plain, and a checkpoint is that of the other run."""
    recipe, data = replace(TINY, precision="bf16", dropout=0.0), augmented_split(tmp_path)
    plain = trainer(tmp_path / "plain", recipe, data)
    right, seen = evaluation.augment, []
    monkeypatch.setattr(evaluation, "augment", lambda *a, **rest: seen.append(right(*a, **rest)) or seen[-1])
    expected = plain.run(reporter())
    assert {(x.shape[1:], x.dtype) for x in seen} == {((3, SIZE, SIZE), torch.bfloat16)}
    seen.clear()
    monkeypatch.setattr(
        importlib.import_module("alexnet_ext.models.alexnet"),
        "decide",
        lambda *_, **__: Decision("auto", "as on a GPU"),
    )
    deep = trainer(tmp_path / "deep", recipe, data)
    result = deep.run(reporter())
    assert {(x.shape[1:], x.dtype) for x in seen} == {((48, 17, 17), torch.bfloat16)}
    torch.testing.assert_close(result.probabilities, expected.probabilities, rtol=0.05, atol=0.01)
    weights = deep.model.state_dict()
    assert list(weights) == list(plain.model.state_dict())
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0.05, atol=2e-3)
    assert same(deep, resumed(tmp_path / "deep", recipe, data))


def test_dropout_and_order_depend_on_the_seed(tmp_path: Path) -> None:
    losses = []
    for seed in (1, 1, 2):
        run = trainer(tmp_path / f"{len(losses)}", replace(TINY, seed=seed, steps=1))
        run.run(reporter())
        losses.append(read_metrics(run.out / "metrics.jsonl")[0]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_a_step_is_that_of_plain_pytorch(tmp_path: Path) -> None:
    recipe = replace(TINY, dropout=0.0, schedule="constant", warmup=0, steps=2, stock=True)
    run = trainer(tmp_path / "run", recipe)
    model = run.model
    weights = [p.detach().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(p) for p in weights]
    twin = trainer(tmp_path / "twin", recipe).model
    for batch in list(run._loader())[:2]:
        x = (batch.images.float() / 255 - 0.5) / 0.25
        for p, w in zip(twin.parameters(), weights, strict=True):
            p.data.copy_(w)
        gradients = torch.autograd.grad(F.cross_entropy(twin(x), batch.targets), list(twin.parameters()))
        momenta = [0.9 * m + g + 5e-4 * w for m, g, w in zip(momenta, gradients, weights, strict=True)]
        weights = [w - recipe.lr * m for w, m in zip(weights, momenta, strict=True)]
    run.run(reporter())
    for p, w in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_fp32_weights(tmp_path: Path, precision: str) -> None:
    run = trainer(tmp_path / "run", replace(TINY, precision=precision, steps=3))
    before = [weight.detach().clone() for weight in run.take.weights().values()]
    result = run.run(reporter())
    assert math.isfinite(result.loss)
    weights = run.take.weights().values()
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights)
    assert any(not torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert run.take.scaler.is_enabled() is (precision == "fp16")


def test_loading_a_state_that_does_not_fit_leaves_the_trainer_alone(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trainer(tmp_path / "run").run(reporter(), stop_at=1)
    path = checkpoint.newest(tmp_path / "run", lambda text: pytest.fail(text))
    state, (_, weights) = (
        checkpoint.read_state(path / checkpoint.STATE),
        checkpoint.read_weights(path / checkpoint.WEIGHTS),
    )
    other = trainer(tmp_path / "other", data=split(images=7))
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(CommandError, match="5 images of 3 classes, and synthetic now has 7"):
        load(other, path, state, weights)
    good = trainer(tmp_path / "good")
    for broken in ({}, {**state, "optimizer": {}}, {**state, "step": None}):
        with pytest.raises(CommandError, match="step-00000001"):
            load(good, path, broken, weights)
    assert good.step == other.step == 0
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in good.model.state_dict().items())


class Broken(Synthetic):
    """Synthetic images some of which cannot be read."""

    broken: tuple[int, ...] = ()

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        sample = super().__getitem__(key)
        if key[1] not in self.broken:
            return sample
        return Sample(sample.index, None, sample.target, BadImage(f"/images/{key[1]}.png", "a damaged image"))


def test_broken_images_are_named_once_counted_and_skipped(tmp_path: Path) -> None:
    data, text = split(), io.StringIO()
    train = Broken(5, 3, SIZE)
    train.broken = (2,)
    run = trainer(tmp_path / "run", data=data._replace(train=train))
    run.run(reporter(text))
    assert run.skipped == ["/images/2.png"]
    assert text.getvalue().count("skipped /images/2.png: a damaged image") == 1, "in two epochs"
    assert run.step == 6


def test_a_batch_of_broken_images_is_no_step_of_the_optimizer(tmp_path: Path) -> None:
    train = Broken(2, 3, SIZE)
    train.broken = (0,)
    run = trainer(tmp_path / "run", replace(TINY, batch_size=1), split()._replace(train=train))
    run.run(reporter())
    trained = [line for line in read_metrics(run.out / "metrics.jsonl") if line["kind"] == "train"]
    assert len(trained) == 2, "one of the two images in each of two epochs"
    assert run.step == 4


def test_too_many_broken_images_end_the_run(tmp_path: Path) -> None:
    train = Broken(5, 3, SIZE)
    train.broken = (1, 4)
    run = trainer(tmp_path / "run", data=split()._replace(train=train))
    with pytest.raises(CommandError, match=r"/images/[14].png: .*2 of 5 training images are unreadable, more than 5%"):
        run.run(reporter())


@pytest.mark.parametrize(("steps", "ends_at"), [(1, "1"), (4, "[234]")], ids=["the last", "any"])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, steps: int, ends_at: str) -> None:
    run = trainer(tmp_path / "run", replace(TINY, lr=1e30, warmup=0, steps=steps))
    with pytest.raises(CommandError, match=rf"the loss is (nan|inf) at step {ends_at}; try a lower --lr"):
        run.run(reporter())


class Fixed(nn.Module):
    """Scores that fall with a class's distance from the image's first value; no two are equal."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        value = (x[:, 0, 0, 0] * 0.25 + 0.5) * 255
        return scores(value, self.classes)


def scores(value: Tensor, classes: int) -> Tensor:
    return -2 * (torch.arange(classes) - value[:, None] - 0.1).abs()


class Valued:
    """Images filled with a number."""

    def __init__(self, values: list[int], targets: list[int], classes: int) -> None:
        self.values, self.targets, self.classes = values, targets, tuple(map(str, range(classes)))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        value = self.values[key[1]]
        if value < 0:
            return Sample(key[1], None, 0, BadImage("x.png", "broken"))
        return Sample(key[1], torch.full((3, 8, 8), value, dtype=torch.uint8), self.targets[key[1]])


def test_evaluation_counts() -> None:
    data = Valued([0, 1, 2, -1, 3, 6], [0, 1, 1, 0, 0, 6], 7)
    model = Fixed(7).train()
    seen: list[tuple[int, int]] = []
    result = evaluate(
        model, data, Synthetic.preprocessing(8), device=torch.device("cpu"), on_batch=lambda *n: seen.append(n)
    )
    assert model.training
    assert seen[-1] == (6, 6)
    assert [error.path for error in result.errors] == ["x.png"]
    assert (result.images, result.top1) == (5, pytest.approx(3 / 5))
    assert result.top5 == pytest.approx(4 / 5), "0 is sixth for a value of 3"
    assert result.by_class(7) == [(1, 2), (1, 2), (0, 0), (0, 0), (0, 0), (0, 0), (1, 1)]
    assert result.indices.tolist() == [0, 1, 2, 4, 5]
    logits = scores(torch.tensor([0, 1, 2, 3, 6]).double(), 7)
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, result.targets)), rel=1e-4)
    torch.testing.assert_close(result.truth, logits.softmax(1)[range(5), result.targets].float(), rtol=1e-4, atol=1e-6)
    probabilities = predict(
        model, torch.full((3, 8, 8), 3, dtype=torch.uint8), Synthetic.preprocessing(8), torch.device("cpu")
    )
    torch.testing.assert_close(probabilities, logits[3].softmax(0).float(), rtol=1e-4, atol=1e-6)
    with pytest.raises(BadImage, match="broken"):
        evaluate(model, Valued([-1], [0], 7), Synthetic.preprocessing(8), device=torch.device("cpu"))


class Small(Fixed):
    """Memory for three images at a time."""

    error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory")

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 3:
            raise self.error
        return super().forward(x)


def test_an_evaluation_beyond_memory_goes_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 7)
    data, cpu, notes = Valued([*range(7)] * 2, [1] * 14, 7), torch.device("cpu"), list[str]()
    expected = evaluate(Fixed(7), data, Synthetic.preprocessing(8), device=cpu)
    found = evaluate(Small(7), data, Synthetic.preprocessing(8), device=cpu, note=notes.append)
    words = "images at a time do not fit into memory: now"
    assert notes == [f"7 {words} 4", f"4 {words} 2"], "once for both batches"
    torch.testing.assert_close(found.probabilities, expected.probabilities)
    assert found.loss == pytest.approx(expected.loss)
    monkeypatch.setattr(Small, "error", RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        evaluate(Small(7), data, Synthetic.preprocessing(8), device=cpu)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule: str) -> None:
    recipe = replace(TINY, schedule=schedule, warmup=5, lr=0.1)
    rates = [recipe.lr_at(step, 50) for step in range(50)]
    assert rates[:5] == pytest.approx([0.1 * (i + 1) / 6 for i in range(5)])
    assert rates[5] == max(rates) == 0.1
    rest = rates[5:]
    if schedule in ("cosine", "linear"):
        assert all(a > b > 0 for a, b in pairwise(rest))
        assert rest[-1] < 0.004
    else:
        assert set(rest) == {0.1}


def test_the_rate_of_a_plateau_falls_three_times_and_no_further() -> None:
    schedule, rates = Schedule(IMAGENET, 40_000), []
    for step in range(100, 4001, 100):  # of 128 images
        schedule.see(step, 0.5)
        rates.append(schedule.rate(step))
    assert sorted(set(rates), reverse=True) == pytest.approx([1e-2, 1e-3, 1e-4, 1e-5], rel=0.01)


def test_recipes_learn_on_small_folders_are_the_papers_by_name_and_quick_for_digits() -> None:
    folder, paper = default("/images"), chosen({"data": "/images"}, "paper")
    for recipe in (folder, paper):
        assert (recipe.batch_size, recipe.lr, recipe.momentum, recipe.weight_decay) == (128, 0.01, 0.9, 5e-4)
        assert (recipe.data, recipe.epochs, recipe.dropout) == ("/images", 90, 0.5)
    assert (folder.init, folder.schedule, folder.warmup) == ("kaiming", "cosine", 20)
    assert (paper.init, paper.schedule, paper.warmup) == ("paper", "plateau", 0)
    assert (folder.normalize, paper.normalize) == (True, False)
    assert chosen({}, "paper") == replace(IMAGENET, data="digits")
    assert default("digits") == DIGITS
    assert DIGITS.init == "kaiming"
    assert chosen({}) == DIGITS
    assert chosen({"epochs": 3, "lr": 0.02}).total_steps(4000) == 375
    assert chosen({"epochs": 3, "steps": 7}).total_steps(4000) == 7
    assert folder.total_steps(129) == 180
    assert replace(folder, steps=7).total_steps(129) == 7
    assert folder.differences({"lr": 0.01, "seed": 4, "data": "/images"}) == ["seed"]


def test_random_states_come_back() -> None:
    state = random_state()
    first = random.random(), float(np.random.rand()), torch.rand(2).tolist(), np.random.randn()
    set_random_state(state)
    assert (random.random(), float(np.random.rand()), torch.rand(2).tolist(), np.random.randn()) == first


def test_a_full_disk_under_the_log_names_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = Log.__new__(Log)
    log.path = tmp_path / "metrics.jsonl"
    log.stream = log.path.open("a")
    with pytest.raises(CommandError, match=r"metrics.jsonl: No space left on device"):
        log.write("train", 1, {"loss": 1.0})


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_pictures_are_written_and_show_what_they_are_given(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": s, "loss": 3.0 / s, "accuracy": 1 - 1 / s} for s in range(1, 40)]
    lines += [{"kind": "evaluate", "step": 39, "loss": 0.2, "top1": 0.9}]
    pictures.curves(tmp_path / "a.png", lines)
    pictures.curves(tmp_path / "b.png", lines[:-1])
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    pictures.curves(tmp_path / "none.png", [])
    weight = torch.zeros(96, 3, 11, 11)
    weight[5, 0] = 1.0  # one kernel, red
    pictures.kernels(tmp_path / "k.png", weight, torch.zeros_like(weight))
    image = pixels(tmp_path / "k.png").astype(int)
    red = (image[..., 0] > 250) & (abs(image[..., 1] - 128) < 3) & (abs(image[..., 2] - 128) < 3)
    grey = (abs(image - 128) < 3).all(-1)
    assert red.sum() / (red.sum() + grey.sum()) == pytest.approx(1 / 96, rel=0.2)
    columns = np.nonzero(red)[1]
    assert columns.min() / image.shape[1] == pytest.approx(5 / 16, abs=0.03), "the sixth of a row of sixteen"
    pictures.kernels(tmp_path / "both.png", weight + 0.01, torch.full_like(weight, 2.0))
    assert len(pixels(tmp_path / "both.png")) == 2 * len(image), "what training added, below"


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_letter_by_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mathematics between dollars, no line breaks, and no warning about a script that the font lacks."""
    written, right = [], pictures._write
    monkeypatch.setattr(pictures, "_write", lambda figure, path: (right(figure, path), written.append(figure)))
    names, shares = ["$x_{$", "a\nb", "猫"], torch.tensor([0.5, 0.3, 0.2])
    pictures.prediction(tmp_path / "a.png", Image.new("RGB", (9, 9)), shares, names, "5$ and 6$.png")
    picture, bars = written[0].axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["$x_{$", "a\\nb", "猫"]
    assert not any(text.get_parse_math() for text in (*bars.get_yticklabels(), picture._left_title))


def test_guesses_show_the_right_class_in_green(tmp_path: Path) -> None:
    data = Valued([0, 1, 2], [0, 1, 2], 6)
    result = evaluate(Fixed(6), data, Synthetic.preprocessing(8), device=torch.device("cpu"))
    pictures.guesses(tmp_path / "right.png", data, result, data.classes)
    result.targets = torch.tensor([5, 5, 5])
    pictures.guesses(tmp_path / "wrong.png", data, result, data.classes)
    green = [
        int((np.abs(pixels(tmp_path / name).astype(int) - (0x00, 0x9E, 0x73)).max(-1) < 3).sum())
        for name in ("right.png", "wrong.png")
    ]
    assert green[0] > 100
    assert green[1] == 0


def test_a_run_leaves_its_files(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", replace(TINY, evaluate_every=2, evaluate_limit=2))
    run.run(reporter())
    assert [path.name for path in checkpoint.generations(run.out)] == ["step-00000006"]
    assert sorted(os.listdir(checkpoint.generations(run.out)[0])) == [
        "checkpoint.json",
        "model.safetensors",
        "state.pt",
    ]
    lines = read_metrics(run.out / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    evaluations = [(line["step"], line["images"]) for line in lines if line["kind"] == "evaluate"]
    assert evaluations == [(2, 2), (4, 2), (6, 3)], "some images on the way, all of them at the end"
    assert json.loads(json.dumps(lines)) == lines
    assert any(path.name.startswith("events.out.tfevents") for path in run.out.iterdir())
