"""Whether this process is the command ``alexnet``. If so, the package imports PyTorch only where it is needed: the
command's help and its errors do without, and the import takes longer than they do."""

from __future__ import annotations

import os
import sys


def _is_command() -> bool:
    if sys.argv[:1] == ["-m"]:  # true while Python looks for the module
        return any(
            first == "-m" and second == __package__
            for first, second in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
        )
    if not sys.argv or os.path.basename(sys.argv[0]) != "alexnet":
        return False
    try:
        with open(sys.argv[0], "rb") as script:
            return f"{__package__}.cli".encode() in script.read(4096)  # and not some other script of that name
    except OSError:
        return False


COMMAND = _is_command()
