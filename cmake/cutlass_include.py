"""Prints the folder of CUTLASS's headers, which the PyPI package nvidia-cutlass brings; nothing where it is missing."""

from importlib.util import find_spec
from pathlib import Path

found = find_spec("cutlass_library")
if found is not None and found.origin is not None:
    print(Path(found.origin).parent / "source" / "include", end="")
