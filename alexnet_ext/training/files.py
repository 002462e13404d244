"""Files that are written whole or not at all, even if the power fails."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from .._errors import CommandError, os_error, path_text


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_target(path: Path, source: Path | None = None, option: str = "--out") -> None:
    """CommandError, before time goes into it, where the file ``path`` of an
    ``option`` cannot be or would replace its ``source``."""
    try:
        path.stat()
    except OSError as error:  # a loop of links, a name too long
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise CommandError(f"{option} {path_text(path)}: {error.strerror}", 2) from error
    if path.is_dir():
        raise CommandError(f"{option} {path_text(path)}: is a folder, expected the name of a file", 2)
    if is_special(path):
        raise CommandError(f"{option} {path_text(path)}: no regular file, expected the name of one", 2)
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise CommandError(f"{option} {path_text(path)}: is what would be read; name another file", 2)


def check_folder(path: Path, option: str = "--out") -> None:
    """CommandError, before time goes into it, where the folder ``path`` of an ``option`` cannot be."""
    if path.exists() and not path.is_dir():
        raise CommandError(f"{option} {path_text(path)}: not a folder, expected a new or an existing one", 2)


def is_special(path: Path) -> bool:
    """Whether a name is no file that another could replace: a device, a pipe, or an open file of a process, such as
    /dev/stdout."""
    if path.exists() and not path.is_file():
        return True
    for _ in range(40):  # as many links as Linux follows
        if Path("/proc") in path.parent.resolve().parents:
            return True
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return False


def _place(path: Path) -> Path:
    """Where to write the file ``path``: the target of a link. Raises CommandError if no file can be there."""
    if is_special(path):
        raise CommandError(f"{path_text(path)}: no regular file, and nothing takes its place")
    return path.resolve() if path.is_symlink() else path


def _beside(path: Path) -> Path:
    """A name in the same folder for the unfinished file: the same ending, short enough for every file system."""
    number = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    return path.with_name(f".{number}.tmp-{os.getpid()}{path.suffix if len(path.suffix) < 20 else ''}")


def check_outside(out: Path, data: Path, option: str = "--out") -> None:
    """CommandError where ``out``, given as ``option``, lies in a folder of images, which would take it for a class."""
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(data)):  # resolve() raises for a loop of links
        raise CommandError(
            f"{option} {path_text(out)}: lies in the images' folder {path_text(data)}; name a folder outside of it", 2
        )


def write_file(path: Path, content: bytes) -> None:
    """Write a file next to ``path`` and rename it: a reader finds the old content or the new. A link stays a link."""
    path = _place(path)
    beside = _beside(path)
    try:
        beside.write_bytes(content)
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:
        raise os_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file of the same ending next to ``path``, which replaces it when the block ends without an error.

    A link stays a link: its target is replaced."""
    path = _place(path)
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    except Exception as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise os_error(path, cause) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that is renamed to ``path`` when the block has ended without an error and its files are on the disk.

    ``path`` must not exist. Unfinished folders of earlier processes next to it are removed.
    """
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_over in path.parent.glob(".*.tmp-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        beside.mkdir()
        yield beside
        for file in beside.iterdir():
            sync(file)
        sync(beside)
        os.rename(beside, path)
        sync(path.parent)
    except Exception as error:
        cause = _system_error(error)
        if cause is None:
            raise
        raise os_error(path, cause) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def unfinished(folder: Path) -> list[Path]:
    """The files that killed processes have left in a folder, half written; to be removed where it is ``locked``."""
    return [path for path in folder.glob(".*.tmp-*") if re.match(r"\.[0-9a-f]{8}\.tmp-\d+", path.name)]


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error, even if safetensors put it into words or torch raised its own error after it."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or error.__context__
    return None


_locks: set[int] = set()


def _leave_locks() -> None:
    """A forked process lets go of what its parent holds, which else would stay locked for as long as the fork lives."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_leave_locks)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process alone, and none that it forks; CommandError where another writes into it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise os_error(folder, error) from error
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CommandError(f"{path_text(folder)}: another process writes into this folder") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        if descriptor in _locks:
            _locks.remove(descriptor)
            os.close(descriptor)
