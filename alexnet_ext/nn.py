"""Drop-in layers: the constructor, state_dict and repr of their torch.nn counterparts, the fused ops inside."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .ops.conv2d_bias_relu.space_to_depth import weight_to_depth

Layer = TypeVar("Layer", bound=nn.Module)


def sharing(kind: type[Layer], stock: nn.Module, **attributes: Any) -> Layer:
    """A layer of ``kind`` with the settings of ``stock`` and its very dictionaries of parameters, buffers and hooks: a
    parameter replaced or a hook registered in one is so in both.

    ``attributes`` are those that only ``kind`` has.
    """
    layer = kind.__new__(kind)
    layer.__dict__.update(vars(stock) | attributes)
    return layer


def stock_kind(layer: nn.Module) -> type[nn.Module]:
    """The class of ``torch.nn`` with a layer's arguments and parameters: its own class, unless it is one of ours."""
    return getattr(type(layer), "stock", type(layer))


def not_scriptable(what: str) -> str:
    """The message for ``torch.jit.script``, whose own would name a line of ours that it cannot read."""
    return (
        f"torch.jit.script cannot compile {what}: use torch.jit.trace, torch.compile or torch.export, or stock layers "
        "(alexnet_ext.restore brings them back)"
    )


class _Fused(nn.Module):
    """The base of all layers here."""

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``."""
        raise RuntimeError(not_scriptable(type(self).__name__))

    @classmethod
    def takes(cls, *layers: nn.Module) -> dict[str, Any]:
        """The attributes of a fused layer that the second and further layers of its pattern decide.

        Raises ValueError for a layer that it cannot replace.
        """
        return {}

    def gives(self, *layers: nn.Module) -> None:
        """Write the present values of the attributes from ``takes`` back into those layers."""


class LocalResponseNorm(_Fused, nn.LocalResponseNorm):
    """``nn.LocalResponseNorm`` by ``ops.local_response_norm``: (N, C, *) to the same shape."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.local_response_norm(input, self.size, self.alpha, self.beta, self.k)


class _Compound(_Fused):
    """A layer that computes more than ``stock``, and has its arguments, attributes, state_dict and repr.

    It is no instance of ``stock``: code that converts such layers, or folds others into them, would lose the rest of
    its computation.
    """

    stock: type[Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if hasattr(cls, "stock"):
            cls.__signature__ = inspect.signature(cls.stock)  # type: ignore[attr-defined]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.__dict__.update(vars(self.stock(*args, **kwargs)))

    def extra_repr(self) -> str:
        return self.stock.extra_repr(self)


class ReLUMaxPool2d(_Compound):
    """``nn.Sequential(nn.ReLU(), nn.MaxPool2d(...))`` by ``ops.relu_max_pool2d``.

    Takes ``nn.MaxPool2d``'s arguments; ``return_indices=True`` raises ValueError, as a winner is stored as
    one byte and not as an index.
    """

    stock = nn.MaxPool2d
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    ceil_mode: bool
    return_indices: bool
    settings = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.return_indices:
            raise ValueError("return_indices=True is not supported: use nn.ReLU and nn.MaxPool2d")

    def forward(self, input: Tensor) -> Tensor:
        return ops.relu_max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)

    @classmethod
    def takes(cls, *layers: nn.Module) -> dict[str, Any]:
        (pool,) = layers
        return {name: getattr(pool, name) for name in cls.settings}

    def gives(self, *layers: nn.Module) -> None:
        (pool,) = layers
        vars(pool).update({name: getattr(self, name) for name in self.settings})


class _WithParameters(_Compound):
    """The base of the layers with a weight."""

    weight: Tensor
    bias: Tensor | None

    def reset_parameters(self) -> None:
        """Initialize weight and bias as the layer of ``torch.nn`` does."""
        self.stock.reset_parameters(self)


