"""``alexnet train --gpus N``: as ``torchrun --nproc-per-node N -m alexnet_ext train``, with one line for an error."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .._errors import CommandError
from ..training.interrupt import SIGNALS, STOPPED
from .ranks import local


def launch(count: int, device: torch.device, arguments: list[str]) -> None:
    """Run ``alexnet`` with these arguments in ``count`` processes of this machine, each with a GPU or a share of the
    cores. They print what there is to say.

    Raises CommandError with their exit code, without text unless a signal has ended all of them.
    """
    if device.type == "cuda" and count > torch.cuda.device_count():
        raise CommandError(f"--gpus {count}: torch sees {torch.cuda.device_count()} GPUs", 2)
    if device.type == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    logging.disable(logging.ERROR)  # the ranks say what happened
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        max_restarts=0,
    )
    config.signals_to_handle = ",".join(number.name for number in SIGNALS)  # passed on to all of them
    try:
        elastic_launch(config, sys.executable)("-m", __package__.partition(".")[0], *arguments)
    except SignalException as stop:
        raise CommandError("", STOPPED) from stop
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if any(other.exitcode != -signal.SIGKILL for other in error.failures.values()):  # it has said why
            raise CommandError("", max(1, failure.exitcode)) from error
        raise CommandError(f"rank {rank} of {count} was ended by {failure.signal_name()}") from error


def started(count: int | None) -> bool:
    """Whether the ``count`` processes of ``--gpus`` run already, this one among them, or none are to be started."""
    _, running = local()
    if count is not None and running not in (1, count):
        raise CommandError(f"--gpus {count}: torchrun has started {running} processes on this machine", 2)
    return count in (None, running)
