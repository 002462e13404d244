"""The layer table of a network: output shapes, parameters, multiply-adds. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from .variants import ACTIVATIONS, ANY_SIZE, HIDDEN, STRIDE, VARIANTS, WINDOW, AlexNetConfig, stages

if TYPE_CHECKING:
    from rich.table import Table

KINDS = {"norm": "LRN", "pool": "max pooling, overlapping"}


@dataclass(frozen=True)
class LayerRow:
    """One line of the table. Sizes that a layer does not have are None; ``output`` is without the batch."""

    layer: str
    kind: str
    kernel: int | None
    stride: int | None
    padding: int | None
    groups: int | None
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int


def layer_rows(config: AlexNetConfig) -> list[LayerRow]:
    """A row for each convolution, pooling and linear layer with the layers that follow it, for one image.

    Each weight is used once at each output position; bias additions are not counted.
    """
    table, found = VARIANTS[config.variant], stages(config)
    activation = ACTIVATIONS[config.activation]
    names = KINDS | {"relu": activation}
    rows = []
    for index, stage in enumerate(found, 1):
        conv = stage.conv
        first = stage.after.index("pool") if "pool" in stage.after else len(stage.after)
        kinds = [["convolution", *(names[kind] for kind in stage.after[:first])]]
        kinds += [[names[kind] for kind in stage.after[first:]]] if first < len(stage.after) else []
        weights = conv.channels * stage.in_channels // conv.groups * conv.kernel**2
        rows.append(
            LayerRow(
                f"conv{index}",
                " + ".join(kinds[0]),
                *(conv.kernel, conv.stride, stage.padding, conv.groups),
                (conv.channels, stage.size, stage.size),
                weights + conv.channels,
                weights * stage.size**2,
            )
        )
        if len(kinds) > 1:
            output = (conv.channels, stage.output, stage.output)
            rows.append(LayerRow(f"pool{index}", " + ".join(kinds[1]), WINDOW, STRIDE, None, None, output, 0, 0))
    channels, side = found[-1].conv.channels, found[-1].output
    if table.any_size:
        side = ANY_SIZE
        output = (channels, side, side)
        rows.append(LayerRow("avgpool", "average pooling", None, None, None, None, output, 0, 0))
    dropout = f"dropout {config.dropout:g}"
    hidden = (dropout, "linear", activation) if table.dropout_first else ("linear", activation, dropout)
    sizes = [channels * side * side, HIDDEN, HIDDEN, config.num_classes]
    for index, (inputs, outputs) in enumerate(pairwise(sizes), 6):
        kind = " + ".join(hidden) if index < 8 else "linear"
        weights = inputs * outputs
        rows.append(LayerRow(f"fc{index}", kind, None, None, None, None, (outputs,), weights + outputs, weights))
    return rows


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


def render(config: AlexNetConfig, rows: Sequence[LayerRow]) -> Table:
    """The rows with their totals as a ``rich.table.Table`` to print."""
    from rich import box
    from rich.table import Table

    sums = total(rows)
    side = config.image_size
    table = Table(
        title=f"alexnet {config.variant!r}, input 3 x {side} x {side}",
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
