"""The figures of finished runs: which are drawn, from what, where, and what is left alone."""

from __future__ import annotations

import io
import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from alexnet_ext import cli
from alexnet_ext.training import figures, pictures, results
from tests.cli.test_cli import SMALL, fails
from tests.training.test_runs import striped

CPU = torch.device("cpu")
OF_NETWORK = ["confusion", "figure-3-kernels", "figure-4-guesses", "figure-4-nearest"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on files of three classes: with ReLU, and with tanh."""
    root = tmp_path_factory.mktemp("figures")
    data = striped(root / "data", 30, 3)
    for name in ("relu", "tanh"):
        options = [
            "--activation",
            name,
            "--steps",
            "40",
            "--lr",
            "0.001",
            "--held-out",
            "0.3",
            "--out",
            str(root / name),
        ]
        assert cli.run_command(["train", str(data), *SMALL, *options, "--quiet"]) == 0
    return root / "relu", root / "tanh"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_run_in_both_formats(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.run_command(["figures", str(runs[0]), "--out", str(out)]) == 0
    expected = sorted(f"{name}.{kind}" for name in [*OF_NETWORK, "curves"] for kind in ("png", "svg"))
    assert names(out) == expected
    assert sorted(capsys.readouterr().out.split()) == [str(out / name) for name in expected]
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
    for path in out.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_several_runs_are_in_one_picture_and_have_folders_of_their_own(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["figures", *map(str, runs), "--out", str(out), "--format", "svg"]
    assert cli.run_command(arguments) == 0
    assert names(out) == ["curves.svg", "figure-1-activations.svg", "relu", "tanh"]
    assert names(out / "tanh") == [f"{name}.svg" for name in OF_NETWORK]
    first = (out / "curves.svg").read_bytes()
    shutil.rmtree(out)
    assert cli.run_command(arguments) == 0
    assert (out / "curves.svg").read_bytes() == first, "the same runs give the same bytes"


def test_a_run_without_its_images_or_its_weights(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run, ignore=shutil.ignore_patterns("events*"))
    data = runs[0].parent / "data"
    data.rename(data.with_name("away"))
    try:
        line = fails_softly(capsys, "figures", run, "--format", "png")
    finally:
        data.with_name("away").rename(data)
    assert "without figure 4 and the confusion, which need the images: " in line
    assert names(run / "figures") == ["curves.png", "figure-3-kernels.png"]
    for folder in ("checkpoints", "best"):
        shutil.rmtree(run / folder)
    assert "without the figures of its network" in fails_softly(capsys, "figures", run, "--out", tmp_path / "few")
    assert names(tmp_path / "few") == ["curves.png", "curves.svg"]


def test_what_is_missing_beside_other_runs_is_told(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, other = tmp_path / "bare", tmp_path / "other"
    bare.mkdir()
    other.mkdir()
    shutil.copy(runs[1] / "metrics.jsonl", other)
    (other / "recipe.json").write_text("[" * 100_000)
    capsys.readouterr()
    command = ["figures", *map(str, (runs[0], bare, other)), "--out", str(tmp_path / "out"), "--format", "png"]
    assert cli.run_command(command) == 0
    told = capsys.readouterr().err
    assert f"{bare}: without its curves: no lines of training in metrics.jsonl" in told
    assert f"{other}: not in figure 1: no recipe.json that this version can read" in told
    assert told.count("without its curves") == told.count("not in figure 1") == 1


def fails_softly(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of warning of a command that succeeds."""
    capsys.readouterr()
    assert cli.run_command([str(argument) for argument in arguments]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_nothing_is_replaced_or_drawn_of_no_run(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "curves.png").write_text("mine")
    assert "not empty" in fails(capsys, 2, "figures", runs[0], "--out", full)
    assert (full / "curves.png").read_text() == "mine"
    data = runs[0].parent / "data"
    assert "lies in the images' folder" in fails(capsys, 2, "figures", runs[0], "--out", data / "figures")
    assert not (data / "figures").exists()
    assert "no such folder" in fails(capsys, 2, "figures", tmp_path / "missing")
    assert "not a folder" in fails(capsys, 2, "figures", full / "curves.png")
    assert "--format" in fails(capsys, 2, "figures", runs[0], "--format", "bmp")
    assert cli.run_command(["figures", str(empty), "--out", str(tmp_path / "out")]) == 1
    assert "neither metrics.jsonl nor weights" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize(("limit", "batch"), [(4000, 50), (4000, 2), (7, 3)])
def test_the_nearest_are_those_of_all_distances(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, limit: int, batch: int
) -> None:
    monkeypatch.setattr(figures, "COMPARED", limit)
    monkeypatch.setattr(figures, "BATCH", batch)
    model, description = results.load(runs[0], None, True, CPU, pytest.fail)
    split = results.own_split(description, pytest.fail)
    console = Console(file=io.StringIO())
    result = results.evaluate_images(model, description, split.held_out, CPU, "fp32", 0, console)
    rows, compared = figures.nearest(model, split, result, CPU, 0, console, seed=3)
    assert compared == min(limit, len(split.train))
    assert split.train.augment, "training goes on as before"
    plain = type(split.train)(split.train.root, split.train.samples, split.train.classes, split.preprocessing)
    images = [plain[0, index].image for index in range(len(plain))]
    vectors = torch.cat([figures.fc7(model, image[None], split.preprocessing, CPU) for image in images])
    assert vectors.shape == (len(plain), 4096)
    for row in rows:
        own = figures.fc7(model, row.image[None], split.preprocessing, CPU)
        order = sorted(((vectors - own).norm(dim=1)).tolist())
        found = [distance for _, _, distance in row.near]
        assert len(found) == 6
        assert found == sorted(found)
        if limit > len(plain):
            assert found == pytest.approx(order[:6], rel=1e-4)
        for image, target, distance in row.near:
            vector = figures.fc7(model, image[None], split.preprocessing, CPU)
            assert float((vector - own).norm()) == pytest.approx(distance, rel=1e-4)
            assert any(torch.equal(image, other) and plain.samples[i][1] == target for i, other in enumerate(images))


def lines(accuracies: list[list[float]], top1: float = 0.9) -> list[dict[str, float | str]]:
    """The metrics of a run whose epochs have these accuracies at their steps."""
    steps = [(epoch, value) for epoch, values in enumerate(accuracies) for value in values]
    train = [
        {"kind": "train", "step": step, "epoch": epoch, "loss": 2.0 / step, "accuracy": value}
        for step, (epoch, value) in enumerate(steps, 1)
    ]
    return [*train, {"kind": "evaluate", "step": len(steps), "loss": 0.1, "top1": top1}]


def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    found: list = []
    monkeypatch.setattr(pictures, "_write", lambda figure, path: found.append(figure))
    return found


def test_figure_1_is_the_mean_error_of_whole_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = drawn(monkeypatch)
    runs = [("ReLU", lines([[0.2, 0.4], [0.6, 0.8], [1.0]])), ("tanh", lines([[0.1, 0.1], [0.2, 0.4]]))]
    pictures.activations(tmp_path / "a.png", runs)
    (axes,) = found[0].axes
    assert [line.get_label() for line in axes.lines] == ["ReLU", "tanh"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2], [1, 2]]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([70, 30]), "a third epoch that did not end says little"
    assert list(axes.lines[1].get_ydata()) == pytest.approx([90, 70])
    assert len({line.get_linestyle() for line in axes.lines}) == 2, "told apart without colours"


def test_curves_are_over_epochs_where_all_runs_have_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = drawn(monkeypatch)
    long, short = lines([[0.2, 0.4], [0.6, 0.8]], top1=0.75), lines([[0.5, 0.5, 0.5]])
    pictures.several_curves(tmp_path / "a.png", [("a", long), ("b", lines([[0.1] * 4, [0.2] * 4]))])
    pictures.several_curves(tmp_path / "b.png", [("a", long), ("b", short)])
    assert [axes.get_xlabel() for figure in found for axes in figure.axes] == ["epoch"] * 3 + ["step"] * 3
    ends = [[line.get_xdata()[-1] for line in figure.axes[0].lines] for figure in found]
    assert ends == [[2, 2], [4, 3]]
    assert found[0].axes[2].lines[0].get_ydata()[-1] == pytest.approx(25), "the held-out error"


def test_kernels_are_drawn_by_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = drawn(monkeypatch)
    weight = torch.zeros(96, 3, 11, 11)
    weight[48:, 2] = 1.0  # the second tower is blue
    pictures.kernels(tmp_path / "a.png", weight, towers=2)
    first, second = (axes.images[0].get_array() for axes in found[0].axes)
    assert first.shape == second.shape == (35, 191, 3), "three rows of sixteen"
    assert float(first[:11, :11, 2].max()) == 0.5
    assert float(second[-11:, -11:, 2].min()) == 1.0
    assert [axes.get_title(loc="left")[:18] for axes in found[0].axes] == ["Tower 1: 48 of the", "Tower 2: 48 of the"]


def test_runs_of_one_name_and_metrics_of_another_version(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "run-2"]
    for path in paths:
        path.mkdir(parents=True)
    assert figures._names(paths) == ["run", "run-2", "run-2-2"]
    odd = [{"kind": "train", "step": 1}, {"kind": "span", "step": 1}, *lines([[0.5]])]
    (paths[0] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in odd))
    assert figures._open(paths[0], "run").lines == lines([[0.5]])
    assert figures._open(paths[0], "run").recipe is None


