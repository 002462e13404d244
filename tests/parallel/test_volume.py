"""What a rank holds and sends, by arithmetic; tests/parallel/test_towers.py compares the bytes with those counted."""

from __future__ import annotations

import pytest

from alexnet_ext import cli
from alexnet_ext.parallel import volume
from alexnet_ext.variants import config_of

CONFIG = config_of("paper", 1000, None, 0.5)


def plan(layout: str, ranks: int, images: int = 128, **rest: object) -> volume.Plan:
    return volume.Plan(CONFIG, layout, ranks, images, **rest)  # type: ignore[arg-type]


def test_one_rank_holds_the_whole_network_and_sends_nothing() -> None:
    assert volume.held(plan("data", 1)) == 60_965_224
    assert volume.exchanged(plan("data", 1)) == []


def test_data_parallel_ranks_send_their_gradients_alone() -> None:
    (row,) = volume.exchanged(plan("data", 4))
    assert row == volume.Sent("weights", "gradients, summed", 0, 2 * 3 * 60_965_224 * 4 // 4)
    (half,) = volume.exchanged(plan("data", 4, itemsize=2, gradient_itemsize=2))
    assert half.backward == row.backward // 2


def test_towers_hold_half_of_all_but_fc8() -> None:
    """By hand: 55 x 55 after conv1, 27 x 27 after conv2, 13 x 13 before conv3, 6 x 6 before fc6."""
    assert volume.held(plan("towers", 2)) == 4_097_000 + (60_965_224 - 4_097_000) // 2
    sent = {row.layer: (row.forward, row.backward) for row in volume.exchanged(plan("towers", 2))}
    counts = {"norm1": 2 * 55**2, "norm2": 2 * 27**2, "conv3": 128 * 13**2, "fc6": 128 * 36, "fc7": 2048, "fc8": 2048}
    assert sent == {name: (512 * n, 512 * n if name != "fc8" else 0) for name, n in counts.items()}
    cut = [row.layer for row in volume.exchanged(plan("towers", 2, lrn_border="per-tower"))]
    assert cut == ["conv3", "fc6", "fc7", "fc8"]
    assert volume.exchanged(plan("towers", 4))[-1].layer == "weights"


def test_the_weird_trick_sums_the_convolutions_and_fc8_alone() -> None:
    *_, row = volume.exchanged(plan("weird-trick", 8))
    assert row.backward == 2 * 7 * (60_965_224 - 37_752_832 - 16_781_312) * 4 // 8
    assert volume.held(plan("weird-trick", 8)) < volume.held(plan("data", 8)) // 4


def test_memory_falls_with_the_parts() -> None:
    whole, tower = volume.memory(plan("data", 1)), volume.memory(plan("towers", 2))
    assert whole["weights"] == whole["momenta"] == 4 * 60_965_224
    assert all(tower[kind] < whole[kind] for kind in whole)
    assert volume.memory(plan("data", 1, itemsize=2, gradient_itemsize=2))["weights"] == 6 * 60_965_224


def test_the_summary_prints_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert cli.run_command(["summary", "--parallel", "towers", "--ranks", "4", "--batch-size", "256"]) == 0
    shown = capsys.readouterr().out
    assert "towers on 4 ranks, 256 images a step: bytes that a rank sends" in shown
    assert "3,097,600" in shown
    assert "32,531,112 parameters a rank" in shown
    for arguments, message in (
        (["--parallel", "towers", "--ranks", "3"], "layout 'towers' needs an even number of ranks, got 3"),
        (["--parallel", "towers", "--model", "torchvision"], "needs a variant with two towers, got 'torchvision'"),
        (["--parallel", "data", "--lrn-border", "per-tower"], "lrn_border 'per-tower' needs layout 'towers'"),
    ):
        assert cli.run_command(["summary", *arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert message in lines[0]
