"""``pytest benchmarks/test_augment.py --benchmark-only``: native beside stock."""

from .harness import op_benchmark

test_augment = op_benchmark("augment")
