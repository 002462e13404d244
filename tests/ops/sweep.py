"""``python -m tests.ops.sweep``: every op once for each dtype and layout against float64, in seconds.

For a process of its own: another instruction set, another torch version.
"""

from __future__ import annotations

import torch

from alexnet_ext import _library
from tests.ops.conv2d_bias_relu.spec import WINOGRAD_CASES
from tests.support import cases, oracle


def main() -> None:
    if not _library.LIBRARIES[0].loaded:
        raise SystemExit(f"the compiled CPU library is not loaded: {_library.LIBRARIES[0].reason}")
    larger = [case for op in cases.OPS for case in cases.CASES[op] if case.shapes["x"][-1] >= 15]
    others = [c for c in cases.of_all("cases", cases.WITHOUT_GRADIENT) if c.constants.get("size", 15) >= 15]
    count = 0
    for case in (*cases.EXAMPLES, *larger, *others):
        backend = "auto" if case.constants.get("kernel_size") == (16, 15) else "native"
        for dtype in cases.DTYPES:
            for layout in ("contiguous", "channels_last", "sliced", "offset"):
                oracle.assert_matches_float64(cases.in_dtype(case, dtype), cases.make(case, dtype, layout), backend)
                count += 1
    for case in WINOGRAD_CASES:
        oracle.assert_matches_float64(case, cases.make(case), "native")
        count += 1
    print(f"{count} calls right on {torch.ops.alexnet_ext.cpu_capability()} with torch {torch.__version__}")


if __name__ == "__main__":
    main()
