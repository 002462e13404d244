"""The CUDA kernels' own source, run on the CPU by tests/gpu_on_cpu/emulator, against float64.

Sizes are small and odd: an emulated kernel is slow. Properties on any device are tested in the op's own test.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu_on_cpu import emulated
from tests.support import cases, oracle
from tests.support.cases import Case, augment, block, conv, each_dtype, lrn, pool

LAYOUTS = ("contiguous", "channels_last", "sliced", "offset")


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest) -> Path:
    found = Path(request.config.getoption("--emulator"))
    if not (found / emulated.NAME).exists():
        pytest.skip(f"the emulator is not built in {found}: {emulated.BUILD}")
    return found


@pytest.fixture
def emulator(folder: Path) -> Iterator[ctypes.CDLL]:
    with emulated.kernels_emulated(folder) as library:
        yield library


# Vectors of 8 channels and warps of 32 lanes, blocks of 256 threads: one below, at and one above; several blocks.
LRN_CASES = (
    *(lrn((2, channels, 3, 5)) for channels in (1, 7, 8, 9, 16, 40)),
    *(lrn((1, 8, 1, pixels)) for pixels in (29, 30, 31, 61)),
    *(lrn((2, 24, 3, 5), size=size) for size in (1, 2, 3, 4, 7, 15)),
    *(lrn((2, 16, 3, 5), beta=beta) for beta in (0.0, 0.5, 1.0, 0.3)),
    *(lrn((2, channels, 2, 3), size) for channels, size in ((65, 4), (130, 9), (150, 100), (70, 300))),
    *(lrn(shape) for shape in ((0, 3, 2, 2), (2, 0, 2, 2), (2, 264, 2, 2), (3, 16, 17, 11))),
)
POOL_CASES = (
    pool((0, 3, 4, 5), 1, 1),
    pool((2, 8, 5, 7)),
    pool((2, 3, 13, 9), ceil_mode=True),
    pool((1, 16, 6, 8), 3, 2, padding=1, ceil_mode=True),
    pool((2, 3, 9, 11), (3, 2), (1, 2), padding=(1, 0)),
    pool((1, 8, 11, 9), (2, 3), (2, 1), padding=(0, 1), dilation=(3, 2)),
    pool((2, 5, 8, 6), 2, 2),
    pool((1, 8, 9, 10), 2, 4),
    pool((1, 1, 16, 17), 15, 1, padding=7),
    pool((3, 7, 6), 3, 2),
    pool((2, 40, 9, 17)),
)
BLOCK_CASES = tuple(
    case
    for op in cases.BLOCKS
    for case in (
        block(op, (2, 6, 7, 5)),
        block(op, (2, 16, 7, 5), bias=False),
        block(op, (1, 1, 1, 1), kernel_size=1, stride=1),
        block(op, (0, 8, 4, 5)),
        *(block(op, (2, channels, 5, 7)) for channels in (1, 7, 8, 9, 24, 40)),
        *(block(op, (2, 8, 5, 7), lrn_size=size) for size in (1, 2, 3, 4, 7, 15)),
        *(block(op, (2, 16, 5, 7), beta=beta) for beta in (0.0, 0.3, 0.5, 1.0)),
        # Threads share their neighbours' parts: around 16 and 64 channels a block, windows beyond the channels.
        *(block(op, (1, channels, 5, 7), lrn_size=4) for channels in (15, 16, 17, 63, 64, 65)),
        *(block(op, (1, 70, 4, 5), lrn_size=size, kernel_size=2) for size in (2, 7, 15, 100, 300)),
        block(op, (2, 8, 6, 9), kernel_size=(2, 3), stride=(1, 2)),
        block(op, (2, 8, 9, 8), kernel_size=2, stride=3),
        block(op, (1, 24, 6, 5), kernel_size=3, stride=1),
        block(op, (3, 24, 11, 13)),  # several blocks, and rows of bias sums
    )
)
CONV_CASES = (
    conv((2, 4, 7, 5), 6, (3, 3), padding=1, groups=2),
    conv((2, 4, 7, 5), 6, (3, 3), bias=False),
    conv((1, 1, 1, 1), 1, (1, 1)),
    conv((0, 2, 3, 4), 4, (3, 3), padding=1),
    conv((2, 4, 5, 6), 16, (1, 1), groups=2),  # planes of 30: vectors reach from one into the next
    conv((3, 3, 15, 13), 24, (3, 2), stride=(2, 1), padding=(1, 0)),
    conv((2, 8, 3, 3), 40, (1, 1)),
)
CASES = LRN_CASES + POOL_CASES + BLOCK_CASES + CONV_CASES
EXAMPLES = (lrn((3, 48, 3, 5)), lrn((2, 24, 3, 5), size=4), pool((2, 24, 9, 7), padding=1), pool((2, 5, 9, 7), 2, 2))
EXAMPLES += tuple(block(op, (2, channels, 7, 9)) for op in cases.BLOCKS for channels in (9, 24))
EXAMPLES += tuple(block(op, (3, 70, 7, 9), lrn_size=size) for op in cases.BLOCKS for size in (4, 15))
EXAMPLES += (conv((3, 4, 9, 7), 24, (3, 3)), conv((3, 4, 9, 7), 9, (3, 3)))


@pytest.mark.usefixtures("poisoned", "emulator")
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", cases.params(CASES))
def test_values_and_gradients(case: Case, dtype: torch.dtype, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, dtype, layout), "native")


# Many blocks, images that end within a tile of several pixels, threads and blocks that take more than one turn.
LARGE_CASES = (
    pool((70_000, 1, 2, 3), 2, 1),
    lrn((70_000, 1, 1, 1)),
    *(block(op, shape) for op in cases.BLOCKS for shape in ((100, 8, 13, 11), (41, 24, 10, 17))),
    *(block(op, (70, 20, 13, 9), lrn_size=4) for op in cases.BLOCKS),
)


@pytest.mark.usefixtures("poisoned", "emulator")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", cases.params(LARGE_CASES))
def test_many_blocks(case: Case, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, layout=layout), "native")


# Sixteen bytes that begin in one row, or image, and end in another; images that end within them; several blocks.
AUGMENT_CASES = tuple(
    augment(images, size, block)
    for block in (1, 4)
    for images, size in (
        *(((5, size + 2, size + 3, 3), size) for size in (1, 2, 3, 5, 8, 9, 17)),
        *(((1, 7, 6, 3), 6), ((3, 33, 34, 3), 31), ((70_000, 2, 3, 3), 1)),
    )
)


@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("case", cases.params(AUGMENT_CASES))
def test_augment_equals_the_cpu_kernels_to_the_bit(folder: Path, case: Case, layout: str, dtype: torch.dtype) -> None:
    case = cases.in_dtype(case, dtype)
    tensors = cases.make(case, layout=layout)
    expected = cases.fused(case, tensors, "native")
    for order in emulated.ORDERS[:: 1 if case.shapes["images"][0] < 10 else 3]:
        with emulated.kernels_emulated(folder, order) as library:
            before = library.alexnet_emulator_launches()
            assert torch.equal(cases.fused(case, tensors, "native"), expected)
            assert library.alexnet_emulator_launches() == before + 1


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("far", [1, 2**33, -1, -(2**33)])
def test_augment_moves_a_crop_inside_its_image(far: int) -> None:
    for case in cases.AUGMENT_EXAMPLES:
        tensors = cases.make(case)
        most = torch.tensor([3, 5])
        inside = tensors | {"offsets": (most if far > 0 else torch.zeros_like(most)).expand(5, 2)}
        outside = tensors | {"offsets": inside["offsets"] + far}
        assert torch.equal(cases.fused(case, outside, "native"), cases.fused(case, inside, "native"))


def raw(case: Case, tensors: cases.Tensors) -> list[torch.Tensor]:
    """What the compiled op and its backward return, in one list."""
    results: list[torch.Tensor] = []
    for op, arguments in ((case.op, cases.raw_forward), (f"{case.op}_backward", cases.raw_backward)):
        found = getattr(torch.ops.alexnet_ext, op)(*arguments(case, tensors))
        results += [found] if isinstance(found, torch.Tensor) else found
    return results


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, for comparison to the bit; a NaN's payload and the tensor's layout do not count."""
    return tensor.nan_to_num(nan=1234.5).contiguous().view(torch.uint8) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", cases.params(EXAMPLES))
