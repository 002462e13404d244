"""What a rank holds and what it sends in a step of training, by arithmetic. Needs no PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..layers import layer_rows
from ..variants import HIDDEN, VARIANTS, AlexNetConfig, stages

if TYPE_CHECKING:
    from rich.table import Table

LAYOUTS = ("data", "towers", "weird-trick")
BORDERS = ("exchange", "per-tower")
TOWERS = 2
ITEMSIZES = {"fp32": (4, 4), "bf16": (2, 2), "fp16": (2, 4)}  # of activations and gradients; fp16 has fp32 weights


def check(layout: str, variant: str, ranks: int, optimizer: str = "sgd", lrn_border: str = "exchange") -> None:
    """Raise ValueError where a network of ``variant`` cannot train in this layout on this number of ranks."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if lrn_border not in BORDERS:
        raise ValueError(f"lrn_border must be one of {', '.join(BORDERS)}, got {lrn_border!r}")
    if lrn_border == "per-tower" and layout != "towers":
        raise ValueError(f"lrn_border 'per-tower' needs layout 'towers', got {layout!r}")
    if layout == "data":
        return
    if all(conv.groups == 1 for conv in VARIANTS[variant].convs):
        raise ValueError(f"layout {layout!r} needs a variant with two towers, got {variant!r}")
    if layout == "towers" and ranks % TOWERS:
        raise ValueError(f"layout 'towers' needs an even number of ranks, got {ranks}")
    if layout == "weird-trick" and HIDDEN % ranks:
        raise ValueError(f"layout 'weird-trick' needs a number of ranks that divides {HIDDEN}, got {ranks}")
    if optimizer == "lars":
        raise ValueError(f"layout {layout!r} cannot train with optimizer 'lars', which needs the norms of whole layers")