class _FusedConv2d(_WithParameters):
    """The base of the layers with a convolution: ``ops.conv2d_bias_relu``, in every padding_mode."""

    stock = nn.Conv2d
    in_channels: int
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]
    adds_bias = relu = True
    """Whether the convolution adds the bias, and whether it applies ReLU; else what comes after it does."""
    takes_depth = False
    """Whether the layer, unpadded and square, also takes images of ``ops.augment(space_to_depth=stride)``."""

    def convolution(self, input: Tensor) -> Tensor:
        if self.takes_depth and input.shape[1] != self.in_channels:
            return self._convolution_of_depth(input)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        bias = self.bias if self.adds_bias else None
        constants = (self.stride, padding, self.dilation, self.groups)
        return ops.conv2d_bias_relu(input, self.weight, bias, *constants, relu=self.relu)

    def _convolution_of_depth(self, input: Tensor) -> Tensor:
        weight = weight_to_depth(self.weight, self.stride[0])
        return ops.conv2d_bias_relu(input, weight, self.bias if self.adds_bias else None, relu=self.relu)


class Conv2dReLU(_FusedConv2d):
    """``nn.Sequential(nn.Conv2d(...), nn.ReLU())`` by ``ops.conv2d_bias_relu``."""

    def forward(self, input: Tensor) -> Tensor:
        return self.convolution(input)


class Conv2d(_FusedConv2d):
    """``nn.Conv2d`` by ``ops.conv2d_bias_relu``, before a layer that applies the ReLU, such as ``ReLUMaxPool2d``."""

    relu = False

    def forward(self, input: Tensor) -> Tensor:
        return self.convolution(input)


class LinearReLU(_WithParameters):
    """``nn.Sequential(nn.Linear(...), nn.ReLU())`` by ``ops.linear_bias_relu``."""

    stock = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear_bias_relu(input, self.weight, self.bias)


class _Conv2dBlock(_FusedConv2d):
    """A convolution and the fused block after it; subclasses name the block's op and its order."""

    adds_bias = relu = False
    norm: tuple[int, float, float, float]
    window: tuple[Any, Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        signature = inspect.signature(cls.stock)
        layers = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("norm", "pool")]
        cls.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), *layers]
        )

    def __init__(self, *args: Any, norm: nn.LocalResponseNorm, pool: nn.MaxPool2d, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__.update(self.block_settings(norm, pool))

    @staticmethod
    def block_settings(norm: nn.LocalResponseNorm, pool: nn.MaxPool2d) -> dict[str, Any]:
        """The attributes that a block adds to its convolution's. Raises ValueError for an unsupported pool."""
        plain = (pool.padding, pool.dilation, pool.ceil_mode, pool.return_indices)
        if plain not in ((0, 1, False, False), ((0, 0), (1, 1), False, False)):
            raise ValueError(f"pool must have no padding, dilation, ceil_mode or return_indices, got {pool}")
        return {"norm": (norm.size, norm.alpha, norm.beta, norm.k), "window": (pool.kernel_size, pool.stride)}

    @classmethod
    def takes(cls, *layers: nn.Module) -> dict[str, Any]:
        return cls.block_settings(*cls._ordered(layers))

    def gives(self, *layers: nn.Module) -> None:
        norm, pool = self._ordered(layers)
        norm.size, norm.alpha, norm.beta, norm.k = self.norm
        pool.kernel_size, pool.stride = self.window

    @staticmethod
    def _ordered(layers: tuple[nn.Module, ...]) -> tuple[nn.LocalResponseNorm, nn.MaxPool2d]:
        """(norm, pool) of the layers after the convolution."""
        (norm,) = (layer for layer in layers if isinstance(layer, nn.LocalResponseNorm))
        (pool,) = (layer for layer in layers if isinstance(layer, nn.MaxPool2d))
        return norm, pool

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lrn={self.norm}, pool={self.window}"


class Conv2dReLULRNMaxPool2d(_Conv2dBlock):
    """``Conv2d -> ReLU -> LocalResponseNorm -> MaxPool2d`` by ``ops.relu_lrn_max_pool2d``: the paper's order.

    Takes ``nn.Conv2d``'s arguments and the two layers as ``norm=nn.LocalResponseNorm(...)`` and
    ``pool=nn.MaxPool2d(...)``, whose constants it copies. state_dict is the convolution's.
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.relu_lrn_max_pool2d(self.convolution(input), self.bias, *self.norm, *self.window)


class Conv2dReLUMaxPool2dLRN(_Conv2dBlock):
    """``Conv2d -> ReLU -> MaxPool2d -> LocalResponseNorm`` by ``ops.relu_max_pool2d_lrn``: CaffeNet's order."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.relu_max_pool2d_lrn(self.convolution(input), self.bias, *self.norm, *self.window)
