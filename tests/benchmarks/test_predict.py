"""benchmarks.predict without a compiler: the model's limits, the gates, the traced step, what the command writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predict import __main__ as predict
from benchmarks.predict import convolutions, count, fit, gates, gpus, kernels, report, step
from benchmarks.predict.gpus import GPUS, LIKELY
from tests.support import specs

H100 = GPUS["h100"]
COMMITTED = json.loads(kernels.COUNTS.read_text(encoding="utf-8"))
GIGABYTE = 1_000_000_000
# Bound by memory, by a wide margin, in a grid of many waves.
LAUNCH: dict[str, Any] = {
    "kernel": "kernel", "blocks": 528 * 40, "persistent": False, "threads": 256, "registers": 32, "shared": 0,
    "instructions": 10_000_000, "clocks_alone": 10_000_000, "turns": 100, "ideal_turns": 100,
    "dram_bytes": GIGABYTE, "block_bytes": GIGABYTE, "kinds": {"integer": 1.0},
}  # fmt: skip
ROW = {"floor_bytes": GIGABYTE, "launches": [LAUNCH]}


def changed(**values: Any) -> dict[str, Any]:
    return {"floor_bytes": GIGABYTE, "launches": [LAUNCH | values]}


# ---- the model


@pytest.mark.parametrize(
    ("limit", "values", "seconds"),
    [
        ("memory", {}, GIGABYTE / (0.95 * 3.0e12)),
        ("issue", {"instructions": 10**9}, 10**9 / (0.80 * 132 * 4 * 1.755e9)),
        ("shared", {"turns": 10**9}, 10**9 / (132 * 1.755e9)),
        ("latency", {"clocks_alone": 10**11}, 10**11 / (132 * 64 * 1.755e9)),
    ],
)
def test_the_largest_limit_is_the_time(limit: str, values: dict[str, Any], seconds: float) -> None:
    time = kernels.time_of(LAUNCH | values, H100)
    assert time.binds == limit
    assert time.total == pytest.approx(seconds, rel=1e-3, abs=0)


@pytest.mark.parametrize(
    ("values", "blocks"),
    [
        ({}, 8),  # threads
        ({"registers": 64}, 4),
        ({"registers": 65}, 3),  # given in 256 a warp: 72
        ({"shared": 100 * 1024}, 2),
        ({"registers": 255, "threads": 1024}, 1),
    ],
)
def test_how_many_blocks_fit(values: dict[str, Any], blocks: int) -> None:
    assert kernels.resident(LAUNCH | values, H100) == blocks


def test_a_few_blocks_too_many_run_alone() -> None:
    grid = {"persistent": True, "registers": 64, "clocks_alone": 10**9}
    full, more = (kernels.time_of(LAUNCH | grid | {"blocks": blocks}, H100) for blocks in (528, 544))
    assert full.tail == 0
    assert more.tail > 0.9 * 10**9 / 544 / 8 / 1.755e9


def test_a_larger_batch_has_more_blocks_or_longer_ones() -> None:
    for persistent, blocks in ((False, 528 * 40), (True, 528)):
        launch = LAUNCH | {"persistent": persistent, "blocks": blocks}
        once, eight = (kernels.time_of(launch, H100, LIKELY, batches) for batches in (1, 8))
        assert eight.memory == pytest.approx(8 * once.memory)
        assert eight.issue == pytest.approx(8 * once.issue)


def test_constants_stand_once_each_with_a_reason_and_a_range() -> None:
    for name, constant in gpus.CONSTANTS.items():
        assert constant.low < constant.value < constant.high
        assert len(constant.reason.split()) > 4
        assert getattr(LIKELY, name.lower()) == constant.value
    assert [name.lower() for name in gpus.CONSTANTS] == list(vars(LIKELY))
    assert gpus.SLOW.gap > LIKELY.gap > gpus.FAST.gap
    assert gpus.SLOW.issue < LIKELY.issue < gpus.FAST.issue


# ---- gates


def one(row: dict[str, Any], **held: Any) -> list[str]:
    name = "relu_max_pool2d forward 128x256x13x13 bfloat16 channels_last native"
    return list(gates.faults(name, row, {"held": [], "rows": {name: row}} | held))


def test_a_kernel_at_its_floor_passes() -> None:
    assert one(ROW) == []


@pytest.mark.parametrize(
    ("gate", "values"),
    [
        ("dram", {"dram_bytes": 1.06 * GIGABYTE}),
        ("blocks", {"block_bytes": 1.31 * GIGABYTE}),
        ("turns", {"turns": 106}),
        ("grid", {"persistent": True, "blocks": 529, "registers": 64}),
        ("copy on h100", {"instructions": 300_000_000}),
        ("copy on h200", {"instructions": 220_000_000}),
    ],
)
def test_each_planted_slow_down_is_noticed(gate: str, values: dict[str, Any]) -> None:
    """A re-read by the launch or by its blocks, a bank conflict, a block too many, a longer path of instructions."""
    said = one(changed(**values))
    assert any(f"({gate})" in sentence for sentence in said), said


def test_a_kernel_may_not_grow_slower_than_it_was() -> None:
    name = "relu_max_pool2d forward 128x256x13x13 bfloat16 channels_last native"
    slower = changed(dram_bytes=1.03 * GIGABYTE)
    (said,) = gates.faults(name, slower, {"held": [], "rows": {name: ROW}})
    assert "at most 1.02 times" in said
    (said,) = gates.faults(name, ROW, {"held": [], "rows": {}})
    assert "--renew" in said


def test_an_exception_holds_its_rows_at_its_number_and_is_needed() -> None:
    slow = changed(dram_bytes=1.2 * GIGABYTE)
    name = "relu_max_pool2d forward 128x256x13x13 bfloat16 channels_last native"
    held = [{"gate": "dram", "rows": ["relu_max_pool2d *"], "at": 1.21, "why": "a test"}]
    assert not any("(dram)" in said for said in one(slow, held=held))
    assert any("(dram)" in said for said in one(changed(dram_bytes=1.23 * GIGABYTE), held=held))
    assert list(gates.idle({"held": held, "rows": {name: slow}})) == []
    assert list(gates.idle({"held": held, "rows": {name: ROW}})) != []


def test_a_thread_that_loads_too_slowly_is_noticed() -> None:
    assert list(gates.producer_faults({"weight_gradient_sm90": 819})) == []
    assert list(gates.producer_faults({"weight_gradient_sm90": 820})) != []


def test_the_committed_counts_are_of_every_job_and_keep_to_the_gates() -> None:
    names = {job.work.name for job in count.jobs()}
    assert set(COMMITTED["rows"]) == names
    said = [sentence for name, row in COMMITTED["rows"].items() for sentence in gates.faults(name, row, COMMITTED)]
    said += [*gates.idle(COMMITTED), *gates.producer_faults(COMMITTED["producers"])]
    assert said == []
    assert all(len(exception["why"]) > 20 for exception in COMMITTED["held"])


def test_every_triton_kernel_of_the_path_has_a_row() -> None:
    """In bf16 and channels-last, after the row of its CUDA twin, whose bytes it moves."""
    names = [job.work.name for job in count.jobs()]
    twins = {name for name in names if name.endswith(" triton")}
    assert {name.split()[0] for name in twins} == set(specs.named("in_triton"))
    for name in twins:
        native = name.replace(" triton", " native")
        assert names[names.index(name) - 1] == native
        assert COMMITTED["rows"][name]["floor_bytes"] == COMMITTED["rows"][native]["floor_bytes"]
        kernels_of = [launch["kernel"] for launch in COMMITTED["rows"][name]["launches"]]
        assert set(kernels_of) <= set().union(*(specs.SPECS[op].triton_kernels for op in specs.named("in_triton")))


def test_a_triton_grid_that_shares_a_sum_does_not_grow_with_the_batch() -> None:
    name = "relu_lrn_max_pool2d backward 128x96x55x55 bfloat16 channels_last triton"
    (launch,) = COMMITTED["rows"][name]["launches"]
    assert launch["persistent"]
    once, eight = (kernels.time_of(launch, H100, LIKELY, batches) for batches in (1, 8))
    assert eight.issue == pytest.approx(8 * once.issue)
    assert eight.latency == pytest.approx(8 * once.latency)


def test_the_step_is_that_of_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    _, before = step.predicted("training", 128, H100, kernels.producers())
    native = {name: row for name, row in kernels.counts().items() if name.endswith(" native")}
    for module in (kernels, step):
        monkeypatch.setattr(module, "counts", lambda: native)
    assert step.predicted("training", 128, H100, kernels.producers())[1] == before


def test_every_op_that_memory_bounds_is_on_the_path_or_said_to_be_elsewhere() -> None:
    on_path = {name.split()[0] for name in COMMITTED["rows"] if gates.on_path(name)}
    elsewhere = {"relu_max_pool2d_lrn"}  # CaffeNet's block
    assert on_path | elsewhere == {*specs.named("on_gpu", "not product"), "conv2d_bias_relu"}


# ---- the step


def test_the_traced_step_has_every_layer_once() -> None:
    names = [operation.name for operation in step.traced("training", 4)]
    assert names.count("conv2d_bias_relu") == names.count("conv2d_bias_relu_backward") == 5
    assert names.count("relu_lrn_max_pool2d") == names.count("relu_lrn_max_pool2d_backward") == 2
    assert names.count("relu_max_pool2d") == names.count("relu_max_pool2d_backward") == 1
    assert names.count("linear_bias_relu") == names.count("linear_bias_relu_backward") == 2
    assert names.count("addmm") == 1
    assert names.count("sgd_step") == 1
    # No cast of weights or gradients, no rewrite of images.
    moved = max(sum(t.bytes for t in o.outputs) for o in step.traced("training", 4) if o.name in step.COPIES)
    assert moved < 1_000_000


def test_a_layer_that_is_called_is_paid_for() -> None:
    parts, seconds = step.predicted("training", 128, H100, kernels.producers())
    whats = {part.what for part in parts}
    for name, _ in convolutions.layers(128):
        assert f"{name} forward" in whats
        assert f"{name} weight gradient" in whats
    assert "conv1 input gradient" not in whats
    assert seconds == pytest.approx(sum(part.seconds for part in parts))


def test_a_training_step_has_no_more_launches_than_it_had() -> None:
    parts, _ = step.predicted("training", 128, H100, kernels.producers())
    assert sum(part.launches for part in parts) <= 64


def test_a_gradient_in_another_memory_format_is_copied() -> None:
    costs = step.Costs(H100, 128, kernels.producers())
    contiguous, last = (
        step.Described((128, 256, 6, 6), stride, 128 * 9216 * 2) for stride in ((9216, 36, 6, 1), (9216, 1, 1536, 256))
    )
    copied, *rest = costs.brought(step.Operation("relu_max_pool2d_backward", (contiguous, last), (last,)))
    assert (copied.launches, rest) == (1, [])
    assert copied.seconds == pytest.approx(2 * contiguous.bytes / (0.33 * 0.95 * H100.copy))
    for operation in (("relu_max_pool2d_backward", (last, last)), ("relu_max_pool2d", (contiguous, last))):
        assert list(costs.brought(step.Operation(*operation, (last,)))) == []


def test_convolutions_cost_at_least_their_products() -> None:
    for name, layer in convolutions.layers(128):
        peak = 2 * H100.products * H100.multiprocessors * H100.clock
        for direction in convolutions.DIRECTIONS:
            for candidate, seconds in convolutions.candidates(layer, direction, H100, kernels.producers()).items():
                assert seconds > layer.operations / peak, (name, direction, candidate)


def test_layers_are_those_of_the_paper() -> None:
    operations = [layer.operations / 1e9 for _, layer in convolutions.layers(1)]
    assert operations == pytest.approx([0.2108, 0.4479, 0.2990, 0.2243, 0.1495], rel=1e-3)
    first = convolutions.layers(1)[0][1]
    assert (first.channels, first.taps, first.inputs, first.outputs) == (48, 9, 57 * 57, 55 * 55)


# ---- the command


def test_what_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "predicted.json", tmp_path / "predicted.png"
    words = ["--gpu", "h200", "--batch", "128", "--batch", "1024", "--json", str(file), "--picture", str(picture)]
    assert predict.main(words) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    for kind in ("training", "inference"):
        assert set(found[kind]) == {"128", "1024"}
        for row in found[kind].values():
            assert row["low"] < row["images_per_second"] < row["high"]
    assert [kernel["kernel"] for kernel in found["kernels"]] == list(COMMITTED["rows"])
    assert {kernel["kernel"].split()[-1] for kernel in found["kernels"]} == {"native", "triton"}
    assert found["predicted"] == "not measured on a GPU"
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{found['training']['128']['images_per_second']:,} images/s predicted" in printed
    assert "does not see" in printed


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_has_a_prediction(gpu: str) -> None:
    found = report.predictions(gpu, [128])
    assert 1_000 < found["training"]["128"]["images_per_second"] < 500_000


def test_a_faster_gpu_is_predicted_faster() -> None:
    slow = replace(H100, copy=H100.copy / 2, clock=H100.clock / 2)
    (_, before), (_, after) = (step.predicted("training", 128, gpu, kernels.producers()) for gpu in (H100, slow))
    assert after > 1.9 * before


def test_counts_are_written_whole_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "counts.json"
    predict.write(file, COMMITTED)
    assert json.loads(file.read_text(encoding="utf-8")) == COMMITTED
    assert [path.name for path in tmp_path.iterdir()] == ["counts.json"]


# ---- beside measured times


def as_if_measured(share: float, issue: float) -> list[fit.Measured]:
    """Times of kernels that reach these shares of a copy's rate and of all issue slots."""
    found = []
    for name, row in COMMITTED["rows"].items():
        op, direction, shape, *rest = name.split()
        if op in ("augment", "sgd_step", "conv2d_bias_relu") or rest[0] != "bfloat16" or rest[-1] != "native":
            continue
        copy = 1e3 * kernels.copy_time(row["floor_bytes"], H100)
        instructions = sum(launch["instructions"] for launch in row["launches"])
        bound = kernels.row_times(row, H100)[0].binds
        kernel = copy / share if bound == "memory" else 1e3 * instructions / (issue * H100.issue)
        words = (op, shape, rest[0], rest[1], direction)
        found.append(fit.Measured(" ".join(words), kernel, copy, row["floor_bytes"] / 1e6))
    return found


