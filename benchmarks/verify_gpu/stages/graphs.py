"""CUDA graphs: forward and backward of each op, and a training step, captured once and replayed with other data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import alexnet_ext as ax
from tests.support import cases
from tests.support.cases import Case

from ..common import attempt, captured, each_way, examples, gradients, preferring
from ..report import Finding
from . import Task


def run(task: Task) -> Iterator[Finding]:
    if task.device != "cuda":
        return
    torch.backends.cudnn.deterministic = True  # cuDNN's own choice is not examined here
    for case, way in examples(task.device, task.wants):
        yield attempt(f"{case.id} {way}", partial(op_replays, case, way), backend=way)
    for way in filter(task.wants, each_way(task.device)):
        yield attempt(f"training step {way}", partial(step_replays, way), backend=way)


def op_replays(case: Case, way: str) -> None:
    tensors = cases.make(case, device="cuda")
    found: list[torch.Tensor] = []

    def work() -> None:
        found[:] = gradients(case, tensors, way)

    graph = captured(work)
    others = cases.make(case, device="cuda", seed=5)
    expected = gradients(case, others, way)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor.copy_(others[name])
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def step_replays(way: str) -> str:
    """Three replayed steps move the weights as three eager steps do."""
    images, labels = torch.randn(8, 3, 227, 227, device="cuda"), torch.randint(0, 10, (8,), device="cuda")

    def moved(graphed: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = ax.models.alexnet("paper", num_classes=10, dropout=0.0, init="kaiming").cuda()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        again = captured(step).replay if graphed else step
        model.load_state_dict(start)
        for _ in range(3):
            again()
        return torch.cat([(now - start[name]).flatten() for name, now in model.state_dict().items()])

    with preferring(way, "cuda"):
        replayed, eager = moved(True), moved(False)
    error, size = (replayed - eager).norm().item(), eager.norm().item()
    assert 0 < size < float("inf"), f"three steps move the weights by {size}"
    assert error <= 1e-3 * size, f"moved by {size:.3g}, replayed {error:.3g} beside"
    return f"moved by {size:.3g}, replayed {error:.2g} beside"