def test_the_order_of_lanes_changes_no_bit(folder: Path, case: Case, layout: str) -> None:
    tensors = cases.make(case, layout=layout, requires_grad=False)
    found = {}
    for order in emulated.ORDERS:
        with emulated.kernels_emulated(folder, order) as library:
            before = library.alexnet_emulator_launches()
            found[order] = raw(case, tensors)
            assert library.alexnet_emulator_launches() >= before + 2
    for order in emulated.ORDERS[1:]:
        for one, other in zip(found["forward"], found[order], strict=True):
            assert torch.equal(bits(one), bits(other)), order


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", cases.params(c for c in CASES if c.op == "relu_max_pool2d" and c.shapes["x"][0]))
def test_pooling_equals_the_cpu_kernels_to_the_bit(folder: Path, case: Case, layout: str, dtype: torch.dtype) -> None:
    """Ties, NaN, inf and both zeros included: values, winners, gradients."""
    generator = torch.Generator().manual_seed(3)
    unusual = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    picked = unusual[torch.randint(0, 8, case.shapes["x"], generator=generator)].to(dtype)
    if len(case.shapes["x"]) == 3:
        picked = picked[None]
    tensors: cases.Tensors = {"x": cases.lay_out(picked, layout)}
    ours = raw(case, tensors)
    with emulated.kernels_emulated(folder):
        found = raw(case, tensors)
    for one, other in zip(ours, found, strict=True):
        assert one.stride() == other.stride()
        # The CPU kernel for contiguous tensors counts padding as the first value, and its zero is +0.
        signless = case.constants["padding"] != 0 and one.is_floating_point()
        assert torch.equal(bits(one + 0 if signless else one), bits(other + 0 if signless else other))


