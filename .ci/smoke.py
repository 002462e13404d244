"""Runs every op natively, with its gradient, and compares it with stock PyTorch. Needs an installed wheel only."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

import alexnet_ext as ax
from alexnet_ext import _library

Tensors = list[torch.Tensor]


def lrn(x: torch.Tensor) -> torch.Tensor:
    return F.local_response_norm(x, 5, 1e-1, 0.75, 2.0)


def relu_pool(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(F.relu(x), 3, 2)


def biased(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.relu(x + bias[:, None, None])


block = {"lrn_size": 5, "alpha": 1e-1, "beta": 0.75, "k": 2.0, "kernel_size": 3, "stride": 2}

# Name: shapes of the tensors, the compiled op, the same by stock layers.
OPS: dict[str, tuple[list[tuple[int, ...]], Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "local_response_norm": (
        [(2, 17, 9, 7)],
        lambda x: ax.ops.local_response_norm(x, 5, 1e-1, 0.75, 2.0, backend="native"),
        lrn,
    ),
    "relu_max_pool2d": (
        [(2, 17, 9, 7)],
        lambda x: ax.ops.relu_max_pool2d(x, 3, 2, backend="native"),
        relu_pool,
    ),
    "conv2d_bias_relu": (
        [(2, 4, 9, 7), (6, 2, 3, 3), (6,)],
        lambda x, weight, bias: ax.ops.conv2d_bias_relu(x, weight, bias, padding=1, groups=2, backend="native"),
        lambda x, weight, bias: F.relu(F.conv2d(x, weight, bias, padding=1, groups=2)),
    ),
    "linear_bias_relu": (
        [(9, 33), (17, 33), (17,)],
        lambda x, weight, bias: ax.ops.linear_bias_relu(x, weight, bias, backend="native"),
        lambda x, weight, bias: F.relu(F.linear(x, weight, bias)),
    ),
    "relu_lrn_max_pool2d": (
        [(2, 17, 9, 7), (17,)],
        lambda x, bias: ax.ops.relu_lrn_max_pool2d(x, bias, **block, backend="native"),
        lambda x, bias: F.max_pool2d(lrn(biased(x, bias)), 3, 2),
    ),
    "relu_max_pool2d_lrn": (
        [(2, 17, 9, 7), (17,)],
        lambda x, bias: ax.ops.relu_max_pool2d_lrn(x, bias, **block, backend="native"),
        lambda x, bias: lrn(F.max_pool2d(biased(x, bias), 3, 2)),
    ),
}


def results(op: Callable[..., torch.Tensor], tensors: Tensors) -> Tensors:
    """The output and the gradient of every tensor."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = op(*leaves)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), leaves)]


def main() -> int:
    cpu, cuda = _library.LIBRARIES
    print(f"torch {torch.__version__}, alexnet_ext from {_library.FOLDER}")
    for library in (cpu, cuda):
        print(f"  {library.name}: {'loaded' if library.loaded else f'not loaded: {library.reason}'}")
    # The arguments name the libraries that this installation must have: "cpu" alone, or both.
    for name in sys.argv[1:]:
        if not next(library for library in (cpu, cuda) if library.name == name).loaded:
            print(f"the {name} library should be loaded")
            return 1
    torch.manual_seed(0)
    for name, (shapes, fused, stock) in OPS.items():
        for dtype in (torch.float32, torch.float64):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
                if tensors[0].dim() == 4:
                    tensors[0] = tensors[0].to(memory_format=memory_format)
                for got, expected in zip(results(fused, tensors), results(stock, tensors), strict=True):
                    torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")
        print(f"  {name}: as stock")
    images, offsets = torch.randint(0, 256, (2, 9, 8, 3), dtype=torch.uint8), torch.tensor([[0, 1], [2, 0]])
    drawn = offsets, torch.tensor([False, True]), torch.randn(2, 3)
    colours = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    found = (ax.ops.augment(images, *drawn, 7, **colours, backend=backend) for backend in ("native", "stock"))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    print("  augment: as stock")
    return 0


if __name__ == "__main__":
    sys.exit(main())
