"""Local response normalization in plain PyTorch."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import autocast_enabled, overrides
from .._reference import differentiable, first_gradient

HALF = (torch.float16, torch.bfloat16)


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """``F.local_response_norm``; bf16 and fp16 are computed in fp32, as the compiled op does.

    (Stock squares fp16 in fp16, so 300 becomes 0, and has no bf16 or fp16 kernel for 4-D tensors on the CPU.)
    """
    if overrides(x):
        return F.local_response_norm(x, size, alpha, beta, k)
    with torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext():
        wide = x.float() if x.dtype in HALF else x
        y = F.local_response_norm(wide, size, alpha, beta, k)
        return y.to(x.dtype) if x.dtype in HALF else y


def local_response_norm_backward(dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    x = differentiable(x)
    return first_gradient(local_response_norm(x, size, alpha, beta, k), [x], dy)[0]
