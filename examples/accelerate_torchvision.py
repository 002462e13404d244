"""Accelerate torchvision's AlexNet: one line, the same results, and the time of a training step with and without.

python examples/accelerate_torchvision.py [--model vgg11] [--batch-size 32] [--steps 10]
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision
from torch import Tensor, nn

import alexnet_ext as ax


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """One training step; its loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="alexnet", help="a model of torchvision.models")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--side", type=int, default=224, help="side of the images")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = torchvision.models.get_model(options.model, weights=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)  # made before: it stays valid
    images = torch.randn(options.batch_size, 3, options.side, options.side)
    labels = torch.randint(0, 1000, (options.batch_size,))

    with torch.no_grad():
        model.eval()
        before = model(images)
        with ax.accelerated(model) as report:
            after = model(images)
        model.train()
    print(report)
    print(f"largest difference of the outputs: {float((after - before).abs().max()):.2e}")

    times: dict[str, list[float]] = {"stock": [], "accelerated": []}
    for i in range(options.steps):
        for name in times:  # in turns, so that other load on the machine slows both
            if name == "accelerated":
                ax.accelerate(model)
            began = time.perf_counter()
            loss = step(model, optimizer, images, labels)
            times[name].append(time.perf_counter() - began)
            ax.restore(model)
        print(f"step {i + 1}: loss {loss:.3f}")
    for name, seconds in times.items():
        print(f"{name}: {sorted(seconds)[len(seconds) // 2] * 1000:.0f} ms a step")


if __name__ == "__main__":
    main()
