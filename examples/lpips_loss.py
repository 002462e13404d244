"""LPIPS as a loss: turn noise into a picture, on the accelerated AlexNet of the lpips package.

    python examples/lpips_loss.py [--backbone alexnet-owt-7be5be79.pth] [--steps 200] [--out lpips.png]

The layers' weights come with the package. ``--backbone`` is a file of torchvision's weights. Without it AlexNet's own
weights are random: the loss is still a distance, of other features.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import lpips
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import alexnet_ext as ax


def target(side: int) -> Tensor:
    """(1, 3, side, side) in -1 to 1: a sun over waves."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    sun = ((x - 0.3) ** 2 + (y + 0.35) ** 2 < 0.08).float()
    sea = (y > 0.2 + 0.05 * torch.sin(12 * x)).float()
    sky = torch.stack([0.1 - 0.6 * y, 0.2 - 0.3 * y, 0.6 + 0 * y])
    water = torch.stack([-0.8 + 0.1 * torch.sin(30 * y), -0.4 + 0.2 * torch.sin(30 * y), 0.3 + 0 * y])
    gold = torch.tensor([1.0, 0.7, -0.4])[:, None, None]
    return (sky * (1 - sea) * (1 - sun) + gold * sun * (1 - sea) + water * sea).clamp(-1, 1)[None]


def picture(images: list[Tensor], path: Path) -> None:
    """Save images of -1 to 1 side by side."""
    row = torch.cat([image.detach()[0] for image in images], 2)
    pixels = ((row.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backbone", type=Path, help="torchvision's alexnet-owt-*.pth")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("lpips.png"))
    options = parser.parse_args()

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips uses torchvision's older arguments
        distance = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    if options.backbone is not None:
        features = torch.load(options.backbone, weights_only=True)
        convolutions = [module for module in distance.net.modules() if isinstance(module, torch.nn.Conv2d)]
        for convolution, number in zip(convolutions, (0, 3, 6, 8, 10), strict=True):
            prefix = f"features.{number}."
            convolution.load_state_dict({kind: features[prefix + kind] for kind in ("weight", "bias")})
    distance.requires_grad_(False)
    print(ax.accelerate(distance))

    wanted = target(options.side)
    start = 0.3 * torch.randn_like(wanted)
    image = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.03)
    for i in range(options.steps):
        optimizer.zero_grad(set_to_none=True)
        loss = distance(image, wanted).mean() + 0.1 * (image - wanted).square().mean()
        loss.backward()
        optimizer.step()
        if i % 20 == 0 or i == options.steps - 1:
            print(f"step {i + 1}: loss {loss.item():.4f}")
    picture([start, image, wanted], options.out)
    print(f"start, result and target: {options.out}")


if __name__ == "__main__":
    main()
