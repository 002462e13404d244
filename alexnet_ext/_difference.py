"""How far a tensor is from its reference: the one comparison of results. Each caller has a tolerance of its own."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def relative_difference(tensor: Tensor, reference: Tensor, order: float = math.inf, least: float = 0.0) -> float:
    """``norm(tensor - reference) / max(norm(reference), least)``; infinity where the two do not agree at all.

    They do not if the shapes differ, or if a NaN or an infinity has no equal at its place in the other. Equal ones
    count as zeros. In tensors of integers or bools every difference is infinite. Empty tensors agree.

    Args:
        tensor, reference: on one device. Of two floating-point dtypes the wider one is compared, at least fp32.
        order: of the norm, as in ``torch.linalg.vector_norm``: infinity for the largest value, 2 for the square root
            of the sum of squares.
        least: the reference's norm counts as at least this. If both are 0, every difference is infinite.
    """
    if tensor.shape != reference.shape:
        return math.inf
    if not (tensor.is_floating_point() and reference.is_floating_point()):
        return 0.0 if tensor.dtype == reference.dtype and torch.equal(tensor, reference) else math.inf
    if not reference.numel():
        return 0.0
    wide = functools.reduce(torch.promote_types, (tensor.dtype, reference.dtype, torch.float32))
    ours, theirs = tensor.detach().to(wide), reference.detach().to(wide)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    difference = _norm((ours - theirs).masked_fill_(same, 0.0), order)
    if difference == 0:
        return 0.0
    scale = max(_norm(theirs.nan_to_num(0.0, 0.0, 0.0), order), least)
    return difference / scale if difference < math.inf and 0 < scale < math.inf else math.inf


def _norm(x: Tensor, order: float) -> float:
    return torch.linalg.vector_norm(x, order, dtype=torch.float64).item()
