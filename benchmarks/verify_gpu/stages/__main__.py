"""``python -m benchmarks.verify_gpu.stages STAGE PART DEVICE SECONDS FILE``: findings as lines of JSON in FILE."""

import faulthandler
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from . import STAGES, Task

MARGIN = 6
"""A part that can stop by itself does so this many seconds before the time limit."""


def main(name: str, part: str, device: str, seconds: str, file: str) -> int:
    end = time.monotonic() + float(seconds) - MARGIN
    faulthandler.dump_traceback_later(max(1.0, float(seconds) - 1))  # shows where it hangs, before it is killed
    stage = next(stage for stage in STAGES if stage.name == name)
    with Path(file).open("w", encoding="utf-8") as lines:
        for finding in stage.run(Task(device, part, end)):
            lines.write(json.dumps(asdict(finding)) + "\n")
            lines.flush()
            print(f"{finding.name}: {finding.ok} {finding.detail} {finding.numbers or ''}", flush=True)
            if finding.ok is False and (error := broken(device)):
                print(f"the CUDA context is lost, and with it what was to follow here: {error}")
                return 1
    return 0


def broken(device: str) -> str:
    """A lasting CUDA error: every later call of this process would fail with it, and prove nothing."""
    torch = sys.modules.get("torch")  # the build stage does not load it
    if device != "cuda" or torch is None:
        return ""
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
