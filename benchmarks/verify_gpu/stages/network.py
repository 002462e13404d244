"""The whole network: ``check``'s comparisons with float64, then training beside stock from the same start."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import alexnet_ext as ax
from alexnet_ext import diagnostics

from ..common import SIZES, each_backend, preferring
from ..report import Finding


def run(device: str) -> Iterator[Finding]:
    sizes = SIZES[device]
    variants = ("paper", "caffenet", "torchvision") if device == "cuda" else ("paper",)
    dtypes = ("fp32", "bf16", "fp16") if device == "cuda" else ("fp32",)
    for backend in each_backend(device):
        with preferring(backend, device):
            for row in diagnostics.check(device, op_names=(), variants=variants, dtypes=dtypes):
                detail = f"error {row.error:.2g}, at most {row.tolerance:.2g} {row.note}"
                yield Finding(f"{row.name} {row.dtype} {row.layout} {backend}", row.ok, detail)
    stock = losses(device, False, "stock", torch.contiguous_format)
    # What rounding alone does to a run: the same layers in another memory format.
    other = losses(device, False, "stock", torch.channels_last)
    allowed = 4 * max(abs(a - b) for a, b in zip(stock, other, strict=True)) + 1e-4 * max(stock)
    for backend in each_backend(device):
        ours = losses(device, True, backend, torch.channels_last)
        worst = max(abs(a - b) for a, b in zip(stock, ours, strict=True))
        detail = (
            f"loss {stock[0]:.4f} to {ours[-1]:.4f} (stock {stock[-1]:.4f}); apart {worst:.2g}, at most {allowed:.2g}"
        )
        yield Finding(
            f"{sizes.training_steps} training steps {backend}", worst <= allowed and ours[-1] < ours[0], detail
        )


def losses(device: str, fused: bool, backend: str, memory_format: torch.memory_format) -> list[float]:
    """Of SGD on one batch that it can learn by heart, without dropout, fp32."""
    sizes = SIZES[device]
    torch.manual_seed(0)
    model = ax.models.alexnet("paper", fused=fused, num_classes=10, init="kaiming", dropout=0.0)
    images, labels = torch.randn(sizes.batch, 3, 227, 227), torch.randint(0, 10, (sizes.batch,))
    model, images = model.to(device, memory_format=memory_format), images.to(device, memory_format=memory_format)
    labels = labels.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    found = []
    with preferring(backend, device):
        for _ in range(sizes.training_steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found