def test_constants_are_fitted_to_measured_times() -> None:
    compared = fit.compare(as_if_measured(0.9, 0.7), H100)
    assert len(compared) > 10
    constants = fit.fitted(compared)
    assert constants["COPY"][:2] == (0.95, pytest.approx(0.9))
    assert constants["ISSUE"][:2] == (0.80, pytest.approx(0.7))
    memory = [c for c in compared if c.limit == "memory" and "norm" in c.name and "channels_last" in c.name]
    assert all(c.ratio == pytest.approx(0.95 / 0.9, rel=0.02) for c in memory)


def test_another_batch_than_the_counted_one_is_compared_too() -> None:
    name = "local_response_norm 256x96x55x55 bfloat16 channels_last forward"
    (found,) = fit.compare([fit.Measured(name, 0.2, 0.1, 297.4), fit.Measured("unknown 1x2 float32", 1, 1, 1)], H100)
    counted = COMMITTED["rows"]["local_response_norm forward 128x96x55x55 bfloat16 channels_last native"]
    expected = 2e3 * kernels.total(kernels.row_times(counted, replace(H100, copy=2.974e12)))
    assert found.predicted == pytest.approx(expected, rel=0.02)
    assert found.ratio == pytest.approx(0.2 / found.predicted)


@pytest.mark.parametrize(
    ("device", "gpu"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("cpu", None)],
)
def test_a_device_is_known_by_its_name(device: str, gpu: str | None) -> None:
    assert fit.gpu_of(device) is (GPUS[gpu] if gpu else None)


