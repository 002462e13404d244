"""``python -m benchmarks.cluster``: training on 1 to 512 GPUs, predicted: images a second, minutes for ImageNet.

python -m benchmarks.cluster [--gpu h100] [--network infiniband] [--images 128] [--json FILE] [--out FILE.png]
python -m benchmarks.cluster --step-ms 2.3     # one GPU's step at --images, measured
python -m benchmarks.cluster --measure         # the all-reduce's model against gloo here, with 2 and 4 processes
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

import torch.distributed as dist

from ..predict.__main__ import put
from . import gloo, links, model, records, report


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=tuple(links.NVLINK), default="h100")
    parser.add_argument("--network", choices=tuple(links.NIC), default="infiniband", help="between nodes of 8 GPUs")
    parser.add_argument("--images", type=int, default=128, help="of each GPU, whatever their number (default 128)")
    parser.add_argument("--step-ms", type=float, metavar="MS", help="one GPU's step, measured; else it is predicted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw them, as PNG or SVG")
    parser.add_argument("--measure", action="store_true", help="compare the model of an all-reduce with gloo's here")
    options = parser.parse_args(words)
    if options.images < 1:
        parser.error(f"--images {options.images}: expected at least 1")
    if options.step_ms is not None and not (math.isfinite(options.step_ms) and options.step_ms > 0):
        parser.error(f"--step-ms {options.step_ms}: expected a positive number of milliseconds")
    if options.out and options.out.suffix not in (".png", ".svg"):
        parser.error(f"--out {options.out}: expected a name that ends in .png or .svg")
    if options.out and importlib.util.find_spec("matplotlib") is None:
        parser.error("--out needs matplotlib: pip install matplotlib")
    if options.measure and not (dist.is_available() and dist.is_gloo_available()):
        parser.error("--measure: this torch has no gloo")
    if options.measure:
        gloo.main()
        return 0
    compute = model.predicted(options.gpu, options.images)
    if options.step_ms is not None:
        compute = compute.scaled(options.step_ms / 1e3, "measured")
    found = report.results(compute, options.images, options.gpu, options.network)
    compared = records.compare()
    report.show(found, compared, options.gpu, options.network)
    try:
        if options.json:
            put(options.json, json.dumps(report.as_dictionary(found, compared, options.gpu, options.network), indent=1))
        if options.out:
            report.draw(found, compared, options.gpu, options.network, options.out)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