class Plan(NamedTuple):
    """``ranks`` that train ``config`` on ``images`` in all a step, in one of ``LAYOUTS``. ``itemsize`` is the bytes of
    an activation, ``gradient_itemsize`` of a gradient."""

    config: AlexNetConfig
    layout: str
    ranks: int
    images: int
    itemsize: int = 4
    gradient_itemsize: int = 4
    lrn_border: str = "exchange"

    @property
    def shares(self) -> int:
        """The ranks with images of their own."""
        return self.ranks // TOWERS if self.layout == "towers" else self.ranks

    @property
    def own_images(self) -> int:
        """The images of the rank with the most."""
        return -(-self.images // self.shares)


class Sent(NamedTuple):
    """Bytes that the rank with the most images sends before, or for, ``layer`` in one step."""

    layer: str
    what: str
    forward: int
    backward: int


def exchanged(plan: Plan) -> list[Sent]:
    """What a rank sends. An all-gather of s bytes from each of W ranks sends (W - 1) s; so does its backward, a
    reduce-scatter. An all-reduce of p bytes sends 2 (W - 1) / W p."""
    found = {"data": list, "towers": lambda: _towers(plan), "weird-trick": lambda: _weird(plan)}[plan.layout]()
    parameters = held(plan) if plan.layout != "weird-trick" else held(plan) - _split_parameters(plan)
    if plan.shares > 1:
        bytes_sent = 2 * (plan.shares - 1) * parameters * plan.gradient_itemsize // plan.shares
        found.append(Sent("weights", "gradients, summed", 0, bytes_sent))
    return found


def _towers(plan: Plan) -> list[Sent]:
    table, found = VARIANTS[plan.config.variant], stages(plan.config)
    a_value, sent = plan.own_images * plan.itemsize, []
    if table.lrn is not None and plan.lrn_border == "exchange":
        for index, stage in enumerate(found[:2], 1):
            pooled = stage.after.index("pool") < stage.after.index("norm")
            count = table.lrn.size // 2 * (stage.output if pooled else stage.size) ** 2 * a_value
            sent.append(Sent(f"norm{index}", "channels at the border", count, count))
    channels = {"conv3": found[1], "fc6": found[-1]}
    halves = {name: stage.conv.channels // TOWERS * stage.output**2 for name, stage in channels.items()}
    halves |= {"fc7": HIDDEN // TOWERS}
    sent += [Sent(name, "a tower's activations", half * a_value, half * a_value) for name, half in halves.items()]
    return [*sent, Sent("fc8", "a tower's activations", HIDDEN // TOWERS * a_value, 0)]


def _weird(plan: Plan) -> list[Sent]:
    last, others = stages(plan.config)[-1], plan.ranks - 1
    columns = HIDDEN // plan.ranks * plan.itemsize
    features = last.conv.channels * last.output**2 * plan.own_images * plan.itemsize * others
    return [
        Sent("fc6", "own images' features", features, features),
        Sent("fc7", "own part of fc6's outputs", columns * plan.images * others, columns * plan.images * others),
        Sent(
            "fc8",
            "other images' part of fc7's",
            columns * (plan.images - plan.own_images),
            columns * plan.own_images * others,
        ),
    ]


def held(plan: Plan) -> int:
    """The parameters of a rank."""
    rows = {row.layer: row.parameters for row in layer_rows(plan.config)}
    if plan.layout == "towers":
        return rows["fc8"] + (sum(rows.values()) - rows["fc8"]) // TOWERS
    if plan.layout == "weird-trick":
        return sum(rows.values()) - rows["fc6"] - rows["fc7"] + _split_parameters(plan)
    return sum(rows.values())


def _split_parameters(plan: Plan) -> int:
    rows = {row.layer: row.parameters for row in layer_rows(plan.config)}
    return (rows["fc6"] + rows["fc7"]) // plan.ranks


def memory(plan: Plan) -> dict[str, int]:
    """Bytes of a rank by kind: weights, gradients and momenta in fp32 (in bf16 also those weights, and gradients of
    two bytes), and the outputs of the layers that a backward reads, with what exchanges put beside them."""
    parameters, half = held(plan), plan.gradient_itemsize == 2
    towers = TOWERS if plan.layout == "towers" else 1
    values = 3 * plan.config.image_size**2
    for stage in stages(plan.config):
        values += stage.conv.channels // towers * (stage.size**2 + stage.output**2 * ("pool" in stage.after))
    outputs = values * plan.own_images
    last = stages(plan.config)[-1]
    if towers > 1:  # the gathered inputs of conv3, fc6, fc7 and fc8
        second = stages(plan.config)[1]
        outputs += plan.own_images * (second.conv.channels * second.output**2 + last.conv.channels * last.output**2)
        outputs += plan.own_images * 3 * HIDDEN
    elif plan.layout == "weird-trick":
        outputs += plan.images * (last.conv.channels * last.output**2 + HIDDEN + 2 * HIDDEN // plan.ranks)
    else:
        outputs += plan.own_images * 2 * HIDDEN
    return {
        "weights": parameters * (6 if half else 4),
        "gradients": parameters * plan.gradient_itemsize,
        "momenta": parameters * 4,
        "activations": outputs * plan.itemsize,
    }


def render(plan: Plan) -> Table:
    """``exchanged`` and ``memory`` as a ``rich.table.Table`` to print."""
    from rich import box
    from rich.table import Table

    rows, kinds = exchanged(plan), memory(plan)
    parts = ", ".join(f"{kind} {count / 2**20:,.0f}" for kind, count in kinds.items())
    table = Table(
        title=f"{plan.layout} on {plan.ranks} ranks, {plan.images} images a step: bytes that a rank sends",
        caption=f"{held(plan):,} parameters a rank; {sum(kinds.values()) / 2**20:,.0f} MiB: {parts}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading, side in (("layer", "left"), ("what", "left"), ("forward", "right"), ("backward", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(row.layer, row.what, f"{row.forward:,}", f"{row.backward:,}")
    table.add_section()
    table.add_row("total", "", f"{sum(r.forward for r in rows):,}", f"{sum(r.backward for r in rows):,}")
    return table
