"""Kernels with faults, for the tests of what proves kernels.

    python -m tests.selfcheck.planted OPERATOR=FAULT [...] < task     # the process that proves kernels, with faults

A fault is called with what the right kernel returned, with its first argument, and with the number of the call.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor

import alexnet_ext  # noqa: F401 (it registers the ops)
from alexnet_ext.selfcheck import child

SMALL = 10_000
"""Numbers in a result; no case that proves a kernel has as many."""


def wrong(y: Tensor, given: Tensor, call: int) -> Tensor:
    return y * 1.5


def wrong_in_bf16(y: Tensor, given: Tensor, call: int) -> Tensor:
    return y * 1.5 if y.dtype == torch.bfloat16 else y


def wrong_at_second_call(y: Tensor, given: Tensor, call: int) -> Tensor:
    return y * 1.5 if call == 2 else y


def rounds_differently_at_second_call(y: Tensor, given: Tensor, call: int) -> Tensor:
    return torch.nextafter(y, torch.full_like(y, torch.inf)) if call == 2 else y


def wrong_where_large(y: Tensor, given: Tensor, call: int) -> Tensor:
    return y * 1.5 if y.numel() > SMALL else y


def wrong_for_expanded(y: Tensor, given: Tensor, call: int) -> Tensor:
    return y * 1.5 if 0 in given.stride() else y


def wrong_for_permuted(y: Tensor, given: Tensor, call: int) -> Tensor:
    return y if 0 in given.stride() or given.is_contiguous() else y * 1.5


def leaves_a_part(y: Tensor, given: Tensor, call: int) -> Tensor:
    result = torch.empty_like(y)
    result[..., 1:] = y[..., 1:]
    return result


def writes_behind(y: Tensor, given: Tensor, call: int) -> Tensor:
    y.as_strided((1,), (1,), y.storage_offset() + y.numel()).zero_()
    return y


def writes_before(y: Tensor, given: Tensor, call: int) -> Tensor:
    y.as_strided((1,), (1,), y.storage_offset() - 1).zero_()
    return y


def raises(y: Tensor, given: Tensor, call: int) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def raises_where_large(y: Tensor, given: Tensor, call: int) -> Tensor:
    return raises(y, given, call) if y.numel() > SMALL else y


def needs_memory(y: Tensor, given: Tensor, call: int) -> Tensor:
    raise torch.OutOfMemoryError("tried to allocate 20.00 GiB\nof 8")


def crashes(y: Tensor, given: Tensor, call: int) -> Tensor:
    os.kill(os.getpid(), signal.SIGSEGV)
    return y


def hangs(y: Tensor, given: Tensor, call: int) -> Tensor:
    time.sleep(1000)
    return y


def spoils_the_device(y: Tensor, given: Tensor, call: int) -> Tensor:
    child._is_usable = lambda _: False
    return y


FAULTS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    fault.__name__: fault
    for fault in (
        *(wrong, wrong_in_bf16, wrong_at_second_call, rounds_differently_at_second_call, wrong_where_large),
        *(wrong_for_expanded, wrong_for_permuted, leaves_a_part, writes_behind, writes_before),
        *(raises, raises_where_large, needs_memory, crashes, hangs, spoils_the_device),
    )
}


@contextmanager
def planted(**faults: str) -> Iterator[None]:
    """In the block the compiled CPU kernels of these operators have these faults."""
    place = torch.library.Library("alexnet_ext", "IMPL", "CPU")
    try:
        for operator, fault in faults.items():
            with warnings.catch_warnings():  # some versions of PyTorch warn, but this is intended
                warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
                place.impl(operator, _with_fault(operator, FAULTS[fault]), allow_override=True)
        yield
    finally:
        place._destroy()


def _with_fault(operator: str, fault: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[..., Any]:
    kernel = torch.library.get_kernel(f"alexnet_ext::{operator}", "CPU")
    cpu, calls = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), count(1)

    def run(*arguments: Any) -> Any:
        result = kernel.call_boxed(cpu, *arguments)
        if isinstance(result, tuple):
            return (fault(result[0], arguments[0], next(calls)), *result[1:])
        return fault(result, arguments[0], next(calls))

    return run


if __name__ == "__main__":
    with planted(**dict(given.split("=") for given in sys.argv[1:])):
        child.main()
