"""Finds code of a model that may run some layers of a container alone, and so read the tensors between them.

The code is not run: its source is read. A container is safe if every method of the modules around it calls it as a
whole, ``self.features(x)``. A method that iterates over it, takes layers out of it, or passes it on may do anything.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from types import CodeType, FunctionType
from typing import NamedTuple

from torch import nn

from .watch import Identity, identity

Path = tuple[str, ...]

ANY, DEEP = "*", "**"
"""In a path: any child; any module below."""

CHILDREN = {"children", "named_children", "items", "values", "__iter__", "__getitem__"}
MODULES = {"modules", "named_modules", "get_submodule", "_modules", "__dict__"}
PASSES_ON = {"enumerate", "reversed", "list", "tuple", "zip", "iter", "next", "sorted", "set"}
"""Functions whose result holds the modules in their arguments."""
ASKS = {"isinstance", "issubclass", "hasattr", "len", "type", "id", "repr", "str", "print", "super", "bool", "callable"}
RUNS_WHOLE = {"checkpoint", "checkpoint_sequential"}
"""Functions that run a module, their argument, as a whole."""


class Use(NamedTuple):
    """A method's use of the modules that it reaches from ``self`` by a path."""

    runs: bool
    """True if it calls them; else it may do anything with them."""
    path: Path


class Method(NamedTuple):
    name: str
    function: FunctionType
    is_of_owner: bool = True
    """Whether its first argument is the owner; else the argument is unknown."""

    def uses(self) -> frozenset[Use] | None:
        """Its uses of modules below its owner; None if its source cannot be read."""
        return _uses(self.function) if self.is_of_owner else None


def is_own_code(module: nn.Module) -> bool:
    """Whether a module's class is neither of PyTorch nor one of this package's layers."""
    return not type(module).__module__.startswith(("torch.", "alexnet_ext."))


STANDS_IN = "stands_in"
"""Attribute of our own forwards: they do the same as the forward of the owner's class."""


def replaced_forward(owner: nn.Module) -> object:
    """The function that replaces the forward of the owner's class, or None."""
    forward = vars(owner).get("forward")
    return None if hasattr(forward, STANDS_IN) else forward


def methods(owner: nn.Module) -> Iterator[Method]:
    """The functions of the owner's classes that may be called with data: all that nn.Module does not have."""
    derived: dict[str, FunctionType] = {}
    for kind in type(owner).__mro__:
        if kind.__module__.startswith("torch.") or kind is object:
            continue
        for name, value in vars(kind).items():
            function = value.fget if isinstance(value, property) else value
            ours = name in ("forward", "__call__") or not hasattr(nn.Module, name)
            if not ours or not isinstance(function, FunctionType):
                continue
            function = inspect.unwrap(function)
            # A method that a derived class overrides runs only if that class calls super.
            if name not in derived or "super" in _names(derived[name].__code__):
                derived[name] = function
                yield Method(name, function)
    for name, value in vars(owner).items():
        function = getattr(value, "__func__", value)
        if isinstance(function, FunctionType) and not str(function.__module__).startswith(("torch.", "alexnet_ext.")):
            yield Method(name, function, getattr(value, "__self__", None) is owner)


def mentioned(method: Method, keys: set[str]) -> set[str]:
    """The children of its owner, among ``keys``, that a method may use; all if its source cannot be read."""
    if not _names(method.function.__code__) & (keys | CHILDREN | MODULES | {"getattr"}):
        return set()
    found = method.uses()
    if found is None:
        return keys
    firsts = {use.path[0] for use in found if use.path}
    return keys if firsts & {ANY, DEEP} or Use(False, ()) in found else keys & firsts


def taken_apart(model: nn.Module, traced: Mapping[nn.Module, set[Identity]]) -> dict[nn.Module, str]:
    """The containers with layers that may be run alone, and the code that may do so.

    ``traced`` are the functions that a trace of a module's forward went through: their effect is known. A module that
    lists the outputs that it reads in ``feature_info``, as timm's do, is believed.
    """
    found: dict[nn.Module, str] = {}

    def open_up(modules: Iterable[nn.Module], reason: str) -> None:
        for module in modules:
            found.setdefault(module, reason)

    for owner in model.modules():
        if replaced_forward(owner) is not None and not type(owner).__module__.startswith("torch._dynamo."):
            open_up(owner.modules(), f"the forward of {type(owner).__name__} was replaced")
        if not is_own_code(owner) or hasattr(owner, "feature_info") or not owner._modules:
            continue
        for method in methods(owner):
            code = method.function.__code__
            if identity(code) in traced.get(owner, ()) or not _may_reach(owner, code):
                continue
            by = f"{type(owner).__name__}.{method.name}"
            used = method.uses()
            if used is None:
                open_up(owner.modules(), f"the source of {by} cannot be read")
                continue
            takes_data = code.co_argcount + code.co_kwonlyargcount > 1 or code.co_flags & (
                inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
            )
            for use in used:
                if use.runs or takes_data:
                    open_up(_opened(owner, use), f"{by} may run its layers one by one")
    return found


def _opened(owner: nn.Module, use: Use) -> set[nn.Module]:
    """The containers whose layers a use reaches one by one; none if the path does not end at a module."""
    reached, opened = [owner], set[nn.Module]()
    for depth, step in enumerate(use.path):
        after: list[nn.Module] = []
        for module in reached:
            if step == DEEP:
                after += module.modules()
                opened.update(module.modules())
                continue
            below = module._modules.values() if step == ANY else [module._modules.get(step)]
            children = [child for child in below if child is not None]
            lists = isinstance(module, (nn.ModuleList, nn.ModuleDict))  # these have no forward
            if children and not lists and (depth or isinstance(module, nn.Sequential)):
                opened.add(module)
            after += children
        reached = after
    if not use.runs:
        opened.update(below for module in reached for below in module.modules())
    return opened if reached else set()


