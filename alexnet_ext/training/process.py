"""The settings of a training process as a whole: memory, random numbers, cuDNN. A library must not choose them.

torch is imported where it is used: ``huge_pages`` must come first, and ``alexnet --help`` needs no torch.
"""

from __future__ import annotations

import ctypes
import os
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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


def huge_pages() -> None:
    """Ask torch to take large tensors in huge pages, unless the user has decided. Before torch's first allocation.

    A step allocates its gradients and activations afresh. Page by page that costs a tenth of the step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def prepare(device: torch.device, seed: int) -> None:
    """Set up this process to train on ``device`` with random numbers from ``seed``."""
    import torch

    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # streams, events and graphs are the current device's
        torch.backends.cudnn.benchmark = True
    seed_everything(seed)


def memory(device: torch.device) -> int:
    """Bytes that this process has: most so far on a GPU, now on the CPU (0 where the system does not say)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch (all devices), by every bit of ``seed``."""
    import numpy as np
    import torch

    from ..data.batches import narrowed

    random.seed(seed)
    np.random.seed(narrowed(seed))
    torch.manual_seed(narrowed(seed))


def random_state() -> dict[str, Any]:
    """The states of all generators in plain types and tensors."""
    import numpy as np
    import torch

    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any], many: bool = False) -> None:
    """Restore what ``random_state`` returned; the GPUs' states only if their number is the same. Of ``many`` processes,
    each on its current GPU, all go on from the first GPU's state."""
    import numpy as np
    import torch

    name, keys, position, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if not torch.cuda.is_available():
        return
    if many and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
    elif len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
