"""Watches a forward while ``torch.fx`` traces it, and stops at the first effect that a traced copy would not repeat.

A trace runs the code once, on proxies. Any effect except calling PyTorch on them would happen now, to the user's
objects, and never again. So each function is examined before it runs, and only those without such an effect may run.
"""

from __future__ import annotations

import builtins
import dis
import enum
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

PURE = {
    *("abs", "all", "any", "callable", "divmod", "getattr", "hasattr", "iter", "len", "max", "min", "next", "pow"),
    *("round", "sorted", "sum"),
}
"""Built-in functions that change nothing."""

READS = {"copy", "count", "get", "index", "items", "keys", "values"}
"""Methods of lists and dictionaries that change nothing."""

IMMUTABLE = (str, bytes, int, float, complex, tuple, range, frozenset)

ARITHMETIC = {"math", "_operator", "torch._C._nn", "torch._C._special", "torch._C._linalg", "torch._C._fft"}
"""Modules of C functions that change nothing, or are in the graph."""

QUESTIONS = {"is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled"}
"""Functions of ``torch._C`` whose result a trace would freeze."""

OPEN = ("torch.fx", "torch.nn.functional", "torch.functional", "torch._jit_internal", "torch.nn.modules.container")
"""Modules of PyTorch whose Python functions a forward may call."""

TYPES = {"isinstance", "issubclass", "type", "__class__"}
NAMES = {"globals", "locals", "vars", "exec", "eval", "setattr", "delattr"}

FORBIDDEN = {
    **dict.fromkeys(
        ("BEFORE_WITH", "BEFORE_ASYNC_WITH"), "it has a with statement, which may switch gradients or autocast"
    ),
    **dict.fromkeys(("STORE_ATTR", "DELETE_ATTR"), "it changes its own attributes"),
    **dict.fromkeys(("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"), "it writes into a container"),
    **dict.fromkeys(("STORE_GLOBAL", "DELETE_GLOBAL"), "it changes a global variable"),
    **dict.fromkeys(("IMPORT_NAME", "IMPORT_STAR"), "it imports a module"),
    "PUSH_EXC_INFO": "it has a try statement",
}
"""Instructions whose effect no trace shows."""

CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.memory_format,
    enum.Enum,
)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type)
OWN = frozenset(vars(nn.Module()))


Identity = tuple[str, int, str]


class Untraceable(RuntimeError):
    """A forward does something that its trace does not show; the message says what."""


class Read(NamedTuple):
    """A value that a forward read from outside its arguments and layers, as it was then."""

    scope: dict[str, Any] | None
    """The globals that contain it, or None for an attribute of the owner."""
    name: str
    value: Any

    def holds(self, owner: nn.Module) -> bool:
        """Whether it still has that value."""
        now = getattr(owner, self.name, None) if self.scope is None else self.scope.get(self.name)
        return now is self.value or (type(now) is type(self.value) and is_constant(now) and bool(now == self.value))


def is_constant(value: object) -> bool:
    if isinstance(value, tuple):
        return all(is_constant(part) for part in value)
    return isinstance(value, CONSTANTS)