def _names(code: CodeType) -> set[str]:
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, nested))


def _may_reach(owner: nn.Module, code: CodeType) -> bool:
    """Whether the code has a name that could lead to a module; most methods have none, and are not read."""
    return isinstance(owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or bool(
        _names(code) & (owner._modules.keys() | CHILDREN | MODULES | {"getattr"})
    )


@lru_cache(maxsize=4096)
def _uses(function: FunctionType) -> frozenset[Use] | None:
    """A method's uses of modules below its ``self``; None if its source cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    definition = next((n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))), None)
    if definition is None or not (definition.args.posonlyargs or definition.args.args):
        return None if definition is None else frozenset()
    reader = _Reader((definition.args.posonlyargs + definition.args.args)[0].arg)
    # Twice, as a loop's body may use a name that is bound further down.
    for _ in range(2):
        for statement in definition.body:
            reader.visit(statement)
    return frozenset(reader.found)


class _Reader(ast.NodeVisitor):
    """Follows ``self``, and the names bound to modules, through a function."""

    def __init__(self, owner: str) -> None:
        self.names: dict[str, set[Path]] = {owner: {()}}
        self.found: set[Use] = set()

    def paths(self, node: ast.AST | None) -> set[Path]:
        """The modules, by paths from ``self``, that an expression may be or contain; empty if it is no module."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, set())
        if isinstance(node, ast.Attribute):
            of = self.paths(node.value)
            if node.attr in MODULES:
                return {(*path, DEEP) for path in of}
            return of if node.attr in CHILDREN else {(*path, node.attr) for path in of}
        if isinstance(node, ast.Subscript):
            return {(*path, ANY) for path in self.paths(node.value)}
        if isinstance(node, ast.Call):
            return self._result(node)
        if isinstance(node, ast.NamedExpr):
            return self.paths(node.value)
        if isinstance(node, ast.Starred):
            return self.paths(node.value)
        if isinstance(node, ast.IfExp):
            return self.paths(node.body) | self.paths(node.orelse)
        if isinstance(node, (ast.BoolOp, ast.List, ast.Tuple, ast.Set)):
            parts = node.values if isinstance(node, ast.BoolOp) else node.elts
            return set().union(*map(self.paths, parts))
        return set()

    def _result(self, call: ast.Call) -> set[Path]:
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        if name == "getattr" and call.args:
            step = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else ANY
            return {(*path, str(step)) for path in self.paths(call.args[0])}
        if name in PASSES_ON:
            return set().union(*map(self.paths, call.args))
        if isinstance(call.func, ast.Attribute) and call.func.attr in CHILDREN | MODULES:
            return self.paths(call.func)
        return set()

    def _hand(self, node: ast.AST | None) -> None:
        """Record that modules go to code that is not followed."""
        if node is None:
            return
        self.found |= {Use(False, path) for path in self.paths(node)}
        self.visit(node)

    def _bind(self, target: ast.AST, paths: set[Path]) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = self.names.get(target.id, set()) | paths
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self._bind(part, paths)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, paths)
        elif paths:  # an attribute or item: it is not followed
            self.found |= {Use(False, path) for path in paths}

    def _iterate(self, target: ast.AST, over: ast.AST) -> None:
        self._bind(target, {path if path[-1:] == (DEEP,) else (*path, ANY) for path in self.paths(over)})
        self.visit(over)

    def visit_For(self, node: ast.For) -> None:
        self._iterate(node.target, node.iter)
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._iterate(node.target, node.iter)
        for condition in node.ifs:
            self.visit(condition)

    def _comprehended(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        for generator in node.generators:
            self.visit(generator)
        self._hand(node.elt)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = _comprehended

    def visit_DictComp(self, node: ast.DictComp) -> None:
        for generator in node.generators:
            self.visit(generator)
        self._hand(node.key)
        self._hand(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        several = not isinstance(node.value, (ast.Tuple, ast.List))
        for target in node.targets:
            if isinstance(target, (ast.Tuple, ast.List)) and several:
                self._iterate(target, node.value)
            else:
                self._bind(target, self.paths(node.value))
        self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._bind(node.target, self.paths(node.value))
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._hand(node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._bind(node.target, self.paths(node.value))
        self.visit(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        self._hand(node.value)

    def visit_Yield(self, node: ast.Yield) -> None:
        self._hand(node.value)

    def visit_YieldFrom(self, node: ast.YieldFrom) -> None:
        self._hand(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        function, arguments = node.func, [*node.args, *(keyword.value for keyword in node.keywords)]
        name = (
            function.id
            if isinstance(function, ast.Name)
            else function.attr
            if isinstance(function, ast.Attribute)
            else ""
        )
        if isinstance(function, ast.Attribute) and function.attr == "forward":
            self.found |= {Use(True, path) for path in self.paths(function.value)}
        elif not isinstance(function, ast.Attribute) or function.attr not in CHILDREN | MODULES:
            self.found |= {Use(True, path) for path in self.paths(function)}
        self.visit(function)
        whole = name in RUNS_WHOLE
        for argument in arguments:
            if whole:
                self.found |= {Use(True, path) for path in self.paths(argument)}
                self.visit(argument)
            elif name in ASKS | PASSES_ON | {"getattr"} and isinstance(function, ast.Name):
                self.visit(argument)
            else:
                self._hand(argument)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for statement in node.body:
            self.visit(statement)
