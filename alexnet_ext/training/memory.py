"""How a training process keeps its memory."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory; returns whether it does (False on another libc).

    A training step frees and allocates the same blocks over and over. By default glibc returns those above 32 MiB
    to the kernel, which hands them back a page at a time, zeroed: on two cores a fifth of AlexNet's step. Keeping
    them suits a process that only trains; a library must not decide that for its user.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
