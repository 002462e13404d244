"""``python -m benchmarks.verify_gpu``: everything that only a GPU can prove, in ten minutes, into one report."""
