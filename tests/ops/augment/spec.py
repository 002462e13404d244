"""augment, as tests, benchmarks and planted faults know it: its images are bytes, its dtype is a constant."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_ext.ops._checks import sides
from alexnet_ext.ops.augment.reference import yuv420_to_rgb
from tests.support.spec import BF16, EMULATOR, FP16, FP32, FP64, Case, Fault, Run, Spec, Tensors, sampled_on_hopper

AUGMENT = "csrc/augment/augment_cpu.cpp"
CUDA_AUGMENT = "csrc/augment/augment_kernels.cuh"
TRITON_AUGMENT = "alexnet_ext/ops/augment/triton_kernels.py"


def augment(images: tuple[int, ...], size: int, space_to_depth: int = 1, dtype: torch.dtype = torch.float32) -> Case:
    batch = images[0]
    shapes = {"images": images, "offsets": (batch, 2), "flips": (batch,), "shifts": (batch, 3)}
    # ImageNet's deviations are near each other; unlike ones show a colour taken for another.
    constants = {"size": size, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.524, 0.125), "dtype": dtype}
    return Case("augment", shapes, constants | {"space_to_depth": space_to_depth})


def stock(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    shifts: Tensor,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    space_to_depth: int,
) -> Tensor:
    """Image by image, as data loaders do: faster than the indexing of backend="stock"."""
    images = yuv420_to_rgb(images) if images.dim() == 3 else images
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y = torch.empty(images.shape[0], 3, size, size, dtype=wide, device=images.device)
    for out, image, (top, left), flip in zip(y, images, offsets.tolist(), flips.tolist(), strict=True):
        crop = image[top : top + size, left : left + size].permute(2, 0, 1)
        out.copy_(crop.flip(2) if flip else crop)
    centre, deviation = (torch.tensor(values, dtype=wide, device=images.device) * 255 for values in (mean, std))
    y = ((y + (shifts - centre)[:, :, None, None]) / deviation[:, None, None]).to(dtype)
    missing = -size % space_to_depth
    y = F.pixel_unshuffle(F.pad(y, (0, missing, 0, missing)), space_to_depth) if space_to_depth > 1 else y
    return y.contiguous(memory_format=torch.channels_last)


def draw(case: Case, generator: torch.Generator) -> Tensors:
    batch, *_ = shape = case.shapes["images"]
    most = [side - case.constants["size"] for side in sides(torch.empty(shape, device="meta"))]
    offsets = torch.stack([torch.randint(0, n + 1, (batch,), generator=generator) for n in most], 1)
    offsets[: batch // 3] = 0
    offsets[batch // 3 : batch * 2 // 3] = torch.tensor(most)
    return {
        "images": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        "offsets": offsets,
        "flips": torch.arange(batch) % 2 == 1,
        "shifts": torch.randn(batch, 3, generator=generator) * 20,
    }


def moved(case: Case, width: int) -> tuple[int, int]:
    """Each crop read, y written in its dtype; a pixel of I420 is half as many bytes."""
    images = case.shapes["images"]
    values = 3 * images[0] * case.constants["size"] ** 2
    return values // (2 if len(images) == 3 else 1) + values * case.constants["dtype"].itemsize, 0


def runs(full: bool) -> Iterator[Run]:
    for blocks in (1, 4):
        yield Run(augment((5, 12, 14, 3), 9, blocks), FP32, "contiguous")
        yield Run(augment((3, 23, 26, 3), 21, blocks), BF16, "contiguous")
        yield Run(augment((3, 33, 26), 19, blocks), BF16, "contiguous")
        for dtype in (BF16, FP16, FP32, FP64) if full else ():
            yield Run(augment((1, 70, 67, 3), 65, blocks), dtype, "contiguous")
            yield Run(augment((1, 105, 68), 65, blocks), dtype, "contiguous")
    yield Run(augment((2, 12, 14, 3), 9), FP16, "sliced", wide=True)
    yield Run(augment((2, 18, 14), 9), FP16, "sliced", wide=True)


FAULTS = (
    Fault("augment: a flipped crop begins at its left", AUGMENT, "+ (in.flips[image] ? p.size - 1 : 0)", "", "augment"),
    Fault("augment: the shift of the image before", AUGMENT, "if (unit / p.out.height != image)", "if (image < 0)",
          "augment"),
    Fault("augment: padding holds what was there", AUGMENT, "r < rows ? p.size : 0", "padded", "augment"),
    Fault("augment: colours and taps traded", AUGMENT, "c * (B * B) + r * B", "c + r * B * kColours", "augment"),
    Fault("augment: V begins at an even line", "csrc/augment/augment.h",
          "(is_v ? height >> 1 : 0)", "(is_v ? height / 4 * 2 : 0)", "augment"),
    Fault("augment: chroma of the square to the right", AUGMENT, "start / 2 * 2, pairs", "start, pairs", "augment"),
    Fault("augment: chroma is cut off, not rounded", "csrc/augment/augment.h", " + 32768) >> 16", ") >> 16", "augment"),
    Fault("augment: colours of YUV are not clamped", "csrc/augment/augment.h", "sum > 255 ? 255 : sum", "sum",
          "augment"),
    Fault("boundary: an odd width of YUV is let through", "csrc/augment/augment_plan.h",
          "images.size(1) % 3 == 0 && images.size(2) % 2 == 0", "images.size(1) % 3 == 0",
          "tests/ops/augment/test_augment.py -k raw_op"),
    Fault("boundary: an offset below zero is let through", "csrc/augment/augment_ops.cpp", "top >= 0 && ", "",
          "tests/ops/augment/test_augment.py -k out_of_range"),
    Fault("CUDA: values before a row's first 16 bytes and behind its last are left out", CUDA_AUGMENT,
          "if (lane >= length - vectors * V) continue;", "continue;", f"{EMULATOR} -k 'augment and float32'"),
    Fault("CUDA: words are not shifted to the crop's first byte", CUDA_AUGMENT, "bits = at % 4U * 8", "bits = 0",
          f"{EMULATOR} -k 'augment and float32'"),
    Fault("CUDA: four pixels of a flipped row in the image's order", CUDA_AUGMENT,
          "if (crop.flip) reverse(bytes);", "", f"{EMULATOR} -k 'augment and float32'"),
    Fault("CUDA: four pixels of a flipped block in the image's order", CUDA_AUGMENT,
          "crop.flip ? 0x0125 : 0x5210", "0x5210", f"{EMULATOR} -k 'augment and float32'"),
    Fault("CUDA: words around the images are read", CUDA_AUGMENT, "kAround = 16", "kAround = 0",
          f"{EMULATOR} -k 'augment and around'"),
    Fault("CUDA: an offset out of range is followed", CUDA_AUGMENT, "offset > most ? most", "offset > most ? offset",
          f"{EMULATOR} -k 'augment and inside'"),
    Fault("CUDA: words around the planes of YUV are read", CUDA_AUGMENT,
          "true, top + end - 1, left + work.size - 1) + kAround", "true, top + end - 1, left + work.size - 1)",
          f"{EMULATOR} -k 'augment and around'"),
    Fault("CUDA: chroma of four pixels as if the first began a square", CUDA_AUGMENT, "odd = x & 1", "odd = false",
          f"{EMULATOR} -k 'augment and float32'"),
    Fault("CUDA: four pixels of flipped YUV in the image's order", CUDA_AUGMENT, "flip ? 0x0123 : 0x3210", "0x3210",
          f"{EMULATOR} -k 'augment and float32'"),
    Fault("CUDA: a value of YUV before a row's first 16 bytes is red", CUDA_AUGMENT, ".colour(colour) & 255",
          ".colour(0) & 255", f"{EMULATOR} -k 'augment and float32'"),
    Fault("Triton: V is read in U's place", TRITON_AUGMENT, "other = line + height // 2", "other = line",
          "tests/ops/augment/test_augment.py -k 'same_bits and triton and float32'"),
    Fault("Triton: a flipped crop of YUV has unflipped chroma", TRITON_AUGMENT, "tl.where(flip, -1, 1)", "1",
          "tests/ops/augment/test_augment.py -k 'same_bits and triton and float32'"),
)  # fmt: skip


SPEC = Spec(
    name="augment",
    gradient=False,
    on_gpu=True,
    in_triton=True,
    product=False,
    in_place=None,
    stock=stock,
    draw=draw,
    # Rows of 3 * size values about what vectors hold; crops as large as the image; sides about the blocks of 4.
    cases=tuple(
        augment(images, size, block)
        for block in (1, 4)
        for images, size in (
            *(((3, size + 2, size + 5, 3), size) for size in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 21, 22, 33)),
            *(((2, 5, 5, 3), 5), ((5, 20, 13, 3), 11), ((1, 9, 40, 3), 9)),
            # Of I420 too: planes of an odd number of lines, so that V begins within a row.
            *(((4, (size + 3) // 2 * 3, size // 2 * 2 + 4), size) for size in (1, 2, 3, 4, 5, 8, 9, 16, 17, 21, 33)),
            *(((2, 9, 6), 6), ((5, 30, 14), 11), ((1, 15, 40), 10)),
        )
    ),
    examples=tuple(augment(images, 9, block) for images in ((5, 12, 14, 3), (5, 18, 14)) for block in (1, 4)),
    edges=(),
    small=(),
    large=(),
    many=(),
    alexnet=tuple(augment(images, 227, block) for images in ((1, 256, 256, 3), (1, 384, 256)) for block in (1, 4)),
    backward_arguments=None,
    needs={},
    winners=False,
    saved=None,
    moved=moved,
    target=None,
    copies=None,
    bad_calls={},
    bad_backward_calls={},
    fuzz=None,
    summands=lambda case, name: 1,
    settled=lambda case, exact, eps: True,
    magnitude=lambda case: 1 / min(case.constants["std"]),  # a byte and a mean may cancel
    # Sixteen bytes that begin in one row, or image, and end in another; images that end within them; several blocks.
    emulated=tuple(
        augment(images, size, block)
        for block in (1, 4)
        for images, size in (
            *(((5, size + 2, size + 3, 3), size) for size in (1, 2, 3, 5, 8, 9, 17)),
            *(((1, 7, 6, 3), 6), ((3, 33, 34, 3), 31), ((70_000, 2, 3, 3), 1)),
            *(((5, (size + 3) // 2 * 3, size // 2 * 2 + 4), size) for size in (1, 2, 3, 8, 9, 17)),
            *(((1, 9, 6), 6), ((3, 51, 34), 31)),
        )
    ),
    emulated_orders=(),
    emulated_many=(),
    ptx=tuple(
        augment(images, size, depth)
        for depth in (1, 4)
        for images, size in (
            *(((5, size + 2, size + 3, 3), size) for size in (1, 8, 17)),
            *(((3, 9, 9, 3), 9), ((5, 15, 10), 8), ((4, 27, 18), 17)),
        )
    ),
    runs=sampled_on_hopper(runs),
    triton_kernels=frozenset({"augment_forward_kernel"}),
    faults=FAULTS,
)
