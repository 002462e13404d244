"""The commands on a packed folder: train, evaluate, resume, data-bench."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from alexnet_ext import cli
from alexnet_ext.data.packed import Index
from alexnet_ext.training import checkpoint, data_bench
from alexnet_ext.training.data_bench import Rates
from alexnet_ext.training.recipe import Recipe
from tests.cli.test_cli import SMALL, fails, images

__all__ = ["images"]  # a fixture

STEP = [*SMALL, "--lr", "0.001", "--steps", "1"]


@pytest.fixture
def packed(images: Path, tmp_path: Path) -> Path:
    out = tmp_path / "packed"
    assert cli.run_command(["prepare", str(images), str(out), "--side", "76", "--workers", "0"]) == 0
    return out


def test_a_packed_folder_trains_evaluates_and_goes_on(
    tmp_path: Path, images: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    for cache in ("ram", "device"):
        shutil.rmtree(out, ignore_errors=True)
        assert cli.run_command(["train", str(packed), *STEP, "--cache", cache, "--out", str(out)]) == 0
        assert f"{packed}: 10 images to train on and 10 held out, 10 classes" in capsys.readouterr().out
    description, _ = checkpoint.read_weights(checkpoint.find_weights(out, pytest.fail))
    assert description.preprocessing.mean == tuple(Index.read(packed).mean)
    printed = []
    for more in ([], [str(packed)], [str(images)]):
        assert cli.run_command(["evaluate", "--weights", str(out), *more, "--json", "--workers", "1"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0]["loss"] == printed[1]["loss"]
    assert (printed[1]["images"], printed[2]["images"]) == (10, 20)
    packed.rename(moved)
    resume = ["train", "--resume", str(out), "--steps", "2"]
    assert cli.run_command([*resume, str(moved), "--workers", "1"]) == 0
    assert cli.run_command(["prepare", str(images), str(packed), "--side", "80", "--workers", "0"]) == 0
    for other in (packed, images):
        line = fails(capsys, 1, *resume[:-1], "3", other)
        assert line.startswith(f"alexnet: {other}: not the images that the run in {out} began with")


def test_weights_keep_their_own_mean(tmp_path: Path, packed: Path) -> None:
    out, tuned = tmp_path / "run", tmp_path / "tuned"
    assert cli.run_command(["train", "--data", "synthetic", *STEP, "--out", str(out)]) == 0
    assert cli.run_command(["train", str(packed), *STEP[2:], "--weights", str(out), "--out", str(tuned)]) == 0
    description, _ = checkpoint.read_weights(checkpoint.find_weights(tuned, pytest.fail))
    assert description.preprocessing.mean == (0.5,) * 3
    assert description.preprocessing.resize == 76


def test_only_packed_images_are_kept_in_memory(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*STEP, "--cache", "ram", "--out", tmp_path / "run"]
    line = fails(capsys, 2, "train", images, *options)
    assert line == f"alexnet: --cache ram: {images} is not packed; `alexnet prepare` packs a folder of images"
    assert "--cache ram: digits is not packed" in fails(capsys, 2, "train", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["packed", "folder"])
def test_data_bench_measures_what_is_there(
    images: Path, packed: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(packed if kind == "packed" else images)
    options = ["--seconds", "0.1", "--batch-size", "2", "--image-size", "67"]
    capsys.readouterr()
    assert cli.run_command(["data-bench", folder, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["packed", "folder", "step", "dali"]
    assert found.pop("folder" if kind == "packed" else "packed") is None
    assert found.pop("dali") is None, "there is no GPU"
    assert all(rate > 0 for rate in found.values())
    assert cli.run_command(["data-bench", folder, *options]) == 0
    assert capsys.readouterr().out.count(" a second") == 2
    assert "image_size=9 is too small" in fails(capsys, 2, "data-bench", folder, *options[:-1], "9")
    assert "--seconds 0: expected" in fails(capsys, 2, "data-bench", folder, "--seconds", "0")


def test_data_bench_takes_a_folder_of_any_name_and_steps_as_training_does(
    tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Recipe] = []
    monkeypatch.setattr(data_bench, "measure", lambda recipe, *_: (recipes.append(recipe), Rates(2.0, None, 1.0))[1])
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    packed.rename(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.run_command(["data-bench", "digits", "--device", "cpu"]) == 0
    assert " on 1 thread: " in capsys.readouterr().out
    monkeypatch.setattr("alexnet_ext.cli_data.device_of", lambda name: torch.device("cuda"))
    assert cli.run_command(["data-bench", "digits", "--json"]) == 0
    assert cli.run_command(["data-bench", "digits", "--json", "--precision", "fp16"]) == 0
    assert {recipe.data for recipe in recipes} == {str(tmp_path / "digits")}
    assert [recipe.precision for recipe in recipes] == ["fp32", "bf16", "fp16"]


def test_dali_reads_folders_on_a_gpu_alone(images: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, 2, "train", images, *STEP, "--loader", "dali", "--device", "cpu")
    assert line == "alexnet: --loader dali: needs a GPU, and the device is cpu"
    line = fails(capsys, 2, "train", packed, *STEP, "--loader", "dali", "--device", "cpu")
    assert line == f"alexnet: --loader dali: reads folders of images, and {packed} is none"
