"""Counts of a kernel whose every number can be said beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gpu_on_cpu import machine_code
from tests.gpu_on_cpu.machine_code import Code, Instruction
from tests.gpu_on_cpu.ptx.counts import CountingMachine, Counts, spread
from tests.gpu_on_cpu.ptx.machine import Launch
from tests.gpu_on_cpu.ptx.program import parse

# Each thread loads a word, stores it to shared memory STRIDE bytes after its neighbour's, and to global memory.
KERNEL = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry copy(.param .u64 copy_param_0, .param .u64 copy_param_1)
{
  .reg .b32 %r<8>;
  .reg .b64 %rd<6>;
  .reg .pred %p<2>;
  .shared .align 4 .b8 tile[8192];
  ld.param.u64 %rd1, [copy_param_0];
  ld.param.u64 %rd2, [copy_param_1];
  mov.u32 %r1, %tid.x;
  mov.u32 %r2, %ctaid.x;
  mad.lo.s32 %r3, %r2, 64, %r1;
  mul.wide.u32 %rd3, %r3, 4;
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  ld.global.u32 %r4, [%rd4];
  mul.lo.s32 %r5, %r1, STRIDE;
  mov.u32 %r6, tile;
  add.s32 %r6, %r6, %r5;
  st.shared.u32 [%r6], %r4;
  setp.ge.u32 %p1, %r1, 32;
  @%p1 bra $end;
  st.global.u32 [%rd5], %r4;
$end:
  ret;
}
"""


def aligned(count: int) -> Any:
    """That many words; the first one begins a sector."""
    around = np.zeros(count + 8, np.uint32)
    skipped = -around.ctypes.data // 4 % 8
    return around[skipped : skipped + count]


def counted(blocks: int, words: int = 1, most: int = 100) -> Counts:
    (kernel,) = parse(KERNEL.replace("STRIDE", str(4 * words))).values()
    source, target = (aligned(64 * blocks) for _ in range(2))
    addresses = [np.uint64(array.ctypes.data).tobytes() for array in (source, target)]
    machine = CountingMachine(Launch(kernel, [source, target], addresses, 64, 0))
    machine.most = most
    machine.run((blocks, 1, 1))
    return machine.counts


def test_instructions_are_counted_by_warp_and_bytes_by_sector() -> None:
    counts = counted(3)
    assert (counts.blocks, counts.sampled, counts.threads, counts.shared) == (3, 3, 64, 8192)
    # Two warps do all, except that the second one jumps over the last store.
    assert counts.issued.tolist() == [6] * 15 + [3, 6]
    assert counts.block_bytes == 3 * (64 + 32) * 4
    assert counts.asked == {"load": 3 * 8, "store": 3 * 4}
    assert counts.buffers == [(768, 1.0, 0.0), (768, 0.0, 0.5)]
    assert counts.cold == 1.0


@pytest.mark.parametrize(("words", "turns"), [(1, 2), (2, 4), (32, 64), (0, 2)])
def test_a_bank_conflict_costs_turns(words: int, turns: int) -> None:
    counts = counted(1, words)
    assert counts.turns == turns
    assert counts.ideal_turns == 2


def test_a_sample_of_a_large_grid_stands_for_it() -> None:
    whole, sample = counted(50), counted(50, most=5)
    assert sample.sampled == 5
    assert sample.issued.sum() * sample.scale == whole.issued.sum()
    assert sample.block_bytes * sample.scale == whole.block_bytes


def test_sampled_blocks_are_spread_over_the_grid_and_meet_no_period() -> None:
    chosen = spread(1000, 12)
    assert len(set(chosen)) == 12
    assert max(np.diff(sorted([0, *chosen, 1000]))) < 200
    assert len({n % 10 for n in chosen}) > 5
    assert list(spread(4, 12)) == [0, 1, 2, 3]


# ---- machine code


def control(stall: int, sets: int = 7, waits: int = 0) -> int:
    return stall | sets << 5 | 7 << 8 | waits << 11


def block(*given: tuple[str, int], stall: int = 1) -> list[Instruction]:
    return [Instruction(text, line, control(stall)) for text, line in given]


