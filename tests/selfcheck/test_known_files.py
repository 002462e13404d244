"""The files of what is known may be damaged, many or impossible to write: at most a warning, and no wrong choice."""

from __future__ import annotations

import errno
import json
import os
import pwd
import warnings
from pathlib import Path
from typing import Any

import pytest

from alexnet_ext.ops import _known
from alexnet_ext.ops._known import Race
from tests.selfcheck.test_known import CPU, KEY, PROVEN, REFUSED, folder, remember, state

__all__ = ["folder"]  # a fixture


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
    (folder / f".{file.name}.tmp-1").write_text("of a process that was killed")
    assert set(_known.forget()) == {file, folder / "broken.json"}
    assert list(folder.iterdir()) == []
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
