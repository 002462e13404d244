"""A contestant in a process of its own, since malloc's settings belong to the process.

``python -m benchmarks.worker train|plain BATCH THREADS`` runs a training step for each line of its input and answers
with a line. ``train`` uses the settings of ``alexnet train`` on the CPU, ``plain`` PyTorch's defaults and stock layers.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Self

import torch

from alexnet_ext.training.process import keep_freed_memory

from . import harness


class Worker:
    """The process, started by ``with``; ``step()`` returns when it has done one."""

    def __init__(self, settings: str, batch: int) -> None:
        self.command = [sys.executable, "-m", "benchmarks.worker", settings, str(batch), str(torch.get_num_threads())]

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def step(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        if self.process.stdout.readline() != "done\n":
            raise RuntimeError(f"{' '.join(self.command)} ended with exit code {self.process.wait()}")

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main(settings: str, batch: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    if settings == "train":
        keep_freed_memory()
        run = harness.network_run("training step", True, int(batch), "channels_last", fused_optimizer=True)
    else:
        run = harness.network_run("training step", False, int(batch))
    for _ in sys.stdin:
        run()
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
