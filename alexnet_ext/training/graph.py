"""A step as one CUDA graph. This file has not yet run on a GPU; ``benchmarks.verify_gpu`` compares it with eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.preprocessing import Preprocessing
from .feed import Inputs

WARM_UP = 3  # eager steps before a capture: libraries allocate, kernels are chosen, the optimizer makes its state
Step = Callable[[list[Inputs], Preprocessing], tuple[Tensor, Tensor]]


class Graphed:
    """``step`` replayed. The first steps of each shape are eager, on the stream that then captures; they train, too.

    A step's inputs are copied into the graph's own. One graph is kept: another shape, as of images that grow during a
    run, makes it anew.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()
        self.forget()

    def forget(self) -> None:
        """Capture anew, after tensors that a graph holds by their address have been replaced."""
        self.key: Any = None
        self.warm = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Inputs] = []
        self.outputs: tuple[Tensor, Tensor] | None = None

    def __call__(self, inputs: list[Inputs], preprocessing: Preprocessing) -> tuple[list[Inputs], tuple[Tensor, ...]]:
        """The inputs that were read, and the results, which the next step leaves alone."""
        key = preprocessing, [[tensor.shape for tensor in part.tensors()] for part in inputs]
        if key != self.key:
            self.forget()
            self.key = key
        if self.warm < WARM_UP:
            self.warm += 1
            return inputs, self._eager(inputs, preprocessing)
        if self.graph is None:
            self._capture(inputs, preprocessing)
        assert self.graph is not None
        assert self.outputs is not None
        for own, given in zip(self.inputs, inputs, strict=True):
            for target, source in zip(own.tensors(), given.tensors(), strict=True):
                target.copy_(source, non_blocking=True)
        self.graph.replay()
        return self.inputs, tuple(tensor.clone() for tensor in self.outputs)

    def _eager(self, inputs: list[Inputs], preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = self.step(inputs, preprocessing)
        current.wait_stream(self.stream)
        for tensor in (tensor for part in inputs for tensor in part.tensors()):
            tensor.record_stream(self.stream)
        for tensor in results:
            tensor.record_stream(current)
        return results

    def _capture(self, inputs: list[Inputs], preprocessing: Preprocessing) -> None:
        self.inputs = [Inputs.of(tuple(torch.empty_like(tensor) for tensor in part.tensors())) for part in inputs]
        graph = torch.cuda.CUDAGraph()
        # Reader threads pin memory meanwhile, which a capture by default forbids every thread of the process.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.outputs = self.step(self.inputs, preprocessing)
        self.graph = graph
