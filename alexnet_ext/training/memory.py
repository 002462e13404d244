"""How a training process keeps its memory."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed; returns whether it took the advice (False on another libc).

    A training step frees and takes the same blocks over and over. By default glibc returns those above 32 MiB
    to the kernel, which hands them back a page at a time, zeroed: on two cores a fifth of AlexNet's step. It
    suits a process that does nothing but train; a library must not decide it for its user.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
