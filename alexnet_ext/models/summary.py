"""The layer table of a network: output shapes, parameters, multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .alexnet import AlexNet, alexnet

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerRow:
    """One line of the table; sizes that a layer does not have are None, ``output`` is without the batch."""

    layer: str
    kind: str
    kernel: int | None
    stride: int | None
    padding: int | None
    groups: int | None
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int


def summary(model: AlexNet) -> list[LayerRow]:
    """The rows of ``model`` for one image: each convolution, pooling and linear layer with what follows it.

    Shapes are measured by running the stock twin of ``model`` on the meta device (no arithmetic, no memory), so
    that a fused model, whose layers run several at once, has the same table; parameters are counted in
    ``model`` itself.

    Raises TypeError for a model that ``alexnet_ext.models.alexnet`` did not make.
    """
    if not isinstance(model, AlexNet):
        raise TypeError(f"model must come from alexnet_ext.models.alexnet, got {type(model).__name__}")
    with torch.device("meta"):
        twin = alexnet(**asdict(model.config), fused=False, init="torch").eval()
        image = torch.empty(1, 3, model.config.image_size, model.config.image_size)
    layers = {name: layer for name, layer in twin.named_modules() if name and not isinstance(layer, nn.Sequential)}
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Any:
        def hook(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
            shapes[name] = tuple(output.shape[1:])

        return hook

    for name, layer in layers.items():
        layer.register_forward_hook(record(name))
    twin(image)
    counted = dict(model.named_modules())
    return [_row(group, [layers[name] for name in group], shapes, counted) for group in _groups(list(layers)) if group]


def _groups(names: Sequence[str]) -> list[list[str]]:
    """Layers that share a line: those of one number, parted where pooling begins."""
    groups: list[list[str]] = []
    number = ""
    for name in names:
        own = name[-1]
        if own != number or name.split(".")[-1].startswith("pool"):
            groups.append([])
        groups[-1].append(name)
        number = own
    return groups


def _row(
    names: list[str], layers: list[nn.Module], shapes: dict[str, tuple[int, ...]], counted: dict[str, nn.Module]
) -> LayerRow:
    name, main = next(
        ((n, layer) for n, layer in zip(names, layers, strict=True) if isinstance(layer, (nn.Conv2d, nn.Linear))),
        (names[0], layers[0]),
    )
    output = shapes[names[-1]]
    # Each weight is used once at each output position; the bias additions are not counted.
    weights = main.weight.numel() if isinstance(main, (nn.Conv2d, nn.Linear)) else 0
    return LayerRow(
        layer=name.rpartition(".")[2],
        kind=" + ".join(_label(layer) for layer in layers),
        kernel=_side(getattr(main, "kernel_size", None)),
        stride=_side(getattr(main, "stride", None)),
        padding=_side(main.padding) if isinstance(main, nn.Conv2d) else None,
        groups=main.groups if isinstance(main, nn.Conv2d) else None,
        output=output,
        parameters=sum(p.numel() for n in names for p in counted[n].parameters(recurse=False)),
        multiply_adds=weights * math.prod(output[1:]),
    )


def _label(layer: nn.Module) -> str:
    if isinstance(layer, nn.MaxPool2d):
        overlapping = _side(layer.stride) < _side(layer.kernel_size)
        return "max pooling, overlapping" if overlapping else "max pooling"
    if isinstance(layer, nn.Dropout):
        return f"dropout {layer.p:g}"
    names = {
        nn.Conv2d: "convolution",
        nn.Linear: "linear",
        nn.ReLU: "ReLU",
        nn.LocalResponseNorm: "LRN",
        nn.AdaptiveAvgPool2d: "average pooling",
    }
    return names.get(type(layer), type(layer).__name__)


def _side(size: Any) -> Any:
    """The layers here are square: (3, 3) is 3."""
    return size[0] if isinstance(size, tuple) else size


def total(rows: Sequence[LayerRow]) -> LayerRow:
    """The sums of parameters and multiply-adds, as a last line of the table."""
    parameters = sum(row.parameters for row in rows)
    return LayerRow(
        "total", "", None, None, None, None, rows[-1].output, parameters, sum(row.multiply_adds for row in rows)
    )


def training_flops(rows: Sequence[LayerRow]) -> int:
    """Floating-point operations to train on one image: 2 a multiply-add, three passes (forward, gradient of the
    input, gradient of the weights), less the input gradient that the first layer does not need."""
    return 2 * (3 * total(rows).multiply_adds - rows[0].multiply_adds)


def render(model: AlexNet) -> Table:
    """``summary(model)`` with its totals as a ``rich.table.Table`` to print."""
    from rich import box
    from rich.table import Table

    rows = summary(model)
    sums = total(rows)
    side = model.config.image_size
    table = Table(
        title=f"alexnet {model.config.variant!r}, input 3 x {side} x {side}",
        caption=f"{sums.multiply_adds / 1e9:.3f} G multiply-adds an image forward, "
        f"{training_flops(rows) / 1e9:.2f} GFLOP to train on one",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("layer", no_wrap=True)
    table.add_column("kind")
    # Kernel, stride, padding and groups, shortened so that the table fits 80 columns.
    for heading in ("k/s/p/g", "output", "parameters", "multiply-adds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        sizes = [row.kernel, row.stride, row.padding, row.groups]
        table.add_row(
            row.layer,
            row.kind,
            "/".join(str(size) for size in sizes if size is not None),
            " x ".join(map(str, row.output)),
            f"{row.parameters:,}",
            f"{row.multiply_adds:,}" if row.multiply_adds else "",
        )
    table.add_section()
    table.add_row("total", "", "", "", f"{sums.parameters:,}", f"{sums.multiply_adds:,}")
    return table
