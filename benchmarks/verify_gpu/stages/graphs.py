"""CUDA graphs: forward and backward of each op, and training steps, captured once and replayed with other data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

import alexnet_ext as ax
from alexnet_ext.data.batches import Batch, Drawn
from alexnet_ext.data.preprocessing import IMAGENET, Preprocessing
from alexnet_ext.training.graph import WARM_UP
from alexnet_ext.training.losses import Losses
from alexnet_ext.training.recipe import Recipe
from alexnet_ext.training.step import TrainingStep
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
        yield attempt(f"alexnet train's step {way}", partial(trained_alike, way), backend=way)


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


def training(device: torch.device, graphed: bool, batch: int, side: int, steps: int) -> list[torch.Tensor]:
    """The weights after some steps of ``alexnet train`` in bf16, each on images of its own. Once a graph is captured, a
    step that waits for the device is an error."""
    torch.manual_seed(0)
    recipe = Recipe("digits", precision="bf16", batch_size=batch, dropout=0.0, clip_norm=1.0)
    model = ax.models.alexnet("paper", num_classes=10, image_size=side, dropout=0.0, init="kaiming")
    step = TrainingStep(model.to(device).to(memory_format=torch.channels_last), recipe, device)
    if not graphed:
        step.graph = None
    losses, preprocessing = Losses(device), Preprocessing(side, side + 29, IMAGENET["mean"], IMAGENET["std"])
    read = losses.read()
    try:
        for number in range(steps):
            images = torch.randint(0, 256, (batch, side + 29, side + 29, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
            targets, indices = torch.randint(0, 10, (batch,)), torch.arange(batch)
            drawn = Drawn(torch.randint(0, 30, (batch, 2)), indices % 2 == 0, torch.randn(batch, 3))
            if graphed and number > WARM_UP:
                torch.cuda.set_sync_debug_mode("error")
            taken = step([Batch(images, targets, indices, [], drawn)], preprocessing, 1e-3 * (number + 1), number + 1)
            losses.add(number + 1, taken, {})
            read += losses.read()
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    read += losses.read(wait=True)
    assert len(read) == steps, f"{len(read)} losses of {steps} steps"
    return [weight.clone() for weight in step.weights().values()]


def trained_alike(way: str) -> str:
    """Replayed steps leave the weights of eager ones, bit for bit, and none waits for the device."""
    steps = WARM_UP + 6
    with preferring(way, "cuda"):
        eager, replayed = (training(torch.device("cuda"), graphed, 8, 227, steps) for graphed in (False, True))
    worst = max(float((a - b).abs().max()) for a, b in zip(eager, replayed, strict=True))
    assert worst == 0, f"after {steps} steps a weight is {worst:.3g} beside"
    return f"{steps} steps, the same bits, no wait"
