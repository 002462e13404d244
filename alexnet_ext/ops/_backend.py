"""Which implementation a call runs: ``native`` (compiled), ``triton`` or ``stock`` PyTorch.

``decide`` is the one place that says so, and why. Calls, ``alexnet info`` and ``alexnet tune`` all ask it. ``KERNELS``
lists what could run, ``ORDER`` in what order and what the authors know of it, ``_known`` what the user's device showed.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from .. import _library
from . import _known
from ._checks import overrides

BACKENDS = ("auto", "native", "triton", "stock")
OPS = tuple(folder.name for folder in pkgutil.iter_modules([str(Path(__file__).parent)]) if folder.ispkg)
PROVABLE = (torch.float32, torch.bfloat16, torch.float16)
"""What users' GPUs prove. Other dtypes run on stock PyTorch there."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Decision(NamedTuple):
    """The backend of a call, and why.

    ``"auto"``: chosen anew for each direction and shape, among an op's candidates (``ops/<op>/candidates.py``).
    ``"none"``: the call raises RuntimeError, for this reason.
    """

    backend: str
    reason: str


class Standing(NamedTuple):
    """What the authors know of a backend's kernels on a kind of device. ``"auto"`` runs proven kernels alone.

    Of an unknown kernel the user's own device decides: what ``_known`` has of it, by ``alexnet_ext.prove``.
    """

    state: _known.State
    reason: str = ""


PROVEN = Standing("proven")
UNKNOWN = Standing("unknown", "not yet proven on this device: `alexnet_ext.prove()` or `alexnet tune` does it")

# The static order: by kind of device, the backends that "auto" prefers, the first one first. On a GPU each direction of
# a convolution has candidates of its own, the compiled kernels do not depend on Triton's version, and no author has run
# either: the user's GPU proves them. On the meta device no kernel runs.
ORDER: dict[str, dict[str, Standing]] = {
    "cpu": {
        "native": PROVEN,
        "triton": Standing("refused", "no compiled kernel is loaded, and Triton's interpreter is for tests"),
    },
    "cuda": {"auto": UNKNOWN, "native": UNKNOWN, "triton": UNKNOWN},
    "meta": {"native": PROVEN, "triton": PROVEN},
}


def _kernels_of(op: str) -> dict[str, dict[str, str]]:
    """[kind of device][backend]: the operator, in the static order."""
    there = {("native", device): op for device in ("cpu", "cuda") if _library.has_kernel(op, device)}
    there |= {("triton", device): f"{op}_triton" for device in _library.triton_devices(op)}
    there |= {(backend, "meta"): name for (backend, _), name in there.items()}
    if _library.has_candidates(op):
        there["auto", "cuda"] = f"{op}_auto"
    return {kind: {name: there[name, kind] for name in order if (name, kind) in there} for kind, order in ORDER.items()}


# [op][kind of device][backend]. Filled at import, as torch.compile can trace a look-up in it, but no question to the
# dispatcher.
KERNELS = {op: _kernels_of(op) for op in OPS}

_RUNS = {
    "auto": Decision("auto", "each direction by whatever measures fastest"),
    "native": Decision("native", "compiled kernel"),
    "triton": Decision("triton", "Triton kernel"),
}
_FOUND = {name: Decision(name, "proven on this device, and the fastest where raced") for name in _RUNS}
_FOUND["stock"] = Decision("stock", "faster here than our kernels")
_UNKNOWN = Decision("stock", UNKNOWN.reason)
_REFUSED = Decision("stock", "our kernels were refused on this device (`alexnet info` says why)")
_DECISIONS = _FOUND | {"unknown": _UNKNOWN, "refused": _REFUSED}
_BY_ARGUMENT = Decision("stock", "backend='stock' was passed")
_BY_BLOCK = Decision("stock", "use_backend('stock') is in force")

_preferred: dict[str, tuple[str, ...]] = {}
"""By kind of device, what ``preferring`` puts in place of the order and standings above."""


