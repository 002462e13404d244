"""The CUDA kernels' own source, run on the CPU by tests/gpu_on_cpu/emulator, against float64.

Sizes are small and odd: an emulated kernel is slow. Properties on any device are tested in the op's own test.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from alexnet_ext.ops._known import Unit
from alexnet_ext.selfcheck import child
from tests.gpu_on_cpu import emulated
from tests.ops.blocks import winners_of_ties
from tests.ops.conv2d_bias_relu.spec import to_depth_and_back
from tests.ops.linear_bias_relu.spec import MASKED, masked_gradients
from tests.support import cases, oracle
from tests.support.cases import Case, block, each_dtype, lrn

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


CASES = cases.of_all("emulated", cases.ON_GPU)


@pytest.mark.usefixtures("poisoned", "emulator")
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", cases.params(CASES))
def test_values_and_gradients(case: Case, dtype: torch.dtype, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, dtype, layout), "native")


@pytest.mark.usefixtures("poisoned", "emulator")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", cases.params(cases.of_all("emulated_many", cases.ON_GPU)))
def test_many_blocks(case: Case, layout: str) -> None:
    oracle.assert_matches_float64(case, cases.make(case, layout=layout), "native")


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("op", dict.fromkeys((*cases.ON_GPU, *cases.WITHOUT_GRADIENT)))
def test_a_users_proof_finds_them_right(op: str, layout: str) -> None:
    """With fences around their memory, three times, gradients of all strides."""
    dtype = "float32" if layout == "contiguous" else "bfloat16"
    assert child.judge(Unit(op, "native", dtype, layout), torch.device("cpu")) == ("proven", "")


@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("case", cases.params(cases.of_all("emulated", cases.WITHOUT_GRADIENT)))
def test_without_a_gradient_they_equal_the_cpu_kernels_to_the_bit(
    folder: Path, case: Case, layout: str, dtype: torch.dtype
) -> None:
    case = cases.in_dtype(case, dtype)
    tensors = cases.make(case, layout=layout)
    expected = cases.fused(case, tensors, "native")
    for order in emulated.ORDERS[:: 1 if math.prod(next(iter(case.shapes.values()))) < 100_000 else 3]:
        with emulated.kernels_emulated(folder, order) as library:
            before = library.alexnet_emulator_launches()
            assert torch.equal(cases.fused(case, tensors, "native"), expected)
            assert library.alexnet_emulator_launches() == before + 1


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("subsampled", [False, True])
def test_augment_reads_nothing_around_its_images(folder: Path, subsampled: bool, block: int, at_end: bool) -> None:
    """The images begin, or end, with a page of memory whose neighbours may not be read: that would end the process."""
    page, batch = mmap.PAGESIZE, 2
    side = int((page / (3 if subsampled else 6)) ** 0.5) // 2 * 2
    memory = mmap.mmap(-1, 3 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for other in (address, address + 2 * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(other), ctypes.c_size_t(page), 0) == 0
    case = cases.augment((batch, side // 2 * 3, side) if subsampled else (batch, side, side, 3), side, block)
    count = math.prod(case.shapes["images"])
    images = torch.frombuffer(memory, dtype=torch.uint8, count=count, offset=2 * page - count if at_end else page)
    tensors = cases.make(case)
    tensors["images"] = images.view(case.shapes["images"]).copy_(tensors["images"])
    for flips in (False, True):
        tensors["flips"].fill_(flips)
        expected = cases.fused(case, tensors, "native")
        with emulated.kernels_emulated(folder):
            assert torch.equal(cases.fused(case, tensors, "native"), expected)


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("far", [1, 2**33, -1, -(2**33)])
def test_augment_moves_a_crop_inside_its_image(far: int) -> None:
    for case in cases.SPECS["augment"].examples:
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
@pytest.mark.parametrize("case", cases.params(cases.of_all("emulated_orders", cases.ON_GPU)))
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
@pytest.mark.parametrize("case", cases.params(c for c in cases.SPECS["relu_max_pool2d"].emulated if c.shapes["x"][0]))
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


@pytest.mark.usefixtures("emulator")
@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 8, 9, 8), (2, 24, 12, 7), (1, 256, 7, 33), (140, 8, 9, 5)], ids=str)
def test_winners_of_ties_and_nan_are_pytorchs(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Blocks of one warp and of several, of a part of a row, and of several rows."""
    winners, expected = winners_of_ties(shape, dtype, layout)
    assert torch.equal(winners, expected)


