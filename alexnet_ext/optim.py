"""Optimizers: SGD for networks whose weights are bf16 or fp16, in one pass over all of them; LARS for large batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .ops import sgd_step
from .ops._backend import DTYPES
from .ops._layout import with_strides_of

LOW = (torch.bfloat16, torch.float16)


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _alike(name: str, group: dict[str, Any], kind: Callable[[Tensor], bool]) -> Iterator[tuple[bool, list[Tensor]]]:
    """The parameters of a group that have a gradient, those together that are of one kind, device and dtype. Raises
    RuntimeError for a sparse gradient."""
    found: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            raise RuntimeError(f"{name} does not support sparse gradients")
        found.setdefault((kind(parameter), parameter.device, parameter.dtype, gradient.dtype), []).append(parameter)
    yield from ((own, parameters) for (own, *_), parameters in found.items())


class SGD(torch.optim.SGD):
    """``torch.optim.SGD`` that keeps an fp32 master of each bf16 or fp16 parameter, and updates all in one pass.

    A network that is bf16 (``model.bfloat16()``) casts no weight and no gradient in a step, as autocast does for fp32
    weights. Yet its steps add up in fp32: the master takes them, and the parameter is the master rounded.

    Bytes a parameter: the step (``ops.sgd_step``) reads the gradient (2), updates master and momentum (8 each) and
    writes the weight (2). The forward and the input's gradient read the weight (2 each), the weight's gradient is
    written (2). That is 26 in a training step. Autocast of fp32 weights moves 38.

    >>> model = alexnet_ext.models.alexnet().cuda().bfloat16()
    >>> optimizer = alexnet_ext.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    All else is as with ``torch.optim.SGD``: formulas, ``param_groups``, hooks, learning-rate schedulers, ``GradScaler``
    and arguments, except that there is no ``foreach``, ``fused`` and ``differentiable``. Parameters of fp32 and fp64
    have no master. A tensor as ``lr``, on the parameters' device, is read there: a CUDA graph is replayed with the rate
    that it then has.

    ``state_dict`` is ``torch.optim.SGD``'s, and holds ``"master"`` besides ``"momentum_buffer"``, both in fp32. Resumed
    from it, a run continues bit for bit. A state of ``torch.optim.SGD`` loads; masters then begin as the parameters. So
    does each element of a parameter that was written meanwhile (``model.load_state_dict``, clipping, a mask), unless it
    is its master rounded. (What is written through ``parameter.data``, as ``torch.nn.utils.vector_to_parameters``
    does, is not noticed.)

    Raises:
        ValueError: as ``torch.optim.SGD``; a parameter that is not of fp64, fp32, bf16 or fp16.
        RuntimeError: from ``step``, for a sparse gradient, or one of another dtype than its bf16 or fp16 parameter.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves scale and check to the step

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        self._versions: dict[Tensor, int] = {}
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._versions = {}  # of each parameter with a master, when the step last wrote it

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in DTYPES:
                del self.param_groups[-1]
                raise ValueError(f"parameters must be of {', '.join(map(str, DTYPES))}, got {parameter.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure``, which computes the loss and its gradients anew, returns."""
        loss = _evaluated(closure)
        for group in self.param_groups:

            def is_first(parameter: Tensor, momentum: float = group["momentum"]) -> bool:
                return momentum != 0 and self.state[parameter].get("momentum_buffer") is None

            for first, parameters in _alike("SGD", group, is_first):
                self._update(group, parameters, first)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor], is_first: bool) -> None:
        found_inf = getattr(self, "found_inf", None)
        if is_first and found_inf is not None and found_inf.item():
            return  # GradScaler skips this step, and the next one is the first
        masters = [self._master(parameter) for parameter in parameters]
        has_masters = parameters[0].dtype in LOW
        momenta: list[Tensor] = []
        if group["momentum"] != 0:
            momenta = [self._momentum(*pair) for pair in zip(parameters, masters, strict=True)]
        sgd_step(
            masters,
            momenta,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            parameters if has_masters else (),
            lr=group["lr"],
            weight_decay=float(group["weight_decay"]),
            **{name: group[name] for name in ("momentum", "dampening", "nesterov", "maximize")},
            first_step=is_first,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=found_inf,
        )
        for parameter, buffer in zip(parameters, momenta, strict=False):
            self.state[parameter]["momentum_buffer"] = buffer
        if has_masters:
            self._versions.update((parameter, parameter._version) for parameter in parameters)

    def _master(self, parameter: Tensor) -> Tensor:
        """The parameter in full precision: itself, or its master. Elements that somebody else wrote begin anew."""
        if parameter.dtype not in LOW:
            return parameter
        master: Tensor | None = self.state[parameter].get("master")
        if master is None:
            master = parameter.detach().float()
        elif self._versions.get(parameter) != parameter._version:
            kept = master.to(parameter.dtype) == parameter
            master = torch.where(kept, master, parameter.detach().float())
        self.state[parameter]["master"] = master = with_strides_of(parameter, master)
        return master

    def _momentum(self, parameter: Tensor, master: Tensor) -> Tensor:
        buffer = self.state[parameter].get("momentum_buffer")
        return torch.zeros_like(master) if buffer is None else with_strides_of(master, buffer)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim.SGD``'s, but masters and momenta stay fp32 where parameters are bf16 or fp16."""
        given = [state_dict]
        # After all other hooks, which may put another dictionary in place of the given one.
        hook = self.register_load_state_dict_pre_hook(lambda _, last: given.append(last))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self._versions = {}
        names = chain.from_iterable(group["params"] for group in given[-1]["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for name, parameter in zip(names, parameters, strict=True):
            for key, value in given[-1]["state"].get(name, {}).items():
                if parameter.dtype in LOW and isinstance(value, Tensor):
                    self.state[parameter][key] = value.to(parameter.device, torch.float32, copy=True)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, for batches of thousands (You, Gitman, Ginsburg 2017, arXiv 1708.03888).

    With large rates, a layer whose gradients are large compared with its weights diverges first. LARS gives each layer
    ``l`` a rate of its own, ``trust``, which makes a step as long as a share of the weights:

    ``trust = trust_coefficient * |w| / (|g| + weight_decay * |w|)``, with Euclidean norms over the layer's tensor;
    1 where ``|w|`` or ``|g|`` is 0,

    ``v = momentum * v + lr * trust * (g + weight_decay * w)``, then ``w = w - v``.

    The rate is inside of ``v``, as in the paper and unlike in ``torch.optim.SGD``: the momentum of earlier steps keeps
    the rate that they had. Parameters of at most one dimension (biases) have ``trust = 1`` and no decay. With
    ``trust_coefficient=1`` the rate is the length of a step relative to the weights.

    >>> optimizer = alexnet_ext.optim.LARS(model.parameters(), lr=8.0, momentum=0.9, weight_decay=5e-4)

    Nothing waits for the device. A tensor as ``lr`` is read there, so that a CUDA graph is replayed with the rate that
    it then has.

    Args:
        params: parameters of fp32 or fp64, or groups of them. For bf16 and fp16 use autocast.
        lr: the rate, as a float or a Tensor of no dimension.
        momentum: share of the step before that is taken again, at least 0 and below 1.
        weight_decay: of the paper's ``beta``, at least 0.
        trust_coefficient: the paper's ``eta``, above 0.

    Raises:
        ValueError: a number outside of its range; a parameter that is not of fp32 or fp64.
        RuntimeError: from ``step``, for a sparse gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 1e-3,
    ) -> None:
        if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:
            raise ValueError(f"lr must be a finite number of at least 0, got {lr!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum!r}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay!r}")
        if not 0 < trust_coefficient < math.inf:
            raise ValueError(f"trust_coefficient must be a finite number above 0, got {trust_coefficient!r}")
        numbers = {"momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(params, {"lr": lr, **numbers})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                del self.param_groups[-1]
                raise ValueError(f"parameters must be of torch.float32 or torch.float64, got {parameter.dtype}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure``, which computes the loss and its gradients anew, returns."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            for is_scaled, parameters in _alike("LARS", group, lambda parameter: parameter.dim() > 1):
                self._update(group, parameters, is_scaled)
        return loss

    def _update(self, group: dict[str, Any], weights: list[Tensor], is_scaled: bool) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        rate = group["lr"]
        if is_scaled:
            decay = group["weight_decay"]
            of_weights, of_gradients = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, gradients))
            trust = group["trust_coefficient"] * of_weights / (of_gradients + decay * of_weights)
            trust = torch.where((of_weights > 0) & (of_gradients > 0), trust, 1.0)
            steps = torch._foreach_add(gradients, weights, alpha=decay)
            torch._foreach_mul_(steps, list((trust * rate).unbind()))
        else:
            steps = torch._foreach_mul(gradients, rate)
        momenta = []
        for weight in weights:
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            momenta.append(state["momentum_buffer"])
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, steps)
        torch._foreach_sub_(weights, momenta)
