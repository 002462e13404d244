"""augment: float64, the same bits by every backend, conv1 through space-to-depth, and PyTorch's contracts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import alexnet_ext as ax
from alexnet_ext import _library
from alexnet_ext.data.preprocessing import Preprocessing
from alexnet_ext.ops import augment
from tests.support import cases, oracle
from tests.support.cases import Case, each_dtype, in_dtype

EXAMPLES = cases.SPECS["augment"].examples
each_example = pytest.mark.parametrize("case", cases.params(EXAMPLES))
each_layout = pytest.mark.parametrize("layout", cases.LAYOUTS)


def available(backend: str) -> str:
    if backend == "native" and not _library.LIBRARIES[0].loaded:
        pytest.skip(f"the compiled CPU library is not loaded: {_library.LIBRARIES[0].reason}")
    if backend == "triton" and not _library.INTERPRETED:
        pytest.skip(f"Triton's interpreter is not on: {_library.TRITON.reason or 'TRITON_INTERPRET is 0'}")
    return backend


@pytest.fixture(params=["native", "triton", "stock"])
def backend(request: pytest.FixtureRequest) -> str:
    return available(request.param)


@pytest.fixture(params=["native", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    return available(request.param)


@pytest.mark.usefixtures("poisoned")
@each_dtype
@each_layout
@pytest.mark.parametrize("case", cases.params(cases.CASES["augment"]))
def test_values(case: Case, layout: str, dtype: torch.dtype) -> None:
    case = in_dtype(case, dtype)
    oracle.assert_matches_float64(case, cases.make(case, layout=layout))


@pytest.mark.usefixtures("poisoned")
@each_dtype
@pytest.mark.parametrize("case", cases.params(cases.CASES["augment"]))
def test_every_backend_gives_the_same_bits(case: Case, dtype: torch.dtype, backend: str) -> None:
    tensors = cases.make(case)
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts fp32 off to bf16")
    y = cases.fused(in_dtype(case, dtype), tensors, backend)
    wide = cases.fused(in_dtype(case, torch.float64 if dtype == torch.float64 else torch.float32), tensors, "stock")
    assert torch.equal(y, wide.to(dtype)), "not rounded once"
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [11, 23, 24, 25, 26, 43])
def test_space_to_depth_makes_conv1_a_convolution_of_stride_1(size: int) -> None:
    case = cases.augment((2, size + 3, size + 5, 3), size, dtype=torch.float64)
    tensors = cases.make(case)
    weight, bias = torch.randn(8, 3, 11, 11, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    expected = F.relu(F.conv2d(cases.stock(case, tensors), weight, bias, stride=4))
    y = augment(**tensors, **case.constants | {"space_to_depth": 4})
    found = ax.ops.conv2d_bias_relu(y, F.pixel_unshuffle(F.pad(weight, (0, 1, 0, 1)), 4), bias)
    # A size of 26 leaves room for one more step of 4, but not for one more window of 11.
    found = found[..., : expected.shape[2], : expected.shape[3]]
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected)


def test_where_nothing_is_drawn_it_is_the_preprocessing(backend: str) -> None:
    images = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    preprocessing = Preprocessing(9, 10, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    drawn = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool), torch.zeros(2, 3)
    given = images.permute(0, 2, 3, 1), *drawn, 9
    y = augment(*given, mean=preprocessing.mean, std=preprocessing.std, backend=backend)
    torch.testing.assert_close(y, preprocessing(images), rtol=0, atol=1e-6)


def test_yuv_becomes_the_rgb_of_jpeg(backend: str) -> None:
    """Every pair of U and V, by JFIF's formula in float64: 16 bits behind the point differ only next to a tie."""
    u, v = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    y = torch.randint(0, 256, (512, 512), generator=torch.Generator().manual_seed(0))
    images = torch.cat([plane.flatten() for plane in (y, u, v)]).to(torch.uint8).view(1, 768, 512)
    drawn = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.bool), torch.zeros(1, 3)
    found = augment(images, *drawn, 512, mean=(0,) * 3, std=(1 / 255,) * 3, dtype=torch.float64, backend=backend)
    du, dv = ((x - 128.0).repeat_interleave(2, 0).repeat_interleave(2, 1) for x in (u, v))
    exact = torch.stack([y + 1.402 * dv, y - 0.344136286 * du - 0.714136286 * dv, y + 1.772 * du]).clamp(0, 255)
    assert torch.equal(found, found.round())
    assert (found[0] - exact).abs().max() <= 0.502


