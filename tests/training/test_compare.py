"""Two runs on the same images: counts, the exact test, the interval, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from alexnet_ext import cli
from alexnet_ext.data import Synthetic
from alexnet_ext.training import checkpoint
from alexnet_ext.training.compare import Comparison, compare
from tests.cli.test_cli import SMALL, fails
from tests.training.test_results import CLASSES, outcome, write_weights
from tests.training.test_runs import striped


@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, 1), (0, 1), (3, 9), (9, 3), (2, 20), (59, 21)])
def test_the_p_value_is_that_of_fair_coins(a: int, b: int) -> None:
    ways = [math.comb(a + b, heads) for heads in range(a + b + 1)]
    extreme = sum(way for heads, way in enumerate(ways) if abs(2 * heads - a - b) >= abs(a - b))
    found = Comparison(10, a, b, 10).p_value
    assert found == pytest.approx(float(Fraction(extreme, 2 ** (a + b))), rel=1e-12)
    assert found == Comparison(900, b, a, 0).p_value, "of both sides, and of the images that differ alone"


def test_many_images_are_quick_and_lose_no_digits() -> None:
    assert Comparison(0, 25_000, 25_000, 0).p_value == 1.0
    assert Comparison(0, 10_000, 15_000, 0).p_value < 1e-200
    # By the normal distribution, with the correction for continuity.
    assert Comparison(0, 20_000, 20_300, 0).p_value == pytest.approx(math.erfc(299 / math.sqrt(2 * 40_300)), rel=1e-3)


def test_the_interval_is_the_published_one() -> None:
    """Bonett and Price 2012: (f + 1) / (n + 2) in place of f / n, in the formula of Wald."""
    found = Comparison(both=42, only_a=5, only_b=16, neither=37)
    low, high = found.interval
    middle, total = 11 / 102, 23 / 102
    half = 1.959963984540054 * math.sqrt((total - middle**2) / 102)
    assert (low, high) == pytest.approx((middle - half, middle + half), rel=1e-12)
    assert low < found.difference == 0.11 < high
    assert Comparison(0, 0, 3, 0).interval[1] <= 1


def test_the_interval_covers_what_it_says() -> None:
    """In 95 of 100 samples, within the chance of 2,000 samples."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([0.6, 0.06, 0.14, 0.2])
    draws = shares.multinomial(2000 * 300, replacement=True, generator=generator).view(2000, 300)
    covered = 0
    for row in draws:
        low, high = Comparison(*torch.bincount(row, minlength=4).tolist()).interval
        covered += low <= 0.08 <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((940, 12, 30, 18), "run B is right on 1.8 points more of the same 1,000 images, beyond chance (p = 0.0079)"),
        ((940, 6, 4, 50), "run A is right on 0.2 points more of the same 1,000 images, which may be chance (p = 0.75)"),
        ((90, 0, 60, 0), "run B is right on 40 points more of the same 150 images, beyond chance (p < 0.0001)"),
        ((3, 2, 2, 1), "both runs are right on 5 of the same 8 images (p = 1)"),
    ],
)
def test_the_verdict_is_one_sentence(counts: tuple[int, int, int, int], sentence: str) -> None:
    assert Comparison(*counts).sentence() == sentence


def test_images_are_counted_by_who_is_right() -> None:
    data = Synthetic(6, 3, 8, 0)
    a, b = outcome([0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 1], 3), outcome([0, 1, 2, 0, 1, 2], [0, 0, 2, 0, 1, 0], 3)
    assert compare((a, data), (b, data)) == Comparison(both=1, only_a=1, only_b=3, neither=1)
    assert b.indices is not None
    b.indices = b.indices.flip(0)
    with pytest.raises(cli.CommandError, match="the images differ"):
        compare((a, data), (b, data))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on digits."""
    out = tmp_path_factory.mktemp("compare") / "run"
    assert cli.run_command(["train", *SMALL, "--steps", "1", "--out", str(out), "--quiet"]) == 0
    return out


def test_a_run_against_another(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.safetensors"
    description, values = checkpoint.read_weights(checkpoint.find_weights(run, pytest.fail))
    checkpoint.write_weights(
        other, {**values, "classifier.fc8.bias": values["classifier.fc8.bias"].roll(1) + 3}, description
    )
    capsys.readouterr()
    assert cli.run_command(["compare", str(run), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["a"], found["b"]) == (str(run), str(other))
    assert found["both"] + found["only_a"] + found["only_b"] + found["neither"] == found["images"] == 1000
    for path, name in ((run, "top1_a"), (other, "top1_b")):
        assert cli.run_command(["evaluate", "--weights", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(found[name], abs=1e-6)
    assert cli.run_command(["compare", str(run), str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("both runs are right on ")
    assert lines[-1].endswith(" of the same 1,000 images (p = 1)")


def test_what_cannot_be_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = write_weights(tmp_path / "bare.safetensors")
    assert "the classes differ: 10 and 3" in fails(capsys, 2, "compare", run, bare)
    assert "name no data of their own" in fails(capsys, 2, "compare", bare, bare)
    assert "no such file or folder" in fails(capsys, 2, "compare", run, tmp_path / "missing")
    data = striped(tmp_path / "data", 24, 3)
    runs = [tmp_path / "a", tmp_path / "b"]
    for out, share in zip(runs, ("0.2", "0.4"), strict=True):
        command = ["train", str(data), *SMALL, "--steps", "1", "--held-out", share, "--out", str(out), "--quiet"]
        assert cli.run_command(command) == 0
    told = fails(capsys, 2, "compare", *runs)
    assert told.startswith(f"alexnet: what the runs held out, of {data} and {data}, is not known to be the same: ")
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    for number, name in enumerate(CLASSES):
        (moved / f"kind {number}").rename(moved / name)
    assert cli.run_command(["compare", *map(str, runs), str(data)]) == 0, "named images settle it"
    assert fails(capsys, 2, "compare", *runs, moved)
