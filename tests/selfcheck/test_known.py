"""What is known is of one identity, and survives damaged files, full disks and other processes."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import multiprocessing
import os
import pwd
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


# ---- damaged files


def damaged(file: Path, content: str | bytes) -> list[str]:
    """The warnings when all is looked up, added and looked up again, once the file has this content."""
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    _known.reopen()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert state() == "unknown"
        remember()
        assert state() == "proven"
        remember()
    return [str(w.message) for w in caught]


NO_JSON = {
    "empty": b"",
    "open": b"{",
    "zeros": b"\0" * 100,
    "no UTF-8": b'{"identity": "\xff"}',
    "deep": b"[" * 100_000,
    "long number": b"9" * 10_000,
}


@pytest.mark.parametrize("name", NO_JSON)
def test_a_corrupt_file_is_one_warning_and_is_replaced(name: str) -> None:
    file = remember()
    (warning,) = damaged(file, NO_JSON[name])
    assert warning.startswith(f"{file} cannot be read and is not used: ")
    _known.reopen()
    assert state() == "proven"


@pytest.mark.parametrize("content", ["[1, 2]", '{"k": 3}', "null", '"text"', '{"identity": [], "proofs": {}}'])
def test_a_foreign_file_is_one_warning_and_is_replaced(content: str) -> None:
    file = remember()
    assert damaged(file, content) == [f"{file} holds nothing of this package and is not used"]
    _known.reopen()
    assert state() == "proven"


def test_a_truncated_file_is_ignored_wherever_it_ends() -> None:
    file = remember()
    whole = file.read_bytes()
    for length in range(0, len(whole.rstrip()) - 1, 97):
        assert len(damaged(file, whole[:length])) == 1


SOUND = {"state": "proven", "reason": "", "seconds": 1.0, "at": 1.0}
RACED = {"choice": "a", "microseconds": {"a": 1.0}, "at": 1.0}
LONG = 10**400
FOREIGN: list[tuple[str, Any]] = [
    *(("proofs", entry) for entry in (3, None, [], {}, "proven", {**SOUND, "more": 1}, {**SOUND, "state": "unknown"})),
    *(("proofs", SOUND | {"state": state}) for state in (None, [], "right")),
    *(("proofs", SOUND | {name: value}) for name in ("at", "seconds") for value in ("1", None, [], LONG)),
    *(("proofs", SOUND | {"at": at}) for at in (float("nan"), float("inf"), 1e30)),
    ("proofs", SOUND | {"reason": 3}),
    *(("races", entry) for entry in (3, {}, {**RACED, "more": 1}, RACED | {"choice": ["a"]})),
    *(("races", RACED | {"microseconds": times}) for times in (3, [1.0], {"a": "fast"}, {"a": LONG}, {"a": None})),
    *(("races", RACED | {"microseconds": {"a": time}}) for time in (float("nan"), float("inf"))),
    *(("races", RACED | {"at": at}) for at in ("1", None, LONG, float("nan"), float("-inf"), 1e30)),
]


@pytest.mark.parametrize(("kind", "entry"), FOREIGN, ids=str)
def test_an_entry_of_another_form_is_passed_over(kind: str, entry: Any, recwarn: pytest.WarningsRecorder) -> None:
    """Those beside it are used, and what is found anew takes its place."""
    file = remember()
    held = json.loads(file.read_text(encoding="utf-8"))
    name = {"proofs": KEY, "races": "call"}[kind]
    held[kind] = {name: entry, "another": {"proofs": SOUND, "races": RACED}[kind]}
    file.write_text(json.dumps(held), encoding="utf-8")
    _known.reopen()
    known = _known.on(CPU)
    found = {"proofs": known.proofs, "races": known.races}
    assert list(found[kind]) == ["another"]
    remember()
    _known.reopen()
    assert state() == "proven"
    assert set(_known.on(CPU).proofs) | set(_known.on(CPU).races) == {KEY, "call", "another"}
    assert recwarn.list == []


@pytest.mark.parametrize("content", [{"proofs": [1], "races": 3}, {"proofs": None}, {}])
def test_lists_of_another_form_are_passed_over(content: dict[str, Any]) -> None:
    file = remember()
    assert damaged(file, json.dumps({"identity": _known.identity(CPU), **content})) == []


# ---- bounded size


def test_the_newest_races_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_known, "MAX_RACES", 3)
    known = _known.on(CPU)
    for i in (5, 1, 4, 2, 3):
        known.add(races={str(i): Race("a", {}, float(i))})
    assert sorted(known.races) == ["3", "4", "5"]
    _known.reopen()
    assert sorted(_known.on(CPU).races) == ["3", "4", "5"]


def test_the_newest_files_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_known, "MAX_FILES", 3)
    for i in range(5):
        with monkeypatch.context() as patch:
            patch.setattr(_known, "__version__", str(i))
            _known.reopen()
            file = remember()
            os.utime(file, (i, i))
    left = [json.loads(path.read_text(encoding="utf-8"))["identity"]["alexnet_ext"] for path in _known.files()]
    assert left == ["2", "3", "4"]
    assert len(list(folder.iterdir())) == 6, "nor are their locks kept"


def test_forgetting_removes_all_files(folder: Path) -> None:
    file = remember()
    (folder / "broken.json").write_text("{")
    assert set(_known.forget()) == {file, folder / "broken.json"}
    assert state() == "unknown"
    assert _known.files() == []
    assert _known.forget() == []


# ---- places that cannot be written to

LASTS = "what was found lasts as long as this process"


def kept_in_memory() -> list[str]:
    """The warnings where nothing can be kept on disk; what was found holds for this process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        remember()
        _known.on(CPU).add(proofs={"another": REFUSED})
    assert state() == "proven"
    assert set(_known.on(CPU).proofs) == {KEY, "another"}
    assert "call" in _known.on(CPU).races
    return [str(w.message) for w in caught]


