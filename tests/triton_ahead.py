"""Compiles the Triton kernels ahead of time, with no GPU, and prints what the code looks like as JSON.

    python -m tests.triton_ahead quick | full | traced    # a process of its own: the interpreter has no compiler

Each op's host code runs on tensors without values while its launches are caught; each launch is compiled for the
architectures asked for with the argument types and alignments that it would have on a GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from functorch.compile import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._library.triton import set_wrap_triton_enabled
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from alexnet_ext.ops.augment import triton_kernels as augment
from alexnet_ext.ops.conv2d_bias_relu import configs
from alexnet_ext.ops.conv2d_bias_relu import triton_kernels as conv2d_bias_relu
from alexnet_ext.ops.local_response_norm import triton_kernels as local_response_norm
from alexnet_ext.ops.relu_lrn_max_pool2d import triton_kernels as relu_lrn_max_pool2d
from alexnet_ext.ops.relu_max_pool2d import triton_kernels as relu_max_pool2d
from alexnet_ext.ops.relu_max_pool2d_lrn import triton_kernels as relu_max_pool2d_lrn

from . import cases

ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}
LRN = (5, 1e-4, 0.75, 2.0)
POOL = ([3, 3], [2, 2])
COLOURS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
IMAGES = (((128, 256, 256, 3), torch.uint8), ((128, 2), torch.int64))

# AlexNet's convolutions: x, weight, stride, padding, groups.
LAYERS = (
    ((128, 3, 227, 227), (96, 3, 11, 11), 4, 0, 1),
    ((128, 96, 27, 27), (256, 48, 5, 5), 1, 2, 2),
    ((128, 256, 13, 13), (384, 256, 3, 3), 1, 1, 1),
    ((128, 384, 13, 13), (384, 192, 3, 3), 1, 1, 2),
    ((128, 384, 13, 13), (256, 192, 3, 3), 1, 1, 2),
)

Launch = tuple[JITFunction, dict[str, Any]]


def launches(run: Callable[[], Any]) -> list[Launch]:
    """The kernels that ``run`` would start, with their arguments by name."""
    found: list[Launch] = []

    def catch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append((self, dict(zip(self.arg_names, args, strict=False)) | options))

    with mock.patch.object(JITFunction, "run", catch), set_wrap_triton_enabled(False):
        run()
    return found


def compiled(launch: Launch, capability: int) -> Any:
    """The kernel for this architecture, its integers and pointers specialized as they are at run time."""
    kernel, given = launch
    given = dict(given)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(kernel.arg_names):
        value = given.pop(name)
        if kernel.params[i].is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:  # 0 of those without values
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=given)


def facts(launch: Launch, capability: int) -> dict[str, Any]:
    name = launch[0].__name__
    kernel = compiled(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    ptx = kernel.asm["ptx"]
    return {
        "kernel": name,
        "capability": capability,
        "shared": kernel.metadata.shared,
        "local": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.\S*128", sass)),
        "wide_stores": len(re.findall(r"\bSTG\.\S*128", sass)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        "products": [
            product
            for product, pattern in (
                ("mma.sync", r"\bmma\.sync"),
                ("wgmma", r"\bwgmma\.mma_async"),
                ("tcgen05", r"\btcgen05\.mma"),
            )
            if re.search(pattern, ptx)
        ],
    }


def memory_bound(
    dtype: torch.dtype, layout: torch.memory_format, channels: int = 96
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """AlexNet's input, and its first normalization and pooling in each op, forward and backward."""
    x = torch.empty(128, channels, 55, 55, dtype=dtype, device="meta").to(memory_format=layout)
    y = torch.empty(128, channels, 27, 27, dtype=dtype, device="meta").to(memory_format=layout)
    winners, bias = torch.empty_like(y, dtype=torch.uint8), torch.empty(channels, dtype=dtype, device="meta")
    padding, dilation = [0, 0], [1, 1]
    bytes_, offsets = (torch.empty(s, dtype=t, device="meta") for s, t in IMAGES)
    drawn = offsets, torch.empty(128, dtype=torch.bool, device="meta"), torch.empty(128, 3, device="meta")
    for block in (1, 4):
        yield "augment", lambda block=block: augment.forward(bytes_, *drawn, 227, *COLOURS, dtype, block)
    yield "local_response_norm", lambda: local_response_norm.forward(x, *LRN)
    yield "local_response_norm_backward", lambda: local_response_norm.backward(x, x, *LRN)
    yield "relu_max_pool2d", lambda: relu_max_pool2d.forward(x, *POOL, padding, dilation, False)
    yield "relu_max_pool2d_backward", lambda: relu_max_pool2d.backward(y, winners, 55, 55, *POOL, padding, dilation)
    yield "relu_lrn_max_pool2d", lambda: relu_lrn_max_pool2d.forward(x, bias, *LRN, *POOL)
    yield "relu_lrn_max_pool2d_backward", lambda: relu_lrn_max_pool2d.backward(y, x, bias, winners, *LRN, *POOL)
    yield "relu_max_pool2d_lrn", lambda: relu_max_pool2d_lrn.forward(x, bias, *LRN, *POOL)
    yield "relu_max_pool2d_lrn_backward", lambda: relu_max_pool2d_lrn.backward(y, y, winners, 55, 55, *LRN, *POOL)


