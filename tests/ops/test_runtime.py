"""Every op at run time: memory, threads, instruction sets, hooks, and wrong calls of the raw ops."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alexnet_ext import ops
from tests.ops.conv2d_bias_relu.spec import WINOGRAD_CASES
from tests.support import ROOT, cases, oracle
from tests.support.cases import Case, each_dtype, each_example, pool

LARGE = cases.of_all("large")


def forward_backward(case: Case, tensors: cases.Tensors, dy: Tensor | None = None) -> list[Tensor]:
    """y and all gradients."""
    y = cases.fused(case, tensors)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=generator).to(y.dtype) if dy is None else dy
    return [y.detach(), *torch.autograd.grad(y, list(cases.wanting_grad(tensors).values()), dy)]


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@each_example
def test_inputs_are_left_alone(case: Case, layout: str) -> None:
    tensors = cases.make(case, layout=layout)
    dy = cases.lay_out(torch.randn_like(cases.fused(case, tensors)), layout)
    owned = [tensor for tensor in (*tensors.values(), dy) if tensor is not None]
    before = [storage_bytes(tensor) for tensor in owned]
    forward_backward(case, tensors, dy)
    assert_same_bits([storage_bytes(tensor) for tensor in owned], before)


def storage_bytes(tensor: Tensor) -> Tensor:
    """A copy of all the memory of a tensor, including the gaps between its values."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@each_dtype
@pytest.mark.parametrize("case", cases.params(cases.EXAMPLES + LARGE))
def test_nothing_is_left_unwritten_in_memory_used_before(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Blocks of the outputs' sizes, full of NaN, are freed just before: the allocator hands them out again."""
    tensors = cases.make(case, dtype, layout)
    expected = forward_backward(case, tensors)
    for _ in range(2):
        waste = [torch.full_like(result, torch.nan) for result in expected for _ in range(3)]
        waste += [torch.full(result.shape, 77, dtype=torch.uint8) for result in expected]
        del waste
        assert_same_bits(forward_backward(case, tensors), expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
@pytest.mark.parametrize("case", cases.params(LARGE))
def test_the_same_bits_every_time_on_any_number_of_threads(case: Case, dtype: torch.dtype, layout: str) -> None:
    """The threads of oneDNN's convolution split the sums of a weight's gradient: for it only reruns are equal."""
    tensors = cases.make(case, dtype, layout)
    torch.set_num_threads(2)
    expected = forward_backward(case, tensors)
    for _ in range(20):
        assert_same_bits(forward_backward(case, tensors), expected)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found = forward_backward(case, tensors)
        if case.op == "conv2d_bias_relu":
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)
        else:
            assert_same_bits(found, expected)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
@each_example
def test_no_more_is_saved_than_promised(case: Case, dtype: torch.dtype) -> None:
    tensors = cases.make(case, dtype)
    parameters = {tensor.data_ptr() for name, tensor in tensors.items() if name != "x" and tensor is not None}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = cases.fused(case, tensors)
    assert saved, "the hook saw nothing"
    found = sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in parameters)
    assert found <= cases.SPECS[case.op].saved(tensors["x"], y)


