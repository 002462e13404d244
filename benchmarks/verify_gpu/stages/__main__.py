"""``python -m benchmarks.verify_gpu.stages STAGE DEVICE FILE``: one stage, its findings as lines of JSON in FILE."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from . import STAGES


def main(name: str, device: str, file: str) -> None:
    stage = next(stage for stage in STAGES if stage.name == name)
    with Path(file).open("w", encoding="utf-8") as lines:
        for finding in stage.run(device):
            lines.write(json.dumps(asdict(finding)) + "\n")
            lines.flush()
            print(f"{finding.name}: {finding.ok} {finding.detail} {finding.numbers or ''}")


if __name__ == "__main__":
    main(*sys.argv[1:])
