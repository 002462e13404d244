"""The fused operators, one folder each. Every function takes ``backend="auto" | "native" | "triton" | "stock"``."""

from ._backend import use_backend
from .augment.op import augment
from .conv2d_bias_relu.op import conv2d_bias_relu
from .linear_bias_relu.op import linear_bias_relu
from .local_response_norm.op import local_response_norm
from .relu_lrn_max_pool2d.op import relu_lrn_max_pool2d
from .relu_max_pool2d.op import relu_max_pool2d
from .relu_max_pool2d_lrn.op import relu_max_pool2d_lrn
from .sgd_step.op import sgd_step

__all__ = [
    "augment",
    "conv2d_bias_relu",
    "linear_bias_relu",
    "local_response_norm",
    "relu_lrn_max_pool2d",
    "relu_max_pool2d",
    "relu_max_pool2d_lrn",
    "sgd_step",
    "use_backend",
]
