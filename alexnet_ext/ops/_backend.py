"""Which implementation a call runs: ``native`` (compiled), ``triton`` or ``stock`` PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import _library
from ._checks import overrides
from ._choices import assume_constant_result, tuned

BACKENDS = ("auto", "native", "triton", "stock")
OPS = (
    "local_response_norm",
    "relu_max_pool2d",
    "conv2d_bias_relu",
    "linear_bias_relu",
    "relu_lrn_max_pool2d",
    "relu_max_pool2d_lrn",
    "augment",
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Asked once, at import: torch.compile can trace a look-up here, not a question to the dispatcher.
NATIVE = {op: {device: _library.has_kernel(op, device) for device in ("cpu", "cuda")} for op in OPS}
_WITH_TRITON = {op: _library.has_triton(op) for op in OPS}
TRITON = {op: {"cpu": found and _library.INTERPRETED, "cuda": found} for op, found in _WITH_TRITON.items()}

# Ops that "auto" runs by whatever it measures to be fastest, our kernels or cuDNN's (ops/<op>/measured.py).
MEASURED = {op: {"cpu": False, "cuda": TRITON[op]["cuda"] and op == "conv2d_bias_relu"} for op in OPS}

# What "auto" prefers by device, where there is a kernel: stock PyTorch runs the rest. The interpreter is no choice.
PREFERENCE = {"cpu": ("native",), "cuda": ("measured", "native", "triton"), "meta": ("native", "triton")}

# Kernels that build but have not been run and measured by us yet: "auto" leaves them to stock PyTorch.
UNPROVEN = {("measured", "cuda"), ("native", "cuda"), ("triton", "cuda")}

# Where and for what "auto" runs what `alexnet tune` found right and fastest on this very device, if it has looked.
TUNED: tuple[str, ...] = ("cuda",)
TUNED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


class _Choice:
    """One entry into a ``use_backend`` block, or what holds outside of all."""

    def __init__(self, backend: str) -> None:
        self.backend = backend


# The blocks that are open in the process, the newest last; each leaves by itself, in whatever order they end. A plain
# list and not a ContextVar: torch.compile guards on the one in every version and breaks the graph at the other in some.
_open = [_Choice("auto")]


def current() -> str:
    """What ``"auto"`` stands for at this moment: the backend of the newest open ``use_backend`` block, or itself."""
    return _open[-1].backend


class use_backend:
    """Context manager: the backend of every call inside that says ``backend="auto"`` (modules do).

    >>> with alexnet_ext.use_backend("stock"):
    ...     y = model(x)

    Raises ValueError for a name other than ``"auto"``, ``"native"``, ``"triton"`` and ``"stock"``.
    The choice holds for the whole process, worker and autograd threads included. Of several open blocks, be they of
    other threads or tasks, the newest counts; they may end in any order, and after the last ``"auto"`` is itself again.
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
    """What is at work around this call that compiled ops cannot go through ("" for nothing; vmap they can)."""
    if forward_ad._current_level >= 0:  # without this the tangent of a compiled op would silently be zero
        return "forward-mode AD"
    return "the gradient transforms of torch.func" if _is_in_gradient_transform() else ""


@assume_constant_result  # torch.compile cannot trace it, and guards on the transforms around itself
def _is_in_gradient_transform() -> bool:
    if not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Grad for level in stack)


def wrapper(*tensors: object) -> str:
    """What kind of tensor is among these that knows PyTorch's own operators or functions alone, or "".

    One that wraps others (DTensor), or of a class with its own ``__torch_function__`` (ExpandedWeight).
    """
    for tensor in tensors:
        if hasattr(type(tensor), "__tensor_flatten__") or overrides(tensor):
            return f"tensors of type {type(tensor).__name__}"
    return ""


def by_functions(backend: str, *tensors: object) -> bool:
    """Whether the call goes to PyTorch's functions as it is, unchecked, for one of these has a ``__torch_function__``.

    It may know nothing else, not even a shape. RuntimeError where ``backend`` asks for more than stock PyTorch.
    """
    if not overrides(*tensors):
        return False
    check_backend(backend)
    backend = current() if backend == "auto" else backend
    if backend not in ("auto", "stock"):
        raise RuntimeError(f"backend={backend!r} does not cover {wrapper(*tensors)}")
    return True


