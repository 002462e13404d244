"""use_backend: the backend while blocks are open; afterwards no effect is left, in whatever order they end."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import alexnet_ext as ax
from alexnet_ext.ops import _backend
from tests.support import cases
from tests.support.cases import lrn


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert _backend.current() == "auto"
    assert len(_backend._open) == 1


def runs_ours() -> bool:
    case = lrn((1, 3, 2, 2))
    return cases.runs_ours(cases.fused(case, cases.make(case)))


ORDERS = list(itertools.permutations(range(3)))


@pytest.mark.parametrize("leaving", ORDERS, ids=str)
def test_blocks_end_in_any_order_and_the_newest_open_one_counts(leaving: tuple[int, ...]) -> None:
    blocks = [ax.use_backend(backend) for backend in ("native", "stock", "triton")]
    for block in blocks:
        with block:
            assert _backend.current() == block.backend
    still_open = [block.__enter__() for block in blocks]
    for i in leaving:
        assert _backend.current() == still_open[-1].backend
        blocks[i].__exit__(None, None, None)
        still_open.remove(blocks[i])


def test_one_instance_may_be_entered_again_inside_itself() -> None:
    block, seen = ax.use_backend("native"), []
    with block:
        with ax.use_backend("stock"):
            with block:
                seen.append(_backend.current())
            seen.append(_backend.current())
        seen.append(_backend.current())
    assert seen == ["native", "stock", "native"]


def test_an_error_ends_its_own_block_alone() -> None:
    with ax.use_backend("native"):
        with pytest.raises(KeyError), ax.use_backend("stock"), ax.use_backend("triton"):
            raise KeyError
        assert _backend.current() == "native"


@pytest.mark.parametrize("leaving", ORDERS, ids=str)
def test_threads_leave_in_any_order(leaving: tuple[int, ...]) -> None:
    shared = ax.use_backend("stock")
    leave = [threading.Event() for _ in leaving]
    entered, left = threading.Semaphore(0), threading.Semaphore(0)

    def visit(i: int) -> None:
        with shared if i else ax.use_backend("native"):
            entered.release()
            leave[i].wait(10)
        left.release()

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
        assert entered.acquire(timeout=10)
    for i in leaving:
        leave[i].set()
        assert left.acquire(timeout=10)
    for thread in threads:
        thread.join()


def test_many_threads_at_once_leave_nothing() -> None:
    shared = ax.use_backend("stock")

    def visit() -> None:
        for _ in range(200):
            with shared, ax.use_backend("native"):
                assert _backend.current() != "auto"

    threads = [threading.Thread(target=visit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_tasks_and_generators_that_take_turns() -> None:
    async def visit(backend: str, turns: int) -> None:
        with ax.use_backend(backend):
            for _ in range(turns):
                await asyncio.sleep(0)

    async def together() -> None:
        await asyncio.gather(visit("native", 1), visit("stock", 3), visit("triton", 2))

    asyncio.run(together())

    def generate(backend: str) -> Iterator[str]:
        with ax.use_backend(backend):
            yield _backend.current()

    first, second = generate("native"), generate("stock")
    assert (next(first), next(second)) == ("native", "stock")
    first.close()
    assert _backend.current() == "stock"
    assert next(second, None) is None


@pytest.mark.usefixtures("native")
def test_worker_threads_follow_the_open_block() -> None:
    """For example those of DataParallel, and of autograd when it recomputes a checkpoint."""
    found: list[bool] = []
    with ax.use_backend("stock"):
        thread = threading.Thread(target=lambda: found.append(runs_ours()))
        thread.start()
        thread.join()
    assert found == [False]
    assert runs_ours()


@pytest.mark.usefixtures("native")
def test_compiled_code_follows_blocks_around_and_inside() -> None:
    x = torch.randn(1, 3, 2, 2, requires_grad=True)

    def inside(x: Tensor) -> tuple[Tensor, Tensor]:
        with ax.use_backend("stock"):
            y = ax.ops.local_response_norm(x, 3)
        return y, ax.ops.local_response_norm(x, 3)

    torch._dynamo.reset()
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(inside, fullgraph=True, backend=record)
    compiled(x)
    with ax.use_backend("stock"):
        compiled(x)
    assert [code.count("torch.ops.alexnet_ext.local_response_norm") for code in graphs] == [1, 0]
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)
        with ax.use_backend("stock"):
            compiled(x)
