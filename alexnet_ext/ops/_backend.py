"""Which implementation a call runs: ``native`` (compiled), ``triton`` or ``stock`` PyTorch.

``decide`` is the one place that says so, and why. Calls, ``alexnet info`` and ``alexnet tune`` all ask it. ``KERNELS``
lists what could run, ``STANDINGS`` what is known of it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd import forward_ad

from .. import _library
from ._checks import overrides
from ._choices import assume_constant_result, tuned

BACKENDS = ("auto", "native", "triton", "stock")
OPS = tuple(folder.name for folder in pkgutil.iter_modules([str(Path(__file__).parent)]) if folder.ispkg)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

TUNED: tuple[str, ...] = ("cuda",)
"""Kinds of devices where ``"auto"`` follows what `alexnet tune` found right and fastest, if it has looked."""
TUNED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Decision(NamedTuple):
    """The backend of a call, and why.

    ``"auto"``: chosen anew for each direction and shape, among an op's candidates (``ops/<op>/candidates.py``).
    ``"none"``: the call raises RuntimeError, for this reason.
    """

    backend: str
    reason: str


class Standing(NamedTuple):
    """What is known of a backend's kernels on a device, and the reason where they are not proven.

    ``"auto"`` runs proven kernels alone.
    """

    state: Literal["proven", "unknown", "refused"]
    reason: str = ""


PROVEN = Standing("proven")


def _unknown(what: str) -> Standing:
    reason = f"its {what} has not been run on a GPU by its authors: `alexnet tune` proves it on yours"
    return Standing("unknown", reason)


# By backend and kind of device, for all that `alexnet tune` has not looked at. On the meta device no kernel runs.
STANDINGS = {
    ("native", "cpu"): PROVEN,
    ("triton", "cpu"): Standing("refused", "no compiled kernel is loaded, and Triton's interpreter is for tests"),
    ("auto", "cuda"): _unknown("choice by measurement"),
    ("native", "cuda"): _unknown("compiled kernel"),
    ("triton", "cuda"): _unknown("Triton kernel"),
    ("native", "meta"): PROVEN,
    ("triton", "meta"): PROVEN,
}


def _kernels_of(op: str) -> dict[str, dict[str, str]]:
    native = {device: op for device in ("cpu", "cuda") if _library.has_kernel(op, device)}
    triton = dict.fromkeys(_library.triton_devices(op), f"{op}_triton")
    found: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {}, "meta": {}}
    if _library.has_candidates(op):
        found["cuda"]["auto"] = f"{op}_auto"
    for backend, operators in (("native", native), ("triton", triton)):
        for device, name in operators.items():
            found[device][backend] = found["meta"][backend] = name
    return found


# [op][kind of device][backend]: the operator, in the order that "auto" prefers. Filled at import, as torch.compile can
# trace a look-up in it, but no question to the dispatcher.
KERNELS = {op: _kernels_of(op) for op in OPS}

_RUNS = {
    "auto": Decision("auto", "each direction by whatever measures fastest"),
    "native": Decision("native", "compiled kernel"),
    "triton": Decision("triton", "Triton kernel"),
}
_FOUND = {name: Decision(name, "right and fastest here, as `alexnet tune` found") for name in (*_RUNS, "stock")}
_BY_ARGUMENT = Decision("stock", "backend='stock' was passed")
_BY_BLOCK = Decision("stock", "use_backend('stock') is in force")

_preferred: dict[str, tuple[str, ...]] = {}
"""By kind of device, what ``preferring`` puts in place of the order and standings above."""


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


class _Choice:
    """One entry into a ``use_backend`` block, or the state outside of all blocks."""

    def __init__(self, backend: str) -> None:
        self.backend = backend


# The open blocks of the process, the newest last; each removes its own entry, in whatever order they end. A plain list:
# torch.compile guards on it in every version, and breaks the graph at a ContextVar in some.
_open = [_Choice("auto")]


def current() -> str:
    """What ``"auto"`` means at this moment: the backend of the newest open ``use_backend`` block, or itself."""
    return _open[-1].backend


class use_backend:
    """Context manager: the backend of every call inside that says ``backend="auto"`` (modules do).

    >>> with alexnet_ext.use_backend("stock"):
    ...     y = model(x)

    Raises ValueError for a name other than ``"auto"``, ``"native"``, ``"triton"`` and ``"stock"``.
    The choice holds for the whole process, worker and autograd threads included. Of several open blocks the newest
    counts, even where others belong to other threads or tasks. They may end in any order. After the last one ``"auto"``
    is itself again.
    """

    def __init__(self, backend: str) -> None:
        check_backend(backend)
        self.backend = backend
        self._entries: list[_Choice] = []

    def __enter__(self) -> use_backend:
        entry = _Choice(self.backend)
        self._entries.append(entry)
        _open.append(entry)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.remove(self._entries.pop())


def _transform() -> str:
    """The transform around this call that compiled ops cannot go through; "" for none. vmap they can."""
    if forward_ad._current_level >= 0:  # else the tangent of a compiled op would silently be zero
        return "forward-mode AD"
    return "the gradient transforms of torch.func" if _is_in_gradient_transform() else ""


@assume_constant_result  # torch.compile cannot trace it; it guards on the transforms around a call by itself
def _is_in_gradient_transform() -> bool:
    if not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Grad for level in stack)


def wrapper(*tensors: object) -> str:
    """The type of a tensor among these that only PyTorch's own operators or functions know how to handle; "" for none.

    Such a tensor wraps others (DTensor), or its class has its own ``__torch_function__`` (ExpandedWeight).
    """
    for tensor in tensors:
        kind = type(tensor)
        if kind is not torch.Tensor and (hasattr(kind, "__tensor_flatten__") or overrides(tensor)):
            return f"tensors of type {kind.__name__}"
    return ""


def by_functions(backend: str, *tensors: object) -> bool:
    """Whether one of these has its own ``__torch_function__``: then PyTorch's functions get the call, unchecked.

    Such a tensor may know nothing else, not even its shape. RuntimeError for a ``backend`` other than auto and stock.
    """
    if not overrides(*tensors):
        return False
    check_backend(backend)
    backend = current() if backend == "auto" else backend
    if backend not in ("auto", "stock"):
        raise RuntimeError(f"backend={backend!r} does not cover {wrapper(*tensors)}")
    return True


def kernels(op: str, device_type: str) -> dict[str, str]:
    """The operator of each backend that has kernels for ``op`` on this kind of device, the preferred one first."""
    return KERNELS[op].get(device_type, {})


def decide(
    op: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    unsupported: str = "",
    x: torch.Tensor | None = None,
) -> Decision:
    """What runs a call of ``op`` in ``dtype`` on ``device``, and why.

    ``unsupported`` says what about the call the op's kernels do not cover, ``x`` is its tensor, which may be of a kind
    that no kernel covers. ``"auto"`` then decides for stock, ``"native"`` and ``"triton"`` for nothing, as they do
    where there is no such kernel. ValueError for an unknown backend.
    """
    check_backend(backend)
    requested = current() if backend == "auto" else backend
    if requested == "stock":
        return _BY_BLOCK if backend == "auto" else _BY_ARGUMENT
    if x is not None and not unsupported:
        unsupported = _unsupported(x, dtype)
    if requested == "auto":
        if unsupported:
            return Decision("stock", f"our kernels do not cover {unsupported}")
        return _automatic(op, device, dtype)
    if requested not in kernels(op, device.type):
        unsupported = _refusal(requested, op, device.type)
    if unsupported:
        return Decision("none", f"backend={requested!r} does not cover {unsupported}")
    return _RUNS[requested]


def _automatic(op: str, device: torch.device, dtype: torch.dtype) -> Decision:
    """What ``"auto"`` runs for a call that our kernels cover."""
    kind = device.type
    there = kernels(op, kind)
    if kind in _preferred:
        for backend in _preferred[kind]:
            if backend in there:
                return _RUNS[backend]
        return Decision("stock", "the backends that are preferred at the moment have no kernel for it")
    if kind in TUNED and dtype in TUNED_DTYPES:
        found = tuned(op, device)
        if found == "stock" or found in there:
            return _FOUND[found]
    reason = ""
    for backend in there:
        standing = STANDINGS[backend, kind]
        if standing.state == "proven":
            return _RUNS[backend]
        reason = reason or standing.reason
    return Decision("stock", reason or _no_kernel(kind))


def _no_kernel(device_type: str) -> str:
    for library in _library.LIBRARIES:
        if library.device == device_type:
            return library.reason or f"the {library.name} library has no kernel for it"
    return f"no library serves {device_type}"


def is_untuned(device: torch.device) -> bool:
    """Whether ``"auto"`` leaves all ops to stock PyTorch on this device because `alexnet tune` has not looked yet."""
    if device.type not in TUNED:
        return False
    return not any(tuned(op, device) or _automatic(op, device, torch.float32).backend != "stock" for op in OPS)


@contextmanager
def preferring(backends: Sequence[str], device: str) -> Iterator[None]:
    """``"auto"`` runs the first of these that has a kernel on this kind of device, proven or not; to prove it."""
    global _preferred
    before = _preferred
    _preferred = before | {device: tuple(backends)}
    try:
        yield
    finally:
        _preferred = before


def _refusal(backend: str, op: str, device: str) -> str:
    """Why ``backend`` has no kernel for ``op`` on ``device``, and what to do."""
    if backend == "native":
        return f"device {device!r} (no compiled kernel for {op} is loaded; `alexnet info` says why)"
    if _library.TRITON.loaded and not _library.triton_devices(op):
        return f"{op}, which has no Triton kernel (use 'auto', 'native' or 'stock')"
    if not _library.TRITON.loaded:
        return f"device {device!r} ({_library.TRITON.reason}; to mend it: {_library.TRITON.remedy})"
    return f"device {device!r} (move the tensors to a GPU, or set TRITON_INTERPRET=1 before Python starts)"


def operator(op: str, backend: str, x: torch.Tensor, unsupported: str = "", dtype: torch.dtype | None = None) -> Any:
    """The operator that runs this call in ``dtype`` (default x's); None where stock PyTorch runs it.

    ``unsupported`` as in ``decide``. RuntimeError where ``backend`` does not cover the call.
    """
    device = x.device
    runs, reason = decide(op, device, dtype or x.dtype, backend, unsupported, x)
    if runs == "stock":
        return None
    if runs == "none":
        raise RuntimeError(reason)
    return getattr(torch.ops.alexnet_ext, KERNELS[op][device.type][runs])


def _unsupported(x: torch.Tensor, dtype: torch.dtype) -> str:
    """What about this call no kernel of ours covers, whichever op it is; "" for nothing."""
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    if x.layout != torch.strided:
        return f"layout {x.layout}"
    return wrapper(x) or _transform()
