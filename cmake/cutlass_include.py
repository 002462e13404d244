"""Prints the folder of CUTLASS's headers in the PyPI package nvidia-cutlass, or nothing if it is not installed."""

from importlib.util import find_spec
from pathlib import Path

found = find_spec("cutlass_library")
if found is not None and found.origin is not None:
    print(Path(found.origin).parent / "source" / "include", end="")