def assume_constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """As ``torch.compiler``'s, which imports torch._dynamo, a second of work, to set this one mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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
        return _automatic(op, device, dtype, x)
    if requested not in kernels(op, device.type):
        unsupported = _refusal(requested, op, device.type)
    if unsupported:
        return Decision("none", f"backend={requested!r} does not cover {unsupported}")
    return _RUNS[requested]


def _automatic(op: str, device: torch.device, dtype: torch.dtype, x: torch.Tensor | None) -> Decision:
    """What ``"auto"`` runs for a call that our kernels cover."""
    kind = device.type
    there = kernels(op, kind)
    if kind in _preferred:
        for name in _preferred[kind]:
            if name.partition(" ")[0] in there:
                return _RUNS[name.partition(" ")[0]]
        return Decision("stock", "the backends that are preferred at the moment have no kernel for it")
    reason = ""
    for backend in there:
        standing = ORDER[kind][backend]
        if standing.state == "proven":
            return _RUNS[backend]
        if standing.state == "unknown" and dtype not in PROVABLE:
            return Decision("stock", f"kernels for {dtype} are not proven on a user's device")
        if standing.state == "unknown":
            layout = "contiguous" if x is None else _known.layout_of(x)
            # Traced sizes may be symbols.
            shape = None if x is None or torch.compiler.is_compiling() else tuple(x.shape)
            return _DECISIONS[_found(op, device, dtype, layout, shape)]
        reason = reason or standing.reason
    return Decision("stock", reason or _no_kernel(kind))


@assume_constant_result
def _found(op: str, device: torch.device, dtype: torch.dtype, layout: str, shape: tuple[int, ...] | None) -> str:
    """A key of ``_DECISIONS``: what is known on this device of a call in this dtype, layout and shape."""
    known = _known.on(device)
    call = (op, dtype, layout, shape)
    decided = known.decided  # another thread may put a new one there
    found = decided.get(call)
    if found is None:
        found = _look_up(known, op, device, dtype, layout, shape)
        if len(decided) >= _known.MAX_RACES:  # a process may see any number of shapes
            decided.clear()
        decided[call] = found
    return found


def _look_up(
    known: _known.Known,
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    layout: str,
    shape: tuple[int, ...] | None,
) -> str:
    states = {backend: proof_of(op, backend, device, dtype, layout).state for backend in kernels(op, device.type)}
    proven = [backend for backend, state in states.items() if state == "proven"]
    if not proven:
        return "unknown" if "unknown" in states.values() else "refused"
    raced = known.winner(op, _known.name_of(dtype), layout, shape)
    return raced if raced in (*proven, "stock") else proven[0]


def proof_of(op: str, backend: str, device: torch.device, dtype: torch.dtype, layout: str) -> _known.Proof:
    """What is known on this device of one backend, or of a candidate of ``"auto"`` (``"auto NAME"``)."""
    standing = ORDER[device.type].get(backend.partition(" ")[0], UNKNOWN)
    if device.type in _preferred or standing.state == "proven":
        return _known.Proof("proven")
    if standing.state == "refused":
        return _known.Proof("refused", standing.reason)
    return _known.on(device).proof(_known.Unit(op, backend, _known.name_of(dtype), layout))


def _no_kernel(device_type: str) -> str:
    for library in _library.LIBRARIES:
        if library.device == device_type:
            return library.reason or f"the {library.name} library has no kernel for it"
    return f"no library serves {device_type}"


def proves(device: torch.device) -> bool:
    """Whether kernels on this kind of device are left to the user's own device to prove."""
    return any(standing.state == "unknown" for standing in ORDER.get(device.type, {}).values())


@contextmanager
def preferring(backends: Sequence[str], device: str) -> Iterator[None]:
    """``"auto"`` runs the first of these that has a kernel on this kind of device, proven or not; to prove it.

    ``"auto NAME"`` is an op's choice among its candidates, with this one taken wherever it applies.
    """
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


def preferred_candidate(device_type: str) -> str:
    """The candidate that ``preferring`` asks for; "" for none."""
    first, *_ = _preferred.get(device_type) or ("",)
    return first.partition(" ")[2]


def operator(op: str, backend: str, x: torch.Tensor, unsupported: str = "", dtype: torch.dtype | None = None) -> Any:
    """The operator that runs this call in ``dtype`` (default x's); None where stock PyTorch runs it.

    ``unsupported`` as in ``decide``. RuntimeError where ``backend`` does not cover the call.
    """
    device, dtype = x.device, dtype or x.dtype
    decision = decide(op, device, dtype, backend, unsupported, x)
    if not torch.compiler.is_compiling() and decision is _UNKNOWN:
        return first_call(op, x, dtype)
    if decision.backend == "stock":
        return None
    if decision.backend == "none":
        raise RuntimeError(decision.reason)
    found = getattr(torch.ops.alexnet_ext, KERNELS[op][device.type][decision.backend])
    return found if torch.compiler.is_compiling() or _is_current(device) else _guarded(found, device)


def _is_current(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return True
    return device.index == torch.cuda.current_device()


def _guarded(operator: Any, device: torch.device) -> Any:
    """The operator on a GPU that is not the current one, where Triton would launch. Autograd sets it backward."""

    @functools.wraps(operator)
    def run(*arguments: Any) -> Any:
        with torch.cuda.device(device):
            return operator(*arguments)

    run.__name__ = operator.__name__
    return run


def _stay_stock(op: str, x: torch.Tensor, dtype: torch.dtype) -> Any:
    return None


first_call: Callable[[str, torch.Tensor, torch.dtype], Any] = _stay_stock
"""What runs an eager call of an op that x's device has not proven yet. ``selfcheck/first_call.py`` sets it."""


def _unsupported(x: torch.Tensor, dtype: torch.dtype) -> str:
    """What about this call no kernel of ours covers, whichever op it is; "" for nothing."""
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    if x.layout != torch.strided:
        return f"layout {x.layout}"
    return wrapper(x) or _transform()
