"""``pytest benchmarks/test_conv2d_bias_relu.py --benchmark-only``: native beside stock."""

from .harness import op_benchmark

test_conv2d_bias_relu = op_benchmark("conv2d_bias_relu")
