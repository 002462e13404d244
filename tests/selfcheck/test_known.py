"""What is known is of one identity, kept for the next process, and right whatever others write meanwhile."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import multiprocessing
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_ext import _library
from alexnet_ext.ops import _known
from alexnet_ext.ops._known import Known, Proof, Race, Unit

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
UNIT = Unit("relu_max_pool2d", "native", "float32", "contiguous")
KEY = str(UNIT)
PROVEN, REFUSED = Proof("proven"), Proof("refused", "wrong in a test")


@pytest.fixture(autouse=True)
def folder(known_files: Path) -> Path:
    """Where the files are."""
    return known_files


def remember(known: Known | None = None) -> Path:
    """Prove the unit and race a call, on the CPU; the file."""
    known = known or _known.on(CPU)
    known.add(proofs={KEY: PROVEN}, races={"call": Race.of("a", {"a": 1e-6, "b": 2e-6})})
    assert known.path is not None
    return known.path


def state(device: torch.device = CPU) -> str:
    return _known.on(device).proof(UNIT).state


# ---- identity


def test_it_is_kept_for_the_next_process() -> None:
    assert state() == "unknown"
    file = remember()
    _known.reopen()
    assert state() == "proven"
    assert _known.on(CPU).races["call"].microseconds == {"a": 1.0, "b": 2.0}
    assert _known.files() == [file]
    held = json.loads(file.read_text(encoding="utf-8"))
    assert held["identity"] == _known.identity(CPU)
    assert held["proofs"][KEY]["state"] == "proven"
    assert _known.on(CPU).proof(UNIT._replace(layout="strided")).state == "unknown"


class Gpu:
    """What PyTorch would say of the GPUs of this machine."""

    name, major, minor, multi_processor_count = "NVIDIA H100 80GB HBM3", 9, 0, 132


def replace_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str) -> None:
    """As if a file of the package had another content."""
    package = tmp_path / "package"
    for path in (*_library.FOLDER.glob("*.so"), *(_library.FOLDER / "ops").rglob("*.py")):
        copy = package / path.relative_to(_library.FOLDER)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (package / changed).parent.mkdir(parents=True, exist_ok=True)
    (package / changed).write_text("another")
    monkeypatch.setattr(_library, "FOLDER", package)


Change = Callable[[pytest.MonkeyPatch, Path], None]
CHANGES: dict[str, Change] = {
    "GPU": lambda patch, _: patch.setattr(Gpu, "name", "NVIDIA H100 PCIe"),
    "compute capability": lambda patch, _: patch.setattr(Gpu, "major", 10),
    "multiprocessors": lambda patch, _: patch.setattr(Gpu, "multi_processor_count", 114),
    "driver": lambda patch, _: patch.setattr(_known, "driver", functools.cache(lambda: "another")),
    "alexnet_ext": lambda patch, _: patch.setattr(_known, "__version__", "99.0"),
    "torch": lambda patch, _: patch.setattr(torch, "__version__", "99.0"),
    "triton": lambda patch, _: patch.setattr(_known.importlib.metadata, "version", lambda _: "99.0"),
    "cuDNN": lambda patch, _: patch.setattr(torch.backends.cudnn, "version", lambda: 99),
    "library": lambda patch, path: replace_library(patch, path, "libalexnet_ext_cuda.so"),
    "kernel sources": lambda patch, path: replace_library(patch, path, "ops/relu_max_pool2d/triton_kernels.py"),
    "a new kernel source": lambda patch, path: replace_library(patch, path, "ops/relu_max_pool2d/another.py"),
    "determinism": lambda patch, _: patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True),
    "cuDNN's determinism": lambda patch, _: patch.setattr(torch.backends.cudnn, "deterministic", True),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu)
    monkeypatch.setattr(_known, "driver", functools.cache(lambda: "NVRM 580.95"))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("what", CHANGES)
def test_what_differs_makes_all_unknown_again(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    remember(_known.on(GPU))
    with monkeypatch.context() as patch:
        CHANGES[what](patch, tmp_path)
        _known.reopen()
        assert state(GPU) == "unknown"
        assert _known.on(GPU).races == {}
    _known.reopen()
    assert state(GPU) == "proven"
    assert "call" in _known.on(GPU).races


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "of", [torch.backends.cuda.matmul, torch.backends.cudnn.conv], ids=["products", "convolutions"]
)
def test_tf32_has_a_table_of_its_own(of: Any) -> None:
    remember(_known.on(GPU))
    before = of.fp32_precision
    of.fp32_precision = "tf32"
    try:
        assert state(GPU) == "unknown"
        assert _known.on(GPU).races == {}
    finally:
        of.fp32_precision = before
    assert state(GPU) == "proven"
    assert "call" in _known.on(GPU).races


@pytest.mark.usefixtures("gpu")
def test_gpus_of_a_kind_share_what_is_known() -> None:
    remember(_known.on(GPU))
    assert state(torch.device("cuda", 1)) == "proven"
    _known.on(torch.device("cuda", 1)).add(proofs={KEY: REFUSED})
    assert state(GPU) == "refused"
    assert state(CPU) == "unknown"


def test_without_a_gpu_nothing_is_known_of_one(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    _known.on(GPU).add(proofs={KEY: PROVEN})
    assert not folder.exists()


def test_the_drivers_version_is_the_modules_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(_known, "Path", lambda _: file)
    for content, expected in ((b"NVRM 580.95\nGCC 12\n", "NVRM 580.95"), (b"", ""), (b"\xff\n", "�"), (None, "")):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        _known.driver.cache_clear()
        assert _known.driver() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    _known.driver.cache_clear()
    assert _known.driver() == "CUDA 13000", "without that module, as under Windows"
    _known.driver.cache_clear()


def test_a_file_under_the_name_of_another_identity_is_not_used(recwarn: pytest.WarningsRecorder) -> None:
    """As where somebody has copied it."""
    file = remember()
    held = json.loads(file.read_text(encoding="utf-8"))
    held["identity"]["driver"] = "another"
    file.write_text(json.dumps(held), encoding="utf-8")
    _known.reopen()
    assert state() == "unknown"
    assert _known.on(CPU).races == {}
    assert [str(w.message) for w in recwarn] == [f"{file} is of another device, driver or version and is not used"]


# ---- many processes

WRITERS, EACH = 8, 6


def write_some(path: Path, writer: int, locks: bool) -> None:
    """Some entries, each of this process's still there in memory at the end."""
    if not locks:
        fcntl.flock = no_locks
    known = Known({"device": "a test"}, path)
    for i in range(EACH):
        known.add(proofs={f"{writer} {i}": PROVEN}, races={f"{writer} {i}": Race.of("a", {"a": 1.0})})
        Known({"device": "a test"}, path)  # raises or warns if the file is not whole
    own = {f"{writer} {i}" for i in range(EACH)}
    os._exit(0 if own <= known.proofs.keys() & known.races.keys() else 3)


