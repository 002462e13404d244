"""What one sees of a run: spans, TensorBoard, a profile, a divergence that names what is kept; and ``--compile``."""

from __future__ import annotations

import io
import json
import math
import mmap
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from alexnet_ext import cli
from alexnet_ext.data import CommandError
from alexnet_ext.training import checkpoint, profile
from alexnet_ext.training.interrupt import Interrupted
from alexnet_ext.training.log import Log, read_metrics
from alexnet_ext.training.process import memory
from alexnet_ext.training.profile import TRACE, profiled
from alexnet_ext.training.progress import Reporter
from alexnet_ext.training.recipe import PRECISION
from alexnet_ext.training.trainer import Means, Trainer
from tests.cli.test_cli import SMALL
from tests.training.test_step import CPU, PREPROCESSING, batch, network, step_of
from tests.training.test_training import SIZE, TINY, reporter, resumed, split, trainer


def test_metrics_say_what_took_the_time(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", replace(TINY, save_every=4))
    run.run(reporter())
    spans = [line for line in read_metrics(run.out / "metrics.jsonl") if line["kind"] == "span"]
    at = {
        name: [line["step"] for line in spans if line["name"] == name] for name in ("data", "step", "evaluate", "save")
    }
    assert at == {"data": [1, 2, 3, 4, 5, 6], "step": [1, 2, 3, 4, 5, 6], "evaluate": [3, 6], "save": [4, 6]}
    assert all(line["seconds"] >= 0 for line in spans)
    assert sum(line["seconds"] for line in spans if line["name"] in ("data", "step")) == pytest.approx(run.seconds)


def test_the_wait_for_data_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, text = trainer(tmp_path / "run"), io.StringIO()
    right = run._loader

    def slow(*given: Any) -> Any:
        for found in right(*given):
            torch.randn(1_500, 1_500) @ torch.randn(1_500, 1_500)
            yield found

    monkeypatch.setattr(run, "_loader", slow)
    lines = reporter(text)
    lines.total = 6
    run.run(lines)
    (waiting,) = re.findall(r"step 6/6 .* data +(\d+)%  [\d.]+ GiB", text.getvalue())
    assert int(waiting) >= 10


def test_reporter_prints_lines_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    with Reporter(4, 2, Console(file=text, width=200)) as lines:
        lines.step(3, 0.5, 0.25, 12.3, 0.02, 3 << 29)
        lines.evaluating(1, 2)
        lines.evaluating(2, 2)
        lines.step(4, 0.5, 0.25, 12_345.6, 0.02, 3 << 29)
    line = "step 4/4  loss  0.500  accuracy  25.0%  12,345.6 images/s  data   2%  1.5 GiB  0:00 left"
    assert text.getvalue().splitlines() == [line]


def test_reporter_draws_a_bar_on_a_terminal() -> None:
    text = io.StringIO()
    with Reporter(4, 0, Console(file=text, width=140, force_terminal=True)) as bar:
        bar.step(2, 0.5, 0.25, 12.3, 0.02, 3 << 29)
        bar.evaluating(50, 100)
    for words in (
        "train",
        "2/4",
        "loss  0.500",
        "25.0%",
        "12.3 images/s",
        "data   2%",
        "1.5 GiB",
        "left",
        "evaluate",
        "50/100",
    ):
        assert words in text.getvalue()


def test_memory_is_that_of_this_process() -> None:
    size = 64 << 20
    before = memory(CPU)
    with mmap.mmap(-1, size) as held:  # not malloc's, which may have kept as much from before
        held.write(bytes(range(256)) * (size // 256))
        assert 0.9 * size < memory(CPU) - before


def test_tensorboard_has_the_kernels_and_the_hyperparameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    weight = torch.zeros(20, 3, 2, 2)
    weight[17, 0] = 1.0
    with Log(tmp_path) as log:
        log.describe({"lr": 0.01, "model": "paper", "val": None, "data": "caf\udce9"})
        log.kernels(weight, 3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images("conv1")
    assert (image.step, image.height, image.width) == (3, 6, 48)
    from PIL import Image

    with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
        red = [(x, y) for x in range(48) for y in range(6) if picture.getpixel((x, y)) == (255, 0, 0)]
    assert red == [(3, 3), (3, 4), (4, 3), (4, 4)], "the second of the second row"
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert all(word in content for word in (b"paper", b"None", b"lr", b"caf"))


def test_log_drops_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    with Log(tmp_path) as log:
        for step in (1, 2, 3):
            log.write("train", step, {"loss": 1.0 / step})
            log.write("evaluate", step, {"top1": 0.5})
            log.span("evaluate", step, 0.5)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')  # the line that a crash cut short
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 9
    with Log(tmp_path, step=2, evaluated=1) as log:
        log.write("train", 3, {"loss": math.nan})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 1),
        ("evaluate", 1),
        ("span", 1),
        ("train", 2),
        ("train", 3),
    ]
    assert losses_in_events(tmp_path) == [1, 2]


def losses_in_events(run: Path) -> list[int]:
    """The steps of the losses that TensorBoard shows. It reads files by their names, which begin with the second: of
    one second, the tenth file of a process comes before the ninth. So they are named by the time of their content."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in run.glob("events.out.tfevents.*"):
        seconds = path.stat().st_mtime_ns
        path.rename(run / f"events.out.tfevents.{seconds:020d}.test")
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")] if "train/loss" in events.Tags()["scalars"] else []


def test_a_run_begun_anew_shows_nothing_of_the_killed_one(tmp_path: Path) -> None:
    for steps in ((0, 1, 2), (1,)):
        with Log(tmp_path) as log:
            for step in steps:
                log.write("train", step, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
    assert losses_in_events(tmp_path) == [1]


def test_a_profile_is_a_chrome_trace_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "WARM_UP", 2)
    text = io.StringIO()
    run = Trainer(TINY, split(), tmp_path, Means(CPU, profile=2))
    run.run(reporter(text))
    assert f"Profile of 2 steps after this process's first 2: {tmp_path / TRACE}" in text.getvalue()
    names = [event.get("name", "") for event in json.loads((tmp_path / TRACE).read_text())["traceEvents"]]
    assert sum(name.startswith("ProfilerStep") for name in names) >= 2
    assert any("conv" in name for name in names)
    assert not list(tmp_path.glob(".*.tmp*"))


def test_a_profile_that_the_run_cuts_short_counts_its_steps(tmp_path: Path) -> None:
    notes: list[str] = []
    with profiled(tmp_path, 50, notes.append) as stepped:
        for _ in range(profile.WARM_UP + 3):
            stepped()
    assert [note.partition(":")[0] for note in notes] == ["Profile of 3 steps after this process's first 10"]
    assert (tmp_path / TRACE).exists()


@pytest.mark.parametrize("steps", [1, profile.WARM_UP])
def test_a_run_too_short_for_a_profile_says_so(tmp_path: Path, steps: int) -> None:
    notes: list[str] = []
    with profiled(tmp_path, 5, notes.append) as stepped:
        for _ in range(steps):
            stepped()
    assert notes == ["No profile: this run ended before its step 11"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save_every", [0, 1])
def test_a_run_that_diverges_names_the_last_good_checkpoint(tmp_path: Path, save_every: int) -> None:
    run = trainer(tmp_path / "run", replace(TINY, save_every=save_every, steps=6, schedule="constant", warmup=0))
    rate = run.schedule.rate
    run.schedule.rate = lambda step: rate(step) if step < 2 else 1e30  # type: ignore[method-assign]
    kept = checkpoint.CHECKPOINTS + "/step-00000002" if save_every else "there is no checkpoint yet"
    with pytest.raises(
        CommandError, match=r"the loss is (nan|inf) at step 3; try a lower --lr.*--detect-nan"
    ) as caught:
        run.run(reporter())
    assert kept in str(caught.value)
    assert caught.value.code == 1
    if save_every:
        path = checkpoint.newest(run.out, lambda text: pytest.fail(text))
        weights = checkpoint.read_weights(path / checkpoint.WEIGHTS)[1]
        assert path.name == "step-00000002"
        assert all(weight.isfinite().all() for weight in weights.values())


def test_a_divergence_names_a_checkpoint_that_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer may still write it, or remove it; what it fails at does not hide the divergence."""
    run = trainer(tmp_path / "run")
    save = checkpoint.save

    def slow(*given: Any) -> None:
        time.sleep(0.5)
        save(*given)
        raise CommandError("the disk is full")

    monkeypatch.setattr(checkpoint, "save", slow)
    path = run.save()
    with pytest.raises(CommandError, match="the loss is nan at step 1") as caught:
        run._check_finite(math.nan, 1)
    assert f"the last good checkpoint is {path}" in str(caught.value)


def test_a_resumed_run_does_not_save_what_it_was_loaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(TINY, save_every=2, steps=5)
    with pytest.raises(Interrupted):
        trainer(tmp_path / "run", recipe).run(reporter(), stop_at=2)
    again, saved = resumed(tmp_path / "run", recipe), []
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *given: (saved.append(given[2].step), save(*given)))
    again.run(reporter())
    assert saved == [4, 5]


def test_full_batches_go_through_the_compiled_network(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def compile(model: Any, **_: Any) -> Any:
        def run(images: Tensor) -> Tensor:
            compiled.append(len(images))
            return model(images)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    recipe = replace(TINY, compile=True, dropout=0.0)
    taking, plain = step_of(recipe), step_of(replace(recipe, compile=False))
    for count in (2, 1, 2):
        for one in (taking, plain):
            one([batch(count)], PREPROCESSING, 0.01)
    assert taking.last_loss() == plain.last_loss()
    assert compiled == [2, 2], "neither the smaller batch nor the loss after the last step"
    taking.pieces = 2  # as memory for one image at a time makes it
    taking([batch(2)], PREPROCESSING, 0.01)
    assert compiled[2:] == [1, 1]
    watched = step_of(recipe, detect_nan=True)
    watched([batch(2)], PREPROCESSING, 0.01)
    assert len(compiled) == 4, "--detect-nan looks at each operation"


def test_dynamo_takes_the_network_whole() -> None:
    """What --compile hands to a compiler, without one: no break in the graph, and the same scores."""
    model = network().eval()
    whole = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(whole(x), model(x))


def test_the_precision_of_a_new_run_is_the_devices_and_is_recorded(tmp_path: Path) -> None:
    assert PRECISION == {"cuda": "bf16", "cpu": "fp32"}
    out = tmp_path / "run"
    options = ["--data", "synthetic", "--steps", "1", "--batch-size", "2", "--device", "cpu", "--quiet"]
    assert cli.run_command(["train", *SMALL, *options, "--out", str(out)]) == 0
    assert json.loads((out / "recipe.json").read_text())["precision"] == "fp32"
    assert math.isfinite(json.loads((out / "result.json").read_text())["loss"])
