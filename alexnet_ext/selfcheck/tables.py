"""What is known of kernels, carried from one machine to another: `alexnet tune --export` and `--import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..ops import _known

SAME = ("device", "capability", "multiprocessors", "alexnet_ext", "torch", "triton", "cudnn")
"""What must be equal for another machine's times to hold here. Its proofs never do: kernels are proven again."""


def exported() -> str:
    """All files of this user, as one JSON text."""
    held = [found for found in map(_known.read, _known.files()) if found is not None]
    return f"{json.dumps(held, indent=1, sort_keys=True)}\n"


def import_races(path: Path, device: torch.device) -> int:
    """Take the races of an exported file that were run on the same kind of GPU, with the same versions; their number.

    Raises:
        ValueError: a file that ``exported`` did not write.
    """
    held = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(held, list) or not all(isinstance(one, dict) for one in held):
        raise ValueError("not a file of `alexnet tune --export`")
    known = _known.on(device)
    races: dict[str, Any] = {}
    for one in held:
        identity = one.get("identity")
        if isinstance(identity, dict) and all(
            identity.get(name) == known.identity.get(name) for name in (*SAME, *_known.Settings._fields)
        ):
            races |= _known.entries(one, "races", _known.Race)
    known.add(races=races)
    return len(races)
