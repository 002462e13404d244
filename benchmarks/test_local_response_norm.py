"""``pytest benchmarks/test_local_response_norm.py --benchmark-only``: native beside stock."""

from .harness import op_benchmark

test_local_response_norm = op_benchmark("local_response_norm")
