"""Argument checks shared by every backend: PyTorch's exception types, one sentence each."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch.overrides import has_torch_function

IntPair = int | Sequence[int]
COLOURS = 3

_INHERITED: Any = torch.Tensor.__torch_function__
_DISABLED: Any = torch._C._disabled_torch_function_impl


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def overrides(*values: object) -> bool:
    """Whether the class of one of these, a Tensor or not, defines its own ``__torch_function__``."""
    if not has_torch_function(values):
        return False
    for value in values:
        function = getattr(type(value), "__torch_function__", _DISABLED)
        if function is not _DISABLED and getattr(function, "__func__", function) is not _INHERITED.__func__:
            return True
    return False


def check_same(name: str, value: torch.Tensor, x: torch.Tensor) -> None:
    """``value`` must live where ``x`` lives, in its dtype."""
    if value.device != x.device:
        raise RuntimeError(f"{name} is on device {value.device}, expected {x.device}, the device of x")
    if value.dtype != x.dtype:
        raise RuntimeError(f"{name} has dtype {value.dtype}, expected {x.dtype}, the dtype of x")


def autocast_enabled(x: torch.Tensor) -> bool:
    """Whether autocast is on for x's device (PyTorch raises when asked about meta tensors, which have none)."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def computed_in(x: torch.Tensor) -> torch.dtype:
    """The dtype that a product with x is computed in: autocast's, where it is on and x is not fp64, else x's own."""
    casts = autocast_enabled(x) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


def check_bias(bias: torch.Tensor | None, channels: int, x: torch.Tensor) -> None:
    if bias is None:
        return
    check_tensor("bias", bias)
    if bias.dim() != 1 or bias.shape[0] != channels:
        raise RuntimeError(f"bias has shape {list(bias.shape)}, expected [{channels}], one value a channel")
    if bias.device != x.device:
        raise RuntimeError(f"bias is on device {bias.device}, expected {x.device}, the device of x")


