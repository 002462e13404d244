"""CUDA graphs: forward and backward of each op, and a training step, captured once and replayed with other data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

import alexnet_ext as ax
from tests import cases
from tests.cases import Case

from ..common import attempt, each_backend, examples, gradients, preferring
from ..report import Finding


def run(device: str) -> Iterator[Finding]:
    if device != "cuda":
        return
    for case, backend in examples(device):
        yield attempt(f"{case.id} {backend}", partial(op_replays, case, backend))
    for backend in each_backend(device):
        yield attempt(f"training step {backend}", partial(step_replays, backend))


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``work`` warmed up beside, as PyTorch asks, then captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def op_replays(case: Case, backend: str) -> None:
    tensors = cases.make(case, device="cuda")
    found: list[torch.Tensor] = []

    def work() -> None:
        found[:] = gradients(case, tensors, backend)

    graph = captured(work)
    others = cases.make(case, device="cuda", seed=5)
    expected = gradients(case, others, backend)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor.copy_(others[name])
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def step_replays(backend: str) -> None:
    """Three replayed steps move the weights as three eager ones do."""
    images, labels = torch.randn(8, 3, 227, 227, device="cuda"), torch.randint(0, 10, (8,), device="cuda")

    def trained(graphed: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = ax.models.alexnet("paper", num_classes=10, dropout=0.0).cuda()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        step()
        again = captured(step).replay if graphed else step
        model.load_state_dict(start)
        for _ in range(3):
            again()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    with preferring(backend, "cuda"):
        torch.testing.assert_close(trained(True), trained(False), rtol=1e-4, atol=1e-6)
