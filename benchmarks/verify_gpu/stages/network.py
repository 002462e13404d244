"""The whole network: ``check``'s comparisons with float64, then training as stock from the same start."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import alexnet_ext as ax
from alexnet_ext.ops import _backend
from alexnet_ext.selfcheck import compare

from ..common import SIZES, attempt, each_way, preferring
from ..report import Finding
from . import Task

IN_IT = ("conv2d_bias_relu", "relu_max_pool2d", "linear_bias_relu", "relu_lrn_max_pool2d")


def run(task: Task) -> Iterator[Finding]:
    device = task.device
    # The effect of TF32 and of cuDNN's choice on the last digits is not examined here.
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    asked = list(filter(task.wants, each_way(device)))
    variants = ("paper", "caffenet", "torchvision") if device == "cuda" else ("paper",)
    dtypes = ("fp32", "bf16", "fp16") if device == "cuda" else ("fp32",)
    for way in asked:
        yield attempt(f"what {way} runs", partial(runs_ours, way, device), backend=way)
        with preferring(way, device):
            for row in compare.check(device, op_names=(), variants=variants, dtypes=dtypes):
                detail = f"error {row.error:.2g}, at most {row.tolerance:.2g} {row.note}"
                yield Finding(f"{row.name} {row.dtype} {row.layout} {way}", row.ok, detail, about={"backend": way})
    if asked:
        yield from trained(asked, device)


def runs_ours(way: str, device: str) -> str:
    """Check that a training step of the paper's network calls the operators of this way, and no stock by accident."""
    model = ax.models.alexnet("paper", num_classes=10).to(device)
    images = torch.randn(2, 3, 227, 227, device=device)

    def step() -> None:
        model(images).sum().backward()

    with preferring(way, device):
        chosen = {op: _backend.decide(op, torch.device(device)).backend for op in IN_IT}
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            step()
    called = {
        event.key.removeprefix("alexnet_ext::") for event in profiled.key_averages() if "alexnet_ext::" in event.key
    }
    operators = [_backend.kernels(op, device)[by] for op, by in chosen.items() if by != "stock"]
    wanted = {f"{name}{end}" for name in operators for end in ("", "_backward")}
    assert wanted, f"all of {', '.join(IN_IT)} run stock"
    assert wanted <= called, f"not called: {', '.join(sorted(wanted - called))}; called: {', '.join(sorted(called))}"
    return ", ".join(f"{op} by {by}" for op, by in chosen.items())


def trained(asked: list[str], device: str) -> Iterator[Finding]:
    stock = losses(device, False, "stock", torch.contiguous_format)
    # The effect of rounding alone on a run: the same layers in another memory format.
    other = losses(device, False, "stock", torch.channels_last)
    allowed = 4 * max(abs(a - b) for a, b in zip(stock, other, strict=True)) + 1e-4 * max(stock)
    for way in asked:
        ours = losses(device, True, way, torch.channels_last)
        worst = max(abs(a - b) for a, b in zip(stock, ours, strict=True))
        detail = (
            f"loss {stock[0]:.4f} to {ours[-1]:.4f} (stock {stock[-1]:.4f}); apart {worst:.2g}, at most {allowed:.2g}"
        )
        name = f"{SIZES[device].training_steps} training steps {way}"
        yield Finding(name, worst <= allowed and ours[-1] < ours[0], detail, about={"backend": way})


def losses(device: str, fused: bool, way: str, memory_format: torch.memory_format) -> list[float]:
    """The losses of SGD on one batch that it can learn by heart, without dropout, fp32."""
    sizes = SIZES[device]
    torch.manual_seed(0)
    model = ax.models.alexnet("paper", fused=fused, num_classes=10, init="kaiming", dropout=0.0)
    images, labels = torch.randn(sizes.batch, 3, 227, 227), torch.randint(0, 10, (sizes.batch,))
    model, images = model.to(device, memory_format=memory_format), images.to(device, memory_format=memory_format)
    labels = labels.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    found = []
    with preferring(way, device):
        for _ in range(sizes.training_steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found