@each_example
def test_saved_tensors_may_live_elsewhere(case: Case) -> None:
    tensors = cases.make(case)
    expected = forward_backward(case, tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy):
        assert_same_bits(forward_backward(case, tensors), expected)
    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(forward_backward(case, tensors), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_example
def test_checkpoint(case: Case, use_reentrant: bool) -> None:
    tensors = cases.make(case)
    inputs = list(cases.wanting_grad(tensors).values())
    names = list(cases.wanting_grad(tensors))
    cases.fused(case, tensors).square().sum().backward()
    expected = [tensor.grad.clone() for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    y = checkpoint(
        lambda *t: cases.fused(case, tensors | dict(zip(names, t, strict=True))), *inputs, use_reentrant=use_reentrant
    )
    y.square().sum().backward()
    assert_same_bits([tensor.grad for tensor in inputs], expected)


@each_example
def test_backward_twice_needs_retain_graph_and_gives_the_same(case: Case) -> None:
    tensors = cases.make(case)
    y = cases.fused(case, tensors)
    inputs = list(cases.wanting_grad(tensors).values())
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    assert_same_bits(list(torch.autograd.grad(y, inputs, dy)), list(first))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, inputs, dy)


@each_example
def test_tensor_hooks_see_and_change_gradients(case: Case) -> None:
    tensors = cases.make(case)
    x = tensors["x"]
    (plain,) = torch.autograd.grad(cases.fused(case, tensors).sum(), x)
    y = cases.fused(case, tensors)
    seen: list[Tensor] = []
    y.register_hook(lambda gradient: gradient * 2)
    x.register_hook(seen.append)
    y.sum().backward()
    torch.testing.assert_close(x.grad, plain * 2)
    torch.testing.assert_close(seen[0], plain * 2)


@each_example
def test_nothing_is_kept_alive(case: Case) -> None:
    tensors = cases.make(case)
    y = cases.fused(case, tensors)
    y.sum().backward()
    watched = [weakref.ref(y), *(weakref.ref(t) for t in tensors.values() if t is not None)]
    del y, tensors  # no cycle holds them, so they are freed at once
    assert all(reference() is None for reference in watched)


def bytes_left(run: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator hands out during this, less those returned; kernels' workspaces count too."""
    run()  # for allocations that only the first call makes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@each_dtype
@pytest.mark.parametrize("case", cases.params((*cases.EXAMPLES, *LARGE, *WINOGRAD_CASES)))
def test_all_memory_is_given_back(case: Case, dtype: torch.dtype, layout: str) -> None:
    tensors = cases.make(case, dtype, layout)
    assert bytes_left(lambda: forward_backward(case, tensors)) == 0


def test_memory_that_is_kept_is_seen() -> None:
    kept = []
    assert bytes_left(lambda: kept.append(torch.empty(1000))) == 4000


@each_example
def test_writing_into_what_was_saved_raises(case: Case) -> None:
    tensors = cases.make(case)
    leaf, tensors["x"] = tensors["x"], tensors["x"] * 1.0
    y = cases.fused(case, tensors)
    needed = set().union(*cases.SPECS[case.op].needs.values())
    saves_y = "y" in needed and case.constants.get("relu", True)
    (y if saves_y else tensors["x"]).detach().add_(1)
    if not needed:  # keeps its own copy of what it needs
        y.sum().backward()
        untouched = cases.make(case)
        cases.fused(case, untouched).sum().backward()
        assert torch.equal(leaf.grad, untouched["x"].grad)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_pool_does_not_need_its_input_for_the_backward() -> None:
    x = torch.randn(1, 3, 7, 9, requires_grad=True)
    inner = x * 1.0
    y = cases.fused(pool((1, 3, 7, 9)), {"x": inner})
    inner.detach().zero_()
    y.sum().backward()
    assert x.grad.sum() > 0


@pytest.mark.parametrize("case", cases.params(cases.of_all("many")))
def test_one_dimension_beyond_65535(case: Case) -> None:
    oracle.assert_matches_float64(case, cases.make(case))


@pytest.mark.slow
def test_more_than_2_to_31_elements() -> None:
    """Offsets beyond 32 bits: the first and last rows equal those of a tensor of four rows."""
    if (free := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")) < 12 * 2**30:
        pytest.skip(f"needs 12 GiB of free memory, found {free / 2**30:.1f}")
    x = torch.empty(1, 2, 40_000, 30_000, dtype=torch.float16).copy_(torch.randn(1, 2, 1, 30_000).half())
    x[:, :, -3:] = torch.randn(1, 2, 3, 30_000).half()
    for run in (lambda t: ops.local_response_norm(t, 3, 1.0), lambda t: ops.relu_max_pool2d(t, (1, 2), 1)):
        y = run(x)
        assert y.numel() > 2**31
        for rows in (slice(None, 4), slice(-4, None)):
            assert torch.equal(y[:, :, rows], run(x[:, :, rows].contiguous()))
        del y


@pytest.mark.drawn
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("instructions", ["default", "avx2", "avx512"])
def test_every_instruction_set_computes_right(instructions: str) -> None:
    """The library chooses its kernels by the same variable as torch."""
    order = ["default", "avx2", "avx512"]
    best = torch.backends.cpu.get_cpu_capability().lower()
    available = order[: order.index(best) + 1] if best in order else ["default"]
    if os.environ.get("ATEN_CPU_CAPABILITY") or instructions not in available:
        pytest.skip(f"{instructions} is not among what this CPU offers here: {available}")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": instructions}
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.sweep"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"on {instructions.upper()}" in result.stdout


BAD_CALLS = {name: spec.bad_calls for name, spec in cases.SPECS.items()}
BAD_CALLS |= {f"{name}_backward": spec.bad_backward_calls for name, spec in cases.SPECS.items()}


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("op", "fault"), [(op, fault) for op, faults in BAD_CALLS.items() for fault in faults])
def test_bad_calls_of_the_raw_ops_raise(op: str, fault: str) -> None:
    case = next(example for example in cases.EXAMPLES if example.op == op.removesuffix("_backward"))
    tensors = cases.make(case, requires_grad=False)
    arguments = (cases.raw_backward if op.endswith("_backward") else cases.raw_forward)(case, tensors)
    call = getattr(torch.ops.alexnet_ext, op)
    call(*arguments)
    with pytest.raises(RuntimeError):
        call(*BAD_CALLS[op][fault](arguments))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("tap", [9, 100, 254])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", cases.params(c for c in cases.EXAMPLES if cases.SPECS[c.op].winners))
def test_winners_beyond_the_window_write_nowhere(case: Case, layout: str, tap: int) -> None:
    arguments = cases.raw_backward(case, cases.make(case, layout=layout, requires_grad=False))
    arguments = tuple(
        torch.full_like(value, tap) if isinstance(value, Tensor) and value.dtype == torch.uint8 else value
        for value in arguments
    )
    results = getattr(torch.ops.alexnet_ext, f"{case.op}_backward")(*arguments)
    for result in results if isinstance(results, tuple) else (results,):
        assert not result.any()
