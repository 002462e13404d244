"""The ops as standard ONNX nodes. The function with an op's name has its arguments and results. Needs onnxscript."""

from __future__ import annotations

from typing import Any

import onnxscript
import torch

OPSET = 20
op: Any = getattr(onnxscript, f"opset{OPSET}")
TINY = torch.finfo(torch.float32).tiny


def _norm(like: Any, x: Any, size: int, alpha: float, beta: float, k: float) -> Any:
    """LRN of x. Its rank and dtype are known from the op's input alone."""
    # An even window of LRN leans to the other side. onnxruntime takes odd windows under these conditions only.
    if size % 2 and len(like.shape) == 4 and str(like.dtype) == "FLOAT" and min(alpha, beta) >= TINY:
        return op.LRN(x, size=size, alpha=alpha, beta=beta, bias=k)
    window = op.Constant(value_ints=[size // 2, (size - 1) // 2])
    square = op.Pad(op.Mul(x, x), window, None, op.Constant(value_ints=[1]))
    axis, end = op.Constant(value_ints=[1]), op.Shape(x, start=1, end=2)
    parts = []
    for i in range(size):
        first = op.Constant(value_ints=[i])
        parts.append(op.Slice(square, first, op.Add(end, first), axis))
    scale = op.CastLike(op.Constant(value_float=alpha / size), x)
    inner = op.Add(op.Mul(op.Sum(*parts), scale), op.CastLike(op.Constant(value_float=k), x))
    return op.Div(x, op.Pow(inner, op.CastLike(op.Constant(value_float=beta), x)))


def _pool(x: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Any:
    y, _indices = op.MaxPool(
        x,
        kernel_shape=list(kernel_size),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        ceil_mode=int(ceil_mode),
    )
    return y


def _biased(x: Any, bias: Any) -> Any:
    return x if bias is None else op.Add(x, op.Unsqueeze(bias, op.Constant(value_ints=[1, 2])))


def _winners(y: Any) -> Any:
    return op.Cast(y, to=2)  # uint8; only a backward reads it, so the exporter removes it


def local_response_norm(x: Any, size: int, alpha: float, beta: float, k: float) -> Any:
    return _norm(x, x, size, alpha, beta, k)


def relu_max_pool2d(
    x: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple[Any, Any]:
    y = _pool(op.Relu(x), kernel_size, stride, padding, dilation, ceil_mode)
    return y, _winners(y)


def conv2d_bias_relu(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int, relu: bool = True
) -> Any:
    pads = [*padding, *padding]
    y = op.Conv(x, weight, bias, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)
    return op.Relu(y) if relu else y


def linear_bias_relu(x: Any, weight: Any, bias: Any) -> Any:
    return op.Relu(op.Gemm(x, weight, bias, transB=1))


def relu_lrn_max_pool2d(
    x: Any, bias: Any, lrn_size: int, alpha: float, beta: float, k: float, kernel_size: Any, stride: Any
) -> tuple[Any, Any]:
    y = _pool(
        _norm(x, op.Relu(_biased(x, bias)), lrn_size, alpha, beta, k),
        kernel_size,
        stride,
        (0, 0),
        (1, 1),
        False,
    )
    return y, _winners(y)


def relu_max_pool2d_lrn(
    x: Any, bias: Any, lrn_size: int, alpha: float, beta: float, k: float, kernel_size: Any, stride: Any
) -> tuple[Any, Any, Any]:
    pooled = _pool(op.Relu(_biased(x, bias)), kernel_size, stride, (0, 0), (1, 1), False)
    return _norm(x, pooled, lrn_size, alpha, beta, k), op.Identity(pooled), _winners(pooled)