def no_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def all_at_once(path: Path, locks: bool) -> Known:
    """What the file holds when all writers are done."""
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in the processes too
        processes = [context.Process(target=write_some, args=(path, writer, locks)) for writer in range(WRITERS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        return Known({"device": "a test"}, path)


def test_writers_at_once_lose_nothing(folder: Path) -> None:
    known = all_at_once(folder / "test.json", locks=True)
    assert len(known.proofs) == len(known.races) == WRITERS * EACH
    assert {path.name for path in folder.iterdir()} == {"test.json", ".test.json.lock"}


def test_writers_at_once_without_locks_leave_a_whole_file(folder: Path) -> None:
    """Entries of others may be lost, and are then found anew."""
    known = all_at_once(folder / "test.json", locks=False)
    assert 0 < len(known.proofs) <= WRITERS * EACH
    assert known.proofs.keys() == known.races.keys()
    assert {path.name for path in folder.iterdir()} == {"test.json", ".test.json.lock"}


def test_a_lock_that_is_never_let_go_is_not_waited_for_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = remember()
    monkeypatch.setattr(_known, "LOCK_SECONDS", 0.2)
    with file.with_name(f".{file.name}.lock").open("w") as stuck:
        fcntl.flock(stuck, fcntl.LOCK_EX)
        began = time.monotonic()
        _known.on(CPU).add(proofs={"another": REFUSED})
        assert 0.2 <= time.monotonic() - began < 10
    _known.reopen()
    assert state() == "proven"
    assert _known.on(CPU).proofs["another"] == REFUSED


def test_processes_of_one_number_do_not_write_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In containers that share a home every process may be number 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    inner, outer = Known({"device": "a test"}, folder / "test.json"), Known({"device": "a test"}, folder / "test.json")
    replace, begun = os.replace, list[str]()

    def replace_late(source: Any, target: Any) -> None:
        """Another process writes between this one's write and its renaming."""
        begun.append(str(source))
        if len(begun) == 1:
            inner.add(proofs={"inner": PROVEN})
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_late)
    outer.add(proofs={"outer": PROVEN})
    assert len(set(begun)) == 2
    assert set(Known({"device": "a test"}, folder / "test.json").proofs) == {"outer"}
    assert {path.name for path in folder.iterdir()} == {"test.json", ".test.json.lock"}


def test_a_process_sees_what_others_have_added_once_it_adds() -> None:
    first = _known.on(CPU)
    second = Known(first.identity, first.path)
    second.add(proofs={KEY: PROVEN}, races={"second": Race.of("b", {"b": 1.0})})
    assert state() == "unknown"
    first.add(races={"first": Race.of("a", {"a": 1.0})})
    assert state() == "proven"
    assert set(first.races) == {"first", "second"}


# ---- merging


def test_a_refusal_outlasts_a_proof() -> None:
    """Whoever writes last: a kernel that is wrong now and then is wrong."""
    first = _known.on(CPU)
    second = Known(first.identity, first.path)
    second.add(proofs={KEY: REFUSED})
    first.add(proofs={KEY: Proof("proven", at=time.time() + 9)})
    for known in (first, Known(first.identity, first.path)):
        assert known.proof(UNIT) == REFUSED
    second.add(proofs={KEY: PROVEN})
    assert second.proof(UNIT) == REFUSED


def test_a_refusal_takes_the_place_of_a_proof() -> None:
    """In memory and in the file, where the proof is."""
    remember()
    _known.on(CPU).add(proofs={KEY: REFUSED})
    assert _known.on(CPU).proof(UNIT) == REFUSED
    _known.reopen()
    assert _known.on(CPU).proof(UNIT) == REFUSED
    alone = Known({"device": "a test"}, None)
    for proof in (REFUSED, PROVEN):
        alone.add(proofs={KEY: proof})
    assert alone.proof(UNIT) == REFUSED


def test_a_proof_outlives_a_new_race() -> None:
    remember()
    _known.on(CPU).add(races={"call": Race.of("b", {"b": 1e-6})})
    _known.reopen()
    assert _known.on(CPU).proof(UNIT) == PROVEN
    assert _known.on(CPU).races["call"].choice == "b"


def test_the_newer_race_counts() -> None:
    known = _known.on(CPU)
    for choice, at in (("b", 2.0), ("a", 1.0), ("c", 3.0)):
        known.add(races={"call": Race(choice, {}, at)})
    assert known.races["call"].choice == "c"


def test_distrust_refuses_all_in_this_process_alone() -> None:
    remember()
    _known.distrust(CPU, "the ranks differ")
    assert (state(), _known.on(CPU).proof(UNIT).reason) == ("refused", "the ranks differ")
    _known.reopen()
    assert state() == "proven"