@pytest.mark.usefixtures("poisoned", "emulator")
@each_dtype
@pytest.mark.parametrize("for_bias", [True, False])
@pytest.mark.parametrize(("rows", "outputs"), MASKED)
def test_a_linear_layer_masks_as_relu_does(rows: int, outputs: int, for_bias: bool, dtype: torch.dtype) -> None:
    assert all(torch.equal(ours, exact) for ours, exact in masked_gradients(rows, outputs, for_bias, dtype))


@pytest.mark.usefixtures("poisoned", "emulator")
@each_dtype
@pytest.mark.parametrize("for_bias", [True, False])
@pytest.mark.parametrize("layouts", [("channels_last", "channels_last"), ("contiguous", "sliced")], ids="-".join)
def test_a_convolutions_mask_is_relus(layouts: tuple[str, str], for_bias: bool, dtype: torch.dtype) -> None:
    shape = (3, 24, 7, 5)
    y = torch.tensor([*SPECIAL, 1.0, -1.0])[torch.randint(0, 10, shape)].to(dtype)
    dy, y = (
        cases.lay_out(t, layout) for t, layout in zip((torch.randint(-1, 2, shape).to(dtype), y), layouts, strict=True)
    )
    dz, dbias = torch.ops.alexnet_ext.conv2d_bias_relu_mask(dy, y, for_bias)
    exact = torch.ops.aten.threshold_backward(dy, y, 0)
    assert torch.equal(dz, exact)
    assert dz.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dbias, exact.double().sum((0, 2, 3)).to(dtype)[: 24 if for_bias else 0])


@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(("shape", "step"), [((5, 3, 11, 11), 4), ((2, 2, 4, 3), 2), ((1, 2, 3, 7), 3)])
def test_a_weight_turned_to_depth_is_pytorchs(
    folder: Path, shape: tuple[int, ...], step: int, layout: str, dtype: torch.dtype
) -> None:
    weight = cases.lay_out(torch.randn(shape).to(dtype), layout)
    expected = to_depth_and_back(weight, step)
    with emulated.kernels_emulated(folder) as library:
        before = library.alexnet_emulator_launches()
        found = to_depth_and_back(weight, step)
        assert library.alexnet_emulator_launches() == before + 3
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, expected, strict=True))


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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("alpha", "k", "x"), [(1.0, 1e-40, 1e-21), (-0.5, 1.2e-38, 1e-19)])
@pytest.mark.parametrize("op", ["local_response_norm", *cases.BLOCKS])
def test_lrn_of_subnormal_scales_equals_the_cpu_kernels(
    folder: Path, op: str, alpha: float, k: float, x: float, layout: str
) -> None:
    """k + alpha / n * sum(x^2) is below the normal numbers, which the fast kernels take for 0."""
    shape = (1, 16, 3, 4)
    tensors: cases.Tensors = {"x": cases.lay_out(torch.full(shape, x), layout)}
    case = lrn(shape, 5, alpha, 0.75, k)
    if op in cases.BLOCKS:
        constants = {"lrn_size": 5, "alpha": alpha, "beta": 0.75, "k": k, "kernel_size": 1, "stride": 1}
        case, tensors = block(op, shape, bias=False, **constants), tensors | {"bias": None}
    expected = raw(case, tensors)[0]
    with emulated.kernels_emulated(folder):
        found = raw(case, tensors)[0]
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


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