def has_kernel(backend: str, op: str, device: str) -> bool:
    kernels = {"native": NATIVE, "triton": TRITON, "measured": MEASURED}.get(backend, {}).get(op, {})
    return any(kernels.values()) if device == "meta" else kernels.get(device, False)


def preferred(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """What ``"auto"`` runs for a call that our kernels cover."""
    if device.type in TUNED and dtype in TUNED_DTYPES:
        found = tuned(op, device)
        if found == "stock" or has_kernel(found, op, device.type):
            return found
    for backend in PREFERENCE.get(device.type, ()):
        if has_kernel(backend, op, device.type) and (backend, device.type) not in UNPROVEN:
            return backend
    return "stock"


def is_untuned(device: torch.device) -> bool:
    """Whether ``"auto"`` leaves all to stock PyTorch on this device because `alexnet tune` has not looked yet."""
    return device.type in TUNED and not any(tuned(op, device) or preferred(op, device) != "stock" for op in OPS)


@contextmanager
def preferring(backends: Sequence[str], device: str) -> Iterator[None]:
    """``"auto"`` by the first of these that has a kernel on this kind of device, proven or not: to prove it."""
    global PREFERENCE, UNPROVEN, TUNED
    before = PREFERENCE, UNPROVEN, TUNED
    PREFERENCE, UNPROVEN, TUNED = {**PREFERENCE, device: tuple(backends)}, set(), ()
    try:
        yield
    finally:
        PREFERENCE, UNPROVEN, TUNED = before


def _refusal(backend: str, op: str, device: str) -> str:
    """Why ``backend`` has no kernel for ``op`` on ``device``, and what to do."""
    if backend == "native":
        return f"device {device!r} (no compiled kernel for {op} is loaded; `alexnet info` says why)"
    if _library.TRITON.loaded and not _library.has_triton(op):
        return f"{op}, which has no Triton kernel (use 'auto', 'native' or 'stock')"
    if not _library.TRITON.loaded:
        return f"device {device!r} ({_library.TRITON.reason}; to mend it: {_library.TRITON.remedy})"
    return f"device {device!r} (move the tensors to a GPU, or set TRITON_INTERPRET=1 before Python starts)"


def choose(op: str, backend: str, x: torch.Tensor, unsupported: str = "", dtype: torch.dtype | None = None) -> str:
    """Which of ``"native"``, ``"triton"`` and ``"stock"`` runs this call, in ``dtype`` (default x's).

    ``unsupported`` says what about the arguments our kernels do not cover. ``"auto"`` then runs stock;
    ``"native"`` and ``"triton"`` raise RuntimeError, as they do where there is no such kernel.
    """
    check_backend(backend)
    if backend == "auto":
        backend = current()
    if backend == "stock":
        return backend
    device = x.device.type
    if not unsupported and (dtype or x.dtype) not in DTYPES:
        unsupported = f"dtype {dtype or x.dtype}"
    if not unsupported and x.layout != torch.strided:
        unsupported = f"layout {x.layout}"
    unsupported = unsupported or wrapper(x) or _transform()
    if backend == "auto":
        return "stock" if unsupported else preferred(op, x.device, dtype or x.dtype)
    if not has_kernel(backend, op, device):
        unsupported = _refusal(backend, op, device)
    if unsupported:
        raise RuntimeError(f"backend={backend!r} does not cover {unsupported}")
    return backend


def operator(op: str, backend: str, x: torch.Tensor, unsupported: str = "", dtype: torch.dtype | None = None) -> Any:
    """The operator that runs this call, chosen as ``choose`` says; None where stock PyTorch runs it."""
    backend = choose(op, backend, x, unsupported, dtype)
    if backend == "stock":
        return None
    return getattr(torch.ops.alexnet_ext, op if backend == "native" else f"{op}_{backend}")
