"""Machine code (SASS) of a kernel: how often each instruction runs, and how long one warp alone takes for it.

The PTX machine counts PTX. ``-lineinfo`` names, for every instruction of machine code, the line of PTX that it came
from. So each block of machine code between jumps gets the count of the PTX in it.
"""

from __future__ import annotations

import re
import statistics
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.tools.cuda_budget import tool

# One instruction of PTX makes one of machine code, and so shows how often the compiler repeated the code around it.
ONE_TO_ONE = re.compile(r"(?:LDG|STG|LDS|STS|LDSM|LDGSTS|SHFL|MUFU|HMMA|HGMMA|BAR|RED|ATOMG|UTMALDG|UTMASTG)\b")
ENDS = re.compile(r"(?:BRA|EXIT|RET|BREAK|BSYNC|CALL)\b")
# Clocks until the result of an instruction is there, where its wait is not in the stall count: as microbenchmarks of
# Volta to Hopper have them (Jia et al. 2018; Luo et al. 2024), rounded up. DRAM's is under load.
FROM_DRAM, FROM_L1 = 700, 40
LATENCY = {"ATOMG": 700, "LDS": 30, "LDSM": 33, "MUFU": 20, "SHFL": 25, "S2R": 25, "LDC": 40}
OTHER_LATENCY = 12
SCOREBOARDS = 6  # a warp's counters of instructions in flight

CLASSES = {
    "fp32": "FADD FMUL FFMA FSETP FSEL FMNMX FSET FCHK HADD2 HMUL2 HFMA2 HSETP2 HMNMX2 HSET2",
    "fp64": "DADD DMUL DFMA DSETP",
    "special": "MUFU",
    "global": "LDG STG LDGSTS ATOMG RED UTMALDG UTMASTG",
    "shared": "LDS STS LDSM ATOMS",
    "constant": "LDC ULDC",
    "shuffle": "SHFL",
    "convert": "F2FP F2F I2F F2I I2FP",
    "control": "BRA EXIT RET BREAK BSYNC BSSY CALL WARPSYNC NOP BAR YIELD DEPBAR",
    "tensor": "HMMA HGMMA",
}
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}


@dataclass
class Instruction:
    text: str
    line: int  # of PTX, 0 if none is named
    control: int  # its bits from 105 on: stall count, scoreboards set and waited for

    @property
    def name(self) -> str:
        words = self.text.split()
        return words[1 if words[0].startswith("@") else 0].split(".")[0]

    @property
    def kind(self) -> str:
        return CLASS_OF.get(self.name, "integer")

    @property
    def stall(self) -> int:
        return max(self.control & 15, 1)

    @property
    def sets(self) -> tuple[int, int]:
        """The scoreboards of its result, and of its operands once read; 7 is none."""
        return self.control >> 5 & 7, self.control >> 8 & 7

    @property
    def waits(self) -> Iterable[int]:
        return (n for n in range(SCOREBOARDS) if self.control >> 11 + n & 1)


Block = list[Instruction]


@dataclass
class Code:
    """A kernel's machine code, in blocks that have one entrance and one end; ``labels`` name some of them."""

    blocks: list[Block] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.blocks))


def disassemble(cubin: Path) -> dict[str, Code]:
    """The kernels of a file compiled with ``-lineinfo``, by mangled name."""
    command = [tool("nvdisasm"), "-c", "-gp", "-hex", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, Code] = {}
    for section in re.split(r"^\s*\.section\s+", text, flags=re.M):
        if head := re.match(r"\.text\.(\w+)", section):
            kernels[head[1]] = read(section)
    return kernels


