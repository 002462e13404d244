"""Several ranks under gloo: a run is that of one rank up to the order of sums; they stop, fail and go on together."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from alexnet_ext import cli, models
from alexnet_ext._errors import CommandError
from alexnet_ext.parallel import ranks
from alexnet_ext.parallel.data import Place, SharedDropout, share
from alexnet_ext.training import checkpoint, runs
from alexnet_ext.training import run as running
from alexnet_ext.training import trainer as training
from alexnet_ext.training.evaluate import evaluate
from alexnet_ext.training.log import METRICS, read_metrics
from alexnet_ext.training.process import random_state, set_random_state
from tests.support import ROOT
from tests.training.test_runs import striped
from tests.training.test_training import SIZE, split

FORK = multiprocessing.get_context("fork")
IMAGES, CLASSES, HELD_OUT = 23, 3, 7
OPTIONS = ["--image-size", "67", "--batch-size", "5", "--lr", "0.003", "--quiet", "--device", "cpu"]
STORES: list[dist.TCPStore] = []
IMPORTED = ("torch._dynamo", "torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg")


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """fc6 and fc7 of 16 outputs."""
    monkeypatch.setattr(importlib.import_module("alexnet_ext.models.alexnet"), "HIDDEN", 16)
    for name in IMPORTED:  # what each process would otherwise import anew
        importlib.import_module(name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of images, one of them broken. The last batch of an epoch has one image more than a multiple of five."""
    root = tmp_path_factory.mktemp("ranks")
    striped(root / "data" / "train", IMAGES, CLASSES)
    striped(root / "data" / "val", HELD_OUT, CLASSES)
    (root / "data" / "train" / "kind 1" / "4.png").write_bytes(b"no image")
    return root / "data"


def started(work: Callable[[], int], size: int, errors: Path) -> list[Any]:
    """``size`` processes as torchrun starts them; they end with the exit code that ``work`` returns."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # torchrun's own, outlives the ranks
    STORES.append(store)

    def run(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ.update({name: str(value) for name, value in names.items()}, TORCHELASTIC_USE_AGENT_STORE="True")
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(store.port))
        torch.set_num_threads(1)
        with errors.with_suffix(f".{rank}").open("w") as stream:
            os.dup2(stream.fileno(), 2)
            with contextlib.redirect_stderr(stream):
                code = work()
        os._exit(code)

    processes: list[Any] = [FORK.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def ended(processes: list[Any], errors: Path) -> tuple[list[int], list[str]]:
    """Exit codes, and the lines that all of them have printed as errors."""
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "a rank waits for ever"
    texts = [errors.with_suffix(f".{rank}").read_text() for rank in range(len(processes))]
    return [process.exitcode for process in processes], [line for text in texts for line in text.splitlines()]


def trained(size: int, out: Path, *arguments: str) -> None:
    """``alexnet train`` by ``size`` ranks, to the end."""
    codes, lines = ended(started(lambda: cli.run_command(["train", *arguments, *OPTIONS]), size, out), out)
    assert codes == [0] * size, lines
    assert not lines


def once(path: Path, text: str) -> None:
    """Wait until a file has this text."""
    for _ in range(1200):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{text} is not in {path}")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read_weights(checkpoint.newest(run, pytest.fail) / checkpoint.WEIGHTS)[1]


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Equal up to the order of sums, over some steps of training."""
    return all(
        float((found[name] - value).abs().max()) <= 1e-5 * float(value.abs().max()) for name, value in expected.items()
    )


def measured(run: Path) -> list[tuple[Any, ...]]:
    lines = [line for line in read_metrics(run / METRICS) if line["kind"] != "span"]
    return [(line["kind"], line["step"], round(line["loss"], 4), line.get("images")) for line in lines]


