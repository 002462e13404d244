"""What a prediction assumes: each GPU's data sheet, and each constant of the model with its reason and its range.

Nothing here was measured by this project. ``verify_gpu`` fits ``ISSUE`` and ``COPY`` anew where a GPU is at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

WARP = 32
SCHEDULERS = 4  # of a multiprocessor, each issues one instruction a clock
REGISTERS = 65_536  # of a multiprocessor
REGISTER_UNIT = 256  # registers that a warp is given at a time
RESERVED_SHARED = 1024  # bytes of shared memory that the system keeps of each block


@dataclass(frozen=True)
class Constant:
    """An assumed number, with the range that its sources leave open."""

    value: float
    low: float
    high: float
    reason: str


@dataclass(frozen=True)
class Gpu:
    """A data sheet, except ``copy`` (bytes a second, read and written) and ``clock`` (Hz, under load): estimates."""

    name: str
    multiprocessors: int
    clock: float
    copy: float
    shared: int  # bytes a multiprocessor
    threads: int  # of a multiprocessor, at most
    products: int  # multiplications of bf16 a clock and multiprocessor, by tensor cores
    capability: int

    @property
    def issue(self) -> float:
        """Warp instructions a second, if every scheduler issues one a clock."""
        return self.multiprocessors * SCHEDULERS * self.clock


# Copy rates: 0.86 to 0.91 of the data sheet's bandwidth, as published copy benchmarks reach. Clocks: 1.755 GHz is an
# H100's under matrix products; the others are boost clocks less the same 5 %.
GPUS = {
    "h100": Gpu("H100 SXM", 132, 1.755e9, 3.00e12, 228 * 1024, 2048, 2048, 90),
    "h200": Gpu("H200 SXM", 132, 1.755e9, 4.30e12, 228 * 1024, 2048, 2048, 90),
    "a100": Gpu("A100 SXM 80 GB", 108, 1.34e9, 1.78e12, 164 * 1024, 2048, 1024, 80),
    "b200": Gpu("B200", 148, 1.77e9, 7.00e12, 228 * 1024, 2048, 4096, 100),
    "rtx4090": Gpu("RTX 4090", 128, 2.40e9, 0.92e12, 100 * 1024, 1536, 256, 89),
}

SHARED_RATE = 128  # bytes a clock and multiprocessor from shared memory: a fact of every GPU above

BLIND = (
    "hits in L2 beyond those within a block",
    "the clock under other loads",
    "the overlap of one kernel's end with the next one's begin",
    "DRAM's turns between reads and writes, and its refresh",
    "misses of the instruction cache",
    "the wait for a load whose use is in another block of machine code",
    "machine code for other GPUs than 9.0, whose counts stand for all",
)
"""What the model does not see."""


def assumed(value: float, low: float, high: float, reason: str) -> float:
    """A field with this default, and what else is known of it."""
    found: float = field(default=value, metadata={"constant": Constant(value, low, high, reason)})
    return found


@dataclass(frozen=True)
class Assumed:
    """The constants in force: the likely ones, or those at an end of their ranges."""

    issue: float = assumed(
        0.80,
        0.70,
        0.90,
        "share of its issue slots that a busy multiprocessor fills; profiles of such kernels: 70 to 90 %",
    )
    copy: float = assumed(0.95, 0.90, 1.00, "share of a copy's rate that a kernel bound by memory reaches")
    l2: float = assumed(
        38, 30, 48, "bytes a clock that a multiprocessor gets from L2; matrix products without multicast show 30 to 45"
    )
    tensor: float = assumed(
        0.82,
        0.78,
        0.86,
        "share of the tensor cores' peak at this clock; an H100's fastest published bf16 products: 0.84",
    )
    mma_sync: float = assumed(
        0.62, 0.55, 0.68, "rate of mma.sync on Hopper, as a share of wgmma's; published comparisons"
    )
    permute: float = assumed(
        0.33,
        0.20,
        0.60,
        "rate of PyTorch's copy between memory formats, as a share of a plain copy's; profiles of others",
    )
    linear: float = assumed(0.63, 0.55, 0.70, "share of the tensor cores' peak that cuBLAS reaches on fc6 to fc8")
    linear_bytes: float = assumed(0.85, 0.75, 0.92, "share of a copy's rate at which cuBLAS reads weights")
    gap: float = assumed(1.3e-6, 1.0e-6, 2.0e-6, "seconds between two kernels of a CUDA graph, with the ramp of both")
    small: float = assumed(1.0e-6, 0.7e-6, 1.5e-6, "seconds of a kernel that moves a few kilobytes")


CONSTANTS: dict[str, Constant] = {f.name.upper(): f.metadata["constant"] for f in fields(Assumed)}


def at_end(which: str) -> Assumed:
    """All constants at their "slow" or "fast" end."""
    slow = which == "slow"
    seconds = {"gap", "small"}  # of these less is faster
    chosen = {
        name.lower(): constant.low if slow != (name.lower() in seconds) else constant.high
        for name, constant in CONSTANTS.items()
    }
    return Assumed(**chosen)


LIKELY, SLOW, FAST = Assumed(), at_end("slow"), at_end("fast")