def convolutions(layer: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    shape, weight_shape, stride, padding, groups = LAYERS[layer]
    last = torch.channels_last
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=last)
    weight = torch.empty(weight_shape, dtype=dtype, device="meta")
    bias = torch.empty(weight_shape[0], dtype=dtype, device="meta")
    constants = ([stride] * 2, [padding] * 2, [1, 1], groups)
    y = conv2d_bias_relu.empty_result(x, weight, conv2d_bias_relu.Convolution(*constants))

    def persistent() -> None:
        if configs.has_persistent(x, conv2d_bias_relu.precision(dtype)):
            conv2d_bias_relu.forward(x, weight, bias, *constants, persistent=True)

    yield f"conv{layer + 1}", lambda: conv2d_bias_relu.forward(x, weight, bias, *constants)
    yield f"conv{layer + 1}_persistent", persistent
    yield (
        f"conv{layer + 1}_backward",
        lambda: conv2d_bias_relu.backward(y, x, weight, y, *constants, [True, True, True]),
    )


# The number of channels shapes the tile: that of AlexNet's other normalization, many, and an odd one.
WIDTHS = (
    (torch.bfloat16, 256),
    (torch.float64, 256),
    (torch.bfloat16, 1024),
    (torch.float32, 1024),
    (torch.float64, 1024),
    (torch.float32, 17),
)

Work = tuple[str, torch.dtype, int, str, int, Callable[[], Any]]


def quick() -> Iterator[Work]:
    """A sample: the memory-bound kernels for one chip, a forward convolution for each."""
    for name, run in memory_bound(torch.bfloat16, torch.channels_last):
        yield name, torch.bfloat16, 96, "channels_last", 90, run
    for capability in ARCHITECTURES:
        for name, run in list(convolutions(1, torch.bfloat16))[:2]:
            yield name, torch.bfloat16, LAYERS[1][1][0], "channels_last", capability, run


def full() -> Iterator[Work]:
    """Every kernel and every configuration; fp16's code is bf16's but for the products."""
    others = (torch.float32, torch.float64)
    for layout, memory_format in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        for capability in ARCHITECTURES if layout == "channels_last" else (90,):
            for dtype, channels in ((torch.bfloat16, 96), *((other, 96) for other in others), *WIDTHS):
                for name, run in memory_bound(dtype, memory_format, channels):
                    if channels == 96 or name != "augment":
                        yield name, dtype, channels, layout, capability, run
    for capability in ARCHITECTURES:
        for layer in range(len(LAYERS)):
            for dtype in (torch.bfloat16, torch.float16, *others) if layer == 1 else (torch.bfloat16,):
                for name, run in convolutions(layer, dtype):
                    yield name, dtype, LAYERS[layer][1][0], "channels_last", capability, run


def traced() -> None:
    """What torch.compile's backend is handed for each op and its backward: the kernels, or an op it cannot see into."""
    triton.runtime.driver.set_active(mock.Mock(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    graphs: list[str] = []

    def capture(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.code)
        return make_boxed_func(module.forward)

    backward = (("_backward", cases.raw_backward),)
    for case in (*(example for example in cases.EXAMPLES if example.op in cases.ON_GPU), *cases.AUGMENT_EXAMPLES):
        tensors = cases.make(case, requires_grad=False)
        for suffix, arguments in (("", cases.raw_forward), *(backward if case.op in cases.OPS else ())):
            op = getattr(torch.ops.alexnet_ext, f"{case.op}_triton{suffix}")
            given = list(arguments(case, tensors))
            places = [i for i, value in enumerate(given) if isinstance(value, torch.Tensor)]

            def run(*values: torch.Tensor, given: Any = given, places: Any = places, op: Any = op) -> Any:
                for i, value in zip(places, values, strict=True):
                    given[i] = value
                return op(*given)

            with FakeTensorMode():
                fakes = [torch.empty(given[i].shape, dtype=given[i].dtype, device="cuda") for i in places]
                aot_function(run, fw_compiler=capture)(*fakes)
            code = graphs.pop()
            counts = {"kernels": code.count("triton_kernel_wrapper"), "opaque": code.count("ops.alexnet_ext")}
            print(json.dumps({"op": f"{case.op}{suffix}"} | counts), flush=True)


def main(grid: str) -> None:
    for name, dtype, channels, layout, capability, run in {"quick": quick, "full": full}[grid]():
        for tf32 in (False, True) if dtype == torch.float32 and name.startswith("conv") else (False,):
            torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
            with mock.patch.object(configs, "architecture", return_value=capability // 10):
                found = launches(run)
            for launch in found:
                what = {"op": name, "dtype": str(dtype).removeprefix("torch."), "channels": channels, "layout": layout}
                what["tf32"] = tf32
                print(json.dumps(what | facts(launch, capability)), flush=True)


if __name__ == "__main__":
    with mock.patch.object(configs, "architecture", return_value=9):
        traced() if sys.argv[1] == "traced" else main(sys.argv[1])
