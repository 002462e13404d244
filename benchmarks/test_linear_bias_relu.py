"""``pytest benchmarks/test_linear_bias_relu.py --benchmark-only``: native beside stock."""

from .harness import op_benchmark

test_linear_bias_relu = op_benchmark("linear_bias_relu")
