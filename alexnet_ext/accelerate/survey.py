"""Surveys a model: which layers run one after another, and what forbids fusing them."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

from .. import nn as fused_nn
from . import readers
from .places import Chain, Flow, Place, by_parent, chains, every_place, in_order, is_sealed, runs_in_order
from .readers import is_own_code
from .tracing import Trace, every_trace, first_line, flows
from .watch import Identity, identity

STOCK = (nn.Conv2d, nn.ReLU, nn.LocalResponseNorm, nn.MaxPool2d)
FUSED = tuple(
    kind for kind in vars(fused_nn).values() if isinstance(kind, type) and kind.__module__ == fused_nn.__name__
)
RETURN_NEW = {
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm),
    *(nn.LocalResponseNorm, nn.MaxPool2d, nn.AvgPool2d, *FUSED),
}
"""Layers whose output is fresh memory that they do not keep. A subclass may keep it. Any other layer may return its
input or a view of it; a write into the one is then a write into the other."""


class Survey(NamedTuple):
    """The facts about a model before anything is replaced."""

    chains: list[Chain]
    untraceable: dict[nn.Module, str]
    """Modules whose forward ``torch.fx`` cannot trace, and why."""
    opened: dict[nn.Module, str]
    """Modules with layers that may be run alone, and the code that may do so."""
    traces: dict[nn.Module, list[Trace]]
    """For each module whose forward was traced, ``every_trace`` of it."""
    shared: dict[int, str]
    """By id, the modules with several places, or with a parameter of another module: where it is shared, in words."""
    read: set[str]
    """Names of modules whose outputs the model returns, by timm's convention ``feature_info``."""


def survey(model: nn.Module, trace: bool) -> Survey:
    """Survey ``model``; with ``trace``, also by tracing the forwards of its own code."""
    places = list(every_place(model))
    names = {(place.parent, place.key): place.name for place in places}
    found: list[Flow] = []
    untraceable, all_traces = {}, {}
    for owner, below in by_parent(places).items():
        if runs_in_order(owner):
            found += in_order(below)
        elif trace:
            try:
                traces = every_trace(owner)
            except Exception as error:  # the module's own code may raise anything on proxies
                untraceable[owner] = first_line(error)
                continue

            def name_of(target: str, owner: nn.Module = owner) -> str:
                # A module below two parents has one place only, and one name.
                parent, _, key = target.rpartition(".")
                return names[owner.get_submodule(parent), key]

            found += [flow for one in traces for flow in flows(one.graph, name_of)]
            all_traces[owner] = traces
    opened = readers.taken_apart(model, {owner: functions(traces) for owner, traces in all_traces.items()})
    return Survey(chains(places, found), untraceable, opened, all_traces, _shared(places), _read_outputs(model))


def functions(traces: list[Trace]) -> set[Identity]:
    """The functions that ran in any of these traces."""
    return {function for one in traces for function in one.methods}


def obstacle(known: Survey, chain: Chain, places: tuple[Place, ...]) -> str:
    """Why layers that form a pattern must stay as they are, or "" if nothing forbids to fuse them."""
    if _has_any_global_hook():
        return "hooks on all modules are set"
    for place in places:
        if reason := _untouchable(place.module, known.shared):
            return f"{place.name}: {reason}"
    # The fused layer takes all contents of a pattern's first layer, but only the settings of the others: their other
    # contents would be missing from state_dict. A ReLU with contents is a class of the user's own.
    begins = isinstance(places[0].module, (nn.Conv2d, nn.LocalResponseNorm))
    for place in places[1:] if begins else places:
        if place.module._parameters or place.module._buffers or place.module._modules:
            return f"{place.name}: it has parameters, buffers or modules of its own"
    if len(places) == 1:  # with nothing between
        return ""
    if reason := known.opened.get(places[0].parent, ""):
        return reason
    for place in places[:-1]:
        if place.name in known.read:
            return f"{place.name}: its output is read (feature_info)"
    return _used_elsewhere(known, places) or _overwritten(chain, places[0])


