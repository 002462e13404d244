"""Whether this process is the command ``alexnet``. Its help and its errors need no PyTorch, whose import takes longer
than they do, so that the package then leaves the imports to whoever needs them."""

from __future__ import annotations

import os
import sys


def _is_command() -> bool:
    if sys.argv[:1] == ["-m"]:  # so it is as long as Python looks for the module
        return any(
            first == "-m" and second == __package__
            for first, second in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
        )
    if not sys.argv or os.path.basename(sys.argv[0]) != "alexnet":
        return False
    try:
        with open(sys.argv[0], "rb") as script:
            return f"{__package__}.cli".encode() in script.read(4096)  # and is no one's own script of that name
    except OSError:
        return False


COMMAND = _is_command()
