"""Kernels proven once for many processes: one rank of each kind of device does the work, the others take its table."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..ops import _known

T = TypeVar("T")


def are_many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def together(device: torch.device, work: Callable[[], T]) -> T | None:
    """``work()``, by one rank of each kind of device where there are many; all ranks must call this.

    A rank whose driver, versions, code or settings differ from those of its kind would follow a table that is not its
    own. Then nothing is done, every rank runs stock PyTorch, and the first one warns.

    Returns:
        what the work returned; None where the ranks differ.

    Raises:
        RuntimeError: on every rank, if the work failed on one.
    """
    if not are_many():
        return work()
    rank, known = dist.get_rank(), _known.on(device)
    identities = _gathered(known.identity)
    kinds = [(identity["device"], identity["capability"]) for identity in identities]
    leader = kinds.index(kinds[rank])
    differing = _differing(identities, kinds)
    if differing:
        _known.distrust(device, f"the ranks differ: {differing}")
        if rank == 0:
            warnings.warn(f"all ops run on stock PyTorch, as the ranks differ: {differing}", stacklevel=4)
        return None
    _known.distrust(device, "")
    done: tuple[T | None, str] = (None, "")
    if leader == rank:
        try:
            done = work(), ""
        except Exception as error:  # the others must not wait for ever
            done = None, f"{type(error).__name__}: {error}"
    tables = _gathered((done, known.proofs, known.races))
    for other, ((_, trouble), _, _) in enumerate(tables):
        if trouble:
            raise RuntimeError(f"rank {other} could not prove the kernels: {trouble}")
    (result, _), proofs, races = tables[leader]
    alike = [table[1] for kind, table in zip(kinds, tables, strict=True) if kind == kinds[rank]]
    refused = {unit: proof for table in alike for unit, proof in table.items() if proof.state == "refused"}
    known.adopt({**proofs, **refused}, races)
    found: T = result
    return found


def _gathered(mine: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def _differing(identities: list[dict[str, Any]], kinds: list[Any]) -> str:
    """What a rank has that its kind's first one has not; "" for nothing."""
    for rank, identity in enumerate(identities):
        first = kinds.index(kinds[rank])
        for name, value in identity.items():
            if identities[first].get(name) != value:
                return f"{name} is {value!r} on rank {rank}, and {identities[first].get(name)!r} on rank {first}"
    return ""