def check_operands(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """A product's weight and bias must live where x lives, in its dtype; autocast brings dtypes together itself."""
    if weight.device != x.device or not autocast_enabled(x):
        check_same("weight", weight, x)
        if bias is not None:
            check_same("bias", bias, x)


def expands(value: torch.Tensor, shape: Sequence[int]) -> bool:
    """Whether ``value.expand(shape)`` is possible."""
    last = shape[len(shape) - value.dim() :]
    return value.dim() <= len(shape) and all(n in (1, m) for n, m in zip(value.shape, last, strict=True))


def check_lrn(size: Any, alpha: Any, beta: Any, k: Any, name: str = "size") -> tuple[Any, ...]:
    """LRN's constants, checked, as Python's own numbers."""
    whole = integer(size)
    if whole is None:
        raise TypeError(f"{name} must be an int, got {type(size).__name__} {size!r}")
    if whole <= 0:
        raise RuntimeError(f"{name} must be greater than zero, got {size}")
    return whole, *(real(which, value) for which, value in (("alpha", alpha), ("beta", beta), ("k", k)))


def real(name: str, value: Any) -> Any:
    """A real number, NumPy's included, as Python's own."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, Real)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__} {value!r}")
    return value if isinstance(value, (int, float, torch.SymFloat)) else float(value)


def integer(value: Any) -> Any:
    """``value`` as an int where PyTorch accepts it as one, as it does NumPy's integers; else None."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    try:
        return operator.index(value)
    except TypeError:
        return None


def pair(name: str, value: IntPair, at_least: int) -> list[int]:
    """``value`` as [height, width]; one int means both."""
    values: list[Any] = [integer(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or None in values:
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if min(values) < at_least:
        raise RuntimeError(f"{name} must be at least {at_least}, got {value!r}")
    if max(values) >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value!r}")
    return values


def pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Length of one pooled side (the rule of ``torch.nn.MaxPool2d``).

    With ``ceil_mode`` a last window that would start beyond the input and its left padding is dropped.
    """
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    length = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (length - 1) * stride >= size + padding:
        length -= 1
    return length


def check_pool(
    x: torch.Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> list[int]:
    """Check a pooling call over the last two dims of x and return the output's [height, width]."""
    if x.dim() not in (3, 4) or 0 in x.shape[-3:]:
        raise RuntimeError(
            f"x has shape {list(x.shape)}, expected 3D (C, H, W) or 4D (N, C, H, W) with non-empty C, H and W"
        )
    for side in (0, 1):
        if padding[side] > kernel_size[side] // 2:
            raise RuntimeError(
                f"padding must be at most half of kernel_size, got padding {padding} and kernel_size {kernel_size}"
            )
    out = [pooled_size(x.shape[-2 + i], kernel_size[i], stride[i], padding[i], dilation[i], ceil_mode) for i in (0, 1)]
    if min(out) < 1:
        raise RuntimeError(
            f"kernel_size {kernel_size} with dilation {dilation} and padding {padding} leaves an output of {out} "
            f"for x of shape {list(x.shape)}, expected at least 1 x 1"
        )
    return out


def check_images(images: torch.Tensor) -> None:
    check_tensor("images", images)
    if images.dim() == 3:
        whole = images.shape[1] % 3 == 0 and images.shape[2] % 2 == 0
    else:
        whole = images.dim() == 4 and images.shape[3] == COLOURS
    if not whole:
        raise RuntimeError(
            f"images has shape {list(images.shape)}, expected (N, H, W, {COLOURS}), or (N, 3 H / 2, W) of even H and W"
        )
    if images.dtype != torch.uint8:
        raise RuntimeError(f"images has dtype {images.dtype}, expected torch.uint8")


def sides(images: torch.Tensor) -> tuple[int, int]:
    """Height and width of images as ``check_images`` allows."""
    return images.shape[1] // 3 * 2 if images.dim() == 3 else images.shape[1], images.shape[2]


def check_drawn(images: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor, shifts: torch.Tensor) -> None:
    """What is drawn for each image: an offset (2 integers), a flip (bool) and a shift of each colour (fp32)."""
    for name, value, columns in (("offsets", offsets, (2,)), ("flips", flips, ()), ("shifts", shifts, (COLOURS,))):
        check_tensor(name, value)
        if value.shape != (images.shape[0], *columns):
            raise RuntimeError(f"{name} has shape {list(value.shape)}, expected {[images.shape[0], *columns]}")
        if value.device != images.device:
            raise RuntimeError(f"{name} is on device {value.device}, expected {images.device}, the device of images")
    if offsets.dtype.is_floating_point or offsets.dtype.is_complex or offsets.dtype == torch.bool:
        raise RuntimeError(f"offsets has dtype {offsets.dtype}, expected integers")
    if flips.dtype != torch.bool:
        raise RuntimeError(f"flips has dtype {flips.dtype}, expected torch.bool")
    if shifts.dtype != torch.float32:
        raise RuntimeError(f"shifts has dtype {shifts.dtype}, expected torch.float32")
    if shifts.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("shifts requires a gradient, which augment does not have")


def check_crop(size: Any, images: torch.Tensor) -> None:
    """``size`` must be an int and fit into both sides of images."""
    if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
        raise TypeError(f"size must be an int, got {type(size).__name__} {size!r}")
    height, width = sides(images)
    if size < 1 or size > height or size > width:
        raise RuntimeError(f"size must be from 1 to the sides of images, got {size} for shape {list(images.shape)}")


def check_normalization(mean: Any, std: Any) -> tuple[list[float], list[float]]:
    """(mean, std) of the colours, checked, as floats."""

    def colours(name: str, values: Any) -> list[float]:
        found = list(values) if isinstance(values, Sequence) else []
        if len(found) != COLOURS or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in found):
            raise TypeError(f"{name} must be three numbers, got {values!r}")
        return [float(v) for v in found]

    mean, std = colours("mean", mean), colours("std", std)
    if not all(value > 0 for value in std):  # nor NaN
        raise RuntimeError(f"std must be greater than zero, got {std}")
    return mean, std