def test_a_run_does_not_depend_on_the_number_of_ranks(data: Path, tmp_path: Path) -> None:
    """Uneven batches, one of them smaller than the number of ranks; a broken image; dropout; resumed by other ranks."""
    options = [str(data), "--dropout", "0.5", "--evaluate-every", "3", "--save-every", "3"]
    for size in (1, 2, 4):
        trained(size, tmp_path / str(size), *options, "--steps", "10", "--out", str(tmp_path / str(size)))
    one, *others = (tmp_path / str(size) for size in (1, 2, 4))
    assert [line[:2] for line in measured(one)].count(("train", 10)) == 1
    for other in others:
        assert close(weights(other), weights(one)), other
        assert measured(other) == measured(one), other
        assert json.loads((other / runs.RESULT).read_text())["skipped"] == 1, "by whichever rank it was read"
    for first, then in ((2, 1), (1, 4), (2, 2)):
        out = tmp_path / f"{first} then {then}"
        trained(first, out, *options, "--steps", "6", "--schedule", "constant", "--out", str(out))
        trained(then, out, "--resume", str(out), "--steps", "10")
    trained(2, tmp_path / "straight", *options, "--steps", "10", "--schedule", "constant", "--out", str(tmp_path / "s"))
    straight = weights(tmp_path / "s")
    assert close(weights(tmp_path / "2 then 1"), straight)
    assert close(weights(tmp_path / "1 then 4"), straight)
    same = weights(tmp_path / "2 then 2")
    assert all(torch.equal(same[name], value) for name, value in straight.items())


def endless(data: Path, out: Path) -> Callable[[], int]:
    arguments = ["train", str(data), *OPTIONS, "--steps", "100000", "--out", str(out)]
    return lambda: cli.run_command(arguments)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = started(endless(data, out), 2, tmp_path / "errors")
    once(out / METRICS, '"step": 2')
    os.kill(processes[1].pid, signal.SIGUSR1)
    codes, lines = ended(processes, tmp_path / "errors")
    assert codes == [130, 130]
    assert len(lines) == 1, lines
    step = checkpoint.generations(out)[0].name
    assert f"saved in {out}/checkpoints/{step}" in lines[0]
    assert checkpoint.damage(checkpoint.generations(out)[0]) is None


@pytest.mark.parametrize("dying", [0, 2])
def test_a_rank_that_dies_ends_the_others_with_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dying: int
) -> None:
    """torchrun ends the others by a signal, here in the moment when they look for what has happened."""
    right = ranks.Ranks.lost

    def signalled(own: ranks.Ranks) -> tuple[str, int]:
        os.kill(os.getpid(), signal.SIGTERM)
        return right(own)

    monkeypatch.setattr(ranks.Ranks, "lost", signalled)
    out = tmp_path / "run"
    processes = started(endless(data, out), 3, tmp_path / "errors")
    once(out / METRICS, '"step": 2')
    os.kill(processes[dying].pid, signal.SIGKILL)
    codes, lines = ended(processes, tmp_path / "errors")
    assert codes == [-signal.SIGKILL if rank == dying else 1 for rank in range(3)]
    assert lines == [f"alexnet: rank {dying} of 3 (process {processes[dying].pid}) has died; the others end, too"]


