"""The processes of a run, as torchrun starts them, and what they agree on. One process alone needs none of it.

Flags, counts and errors are exchanged by gloo, on GPUs too: it notices at once that another process has ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .._errors import CommandError, first_line
from ..training.interrupt import STOPPED, Interrupted, ignore

T = TypeVar("T")

# Rank 0 may prove kernels or wait for a disk while the others wait for it. A rank that dies closes its connections,
# which needs no timeout.
TIMEOUT = timedelta(minutes=30)
REPORT = 3.0  # seconds for a failing rank to say why, or to be gone, before the others speak for it


class Ranks:
    """Process number ``rank`` of ``size`` that train one network. All of them must make the same calls."""

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.size, self.store = rank, size, store

    @property
    def first(self) -> bool:
        """Whether this is the rank that logs and writes."""
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.size > 1

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether it is set on some rank."""
        if not self.many:
            return flags
        found = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return tuple(map(bool, found.tolist()))

    def numbers(self, own: Sequence[int]) -> list[list[int]]:
        """The whole numbers of every rank: a list as long on each of them."""
        if not self.many:
            return [list(own)]
        found = [torch.empty(len(own), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor(own, dtype=torch.int64))
        return [numbers.tolist() for numbers in found]

    def gather(self, own: T) -> list[T]:
        """The object of every rank, pickled on the way."""
        found: list[Any] = [own] * self.size
        if self.many:
            dist.all_gather_object(found, own)
        return found

    def add_up(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place; on a GPU nothing waits for it."""
        if self.many:
            dist.all_reduce(tensor)
        return tensor

    def first_does(self, work: Callable[[], T]) -> T:
        """What ``work()`` returns on rank 0. A CommandError there is raised on every rank."""
        if not self.many:
            return work()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = work()
            except CommandError as error:
                found[1] = error
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        result: T = found[0]
        return result

    def report(self, text: str, code: int) -> bool:
        """Tell the other ranks that this one ends, and with which exit code; returns whether it should print ``text``,
        as no other rank has."""
        store = self.store
        if store is None or not text:
            return bool(text)
        try:
            store.set(f"end/{self.rank}", str(code))
            return store.add(f"said/{text}", 1) == 1
        except (RuntimeError, ValueError):  # the store is gone
            return True

    def lost(self) -> tuple[str, int]:
        """What has become of the ranks that do not answer, and the exit code of all: "" if one of them has said it."""
        store = self.store
        others = [rank for rank in range(self.size) if rank != self.rank]
        until = time.monotonic() + REPORT
        with contextlib.suppress(RuntimeError, ValueError):  # the store has gone with the machine that had it
            while store is not None and time.monotonic() < until:  # a process closes its connections before it is gone
                for rank in others:
                    process, host = store.get(f"process/{rank}").decode().split(" ", 1)
                    if store.check([f"end/{rank}"]):
                        return "", int(store.get(f"end/{rank}"))
                    if host == socket.gethostname() and not _lives(int(process)):
                        return f"rank {rank} of {self.size} (process {process}) has died; the others end, too", 1
                time.sleep(0.05)
        return f"rank {self.rank} of {self.size} has lost another one, and ends, too", 1


ALONE = Ranks()


def _lives(process: int) -> bool:
    """Whether a process of this machine runs: neither gone nor waiting to be cleared away."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as stream:
            return stream.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def started_by_torchrun() -> bool:
    """Whether torchrun has started this process as one of several."""
    # Batch systems set some of these names, too, for a process that is alone.
    named = {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return named and int(os.environ.get("WORLD_SIZE", "1")) > 1


def local() -> tuple[int, int]:
    """The number of this process among those of its machine, and theirs."""
    if not started_by_torchrun():
        return 0, 1
    return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])


def restarted() -> bool:
    """Whether torchrun has started this process again, after another rank failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def own_device(device: torch.device) -> torch.device:
    """The device of this rank: of several on a machine each takes a GPU of its own. Raises CommandError without one."""
    number, count = local()
    if device.type != "cuda" or count == 1:
        return device
    if device.index is not None:
        raise CommandError(f"--device {device}: expected cuda, as each of {count} ranks takes a GPU of its own", 2)
    if count > torch.cuda.device_count():
        raise CommandError(f"{count} ranks on this machine: torch sees {torch.cuda.device_count()} GPUs", 2)
    return torch.device("cuda", number)


@contextmanager
def connected(device: torch.device) -> Iterator[Ranks]:
    """Context manager: the ranks that torchrun has started; ``ALONE`` without torchrun.

    An error that ends all ranks is printed by one of them: the others leave with its exit code and a CommandError
    without text. Raises CommandError if the ranks cannot be connected.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    ranks = _connect(device)
    try:
        yield ranks
    except (Exception, KeyboardInterrupt) as error:
        ignore()  # torchrun ends the others by a signal once one has ended, and they have still to say why
        found = _ending(ranks, error)
        if found is None:
            ranks.report(f"rank {ranks.rank} of {ranks.size}: {type(error).__name__}: {first_line(error)}", 1)
            raise
        text, code = found
        raise CommandError(text if ranks.report(text, code) else "", code) from error
    dist.destroy_process_group()


def _ending(ranks: Ranks, error: BaseException) -> tuple[str, int] | None:
    """The line that this error gives, and the exit code; None if it is to be seen as it is."""
    if isinstance(error, CommandError):
        return str(error), error.code
    if is_lost(error) or (isinstance(error, KeyboardInterrupt) and is_lost(error.__context__)):
        return ranks.lost()
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return error.told() if isinstance(error, Interrupted) else "stopped", STOPPED
    return None


def _connect(device: torch.device) -> Ranks:
    """Tensors on a GPU go by NCCL (not yet run on a GPU), all others by gloo."""
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = _fresh(store, rank, size)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        ranks = Ranks(rank, size, store)
        store.set(f"process/{rank}", f"{os.getpid()} {socket.gethostname()}")
        ranks.any(False)  # from here on each of them knows the others
    except (RuntimeError, ValueError) as error:
        raise CommandError(f"the ranks cannot be connected: {first_line(error)}") from error
    return ranks


def _fresh(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of torchrun's store that nobody has written to. The store outlives restarts, so it still has the addresses
    of ranks that have ended. Rank 0 names a part for the ranks that it sees, until each of them agrees."""
    own, until, token, seen = uuid.uuid4().hex, time.monotonic() + TIMEOUT.total_seconds(), "", [""] * size
    store.set(f"start/{rank}", own)
    while time.monotonic() < until:
        if rank == 0:
            names = [f"start/{other}" for other in range(size)]
            found = [store.get(name).decode() for name in names] if store.check(names) else seen
            if found != seen:
                seen, token = found, uuid.uuid4().hex
                store.set("group", " ".join([token, *found]))
        elif store.check(["group"]):
            token, *seen = store.get("group").decode().split()
        if seen[rank] == own:
            store.set(f"agreed/{token}/{rank}", "")
            if store.check([f"agreed/{token}/{other}" for other in range(size)]):
                return dist.PrefixStore(token, store)
        time.sleep(0.02)
    raise RuntimeError(f"not all of {size} ranks have come")


def is_lost(error: BaseException | None) -> bool:
    """Whether another rank does not answer."""
    words = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    kinds = (dist.DistBackendError, dist.DistNetworkError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