def read(section: str) -> Code:
    blocks: list[Block] = [[]]
    labels: dict[str, int] = {}
    line = 0
    for row in section.splitlines():
        if found := re.match(r'\s*//## File "\.nv_debug_ptx_txt(?:\.\d+)?", line (\d+)', row):
            line = int(found[1])
        elif found := re.match(r"(\.L\w+):", row):
            blocks += [[]] if blocks[-1] else []
            labels[found[1]] = len(blocks) - 1
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/", row):
            blocks[-1].append(Instruction(found[1].strip("{} "), line, 0))
        elif (found := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", row)) and blocks[-1]:
            last = blocks[-1][-1]
            last.control = int(found[1], 16) >> 41
            if ENDS.match(last.name):
                blocks.append([])
    return Code(blocks if blocks[-1] else blocks[:-1], labels)


def reached(code: Code) -> set[int]:
    """The blocks that run where warps do not diverge. BRA.DIV jumps to a shuffle of threads that come one by one."""
    found, left = set(), [0] if code.blocks else []
    while left:
        n = left.pop()
        if n in found or n >= len(code.blocks):
            continue
        found.add(n)
        block = code.blocks[n]
        for i in block:
            if (target := re.search(r"`?\(?(\.L\w+)\)?$", i.text)) and ".DIV" not in i.text:
                left += [code.labels[target[1]]] if target[1] in code.labels else []
        last = block[-1]
        if (
            last.name not in ("BRA", "EXIT", "RET")
            or last.text.startswith("@")
            or re.search(r"BRA\.(DIV|U)", last.text)
        ):
            left.append(n + 1)
    return found


def executed(code: Code, issued: Mapping[int, int]) -> list[float]:
    """How many warps run each block, from the warps that issued each line of PTX.

    A line whose code stands in several places (unrolled loops, repeated ends) ran its count in all of them together.
    The median of a block's lines outweighs those that the compiler moved to it from elsewhere.
    """
    places: dict[tuple[int, str], list[int]] = defaultdict(list)
    runs = reached(code)
    for n in runs:
        for i in code.blocks[n]:
            places[i.line, i.name].append(n)

    def estimates(block: Block, sure: bool) -> list[float]:
        found = []
        for i in block:
            if i.line in issued and bool(ONE_TO_ONE.match(i.name)) == sure:
                at = places[i.line, i.name]
                found.append(issued[i.line] / (len(at) if sure else len(set(at))))
        return found

    counts = []
    for n, block in enumerate(code.blocks):
        found = (estimates(block, True) or estimates(block, False)) if n in runs else []
        counts.append(statistics.median(found) if found else 0.0)
    return counts


def totals(code: Code, counts: list[float]) -> Counter[str]:
    """Instructions that all warps issue, by kind."""
    kinds: Counter[str] = Counter()
    for block, count in zip(code.blocks, counts, strict=True):
        for i in block:
            kinds[i.kind] += count  # type: ignore[assignment]  # a mean of blocks is no whole number
    return kinds


def clocks_alone(code: Code, counts: list[float], cold: float) -> float:
    """Clocks of all warps, if each ran alone on its scheduler: stall counts, and waits for what is in flight.

    ``cold``: the share of loads that L1 does not have.
    """
    load = cold * FROM_DRAM + (1 - cold) * FROM_L1
    latencies = LATENCY | {"LDG": load, "LDGSTS": load}
    return sum(count * latency(block, latencies) for block, count in zip(code.blocks, counts, strict=True) if count)


def latency(block: Block, latencies: Mapping[str, float]) -> float:
    clock, ready = 0.0, [0.0] * SCOREBOARDS
    for i in block:
        clock = max([clock, *(ready[n] for n in i.waits)])
        wait = latencies.get(i.name, OTHER_LATENCY)
        result, operands = i.sets
        if result < SCOREBOARDS:
            ready[result] = max(ready[result], clock + wait)
        if operands < SCOREBOARDS:
            ready[operands] = max(ready[operands], clock + min(wait, OTHER_LATENCY))
        clock += i.stall
    return clock


def loop_around(code: Code, name: str) -> list[Block]:
    """The smallest loop that has all instructions of this name; of several loops that lie in a line, all."""
    wanted = [n for n, block in enumerate(code.blocks) if any(i.name == name for i in block)]
    loops = []
    for end, block in enumerate(code.blocks):
        for i in block:
            target = re.search(r"\(?(\.L\w+)\)?$", i.text)
            if i.name == "BRA" and target and (begin := code.labels.get(target[1], end + 1)) <= end:
                loops.append((begin, end))
    around = [(begin, end) for begin, end in loops if wanted and begin <= wanted[0] and wanted[-1] <= end]
    if not around:
        raise ValueError(f"no loop has all {len(wanted)} blocks with {name}")
    begin, end = min(around, key=lambda loop: loop[1] - loop[0])
    return code.blocks[begin : end + 1]


def registers(cubin: Path) -> dict[str, int]:
    """Registers a thread, by mangled name."""
    command = [tool("cuobjdump"), "-res-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"Function (\w+):\s*REG:(\d+)", text)}