SPECIAL = (torch.nan, torch.inf, -torch.inf, 1e20, -1e20, 1e-30, -0.0, 0.0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("beta", "k"), [(0.75, 1.0), (0.5, 1.0), (2.0, -1.0), (0.75, -1.0), (0.75, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("size", [3, 4, 5])
@pytest.mark.parametrize("op", ["local_response_norm", *cases.BLOCKS])
def test_lrn_at_the_edges_equals_the_cpu_kernels(
    folder: Path, op: str, size: int, beta: float, k: float, layout: str
) -> None:
    """NaN, inf, overflow, zeros, bases of the power that are 0, negative or inf: values and gradients."""
    x = torch.linspace(0.5, 1.5, 16 * 12).view(1, 16, 3, 4)
    for i, value in enumerate(SPECIAL):
        x[0, 5, i // 4, i % 4] = value
    tensors: cases.Tensors = {"x": cases.lay_out(x, layout)}
    case = lrn((1, 16, 3, 4), size, 1.0, beta, k)
    if op in cases.BLOCKS:
        constants = {"lrn_size": size, "alpha": 1.0, "beta": beta, "k": k, "kernel_size": 1, "stride": 1}
        case, tensors = block(op, (1, 16, 3, 4), bias=False, **constants), tensors | {"bias": None}
    expected = raw(case, tensors)
    with emulated.kernels_emulated(folder):
        found = raw(case, tensors)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("emulator")
def test_what_a_kernel_cannot_count_is_refused() -> None:
    """A window that reaches beyond 2^30: it fits into the image only with an equally large stride."""
    with pytest.raises(RuntimeError, match="relu_max_pool2d did not launch: invalid argument"):
        torch.ops.alexnet_ext.relu_max_pool2d(
            torch.zeros(1, 1, 4, 4), [200, 1], [1 << 40, 1], [0, 0], [(1 << 31) - 1, 1], True
        )


# ---- faults that the emulator must notice

DATA = torch.arange(1.0, 65.0)
OUTCOMES = {
    1: "another sum in some order",  # a dropped __syncthreads
    3: "divergent barrier: thread 0, 0, 0 waits in line",
    4: "divergent lanes: thread 0, 0, 0 has ended",
    5: "divergent lanes",
    6: "another sum in some order",  # a race between warps
    7: "another sum in some order",
}


def faulty_sums(emulator: ctypes.CDLL, fault: int) -> list[str | float]:
    emulator.alexnet_emulator_fault.restype = ctypes.c_char_p
    found: list[str | float] = []
    for order in range(len(emulated.ORDERS)):
        emulator.alexnet_emulator_order(order)
        total = torch.zeros(1)
        said = emulator.alexnet_emulator_fault(
            fault, ctypes.c_void_p(DATA.data_ptr()), ctypes.c_void_p(total.data_ptr())
        )
        found.append(said.decode() or total.item())
    return found


def test_a_kernel_without_a_fault_gives_its_sum_in_every_order(emulator: ctypes.CDLL) -> None:
    assert faulty_sums(emulator, 0) == [DATA.sum().item()] * 3


@pytest.mark.parametrize("fault", OUTCOMES)
def test_a_planted_fault_is_noticed(emulator: ctypes.CDLL, fault: int) -> None:
    found = faulty_sums(emulator, fault)
    if OUTCOMES[fault] == "another sum in some order":
        assert any(value != DATA.sum().item() for value in found), found
    else:
        assert all(str(value).startswith(OUTCOMES[fault]) for value in found), found


# The last of 64 values is before a page that cannot be read, or at the end of a tensor's memory.
MEMORY = {
    "page": """
import mmap
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page - 64 * 4
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + 64 * 4), page, 0) == 0
""",
    "tensor": "values = torch.zeros(64)\nstart = values.data_ptr()\n",
}


@pytest.mark.parametrize("memory", MEMORY)
def test_a_load_beyond_the_end_is_noticed(folder: Path, memory: str) -> None:
    if memory == "tensor" and not hasattr(ctypes.CDLL(None), "__asan_init"):
        pytest.skip("AddressSanitizer is not loaded (.ci/run loads it)")
    script = f"""
import ctypes, torch
{MEMORY[memory]}
library = ctypes.CDLL({str(folder / emulated.NAME)!r})
total = (ctypes.c_float * 1)()
for fault in (0, 2):
    print("fault", fault, flush=True)
    library.alexnet_emulator_fault(fault, ctypes.c_void_p(start), total)
print("not noticed", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split("\n") == ["fault 0", "fault 2", ""], done.stderr
    assert done.returncode != 0
