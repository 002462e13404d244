"""``python -m benchmarks.verify_gpu``: proves in ten minutes what only a GPU can prove, and writes one report."""