def test_a_signal_to_one_rank_before_the_training_ends_all_with_one_code(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = running.open_split

    def signalled(*given: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return right(*given)

    monkeypatch.setattr(running, "open_split", signalled)
    codes, lines = ended(started(endless(data, tmp_path / "run"), 2, tmp_path / "errors"), tmp_path / "errors")
    assert codes == [130, 130]
    assert lines == ["alexnet: stopped"]


def test_a_loss_that_is_no_number_ends_all_with_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a checkpoint is being written: the rank that writes it knows that it becomes the last good one."""
    save, step = checkpoint.save, training.TrainingStep.__call__

    def late(*given: Any, **rest: Any) -> Path:
        time.sleep(0.5)
        return save(*given, **rest)

    def diverged(own: Any, *given: Any) -> Any:
        taken = step(own, *given)
        return taken._replace(loss=taken.loss * math.nan) if own.number == 3 else taken

    monkeypatch.setattr(checkpoint, "save", late)
    monkeypatch.setattr(training.TrainingStep, "__call__", diverged)
    arguments = ["train", str(data), *OPTIONS, "--steps", "9", "--save-every", "2", "--out", str(tmp_path / "run")]
    codes, lines = ended(started(lambda: cli.run_command(arguments), 2, tmp_path / "errors"), tmp_path / "errors")
    assert codes == [1, 1]
    (line,) = lines
    assert line.endswith(f"(the last good checkpoint is {checkpoint.place(tmp_path / 'run', 2)})")


@pytest.mark.parametrize("during", ["a checkpoint", "a start"])
def test_an_error_of_one_rank_ends_all_with_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    def full(*_: Any) -> None:
        raise CommandError("the disk is full")

    failing = (checkpoint, "save") if during == "a checkpoint" else (training, "locked")
    monkeypatch.setattr(*failing, full)
    arguments = ["train", str(data), *OPTIONS, "--steps", "9", "--save-every", "2", "--out", str(tmp_path / "run")]
    codes, lines = ended(started(lambda: cli.run_command(arguments), 2, tmp_path / "errors"), tmp_path / "errors")
    assert codes == [1, 1]
    assert lines == ["alexnet: the disk is full"]


def test_gpus_starts_the_ranks_and_ends_them_with_its_own_signal(data: Path, tmp_path: Path) -> None:
    """The real command, in processes of its own: they take a second to import torch."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "alexnet_ext", "train", str(data), *OPTIONS, "--gpus", "2", "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--steps", "100000"], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    once(out / METRICS, '"step": 2')
    process.send_signal(signal.SIGUSR2)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert not printed
    first, second = errors.splitlines()
    assert first.startswith("alexnet: stopping after this step")
    assert second.startswith("alexnet: stopped at step")


def test_the_ranks_evaluate_each_image_once_and_all_know_the_result(tmp_path: Path) -> None:
    """109 images are three batches for two ranks."""
    held_out = split(held_out=109).held_out
    torch.manual_seed(0)
    model = models.alexnet(num_classes=3, image_size=SIZE, init="kaiming").eval()
    settings: dict[str, Any] = {"device": torch.device("cpu")}

    def work() -> int:
        expected = evaluate(model, held_out, split().preprocessing, **settings)
        with ranks.connected(torch.device("cpu")) as both:
            found = evaluate(model, held_out, split().preprocessing, ranks=both, **settings)
        columns = ("indices", "targets", "guesses", "probabilities", "truth")
        equal = all(torch.equal(getattr(found, name), getattr(expected, name)) for name in columns)
        return 0 if equal and found.loss == expected.loss and found.images == 109 else 1

    codes, lines = ended(started(work, 2, tmp_path / "errors"), tmp_path / "errors")
    assert codes == [0, 0], lines


@pytest.mark.parametrize("total", [0, 1, 2, 7, 8, 128])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_cover_a_batch_in_order_and_rank_0_has_the_most(total: int, size: int) -> None:
    shares = [share(total, rank, size) for rank in range(size)]
    assert [number for own in shares for number in own] == list(range(total))
    lengths = [len(own) for own in shares]
    assert max(lengths) - min(lengths) <= 1
    assert lengths[0] == max(lengths)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_of_a_share_is_that_of_the_whole_batch(p: float) -> None:
    x = torch.randn(7, 16)
    torch.manual_seed(1)
    expected = F.dropout(x, p)
    found = []
    for first, last in ((0, 3), (3, 3), (3, 7)):
        torch.manual_seed(1)
        dropout = SharedDropout(p, 16)
        dropout.begin(Place(first, 7))
        found.append(dropout(x[first:last]))
    assert torch.equal(torch.cat(found), expected)
    assert dropout.eval()(x) is x


def test_all_ranks_go_on_from_the_random_state_of_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a GPU of its own; what rank 0 saves of the others is how they began."""
    restored: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["used", "unused"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    set_random_state(random_state(), many=True)
    set_random_state(random_state())
    assert restored == ["used", ["used", "unused"]]


def test_more_processes_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(ranks, "local", lambda: (1, 2))
    with pytest.raises(CommandError, match=r"^2 ranks on this machine: torch sees 1 GPUs$"):
        ranks.own_device(torch.device("cuda"))
    with pytest.raises(CommandError, match=r"^--device cuda:0: expected cuda, as each of 2 ranks takes"):
        ranks.own_device(torch.device("cuda:0"))
    assert ranks.own_device(torch.device("cpu")) == torch.device("cpu")
