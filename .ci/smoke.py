"""Runs every op natively, with its gradient, and compares with float64: needs an installed wheel, no more.

What the ops are and what equals them is in tests/ops/*/spec.py beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from alexnet_ext import _library


def main() -> int:
    # Behind the import above, so that what is tested is the installed package and not the tree's.
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from tests.support import oracle, specs

    cpu, cuda = _library.LIBRARIES
    print(f"torch {torch.__version__}, alexnet_ext from {_library.FOLDER}")
    for library in (cpu, cuda):
        print(f"  {library.name}: {'loaded' if library.loaded else f'not loaded: {library.reason}'}")
    # The arguments name the libraries that this installation must have: "cpu" alone, or both.
    for name in sys.argv[1:]:
        if not next(library for library in (cpu, cuda) if library.name == name).loaded:
            print(f"the {name} library should be loaded")
            return 1
    for op, spec in specs.SPECS.items():
        for case in spec.examples:
            for dtype in (torch.float32, torch.float64):
                for layout in ("contiguous", "channels_last"):
                    tensors = specs.make(case, dtype, layout)
                    oracle.assert_matches_float64(specs.in_dtype(case, dtype), tensors, "native")
        print(f"  {op}: as stock")
    return 0


if __name__ == "__main__":
    sys.exit(main())
