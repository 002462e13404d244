"""``pytest benchmarks/test_relu_lrn_max_pool2d.py --benchmark-only``: native beside stock."""

from .harness import op_benchmark

test_relu_lrn_max_pool2d = op_benchmark("relu_lrn_max_pool2d")
