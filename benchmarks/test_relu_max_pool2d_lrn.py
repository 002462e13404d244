"""``pytest benchmarks/test_relu_max_pool2d_lrn.py --benchmark-only``: native beside stock."""

from .harness import op_benchmark

test_relu_max_pool2d_lrn = op_benchmark("relu_max_pool2d_lrn")
