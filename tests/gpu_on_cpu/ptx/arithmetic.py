"""PTX's numbers: types, comparisons, conversions."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def dtype_of(kind: str, sign: str = "") -> np.dtype[Any]:
    """NumPy's type for a PTX type; with a sign (``"u"``), the integer type of the same bytes."""
    if kind == "pred":
        return np.dtype(bool)
    letter, bits = kind[0], int(kind[1:])
    return np.dtype(f"{sign or {'b': 'u', 's': 'i'}.get(letter, letter)}{bits // 8}")


def _left(a: Any, by: Any) -> Any:
    """Shift left; by the width or more gives 0."""
    dtype = np.asarray(a).dtype
    width = 8 * dtype.itemsize
    return np.where(by < width, a << np.minimum(by, width - 1).astype(dtype), 0).astype(dtype)


def _right(a: Any, by: Any) -> Any:
    dtype = np.asarray(a).dtype
    width = 8 * dtype.itemsize
    shifted = a >> np.minimum(by, width - 1).astype(dtype)
    return shifted if dtype.kind == "i" else np.where(by < width, shifted, 0).astype(dtype)


def _divided(a: Any, b: Any) -> Any:
    dtype = np.asarray(a).dtype
    if dtype.kind == "f":
        return a / b
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(dtype)


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _divided,
    "rem": lambda a, b: a - b * _divided(a, b),
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shl": _left,
    "shr": _right,
    "min": np.fmin,
    "max": np.fmax,
}


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float64, rounded once: what the product and the sum leave out is computed, and added last."""

    def upper(value: Any) -> Any:
        scaled = value * (2.0**27 + 1)
        return scaled - (scaled - value)

    with np.errstate(over="ignore", invalid="ignore"):
        product, (high_a, high_b) = a * b, (upper(a), upper(b))
        low_a, low_b = a - high_a, b - high_b
        missing = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
        total = product + c
        added = total - product
        missing = missing + ((product - (total - added)) + (c - added))
        return np.where(np.isfinite(missing), total + missing, total)


UNARY: dict[str, Callable[[Any], Any]] = {
    "not": operator.invert,
    "neg": operator.neg,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
}


# True for numbers that are not NaN; comparisons that end with u are true for NaN too.
_ORDERED: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}


def _or_nan(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: compare(a, b) | (a != a) | (b != b)


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    **_ORDERED,
    **{f"{name}u": _or_nan(compare) for name, compare in _ORDERED.items()},
    **_UNSIGNED,
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}


def to_bf16(value: Any) -> Array:
    """The bits of fp32 numbers rounded to the nearest bf16, ties to even."""
    bits = np.asarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_f16(value: Any) -> Array:
    return np.asarray(value).astype(np.float16).view(np.uint16)


def from_bf16(bits: Any) -> Array:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def convert(
    op: list[str], write: Callable[..., None], source: Callable[[int, str], Callable[..., Any]]
) -> Callable[..., None]:
    """``cvt``; the type of its result is written before that of its operand."""
    to, of = op[-2:]
    if to in ("bf16x2", "f16x2"):
        narrow, high, low = to_bf16 if to == "bf16x2" else to_f16, source(0, "f32"), source(1, "f32")

        def pack(some: Any) -> None:
            upper, lower = narrow(high(some)).astype(np.uint32), narrow(low(some)).astype(np.uint32)
            write(some, upper << np.uint32(16) | lower)

        return pack
    if to in ("bf16", "f16") and of == "f32":
        narrow, a = to_bf16 if to == "bf16" else to_f16, source(0, "f32")
        return lambda some: write(some, narrow(a(some)))
    if to == "tf32":
        a = source(0, "u32")
        return lambda some: write(some, (a(some) + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    if of == "bf16":
        bits = source(0, "u16")
        return lambda some: write(some, from_bf16(bits(some)))
    a, dtype, modes = source(0, of), dtype_of(to), op[1:-2]
    if of.startswith("f") and (whole := next((WHOLE[mode] for mode in modes if mode in WHOLE), None)):

        def round_to_integer(some: Any) -> None:
            value = whole(np.asarray(a(some)))
            if dtype.kind in "iu":  # the nearest representable number
                limits, wide = np.iinfo(dtype), np.nan_to_num(value.astype(np.float64), nan=0.0)
                value = np.where(wide >= limits.max, limits.max, np.clip(wide, limits.min, 2.0**62).astype(np.int64))
            write(some, value.astype(dtype))

        return round_to_integer
    if set(modes) - {"rn"}:
        raise ValueError("another way to round")
    return lambda some: write(some, np.asarray(a(some)).astype(dtype))


# To integers, even if of a floating-point type.
WHOLE: dict[str, Any] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
