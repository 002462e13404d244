"""The command line and its data: allowed and refused places of images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from alexnet_ext import cli
from tests.cli.test_cli import SMALL, fails, images, run

__all__ = ["images", "run"]  # fixtures


def test_a_run_goes_on_with_its_own_images_alone_wherever_they_are(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    options = [*SMALL, "--steps", "1", "--held-out", "0.4", "--out", str(out)]
    assert cli.run_command(["train", str(images), *options]) == 0
    assert cli.run_command(["evaluate", "--weights", str(out)]) == 0
    assert capsys.readouterr().err == ""
    images.rename(moved)
    resume = ["train", "--resume", str(out), "--steps", "2"]
    assert f"{images}: no such folder" in fails(capsys, 2, *resume)
    assert cli.run_command([*resume, str(moved)]) == 0
    assert json.loads((out / "recipe.json").read_text())["data"] == str(moved)
    (moved / "3" / "3.png").rename(moved / "3" / "other.png")
    line = fails(capsys, 1, *resume[:-1], "3")
    assert line.startswith(f"alexnet: {moved}: not the images that the run in {out} began with")
    assert cli.run_command(["evaluate", "--weights", str(out)]) == 0
    assert f"{moved}: not the images that the run began with" in capsys.readouterr().err
    assert f"--held-out 0.1: the run in {out} has 0.4" in fails(capsys, 2, *resume, "--held-out", "0.1")


def test_a_run_on_digits_takes_no_folder(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{images}: the run in {run} has digits" in fails(capsys, 2, "train", "--resume", run, images)
    for option in (["--val", images], ["--held-out", "0.2"]):
        assert f"{option[0]}: only with DIR" in fails(capsys, 2, "train", *option)


def test_held_out_images_of_a_folder_of_their_own(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, val = tmp_path / "run", tmp_path / "val"
    shutil.copytree(images, val)
    (val / "3" / "note.txt").touch()
    arguments = ["train", str(images), *SMALL, "--steps", "1", "--val", str(val), "--out", str(out)]
    assert cli.run_command(arguments) == 0
    printed = capsys.readouterr().out
    assert "20 images to train on and 20 held out" in printed
    assert f"{val}: left out 1 .txt in its folders" in printed
    assert cli.run_command(["evaluate", "--weights", str(out)]) == 0
    assert "on 20 images" in capsys.readouterr().out
    assert "give one of them" in fails(capsys, 2, *arguments, "--held-out", "0.2")
    assert "--held-out 1.0: expected a share" in fails(capsys, 2, "train", images, "--held-out", "1")


def test_a_run_in_the_images_folder_is_refused(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(images)
    for out in (images / "run", images / "3" / "run", images, tmp_path / "link" / "run"):
        assert "lies in the images' folder" in fails(capsys, 2, "train", images, "--out", out)
    monkeypatch.chdir(images)
    assert "lies in the images' folder" in fails(capsys, 2, "train", ".")
    assert sorted(path.name for path in images.iterdir()) == list("0123456789")
