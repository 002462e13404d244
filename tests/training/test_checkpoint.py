"""Checkpoints: whole or absent, checked before anything is loaded, safe to read from any source."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from alexnet_ext import models
from alexnet_ext.data import CommandError, Preprocessing
from alexnet_ext.training import checkpoint
from alexnet_ext.training.checkpoint import RECORD, STATE, WEIGHTS, Description
from alexnet_ext.training.files import locked, write_file

CONFIG = models.AlexNetConfig("paper", 2, 67, 0.5)
DESCRIPTION = Description(CONFIG, ("cat", "dog"), Preprocessing(67, 76, (0.5,) * 3, (0.25,) * 3), "digits", 1)


def small(value: float, count: int = 500_000) -> nn.Module:
    """A model of 2 MB whose weights all are ``value``."""
    model = nn.Linear(count, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def save(run: Path, step: int, count: int = 500_000) -> Path:
    """A generation whose weights and state both record its step."""
    state = {"step": step, "filled": torch.full((count,), float(step))}
    return checkpoint.save(run, small(step, count), replace(DESCRIPTION, step=step), state)


def step_of(path: Path) -> int:
    """The step of a generation, the same in all its files."""
    state = checkpoint.read_state(path / STATE)
    weights = load_file(path / WEIGHTS)["weight"]
    assert (weights == state["step"]).all()
    assert (state["filled"] == state["step"]).all()
    return state["step"]


def silent(text: str) -> None:
    raise AssertionError(f"warned: {text}")


def left_over(run: Path) -> list[Path]:
    return list(run.glob("**/*tmp*"))


def test_the_last_two_generations_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert [step_of(path) for path in checkpoint.generations(tmp_path)] == [10, 2]
    assert checkpoint.newest(tmp_path, silent) == checkpoint.generations(tmp_path)[0]
    assert not left_over(tmp_path)


def test_saving_a_step_again_keeps_the_good_one_and_replaces_the_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    before = (path / STATE).stat().st_mtime_ns
    assert save(tmp_path, 3) == path
    assert (path / STATE).stat().st_mtime_ns == before
    os.truncate(path / STATE, 1000)
    save(tmp_path, 3)
    assert step_of(path) == 3


@pytest.mark.parametrize("name", [WEIGHTS, STATE])
@pytest.mark.parametrize("how", ["cut", "flipped", "missing", "empty"])
def test_damage_is_told_and_the_generation_before_serves(tmp_path: Path, name: str, how: str) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if how == "flipped":  # one bit in the middle of the numbers, where no parser would notice
        content[len(content) // 2] ^= 1
    file.unlink()
    if how != "missing":
        file.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "empty": b""}[how])
    told: list[str] = []
    assert step_of(checkpoint.newest(tmp_path, told.append)) == 1
    assert len(told) == 1
    assert str(file) in told[0]
    shutil.rmtree(checkpoint.generations(tmp_path)[1])
    with pytest.raises(CommandError, match=name) as caught:
        checkpoint.newest(tmp_path, silent)
    assert caught.value.code == 1


def test_damaged_record(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for text in ("", "{", "[]", '{"files": {}}'):
        (path / RECORD).write_text(text)
        with pytest.raises(CommandError, match=RECORD):
            checkpoint.newest(tmp_path, silent)


def test_no_checkpoint_and_no_folder(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "no checkpoint"), (tmp_path / "missing", "no such file")):
        with pytest.raises(CommandError, match=words) as caught:
            checkpoint.find_weights(path, silent)
        assert str(path) in str(caught.value)
        assert caught.value.code == 2


def _save_forever(run: Path) -> None:
    torch.set_num_threads(1)
    for step in range(1, 10_000):
        save(run, step, 300_000)


def test_killed_at_any_moment_a_whole_checkpoint_is_there(tmp_path: Path) -> None:
    chance = random.Random(0)
    context = multiprocessing.get_context("fork")
    reached, last = set(), 0
    for _ in range(12):
        writer = context.Process(target=_save_forever, args=(tmp_path,))
        writer.start()
        deadline = time.monotonic() + 20
        # After the first rename, at a different moment each time.
        while not checkpoint.generations(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.15))
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        last = step_of(checkpoint.newest(tmp_path, silent))
        reached.add(last)
        if chance.random() < 0.5:  # the next writer starts afresh, next to this one's unfinished folder
            for path in checkpoint.generations(tmp_path):
                shutil.rmtree(path)
    assert len(reached) > 1, "the writer was killed at different steps"
    for path in checkpoint.generations(tmp_path):
        shutil.rmtree(path)
    save(tmp_path, 1)
    assert not left_over(tmp_path)


def full_disk_by_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fail)


def full_disk_by_limit(_monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel lets no file grow past 1 MB: torch's and safetensors' writers fail, not Python."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("fill", "words"), [(full_disk_by_fsync, "No space left on device"), (full_disk_by_limit, "File too large")]
)
@pytest.mark.usefixtures("file_size_limit")
def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[pytest.MonkeyPatch], None], words: str
) -> None:
    save(tmp_path, 1)
    fill(monkeypatch)
    with pytest.raises(CommandError, match=words) as caught:
        save(tmp_path, 2)
    assert caught.value.code == 1
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(CommandError, match=words):
        write_file(tmp_path / "recipe.json", b"x" * 2_000_000)
    assert step_of(checkpoint.newest(tmp_path, silent)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert not left_over(tmp_path)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 5 MB, if this process may mount one."""
    path = tmp_path / "small"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root; the test above covers the same with a limit")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("count", [500_000, 700_000], ids=["state", "weights"])