@each_example
@each_layout
def test_what_is_drawn_may_lie_anyhow(case: Case, layout: str, backend: str) -> None:
    tensors = cases.make(case)
    for name in ("offsets", "flips", "shifts"):
        tensors[name] = cases.lay_out(tensors[name], layout)
    oracle.assert_matches_float64(case, tensors, backend)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_offsets_of_any_integers(dtype: torch.dtype, backend: str) -> None:
    tensors = cases.make(EXAMPLES[0])
    expected = cases.fused(EXAMPLES[0], tensors)
    tensors["offsets"] = tensors["offsets"].to(dtype)
    assert torch.equal(cases.fused(EXAMPLES[0], tensors, backend), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
@each_dtype
def test_a_shift_that_is_no_number_stays_in_its_colour_of_its_image(
    value: float, dtype: torch.dtype, backend: str
) -> None:
    """Padding stays zero, and values too large for fp16 become infinite."""
    for case in EXAMPLES:
        tensors = cases.make(case)
        tensors["shifts"][1, 2] = value
        case = in_dtype(case, dtype)
        found = cases.fused(case, tensors, backend)
        torch.testing.assert_close(found, cases.stock(case, tensors), equal_nan=True)
        colours = F.pixel_shuffle(found, case.constants["space_to_depth"])[:, :, :9, :9]
        odd = ~colours.isfinite() | (colours.abs() > 1e30)
        wanted = torch.zeros_like(odd)
        wanted[1, 2] = True
        assert torch.equal(odd, wanted)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("batch", [0, 1])
def test_an_empty_batch_and_one_image(batch: int, block: int, backend: str) -> None:
    images, offsets = torch.zeros(batch, 6, 7, 3, dtype=torch.uint8), torch.zeros(batch, 2, dtype=torch.int64)
    drawn = torch.zeros(batch, dtype=torch.bool), torch.zeros(batch, 3)
    colours = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    y = augment(images, offsets, *drawn, 5, **colours, space_to_depth=block, backend=backend)
    assert y.shape == ((batch, 3, 5, 5) if block == 1 else (batch, 48, 2, 2))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("block", [1, 4])
def test_seventy_thousand_images(block: int) -> None:
    case = cases.augment((70_000, 3, 4, 3), 2, block)
    tensors = cases.make(case)
    assert torch.equal(cases.fused(case, tensors), cases.fused(case, tensors, "stock"))


@pytest.mark.usefixtures("threads")
@each_example
def test_threads_change_no_bit(case: Case) -> None:
    tensors = cases.make(case)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(cases.fused(case, tensors))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("offset", [(-1, 0), (0, -1), (4, 0), (0, 6), (2**40, 0), (0, -(2**40))])
def test_an_offset_out_of_range(offset: tuple[int, int], backend: str, request: pytest.FixtureRequest) -> None:
    """An error on the CPU; kernels for a GPU move the offset inside."""
    tensors = cases.make(EXAMPLES[0])
    tensors["offsets"][2] = torch.tensor(offset)
    if backend == "triton" or (backend == "native" and request.config.getoption("--emulated")):
        y = cases.fused(EXAMPLES[0], tensors, backend)
        tensors["offsets"] = torch.stack([tensors["offsets"][:, i].clamp(0, most) for i, most in enumerate((3, 5))], 1)
        assert torch.equal(y, cases.fused(EXAMPLES[0], tensors, "stock"))
        return
    message = rf"offsets\[2\] is \[{offset[0]}, {offset[1]}\], expected at least \[0, 0\] and at most \[3, 5\]"
    with pytest.raises(RuntimeError, match=message if backend == "native" else "offsets reach out of the images"):
        cases.fused(EXAMPLES[0], tensors, backend)


@pytest.mark.skipif(not _library.INTERPRETED, reason="Triton's interpreter is not on")
@each_example
def test_wide_offsets_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for tensors of 2^31 elements and more."""
    from alexnet_ext.ops.augment import triton_kernels

    tensors = cases.make(case)
    narrow = cases.fused(case, tensors, "triton")
    monkeypatch.setattr(triton_kernels, "is_wide", lambda *_: True)
    assert torch.equal(cases.fused(case, tensors, "triton"), narrow)


TENSORS = cases.make(EXAMPLES[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"images": TENSORS["images"].float()},
            RuntimeError,
            r"images has dtype torch\.float32, expected torch\.uint8",
        ),
        ({"images": TENSORS["images"][0]}, RuntimeError, r"images has shape \[12, 14, 3\], expected \(N, H, W, 3\)"),
        ({"images": TENSORS["images"].mT}, RuntimeError, r"images has shape \[5, 12, 3, 14\], expected \(N, H, W, 3\)"),
        (
            {"images": TENSORS["images"][..., 0]},  # 12 rows could be 8 of luma
            RuntimeError,
            r"size must be from 1 to the sides of images, got 9 for shape \[5, 12, 14\]",
        ),
        (
            {"images": TENSORS["images"][:, :11, :, 0]},
            RuntimeError,
            r"images has shape \[5, 11, 14\], expected \(N, H, W, 3\), or \(N, 3 H / 2, W\) of even H and W",
        ),
        ({"images": TENSORS["images"][:, :, :13, 0]}, RuntimeError, r"images has shape \[5, 12, 13\], expected"),
        ({"images": TENSORS["images"].numpy()}, TypeError, "images must be a Tensor, got ndarray"),
        ({"offsets": TENSORS["offsets"][:2]}, RuntimeError, r"offsets has shape \[2, 2\], expected \[5, 2\]"),
        ({"offsets": TENSORS["offsets"].float()}, RuntimeError, "offsets has dtype torch.float32, expected integers"),
        ({"offsets": TENSORS["offsets"] > 0}, RuntimeError, "offsets has dtype torch.bool, expected integers"),
        ({"flips": TENSORS["flips"][:, None]}, RuntimeError, r"flips has shape \[5, 1\], expected \[5\]"),
        ({"flips": TENSORS["flips"].long()}, RuntimeError, "flips has dtype torch.int64, expected torch.bool"),
        ({"flips": [True, False, True]}, TypeError, "flips must be a Tensor, got list"),
        ({"shifts": TENSORS["shifts"][:, :2]}, RuntimeError, r"shifts has shape \[5, 2\], expected \[5, 3\]"),
        (
            {"shifts": TENSORS["shifts"].double()},
            RuntimeError,
            "shifts has dtype torch.float64, expected torch.float32",
        ),
        ({"shifts": TENSORS["shifts"].to("meta")}, RuntimeError, "shifts is on device meta, expected cpu"),
        ({"shifts": TENSORS["shifts"].clone().requires_grad_()}, RuntimeError, "shifts requires a gradient"),
        ({"size": 13}, RuntimeError, r"size must be from 1 to the sides of images, got 13 for shape \[5, 12, 14, 3\]"),
        ({"size": 0}, RuntimeError, "size must be from 1 to the sides of images, got 0"),
        ({"size": 2.0}, TypeError, "size must be an int, got float 2.0"),
        ({"mean": (0.5, 0.5)}, TypeError, r"mean must be three numbers, got \(0.5, 0.5\)"),
        ({"mean": 0.5}, TypeError, "mean must be three numbers, got 0.5"),
        ({"std": (1, "a", 1)}, TypeError, r"std must be three numbers, got \(1, 'a', 1\)"),
        ({"std": (1, 0, 1)}, RuntimeError, r"std must be greater than zero, got \[1.0, 0.0, 1.0\]"),
        ({"std": (math.nan, 0, 1)}, RuntimeError, r"std must be greater than zero, got \[nan, 0.0, 1.0\]"),
        ({"dtype": torch.int32}, RuntimeError, r"dtype must be of .*, got torch\.int32"),
        ({"space_to_depth": 2}, RuntimeError, "space_to_depth must be 1 or 4, got 2"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, native, triton, stock, got 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        augment(**(TENSORS | EXAMPLES[0].constants | change))


@pytest.mark.usefixtures("native")
def test_the_raw_op_checks_what_it_is_given() -> None:
    op, given = torch.ops.alexnet_ext.augment, list(cases.raw_forward(EXAMPLES[0], TENSORS))
    for place, value, message in (
        (0, TENSORS["images"].short(), "images must be uint8"),
        (0, TENSORS["images"][:, :11, :, 0], r"images has shape \[5, 11, 14\], expected \(N, H, W, 3\), or"),
        (0, TENSORS["images"][:, :, :13, 0], r"images has shape \[5, 12, 13\], expected"),
        (1, TENSORS["offsets"].int(), "offsets must be int64"),
        (1, TENSORS["offsets"][:2], r"offsets has shape \[2, 2\], expected \[5, 2\]"),
        (2, TENSORS["flips"].byte(), "flips must be bool"),
        (3, TENSORS["shifts"].half(), "shifts must be float32"),
        (4, 15, "size must be from 1 to the sides of images, got 15"),
        (5, [0.5], "mean and std must have 3 values each"),
        (7, torch.int64, "dtype must be float64, float32, bfloat16 or float16"),
        (8, 3, "space_to_depth must be 1 or 4, got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*given[:place], value, *given[place + 1 :])


# ---- PyTorch's contracts


@pytest.mark.usefixtures("native")
def test_the_triton_schema_is_the_compiled_ops() -> None:
    available("triton")
    schemas = [str(getattr(torch.ops.alexnet_ext, name).default._schema) for name in ("augment", "augment_triton")]
    assert schemas[1].replace("augment_triton", "augment") == schemas[0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@each_example
def test_opcheck(case: Case, layout: str, kernels: str) -> None:
    op = getattr(torch.ops.alexnet_ext, "augment" if kernels == "native" else "augment_triton")
    # Tracing needs a compiler, which the interpreter lacks (test_triton_ahead).
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = cases.raw_forward(case, cases.make(case, layout=layout))
    torch.library.opcheck(op, arguments, test_utils=tests if kernels == "native" else tests[:3])


@each_dtype
@each_layout
@each_example
def test_fakes_tell_the_real_strides(case: Case, layout: str, dtype: torch.dtype, kernels: str) -> None:
    case = in_dtype(case, dtype)
    tensors = cases.make(case, layout=layout)
    real = cases.fused(case, tensors, kernels)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = cases.fused(case, {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}, kernels)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize(("backend", "dynamic"), [("auto", False), ("auto", True), ("stock", False)])
@each_example
def test_compiles_without_a_graph_break(case: Case, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda tensors: cases.fused(case, tensors, backend), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    larger = (6, 17, 19, 3) if len(case.shapes["images"]) == 4 else (6, 27, 20)
    shapes = [case, replace(case, shapes=cases.augment(larger, 9).shapes)] if dynamic else [case]
    for i, shape in enumerate(shapes):
        tensors = cases.make(shape)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            y = compiled(tensors)
        assert torch.equal(y, cases.fused(case, tensors))


@each_example
def test_autocast_leaves_it_alone(case: Case, backend: str) -> None:
    tensors = cases.make(case)
    with torch.autocast("cpu", torch.bfloat16):
        y = cases.fused(case, tensors, backend)
    assert torch.equal(y, cases.fused(case, tensors))


@pytest.mark.usefixtures("native")
@each_example
def test_vmap_over_everything_and_over_what_is_drawn(case: Case) -> None:
    many = [cases.make(case, seed=seed) for seed in range(3)]
    stacked = {name: torch.stack([tensors[name] for tensors in many]) for name in many[0]}
    together = torch.vmap(lambda tensors: cases.fused(case, tensors))(stacked)
    assert torch.equal(together, torch.stack([cases.fused(case, tensors) for tensors in many]))
    images = many[0]["images"]
    drawn = {name: tensor for name, tensor in stacked.items() if name != "images"}
    together = torch.vmap(lambda drawn: cases.fused(case, {"images": images, **drawn}))(drawn)
    one_by_one = [cases.fused(case, tensors | {"images": images}) for tensors in many]
    assert torch.equal(together, torch.stack(one_by_one))


def test_the_result_wants_no_gradient(backend: str) -> None:
    tensors = cases.make(EXAMPLES[0])
    assert not cases.fused(EXAMPLES[0], tensors, backend).requires_grad
    tensors["shifts"].requires_grad_()
    with torch.no_grad():
        y: Tensor = cases.fused(EXAMPLES[0], tensors, backend)
    assert not y.requires_grad