class Watch:
    """A function for ``sys.setprofile``. It refuses a call by raising Untraceable before the call is made."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.refusal = ""
        self.reads: dict[tuple[int, str], Read] = {}
        self.methods: set[Identity] = set()
        """The functions that ran, by ``identity``."""
        self._admitted: dict[int, types.CodeType] = {}

    def __call__(self, frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "c_call":
            if id(frame.f_code) in self._admitted:
                self._check(_refused_built_in(arg))
        elif event == "call" and (caller := frame.f_back) is not None:
            if id(caller.f_code) in self._admitted:
                if not _is_open(frame):
                    module = str(frame.f_globals.get("__name__", ""))
                    if module.partition(".")[0] == "torch":
                        self._check(f"it calls {_name(frame)}")
                    self._admit(frame.f_code, frame.f_globals)
            elif not self._admitted and identity(frame.f_code) == self.forward:
                self._admit(frame.f_code, frame.f_globals)

    @contextmanager
    def over(self, forward: Callable[..., Any]) -> Iterator[None]:
        code = getattr(forward, "__code__", None)
        if not isinstance(code, types.CodeType):
            raise Untraceable("it is no Python function")
        self.forward = identity(code)
        before = sys.getprofile()
        try:
            with _NothingNew():
                sys.setprofile(self)
                yield
        finally:
            sys.setprofile(before)
        if self.refusal:  # the traced code has caught the exception
            raise Untraceable(self.refusal)

    def _check(self, reason: str) -> None:
        if reason:
            self.refusal = reason
            raise Untraceable(reason)

    def _admit(self, code: types.CodeType, scope: dict[str, Any]) -> None:
        if id(code) in self._admitted:
            return
        self._admitted[id(code)] = code
        self.methods.add(identity(code))
        self._check(_refused_code(code))
        for name in code.co_names:
            if name in OWN:
                continue
            value = inspect.getattr_static(self.owner, name, None)
            if name in vars(self.owner) or is_constant(value):
                self._check(self._read(None, name, value, f"self.{name}"))
        for name in _globals(code):
            if name in scope:
                self._check(self._read(scope, name, scope[name], f"the global {name}"))

    def _read(self, scope: dict[str, Any] | None, name: str, value: object, shown: str) -> str:
        if value is None and scope is None and name not in vars(self.owner):
            return ""  # another object's attribute has this name
        if is_constant(value) or isinstance(value, FUNCTIONS):
            self.reads[id(scope), name] = Read(scope, name, value)
            return ""
        if isinstance(value, (torch.Tensor, nn.Module)):
            return ""  # in the graph by their names, or refused there
        return f"it reads {shown}, a {type(value).__name__}, which may change"


def identity(code: types.CodeType) -> Identity:
    """The part of a function's code that torch.fx keeps when it changes how arguments are passed."""
    return (code.co_filename, code.co_firstlineno, code.co_qualname)


def _name(frame: types.FrameType) -> str:
    """The full name of the function that is about to run; for a wrapper of torch._compile, of the wrapped one."""
    wrapped = frame.f_locals.get("fn") if frame.f_code.co_name == "inner" else None
    if isinstance(wrapped, types.FunctionType):
        return f"{wrapped.__module__}.{wrapped.__qualname__}"
    return f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_qualname}"


def _is_open(frame: types.FrameType) -> bool:
    module, name = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
    if module == "torch.nn.modules.module":
        return name in ("__getattr__", "children", "named_children", "modules", "named_modules", "__dir__")
    return module in (*OPEN, __name__) or module.startswith("torch.fx.") or (module == "torch" and name == "_assert")


def _globals(code: types.CodeType) -> set[str]:
    return {str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def _refused_code(code: types.CodeType) -> str:
    """Why this code may not run on proxies, or ""."""
    if TYPES.intersection(code.co_names):
        return "it asks for types by isinstance"
    if found := NAMES.intersection(code.co_names):
        return f"it calls {min(found)}"
    instructions = list(dis.get_instructions(code))
    for name, reason in FORBIDDEN.items():
        if any(i.opname == name for i in instructions):
            return reason
    if any(i.opname == "LOAD_SPECIAL" for i in instructions):  # Python 3.14's BEFORE_WITH
        return FORBIDDEN["BEFORE_WITH"]
    if any(i.opname == "STORE_DEREF" and i.argval in code.co_freevars for i in instructions):
        return "it changes a variable of another function"
    return ""


def _refused_built_in(function: Any) -> str:
    """Why this function of C may not be called, or ""."""
    name, of = str(getattr(function, "__name__", function)), getattr(function, "__self__", None)
    if isinstance(of, types.ModuleType):
        pure = of.__name__ in ARITHMETIC
        known = of is builtins and name in PURE
        if of is torch._C and name in QUESTIONS:
            return "it asks whether gradients or autocast are on"
    else:
        pure = isinstance(of, IMMUTABLE) or of is getattr(torch.relu, "__self__", None)
        reads = isinstance(of, (list, dict)) and name in READS
        known = reads or (of in (tuple, dict) and name in ("__new__", "fromkeys"))
    if pure or known or isinstance(of, types.MappingProxyType):
        return ""
    whose = "" if of is None or isinstance(of, types.ModuleType) else f"{type(of).__name__}."
    return f"it calls {whose}{name}"


class _NothingNew(TorchFunctionMode):
    """Stops calls of PyTorch without a proxy: their result would be a constant in the graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        flat = [part for value in given for part in (value if isinstance(value, (list, tuple)) else [value])]
        asks = getattr(func, "__name__", "") == "__get__"  # a shape, a dtype
        if not asks and not any(isinstance(value, fx.Proxy) for value in flat):
            raise Untraceable("it makes or keeps tensors of its own")
        return func(*args, **kwargs)