def _used_elsewhere(known: Survey, places: tuple[Place, ...]) -> str:
    """Why a method of the parent, other than its forward, may run a part of these layers."""
    parent = places[0].parent
    if runs_in_order(parent) or not is_own_code(parent):
        return ""
    keys, below = {place.key for place in places}, set(parent._modules)
    for method in readers.methods(parent):
        if method.name == "forward":
            continue
        some = readers.mentioned(method, below) & keys
        code = method.function.__code__
        arguments = inspect.signature(method.function).parameters.values()
        all_given = all(
            argument.default is argument.empty and argument.kind is argument.POSITIONAL_OR_KEYWORD
            for argument in arguments
        )
        # A method that the forward calls, and that runs all of them for any arguments, is fully in the trace.
        if some and not (some == keys and all_given and identity(code) in functions(known.traces.get(parent, []))):
            return f"{type(parent).__name__}.{method.name} may use {min(some)!r} alone"
    return ""


def _overwritten(chain: Chain, first: Place) -> str:
    """Why other code may hold the tensor that a ReLU in place writes into; a fused layer does not write into it."""
    if not (isinstance(first.module, nn.ReLU) and first.module.inplace):
        return ""
    at = chain.index(first)
    before = chain[at - 1].module if at else None
    if before is None or type(before) not in RETURN_NEW:
        return f"{first.name}: it writes into its input (inplace=True), which others may read"
    if has_hooks(before) or is_replaced(before):
        return f"{first.name}: it writes into its input (inplace=True), which hooks of {chain[at - 1].name} may hold"
    return ""


def _untouchable(module: nn.Module, shared: dict[int, str]) -> str:
    """Why this layer cannot be replaced by a nominally equal one, or ""."""
    if parametrize.is_parametrized(module):
        return "it has parametrizations"
    if is_sealed(module) or getattr(module, "qconfig", None) is not None:
        return "it is quantised or prepared for it"
    if type(module) not in STOCK:
        return f"{type(module).__name__} is a subclass of {next(k for k in STOCK if isinstance(module, k)).__name__}"
    if has_hooks(module):
        return "it has hooks"
    if is_replaced(module):
        return "its forward was replaced or compiled"
    if getattr(module, "return_indices", False):
        return "return_indices=True"
    if any(isinstance(getattr(module, name, None), torch.Tensor) for name in ("alpha", "beta", "k")):
        return "its alpha, beta or k is a tensor"
    return shared.get(id(module), "") if isinstance(module, nn.Conv2d) else ""


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, which are called when it runs."""
    return any(value for name, value in vars(module).items() if "hooks" in name)


def is_replaced(module: nn.Module) -> bool:
    """Whether another function replaces the forward of a module's class."""
    return "forward" in vars(module) or module._compiled_call_impl is not None


def _shared(places: list[Place]) -> dict[int, str]:
    names: dict[int, list[str]] = {}
    holders: dict[int, set[str]] = {}
    modules: dict[int, nn.Module] = {}
    for place in places:
        module = modules.setdefault(id(place.module), place.module)
        names.setdefault(id(module), []).append(place.name)
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(names[id(module)][0])
    reasons = {}
    for key, module in modules.items():
        together = {name for p in module._parameters.values() if p is not None for name in holders[id(p)]}
        if len(names[key]) > 1:
            reasons[key] = f"it stands at {' and '.join(names[key])}"
        elif len(together) > 1:
            reasons[key] = f"{' and '.join(sorted(together))} share a parameter"
    return reasons


def _read_outputs(model: nn.Module) -> set[str]:
    read = set()
    for name, module in model.named_modules():
        info = getattr(module, "feature_info", None)
        for entry in info if isinstance(info, (list, tuple)) else ():
            if isinstance(entry, dict) and isinstance(entry.get("module"), str):
                read.add(f"{name}.{entry['module']}" if name else entry["module"])
    return read


def sealed(module: nn.Module) -> str:
    """The other tool that owns a module, in words; "" for none."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted or traced by torch.jit"
    return "it is quantised or prepared for it" if is_sealed(module) else ""


def no_pattern(place: Place, chain: Chain, i: int, untraceable: str) -> str:
    """Why a layer that could be part of a pattern is in none; "" for any other module."""
    module = place.module
    if is_sealed(module):
        return sealed(module)
    if not isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
        return ""
    if untraceable:
        return f"torch.fx cannot trace the forward of {type(place.parent).__name__}: {untraceable}"
    if isinstance(module, nn.Conv2d):
        after = chain[i + 1].module if i + 1 < len(chain) else None
        return f"{type(after).__name__} follows it" if after is not None else "no layer is known to follow it alone"
    before = chain[i - 1].module if i else None
    return f"{type(before).__name__} precedes it" if before is not None else "no layer is known to precede it"