def test_a_loop_that_the_compiler_repeats_is_counted_once() -> None:
    """Four copies of a load of line 7, which 40 warps issue: each copy runs 10 times."""
    loop = block(*[("LDG.E R1, [R2]", 7), ("IADD3 R2, R2, 4, RZ", 8)] * 4)
    code = Code([block(("MOV R1, R2", 1)), loop, block(("EXIT", 9))])
    counts = machine_code.executed(code, {1: 2, 7: 40, 8: 40, 9: 2})
    assert counts == [2, 10, 2]
    assert machine_code.totals(code, counts) == {"integer": 2 + 40, "global": 40, "control": 2}


def test_code_for_threads_that_come_one_by_one_does_not_run() -> None:
    """BRA.DIV leaves the shuffle of a whole warp for its copy, which is reached from nowhere else."""
    whole = [block(("BRA.DIV UR4, `(.L_x_1)", 7)), block(("SHFL.DOWN R1, R2, 1", 7)), block(("EXIT", 9))]
    alone = block(("WARPSYNC.COLLECTIVE R3, `(.L_x_2)", 7), ("SHFL.DOWN R1, R2, 1", 7), ("BRA `(.L_x_3)", 7))
    code = Code([*whole, alone], {".L_x_1": 3, ".L_x_2": 3, ".L_x_3": 2})
    assert machine_code.executed(code, {7: 10, 9: 10}) == [10, 10, 10, 0]


def test_code_moved_from_another_place_is_outweighed() -> None:
    """The address of line 8 is computed before the loop, though PTX computes it inside."""
    before = block(("S2R R1, SR_TID.X", 1), ("IADD3 R2, R1, 4, RZ", 8), ("MOV R3, R1", 2))
    inside = block(("LDG.E R4, [R2]", 7), ("FADD R5, R5, R4", 9))
    counts = machine_code.executed(Code([before, inside]), {1: 2, 2: 2, 7: 40, 8: 40, 9: 40})
    assert counts == [2, 40]


def test_one_warp_alone_waits_for_what_it_needs() -> None:
    load = Instruction("LDS R1, [R2]", 1, control(2, sets=0))
    free = Instruction("FADD R3, R4, R5", 2, control(4))
    needs = Instruction("FADD R6, R1, R3", 3, control(4, waits=1))
    assert machine_code.latency([load, free], machine_code.LATENCY) == 6
    assert machine_code.latency([load, free, needs], machine_code.LATENCY) == 30 + 4
    twice = machine_code.clocks_alone(Code([[load, free], [needs]]), [2, 3], cold=1.0)
    assert twice == 2 * 6 + 3 * 4


def test_the_loop_around_all_loads_is_found() -> None:
    jump = block(("@P0 BRA `(.L_x_1)", 5))
    code = Code([block(("MOV", 1)), block(("UTMALDG", 2)), block(("UTMALDG", 3)), jump], {".L_x_1": 1})
    assert machine_code.loop_around(code, "UTMALDG") == code.blocks[1:]
    with pytest.raises(ValueError, match="no loop has all"):
        machine_code.loop_around(Code(code.blocks, {".L_x_1": 2}), "UTMALDG")


def test_a_listing_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    listing = """
	.section	.text._Z1fv,"ax",@progbits
.text._Z1fv:
	//## File ".nv_debug_ptx_txt", line 12
        /*0000*/                   LDG.E.128 R4, [R2.64] ;  /* 0x0000000402047981 */
                                                            /* 0x000ea2000c1e1d00 */
.L_x_3:
	//## File ".nv_debug_ptx_txt", line 14
        /*0010*/              @!P0 BRA `(.L_x_3) ;          /* 0x0000000402047981 */
                                                            /* 0x000fe20000000800 */
        /*0020*/                   EXIT ;                   /* 0x0000000402047981 */
                                                            /* 0x000fea0003800000 */
"""
    code = machine_code.read(listing)
    assert [[i.name for i in block] for block in code.blocks] == [["LDG"], ["BRA"], ["EXIT"]]
    assert code.labels == {".L_x_3": 1}
    load, jump = code.blocks[0][0], code.blocks[1][0]
    assert (load.line, load.kind, load.stall, load.sets) == (12, "global", 1, (2, 7))
    assert (jump.line, jump.kind, list(jump.waits)) == (14, "control", [])
