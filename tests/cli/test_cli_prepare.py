"""``alexnet prepare``: its lines and exit codes, and what a signal leaves."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from alexnet_ext import cli
from alexnet_ext.data.packed import Index
from tests.cli.test_cli import fails, images
from tests.cli.test_command import begin

__all__ = ["images"]  # a fixture

SMALL = ["--side", "32", "--shard-size", "3", "--workers", "1"]


def test_prepare_packs_verifies_and_does_nothing_twice(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    (images / "3" / "note.txt").touch()
    for _ in range(2):
        assert cli.run_command(["prepare", str(images), str(out), *SMALL]) == 0
        printed = capsys.readouterr().out
        assert f"{images}: left out 1 .txt in its folders" in printed
        assert f"{out}: 10 images to train on and 10 held out, 32 x 32, of 10 classes; 8 shards, 0.1 MB\n" in printed
    assert cli.run_command(["prepare", str(out), "--verify"]) == 0
    assert capsys.readouterr().out == f"{out}: 20 images, all as written\n"
    with (out / "val-00002.npy").open("r+b") as stream:
        stream.seek(500)
        stream.write(b"\0\1\2")
    line = fails(capsys, 1, "prepare", out, "--verify")
    assert line == f"alexnet: {out / 'val-00002.npy'}: not the bytes that were written (SHA-256 differs)"
    assert fails(capsys, 1, "prepare", images, out, *SMALL, "--verify") == line


def test_prepare_names_a_broken_image(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("train", "val"):
        (images / part).mkdir()
        for number in range(4):
            for path in sorted((images / str(number)).glob("*.png")):
                name = images / part / str(number % 2) / path.name
                name.parent.mkdir(exist_ok=True)
                name.write_bytes(path.read_bytes())
    (images / "train" / "1" / "3.png").write_text("text")
    out = tmp_path / "packed"
    assert cli.run_command(["prepare", str(images), str(out), *SMALL]) == 0
    assert "; 1 images could not be read, skipped.txt names them\n" in capsys.readouterr().out
    assert (out / "skipped.txt").read_text() == "train/1/3.png: not an image (JPEG, PNG, BMP, WEBP, GIF)\n"
    (images / "train" / "0" / "0.png").write_text("text")
    line = fails(capsys, 1, "prepare", images, tmp_path / "other", *SMALL)
    assert "with it 2 of 8 images of train are unreadable, more than 5%" in line


def test_prepare_refuses(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "packed"
    assert "name also DST" in fails(capsys, 2, "prepare", images)
    assert f"{out}: no such folder" in fails(capsys, 2, "prepare", out, images.parent / "other")
    assert f"DST {images / 'out'}: lies in the images' folder" in fails(capsys, 2, "prepare", images, images / "out")
    (tmp_path / "file").touch()
    assert "DST" in fails(capsys, 2, "prepare", images, tmp_path / "file")
    assert "--side 0: expected greater than or equal to 1" in fails(capsys, 2, "prepare", images, out, "--side", "0")
    odd = ("--side", "31", "--store", "yuv420")
    assert "--side must be even with --store yuv420, got 31" in fails(capsys, 2, "prepare", images, out, *odd)
    assert "--store" in fails(capsys, 2, "prepare", images, out, "--store", "jpeg")
    assert "no such file; `alexnet prepare` writes it" in fails(capsys, 1, "prepare", images, "--verify")
    assert cli.run_command(["prepare", str(images), str(out), *SMALL]) == 0
    assert "holds shards of side 32, not 64" in fails(capsys, 2, "prepare", images, out, *SMALL[2:], "--side", "64")
    assert "have a side of 32, and the network takes 227; prepare them anew" in fails(capsys, 1, "train", out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_signal_ends_it_in_one_line_and_the_command_goes_on(
    tmp_path: Path, images: Path, number: signal.Signals, workers: str
) -> None:
    out = tmp_path / "packed"
    for path in list(images.rglob("*.png")):
        for copy in range(20):
            path.with_name(f"{path.stem}-{copy}.png").write_bytes(path.read_bytes())
    options = ["prepare", str(images), str(out), "--side", "300", "--shard-size", "10", "--workers", workers]
    process = begin(*options)
    deadline = time.monotonic() + 120
    while not list(out.glob("train-0000*.npy")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "alexnet: stopped\n")
    assert not (out / "index.json").exists()
    assert [path.name for path in out.rglob("*") if ".tmp-" in path.name] == []
    assert cli.run_command(options) == 0
    assert sum(Index.read(out).images.values()) == 420
