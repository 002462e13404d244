"""Runs Triton's compiler, which a process under Triton's interpreter lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.support import ROOT


def printed(*module: str) -> list[dict[str, Any]]:
    """The lines of JSON that ``python -m module...`` prints, in a process of its own with Triton's compiler."""
    result = subprocess.run(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]
