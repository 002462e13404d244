"""benchmarks.cluster: the simulated all-reduce against closed forms, the model of a step, what the command writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from alexnet_ext.parallel import volume
from benchmarks.cluster import __main__ as cluster
from benchmarks.cluster import allreduce, gloo, links, model, records, report
from benchmarks.cluster.allreduce import Link, Message, simulate
from benchmarks.cluster.model import Compute

LINK = Link(5e-6, 1e10)
COMPUTE = Compute(
    1e-3, dict.fromkeys(("fc8", "fc7", "fc6", "conv5", "conv4", "conv3", "conv2", "conv1"), 1e-3), 1e-3, "measured"
)
H100 = links.cluster("h100", "infiniband")


def always(_source: int, _target: int) -> Link:
    return LINK


# ---- the simulation


@pytest.mark.parametrize("size", [0.0, 1e3, 1e8])
@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 16])
def test_a_ring_takes_what_the_closed_form_says(ranks: int, size: float) -> None:
    expected = 2 * (ranks - 1) * (5e-6 + size / ranks / 1e10)
    assert simulate(allreduce.ring(ranks, size), always) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", [0.0, 1e3, 1e8])
@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
def test_a_tree_takes_what_the_closed_form_says(ranks: int, size: float) -> None:
    expected = 2 * math.log2(ranks) * (5e-6 + size / 1e10)
    assert simulate(allreduce.tree(ranks, size), always) == pytest.approx(expected, rel=1e-9)


def holding(messages: list[Message], ranks: int, chunk_of: list[int]) -> list[list[set[int]]]:
    """Whose gradients each rank has of each chunk at the end. A message carries all that its sender had by then."""
    chunks = max(chunk_of) + 1
    held = [[{rank} for _ in range(chunks)] for rank in range(ranks)]
    for message, chunk in zip(messages, chunk_of, strict=True):
        held[message.target][chunk] |= held[message.source][chunk]
    return held


def test_each_rank_ends_with_the_sum_of_all() -> None:
    """In the order of the lists, in which each message comes after those that it needs."""
    for messages in (allreduce.ring(5, 1.0), allreduce.tree(8, 1.0)):
        assert all(needed < number for number, message in enumerate(messages) for needed in message.needs)
    chunk_of = [(rank - step) % 5 for step in range(8) for rank in range(5)]
    assert holding(allreduce.ring(5, 1.0), 5, chunk_of) == [[set(range(5))] * 5] * 5
    assert holding(allreduce.tree(8, 1.0), 8, [0] * 14) == [[set(range(8))]] * 8


def test_a_port_sends_one_message_at_a_time() -> None:
    both = [Message(0, 1, 1e6, ()), Message(0, 2, 1e6, ())]
    assert simulate(both, always) == pytest.approx(2e-4 + 5e-6)
    assert simulate([Message(1, 0, 1e6, ()), Message(2, 0, 1e6, ())], always) == pytest.approx(2e-4 + 5e-6)
    assert simulate([Message(0, 1, 1e6, ()), Message(1, 0, 1e6, ())], always) == pytest.approx(1e-4 + 5e-6)


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(ValueError, match="messages wait for each other: 2 were never sent"):
        simulate([Message(0, 1, 1.0, (1,)), Message(1, 0, 1.0, (0,))], always)
    with pytest.raises(ValueError, match="ranks must be a power of two, got 6"):
        allreduce.tree(6, 1.0)


@pytest.mark.parametrize("size", [1e6, 1e8])
@pytest.mark.parametrize("nodes", [2, 4])
def test_a_ring_over_nodes_is_near_the_formula_of_the_model(nodes: int, size: float) -> None:
    """The formula adds latencies and bytes of the slowest link; the chunks do better or worse by their place."""
    ranks = 8 * nodes
    found = simulate(allreduce.ring(ranks, size), lambda a, b: node_link(a // 8 == b // 8))
    assert found >= 2 * (ranks - 1) / ranks * size / H100.inside.bandwidth
    ring = 2 * ((ranks - nodes) * H100.inside.latency + (nodes - 1) * H100.between.latency)
    ring += 2 * (ranks - 1) / ranks * size / (8 * H100.between.bandwidth)
    assert 0.9 < found / ring < 1.15
    assert model.all_reduce(size, ranks, H100) <= links.START.value + ring * (1 + 1e-9)


def node_link(inside: bool) -> Link:
    return H100.inside if inside else Link(H100.between.latency, 8 * H100.between.bandwidth)


def test_buckets_are_exchanged_in_turn_and_each_once_ready() -> None:
    assert allreduce.in_turn([(1.0, 2.0), (1.5, 1.0), (10.0, 0.5)]) == 10.5
    assert allreduce.in_turn([(1.0, 2.0), (1.5, 1.0)]) == 4.0


# ---- the step


def test_buckets_are_those_of_distributed_data_parallel() -> None:
    with torch.device("meta"):
        held = {name: torch.empty(row.parameters) for name, row in model.rows().items()}
    names = list(reversed(held))
    if not hasattr(dist, "_compute_bucket_assignment_by_size"):
        pytest.skip("this torch does not show its buckets")
    found, _ = dist._compute_bucket_assignment_by_size([held[name] for name in names], list(links.BUCKETS))
    expected = [(names[numbers[-1]], sum(4.0 * held[names[n]].numel() for n in numbers)) for numbers in found]
    assert model.buckets({name: 4.0 * row.parameters for name, row in model.rows().items()}) == expected
    assert [name for name, _ in expected] == ["fc8", "fc7", "fc6", "conv1"]


def test_one_gpu_takes_its_own_step() -> None:
    row = model.train_step("data", 1, 128, COMPUTE, H100, math.inf)
    assert row.seconds == pytest.approx(COMPUTE.seconds)
    assert (row.exchanges, row.exposed, row.waiting, row.megabytes_sent) == (0, 0, 0, 0)
    assert row.minutes() == pytest.approx(90 * 1_281_167 / 128 * 0.010 / 60)


def test_an_endless_link_leaves_the_latencies() -> None:
    fast = H100._replace(inside=Link(0.0, math.inf), between=Link(0.0, math.inf), tree=(0.0, 0.0))
    row = model.train_step("data", 512, 128, COMPUTE, fast, math.inf)
    assert row.exposed == pytest.approx(links.START.value)  # the last bucket's
    assert row.compute == pytest.approx(COMPUTE.seconds)


def test_gradients_of_the_linear_layers_hide_behind_the_convolutions() -> None:
    """At 8 GPUs fc6's all-reduce ends before conv1's gradient is there; without overlap all of it would be exposed."""
    row = model.train_step("data", 8, 128, COMPUTE, H100, math.inf)
    (gradients,) = volume.exchanged(volume.Plan(model.CONFIG, "data", 8, 1024, 2, 2))
    assert row.megabytes_sent == gradients.backward / 1e6
    convolutions = sum(r.parameters for name, r in model.rows().items() if name.startswith("conv"))
    assert row.exposed == pytest.approx(model.all_reduce(2 * convolutions, 8, H100))
    assert row.exposed < gradients.backward / H100.inside.bandwidth / 4


@pytest.mark.parametrize(("layout", "gpus"), [("towers", 2), ("towers", 8), ("weird-trick", 8), ("weird-trick", 64)])
def test_exchanges_take_at_least_their_bytes(layout: str, gpus: int) -> None:
    row = model.train_step(layout, gpus, 128, COMPUTE, H100, math.inf)
    sent = volume.exchanged(volume.Plan(model.CONFIG, layout, gpus, 128 * gpus, 2, 2))
    activations = sum(r.forward + r.backward for r in sent if r.layer != "weights")
    assert row.exchanges > activations / H100.inside.bandwidth
    assert row.megabytes_sent == sum(r.forward + r.backward for r in sent) / 1e6
    held = volume.held(volume.Plan(model.CONFIG, layout, gpus, 128 * gpus, 2, 2)) / 60_965_224
    extra = COMPUTE.backward["fc8"] * 1.5 if layout == "towers" else 0  # fc8 of both halves of the images
    assert row.compute == pytest.approx(COMPUTE.seconds - COMPUTE.optimizer * (1 - held) + extra)


def test_a_slow_loader_is_what_limits() -> None:
    row = model.train_step("data", 8, 128, COMPUTE, H100, 1000.0)
    assert row.seconds == pytest.approx(0.128)
    with pytest.raises(ValueError, match="even number of ranks, got 3"):
        model.train_step("towers", 3, 128, COMPUTE, H100, math.inf)


def test_the_predicted_step_is_that_of_benchmarks_predict() -> None:
    found = model.predicted("h100", 128)
    _, seconds = model.step.predicted("training", 128, model.GPUS["h100"], model.producers())
    assert found.seconds == pytest.approx(seconds)
    assert list(found.backward) == list(COMPUTE.backward)
    half = found.scaled(seconds / 2, "measured")
    assert (half.seconds, half.how) == (pytest.approx(seconds / 2), "measured")


def test_records_name_what_they_lack() -> None:
    for found in records.compare():
        assert found.record.missing
        assert found.near == (0.75 <= found.minutes / found.record.minutes <= 1.25)


# ---- the commands


def test_the_fit_finds_the_link_again() -> None:
    for ranks in (2, 4):
        link = gloo.fit(ranks, {size: allreduce.ring_seconds(ranks, size, LINK) for size in gloo.FITTED})
        assert link == pytest.approx(LINK)


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--step-ms", "2.5", "--json", str(tmp_path / "a.json"), "--out", str(tmp_path / "a.png")]
    assert cluster.main(arguments) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    first = found["results"][0]
    assert (first["gpus"], first["how"]) == (1, "measured")
    assert first["seconds"] == pytest.approx(2.5e-3)
    assert {row["gpus"] for row in found["results"]} == set(report.GPUS)
    assert all(f"{row['images_per_second']:,}" in shown for row in found["results"])
    assert "one GPU's step is measured" in shown
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images 0: expected at least 1"),
        (["--step-ms", "nan"], "--step-ms nan: expected a positive number of milliseconds"),
        (["--out", "a.jpg"], "--out a.jpg: expected a name that ends in .png or .svg"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cluster.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_the_measurement_compares_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    gloo.main(worlds=(2,), rounds=1)
    shown = capsys.readouterr().out
    assert "gloo, 2 processes: a ring of" in shown
    for size in (*gloo.FITTED, *gloo.PREDICTED):
        assert f"{size:,} bytes" in shown
    assert shown.count("4 buckets, one each") == len(gloo.GAPS)