def test_a_folder_that_is_a_file(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file stands where the folder should be", encoding="utf-8")
    (warning,) = kept_in_memory()
    assert LASTS in warning
    assert folder.read_text(encoding="utf-8") == "a file stands where the folder should be"
    assert _known.forget() == []


def test_a_folder_in_the_files_place(folder: Path) -> None:
    path = _known.on(CPU).path
    assert path is not None
    path.mkdir(parents=True)
    _known.reopen()
    with pytest.warns(UserWarning, match="cannot be read and is not used"):
        assert state() == "unknown"
    (warning,) = kept_in_memory()
    assert LASTS in warning
    assert [found.name for found in folder.iterdir() if "tmp" in found.name] == []


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Writing to files fails midway with this error number: for root, permissions do not count."""

    def write_text(path: Path, text: str, **_: Any) -> None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text[:10])
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_text", write_text)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_no_more(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file stays whole, and nothing half written lies about."""
    file = remember()
    before = file.read_bytes()
    refuse(monkeypatch, number)
    (warning,) = kept_in_memory()
    assert LASTS in warning
    assert os.strerror(number) in warning
    assert file.read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {file.name, f".{file.name}.lock"}


def test_a_full_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes nothing: each write to it is as on a full disk."""
    if not Path("/dev/full").is_char_device():
        pytest.skip("this system has no /dev/full")
    remember()
    write_text = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda _, *given, **kw: write_text(Path("/dev/full"), *given, **kw))
    (warning,) = kept_in_memory()
    assert os.strerror(errno.ENOSPC) in warning
    assert LASTS in warning


def test_a_read_only_folder(folder: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    try:
        (warning,) = kept_in_memory()
    finally:
        folder.chmod(0o700)
    assert LASTS in warning


def test_a_folder_that_may_not_be_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(path: Path, **_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    (warning,) = kept_in_memory()
    assert LASTS in warning
    assert not folder.exists()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number without an entry."""

    def nobody(_: int) -> Any:
        raise KeyError("no such user")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    _known.reopen()
    assert _known.folder() is None
    known = _known.on(CPU)
    assert known.path is None
    known.add(proofs={KEY: PROVEN})
    assert state() == "proven"
    assert _known.files() == []
    assert _known.forget() == []
    assert state() == "unknown"


def test_the_folder_is_by_the_base_directory_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, cache in (("", tmp_path / "home" / ".cache"), (str(tmp_path / "own"), tmp_path / "own")):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert _known.folder() == cache / "alexnet_ext" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _known.folder() == tmp_path / "home" / ".cache" / "alexnet_ext" / "kernels"


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
