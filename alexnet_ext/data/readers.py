"""Processes and threads that work ahead: they read images for the trainer. Processes answer by a pipe: no shared memory
that may be full, no names in a temporary folder, no descriptor that is passed on."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

from .._errors import CommandError
from .batches import Batch, Dataset, Gathering, Key, read_batch

LOOK_EVERY = 0.1  # seconds of waiting
Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Processes(Generic[Request, Answer]):
    """Context manager: ``count`` processes that do ``work`` on requests, from the first one to the end of the block; 0
    works in this process. They serve any number of calls, one after another.

    An exception raised by ``work`` is raised here. Raises CommandError if a process cannot be started or
    has died. ``look`` is called again and again during a wait; its exception ends the wait.
    """

    def __init__(
        self, work: Callable[[Request], Answer], count: int = 0, look: Callable[[], None] = lambda: None
    ) -> None:
        self.work, self.count, self.look = work, count, look
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []
        self.asked: list[bool] = []  # whether a process owes an answer

    def __call__(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """The answer to each of ``requests``, in their order. Answers that an earlier call has not fetched are
        dropped."""
        if not self.count:
            yield from map(self.work, requests)
            return
        if not self.processes:
            self._start()
        for number, asked in enumerate(self.asked):
            if asked:
                self._answer(number)
        for number, request in enumerate(requests[: self.count]):
            self._ask(number, request)
        for at in range(len(requests)):
            number = at % self.count
            answer = self._answer(number)
            if at + self.count < len(requests):
                self._ask(number, requests[at + self.count])
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # what the work needs is in memory already, and is not copied
        try:
            for _ in range(self.count):
                self.look()
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(self.work, ours, theirs), daemon=True)
                try:
                    process.start()
                finally:
                    theirs.close()  # so that the pipe ends when its process does
                self.processes.append(process)
                self.pipes.append(ours)
                self.asked.append(False)
        except OSError as error:
            self.close()
            raise CommandError(
                f"--workers {self.count}: {error.strerror}, where a process that reads images was to start; "
                "try fewer --workers"
            ) from error

    def _ask(self, number: int, request: Request) -> None:
        try:
            self.pipes[number].send_bytes(pickle.dumps(request))
        except OSError as error:
            raise self._died(number) from error
        self.asked[number] = True

    def _answer(self, number: int) -> Answer | Exception:
        """The answer of process ``number``, or the exception raised there."""
        pipe = self.pipes[number]
        try:
            while not pipe.poll(LOOK_EVERY):
                self.look()
                for other, process in enumerate(self.processes):
                    if not process.is_alive():
                        raise self._died(other)
            shape, found = pickle.loads(pipe.recv_bytes())
            if isinstance(found, Batch):
                found = found._replace(images=torch.empty(shape, dtype=torch.uint8))
                if found.images.numel():
                    pipe.recv_bytes_into(found.images.numpy().reshape(-1).data)
        except (EOFError, ConnectionError) as error:
            raise self._died(number) from error
        self.asked[number] = False
        return found

    def _died(self, number: int) -> CommandError:
        process = self.processes[number]
        process.join(1)
        self.look()  # a signal to the whole group is a wish to stop
        code = process.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return CommandError(
            f"a process that reads images has died ({how}); try fewer --workers, or 0 to read without them"
        )

    def close(self) -> None:
        """End the processes, even if they wait."""
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            pipe.close()
        self.processes, self.pipes, self.asked = [], [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Readers(Processes[Sequence[Key], Batch]):
    """``Processes`` that read batches of ``dataset``; threads of this one if it gathers them, which is mere copying.

    ``pin_memory``: into memory that a GPU copies from without a wait, if the dataset gathers its batches."""

    def __init__(
        self,
        dataset: Dataset,
        count: int = 0,
        look: Callable[[], None] = lambda: None,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(functools.partial(read_batch, dataset, pin_memory=pin_memory), count, look)
        self.dataset = dataset
        self.threads: ThreadPoolExecutor | None = None

    def __call__(self, requests: Sequence[Sequence[Key]]) -> Iterator[Batch]:
        if not isinstance(self.dataset, Gathering):
            return super().__call__(requests)
        return self._by_threads(requests) if self.count and self.dataset.threads else map(self.work, requests)

    def _by_threads(self, requests: Sequence[Sequence[Key]]) -> Iterator[Batch]:
        """The batches in order. Each thread is at most one ahead."""
        self.threads = self.threads or ThreadPoolExecutor(self.count, "reader")
        ahead = deque(self.threads.submit(self.work, request) for request in requests[: self.count])
        for place in range(self.count, self.count + len(requests)):
            while not wait(list(ahead)[:1], LOOK_EVERY).done:
                self.look()
            batch = ahead.popleft().result()
            if place < len(requests):
                ahead.append(self.threads.submit(self.work, requests[place]))
            yield batch

    def close(self) -> None:
        if self.threads is not None:
            self.threads.shutdown(cancel_futures=True)
            self.threads = None
        super().close()


def _serve(work: Callable[[Any], Any], parents: Connection, pipe: Connection) -> None:
    """A working process. It closes its copy of the parent's end, so that it notices when the parent ends."""
    # Ctrl-C reaches every process of the terminal. Only the parent handles it, and ends its processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parents.close()
    torch.set_num_threads(1)
    try:
        while True:
            request = pickle.loads(pipe.recv_bytes())
            try:
                answer = work(request)
            except Exception as error:
                answer = _told(error)
            if not isinstance(answer, Batch):
                pipe.send_bytes(pickle.dumps((None, answer)))
                continue
            # The images go as bytes: pickled, they would be copied once more. ``Connection.send`` is not used, as there
            # torch puts tensors into shared memory and passes descriptors on.
            rest = answer._replace(images=torch.empty(0, dtype=torch.uint8))
            pipe.send_bytes(pickle.dumps((answer.images.shape, rest)))
            if answer.images.numel():
                pipe.send_bytes(answer.images.numpy().reshape(-1).data)
    except (EOFError, ConnectionError):
        return


def _told(error: Exception) -> Exception:
    """An exception as sent to the parent: errors that the user can fix as they are, others with a traceback."""
    if isinstance(error, (CommandError, OSError, MemoryError)):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))
