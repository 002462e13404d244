"""``prove``: the kernels that a model calls, checked on the user's own device, raced there, and from then on trusted.

Each unit (an op's backend in one dtype and layout) runs small cases in a process of its own and is compared with
float64 on the CPU (``prover.py``, ``child.py``). What is right is compared with stock PyTorch at the model's own
shapes, and raced with it (``races.py``). Both are remembered (``ops/_known.py``). Not yet run on a GPU.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from ..models import alexnet
from ..ops import _backend, _known, _race
from ..ops._known import Proof, Unit
from . import prover, ranks
from .calls import Call, calls_of, units_of
from .races import Setting, TunedRow, race_calls

SECONDS = 60.0
"""For all of it; three quarters of it for the proofs."""
BATCH = 128
Tell = Callable[[str], None]


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True)
class Proved:
    """What ``prove`` found; ``str()`` of it is one line.

    ``proofs`` has the units that the model needs, with those that were known before; ``races`` what was raced now.
    """

    device: str
    seconds: float
    proofs: dict[Unit, Proof] = field(default_factory=dict)
    races: list[TunedRow] = field(default_factory=list)
    faster: tuple[str, ...] = ()

    def __str__(self) -> str:
        states: dict[str, set[str]] = {state: set() for state in ("proven", "refused", "unknown")}
        for unit, proof in self.proofs.items():
            states[proof.state].add(unit.op)
        ops = len({unit.op for unit in self.proofs})
        right, faster = len(states["proven"]), len(self.faster)
        said = [f"{right} right", f"{faster} faster than PyTorch"]
        for state, words in (("refused", "refused"), ("unknown", "not yet known")):
            found = [(unit, proof) for unit, proof in self.proofs.items() if proof.state == state]
            reasons = [f"{u.op} by {u.backend} ({p.reason})" for u, p in found if p.reason != _known.NOT_APPLICABLE]
            if reasons:
                more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
                said.append(f"{len(reasons)} {words}: {', '.join(reasons[:3])}{more}")
        return f"proved {ops} ops on {self.device} in {self.seconds:.0f} s: {', '.join(said)}"


def prove(
    device: torch.device | str | None = None,
    model: nn.Module | None = None,
    shape: Sequence[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.memory_format | None = None,
    again: bool = False,
    tell: Tell = _silent,
) -> Proved:
    """Check on this GPU the kernels that ``model`` calls, and race those that are right; ``backend="auto"`` follows.

    Takes at most a minute, and nothing where all is known already. What was found is kept in the user's cache folder
    for this GPU, driver, library, and versions, and for the settings of determinism and TF32 in force. A kernel is
    checked in a process of its own, which may crash: with guarded memory, odd sizes, all strides, three times, against
    float64. Where torch.distributed is initialized all ranks must call this: one of each kind of GPU does the work.
    Not yet run on a GPU.

    >>> print(alexnet_ext.prove(model=model, shape=(128, 3, 224, 224)))

    Args:
        device: a GPU; None is the current one.
        model: with fused layers, ``accelerate``'s or one's own; None is the paper's network. Its tensors stay as they
            are, on any device.
        shape: (N, C, H, W) of its input; None is (128, 3, 227, 227).
        dtype: fp32, bf16 or fp16, what the ops compute in; None is autocast's where that is on, else that of the
            model's parameters, else bf16.
        layout: the memory format of images; None is channels-last without a model or where it has such a parameter,
            else contiguous.
        again: race also what was raced before. What is proven or refused stays so (`alexnet tune --forget`).
        tell: called with a line of progress, again and again.

    Raises:
        RuntimeError: a device that is no GPU or that PyTorch does not see; a call during the capture of a CUDA graph,
            a trace or a transform.
        ValueError: another dtype, or a shape that has not four sizes.
    """
    where = setting(device, dtype, layout, model)
    calls = _calls(model, shape, where.dtype)
    proved = ranks.together(where.device, partial(_prove, calls, where, tell, again))
    return proved or Proved(_known.on(where.device).identity["device"], 0.0)  # ranks that differ prove nothing


def tune(
    model: nn.Module,
    shape: Sequence[int],
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format | None = torch.channels_last,
) -> list[TunedRow]:
    """``prove``, and race each op again; the rows of what was raced.

    A convolution's directions are raced where their choice is not known yet. Not yet run on a GPU.

    >>> rows = alexnet_ext.tune(alexnet_ext.models.alexnet().cuda(), (128, 3, 227, 227), dtype=torch.bfloat16)

    Args:
        model, shape, device, dtype, layout: as for ``prove``.

    Warns:
        UserWarning: a kernel that is wrong or does not run here, and is not used.

    Raises:
        RuntimeError, ValueError: as ``prove``.
    """
    proved = prove(device, model, shape, dtype=dtype, layout=layout, again=True)
    for unit, proof in proved.proofs.items():
        if proof.state == "refused":
            warnings.warn(f"{unit.op} by {unit.backend} is not used: {proof.reason}", stacklevel=2)
    return proved.races


def setting(
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    layout: torch.memory_format | None,
    model: nn.Module | None,
) -> Setting:
    """Where to prove. Raises as ``prove``."""
    if device is None:
        device = "cuda"
    device = torch.device(device)
    if not _backend.proves(device) or (device.type == "cuda" and not torch.cuda.is_available()):
        raise RuntimeError(f"device must be a GPU that PyTorch sees, got {str(device)!r}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if not _race.is_plain():
        raise RuntimeError("kernels cannot be proven during the capture of a CUDA graph, a trace or a transform")
    dtype = dtype or _dtype_of(model, device)
    if dtype not in _backend.PROVABLE:
        raise ValueError(f"dtype must be of {', '.join(map(str, _backend.PROVABLE))}, got {dtype}")
    return Setting(device, dtype, layout or _layout_of(model))


def _dtype_of(model: nn.Module | None, device: torch.device) -> torch.dtype:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    parameters = model.parameters() if model is not None else iter(())
    return next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), torch.bfloat16)


def _layout_of(model: nn.Module | None) -> torch.memory_format:
    """PyTorch convolves in channels-last where the weight is."""
    weights = [p for p in model.parameters() if p.dim() == 4] if model is not None else []
    is_last = model is None or any(_known.layout_of(weight) == "channels_last" for weight in weights)
    return torch.channels_last if is_last else torch.contiguous_format


def _calls(model: nn.Module | None, shape: Sequence[int] | None, dtype: torch.dtype) -> list[Call]:
    if model is None:
        with torch.device("meta"):
            model = alexnet("paper", init="torch")
    shape = (BATCH, 3, 227, 227) if shape is None else tuple(shape)
    if len(shape) != 4:
        raise ValueError(f"shape must be (N, C, H, W), got {shape}")
    return calls_of(model, shape, dtype)


def _prove(calls: Sequence[Call], where: Setting, tell: Tell, again: bool) -> Proved:
    """Prove what is unknown; race what was not raced, or all of it."""
    begun = time.monotonic()
    units = units_of(calls, where.device.type, where.dtype, where.layout)
    proofs = prove_units(units, where.device, 0.75 * SECONDS, tell)
    rows = list[TunedRow]()
    if _race.may_race():
        for row in race_calls(calls, where, begun + SECONDS, again):
            tell(f"racing {row.layer}, {row.direction}: {row.choice}")
            rows.append(row)
    known = _known.on(where.device)
    proofs |= {unit: known.proof(unit) for unit, proof in proofs.items() if proof.state == "proven"}  # races refuse too
    faster = tuple(dict.fromkeys(call.op for call in calls if _is_faster(call, where)))
    return Proved(known.identity["device"], time.monotonic() - begun, proofs, rows, faster)


def _is_faster(call: Call, where: Setting) -> bool:
    """Whether a proven kernel of ours won this call's race."""
    known, dtype, layout = _known.on(where.device), _known.name_of(where.dtype), call.layout(where.layout)
    choice = known.winner(call.op, dtype, layout, call.shape)
    return known.proof(Unit(call.op, choice, dtype, layout)).state == "proven"


def prove_units(units: Sequence[Unit], device: torch.device, seconds: float, tell: Tell = _silent) -> dict[Unit, Proof]:
    """What is known of these units, with what is proven now."""
    known = _known.on(device)
    unknown = [unit for unit in units if known.proof(unit).state == "unknown"]
    found = {}
    if unknown:
        name = known.identity["device"]
        found = prover.examine(
            unknown, device, seconds, lambda done, of, unit: tell(f"proving kernels on {name}: {done} of {of}, {unit}")
        )
        known.add(proofs={str(unit): proof for unit, proof in found.items() if proof.state != "unknown"})
    return {unit: found.get(unit) or known.proof(unit) for unit in units}