def test_a_file_system_that_fills_up(full_disk: Path, count: int) -> None:
    save(full_disk, 1, 100_000)
    with pytest.raises(CommandError, match="No space left on device"):
        save(full_disk, 2, count * 2)
    assert step_of(checkpoint.newest(full_disk, silent)) == 1
    assert not left_over(full_disk)


def test_a_run_folder_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(CommandError, match="another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of a whole small network."""
    run = tmp_path_factory.mktemp("run")
    model = models.alexnet("paper", num_classes=2, image_size=67, init="kaiming")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return checkpoint.save(run, model, DESCRIPTION, {"step": 1}) / WEIGHTS


def test_weights_come_back_bit_for_bit_fused_and_stock(weights: Path) -> None:
    saved = load_file(weights)
    for fused in (True, False):
        model, description = checkpoint.load_model(weights, "paper", fused)
        assert description == DESCRIPTION
        assert model.fused is fused
        state = model.state_dict()
        assert state.keys() == saved.keys()
        assert all(torch.equal(state[name], saved[name]) for name in saved)
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert weights.stat().st_mode == (weights.parent / RECORD).stat().st_mode, "whoever reads the one reads the other"
    assert checkpoint.find_weights(weights.parent, silent) == weights
    assert checkpoint.find_weights(weights.parent.parent.parent, silent) == weights


def test_weights_of_another_variant_are_refused(weights: Path) -> None:
    with pytest.raises(CommandError, match=r"variant 'paper', not 'caffe'") as caught:
        checkpoint.load_model(weights, "caffe", fused=True)
    assert str(weights) in str(caught.value)


def rewrite(weights: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], Any], header: str | None) -> Path:
    """The first weights with a changed set of tensors: all small, as only names, shapes and types are checked."""
    tensors = {name: torch.zeros(()).expand(value.shape) for name, value in load_file(weights).items()}
    change(tensors)
    small_ones = {
        name: value if value.numel() < 1000 else value.flatten()[:1].clone() for name, value in tensors.items()
    }
    save_file(
        {n: v.contiguous() for n, v in small_ones.items()}, out, metadata={"alexnet_ext": header} if header else None
    )
    return out


def test_a_file_that_does_not_fit_is_refused_before_a_tensor_is_read(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = DESCRIPTION.to_json()
    other = json.loads(good)
    other["config"]["num_classes"] = 10**12
    other["classes"] = ["x"]
    no_step, side, deep = json.loads(good) | {"step": math.inf}, json.loads(good), "[" * 100_000
    side["preprocessing"] |= {"size": 60}
    unknown = json.loads(good) | {"config": {"variant": "vgg", "num_classes": 2, "image_size": 67, "dropout": 0.5}}
    cases: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str | None, str]] = [
        (lambda t: t.pop("features.conv1.bias"), good, "lacks features.conv1.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), good, "has unknown extra"),
        (lambda t: t.update({"features.conv1.weight": torch.zeros(2, 2)}), good, "expected \\[96, 3, 11, 11\\]"),
        (lambda t: t.update({"features.conv1.bias": torch.zeros(96, dtype=torch.int32)}), good, "of type I32|is \\["),
        (lambda t: None, None, "not written by alexnet_ext"),
        (lambda t: None, "{", "does not describe a network"),
        (lambda t: None, "[]", "does not describe a network"),
        (lambda t: None, deep, "does not describe a network"),
        (lambda t: None, json.dumps(no_step), "does not describe a network"),
        (lambda t: None, json.dumps(side), "does not describe a network .images of side 60 for a network of 67"),
        (lambda t: None, json.dumps(other), "does not describe a network"),
        (lambda t: None, json.dumps(unknown), "does not describe a network .*vgg"),
    ]
    for change, header, words in cases:
        path = rewrite(weights, tmp_path / "w.safetensors", change, header)
        with pytest.raises(CommandError, match=words) as caught:
            checkpoint.read_weights(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_truncated_weights_name_the_file(weights: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(CommandError, match="damaged") as caught:
        checkpoint.load_model(path, None, fused=True)
    assert str(path) in str(caught.value)


class Payload:
    """The effect of opening a hostile pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_state_that_runs_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"optimizer": Payload(mark)}, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Payload(mark)))
    torch.save([1, 2], tmp_path / "list.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    for name in ("zip.pt", "pickle.pt", "list.pt", "bomb.pt"):
        with pytest.raises(CommandError, match=name) as caught:
            checkpoint.read_state(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_an_optimizer_of_other_shapes_is_refused() -> None:
    def stepped(width: int) -> torch.optim.SGD:
        model = nn.Linear(width, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model(torch.ones(1, width)).sum().backward()
        optimizer.step()
        return optimizer

    good, other = stepped(3).state_dict(), stepped(4).state_dict()
    checkpoint.check_optimizer(Path("a"), good, stepped(3))
    wide = {**good, "state": {**good["state"], 0: {"momentum_buffer": torch.zeros(1).expand(2, 3_000_000_000)}}}
    fewer = {**good, "param_groups": [{**good["param_groups"][0], "params": [0]}]}
    for state in (other, wide, fewer, {}, {"state": {7: {"x": torch.zeros(1)}}, "param_groups": good["param_groups"]}):
        with pytest.raises(CommandError, match="does not fit"):
            checkpoint.check_optimizer(Path("a"), state, stepped(3))