@pytest.mark.parametrize("device", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_a_smaller_gpu_of_the_same_name_has_no_data_sheet(device: str) -> None:
    assert fit.gpu_of(device) is None


# ---- what a stranger may type


@pytest.mark.parametrize("batches", [("1", "4096"), ("4096", "1"), ("16", "256")])
def test_each_batch_has_its_own_parts(batches: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """A part that one batch lacks shifts no other: the table's numbers are those of the predictions."""
    assert predict.main([word for batch in batches for word in ("--batch", batch)]) == 0
    lines = capsys.readouterr().out.splitlines()
    title = next(n for n, line in enumerate(lines) if line.startswith("Predicted: inference"))
    (line,) = (line for line in lines[title:] if line.startswith(" conv1 forward"))
    found = report.predictions("h100", [int(batch) for batch in batches])["inference"]
    expected = [
        part["microseconds"] for one in found.values() for part in one["parts"] if part["part"] == "conv1 forward"
    ]
    assert [float(word) for word in line.split()[2:4]] == expected


@pytest.mark.parametrize("words", [["--picture", "a.foo"], ["--batch", "0"], ["--gpu", "voodoo"]])
def test_a_wrong_word_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        predict.main(words)
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main(["--batch", "128", "--json", str(tmp_path / "missing" / "x.json")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert predict.main(["--batch", "128", "--json", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


def test_sums_of_rows_do_not_grow_with_the_batch() -> None:
    launch = LAUNCH | {"kernel": "sum_rows_kernel<bf16, 8, 9>", "persistent": True, "blocks": 32}
    assert kernels.time_of(launch, H100, LIKELY, 8) == kernels.time_of(launch, H100)


def test_what_is_not_built_for_9_0_is_not_predicted_there() -> None:
    layer = convolutions.layers(128)[2][1]
    names = {gpu: set(convolutions.candidates(layer, "forward", GPUS[gpu], kernels.producers())) for gpu in GPUS}
    assert names["h100"] == names["h200"] == {"cutlass sm90", "triton"}
    assert names["a100"] == {"cutlass", "triton"}
