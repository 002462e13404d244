"""``python -m benchmarks.predict``: what each kernel, the training step and inference would cost on a GPU, predicted.

Kernels are predicted from counts (counts.json) and a GPU's data sheet, none of it measured on a GPU.

    python -m benchmarks.predict [--gpu h100] [--batch 128 --batch 1024] [--json FILE] [--picture FILE.png]
    python -m benchmarks.predict --renew [WORDS...]    # counts again those whose names have all words (by nvcc, Triton)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from . import gates, report
from .gpus import GPUS
from .kernels import COUNTS


def write(path: Path, found: dict[str, Any]) -> None:
    """One row a line, so that a change shows which rows it concerns."""
    rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(found["rows"].items()))
    rest = {name: value for name, value in found.items() if name != "rows"}
    text = json.dumps(rest, indent=1)[:-2] + f',\n "rows": {{\n{rows}\n }}\n}}\n'
    json.loads(text)
    put(path, text)


def put(path: Path, text: str) -> None:
    """The file as a whole, or as it was."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def renew(words: list[str]) -> int:
    """Counts the rows whose names have all these words and writes them; returns how many gates do not hold."""
    from . import count  # needs what tests need

    committed = json.loads(COUNTS.read_text(encoding="utf-8"))
    known = {job.work.name for job in count.jobs()}
    committed["rows"] = {name: row for name, row in committed["rows"].items() if name in known}
    started = time.monotonic()
    for name, row in count.count(words):
        print(f"{time.monotonic() - started:5.0f} s  {name}", flush=True)
        committed["rows"][name] = row
    if not words:
        committed["producers"] = count.producers()
    write(COUNTS, committed)
    said = [text for name, row in committed["rows"].items() for text in gates.faults(name, row, committed)]
    said += gates.idle(committed)
    print(*said, sep="\n")
    return len(said)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100")
    parser.add_argument("--batch", type=int, action="append", help="batch size (repeat it; default 128 and 1024)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the steps' parts, as PNG or SVG")
    parser.add_argument("--renew", nargs="*", metavar="WORD", help="count again; rows whose names have all words")
    options = parser.parse_args(words)
    if options.renew is not None:
        return 1 if renew(options.renew) else 0
    batches = options.batch or [128, 1024]
    if min(batches) < 1:
        parser.error(f"--batch {min(batches)}: expected at least 1")
    if options.picture and options.picture.suffix not in (".png", ".svg"):
        parser.error(f"--picture {options.picture}: expected a name that ends in .png or .svg")
    if options.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install matplotlib")
    found = report.predictions(options.gpu, batches)
    report.show(found)
    try:
        if options.json:
            put(options.json, json.dumps(found, indent=1) + "\n")
        if options.picture:
            report.draw(found, options.picture)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