ODD = [
    {"kind": "train", "step": 0, "epoch": 0, "loss": 1.0, "accuracy": 0.5},
    {"kind": "train", "step": 1, "epoch": 0, "loss": 10**400, "accuracy": 0.5},
    {"kind": "train", "step": 1, "epoch": None, "loss": 1.0, "accuracy": 0.5},
    {"kind": "train", "step": 1, "epoch": 10**400, "loss": 1.0, "accuracy": 0.5},
    {"kind": "train", "step": 10**400, "epoch": 0, "loss": 1.0, "accuracy": 0.5},
    {"kind": "train", "step": 1.5, "epoch": 0, "loss": 1.0, "accuracy": 0.5},
    {"kind": "train", "step": True, "epoch": 0, "loss": 1.0, "accuracy": 0.5},
    {"kind": "train", "step": -1, "epoch": 0, "loss": 1.0, "accuracy": 0.5},
    {"kind": [], "step": 1},
    {"kind": "evaluate", "step": 1, "top1": "good"},
    {"kind": "evaluate", "step": None, "top1": 0.5},
]


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    whole = "".join(json.dumps(line) + "\n" for line in lines([[0.5, 0.6], [0.7, 0.8]])).encode()
    odd = "".join(json.dumps(line) + "\n" for line in ODD).encode()
    deep = b"[" * 100_000
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_bytes(odd + b"\xff{\n" + whole + deep + b"\n" + whole[:30])
    assert figures._open(tmp_path / "a", "a").lines == lines([[0.5, 0.6], [0.7, 0.8]])
    command = ["figures", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out"), "--format", "png"]
    assert cli.run_command(command) == 0
    assert names(tmp_path / "out") == ["curves.png"]


def test_a_running_mean_is_that_of_the_finite_values() -> None:
    nan, inf = float("nan"), float("inf")
    values = np.array([nan, 2.0, inf, 4.0, nan, nan, 6.0] + [6.0] * 33)  # windows of two
    found = pictures._smooth(values)
    assert np.array_equal(found[:8], [nan, 2, 2, 4, 4, nan, 6, 6], equal_nan=True)


def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, runs = drawn(monkeypatch), [("_old", lines([[0.5]])), ("new", lines([[0.5]]))]
    pictures.several_curves(tmp_path / "a.png", runs)
    pictures.activations(tmp_path / "b.png", runs)
    legends = (found[0].legends[0], found[1].axes[0].get_legend())
    assert [[text.get_text() for text in legend.get_texts()] for legend in legends] == [[" _old", "new"]] * 2
