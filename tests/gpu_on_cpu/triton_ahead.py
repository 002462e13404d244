"""Compiles the Triton kernels ahead of time, with no GPU, and prints what the code looks like as JSON.

    python -m tests.gpu_on_cpu.triton_ahead quick | full CAPABILITY | traced

A process of its own, as there is no compiler in the interpreter's.

Each op's host code runs on tensors without values while its launches are caught; each launch is compiled for the
architectures asked for with the argument types and alignments that it would have on a GPU.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
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

from alexnet_ext.ops.conv2d_bias_relu import configs
from alexnet_ext.ops.conv2d_bias_relu import triton_kernels as conv2d_bias_relu
from tests.support import cases
from tests.support.cases import Case

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
LAYERS = cases.alexnet_cases("conv2d_bias_relu", 128)

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


def without_values(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> dict[str, torch.Tensor]:
    """The case's tensors: x in this layout, all in this dtype where their op leaves it to them."""
    spec = cases.SPECS[case.op]
    drawn = spec.draw(spec.examples[0], torch.Generator())
    tensors = {
        name: torch.empty(shape, dtype=dtype if spec.gradient else drawn[name].dtype, device="meta")
        for name, shape in case.items()
    }
    return {name: t.to(memory_format=layout) if name == "x" else t for name, t in tensors.items()}


def memory_bound(
    dtype: torch.dtype, layout: torch.memory_format, channels: int = 96
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """AlexNet's first layer of each op, with this many channels, forward and backward. Of an op without a gradient,
    which takes images, every call."""
    for op in cases.named("in_triton", "not product"):
        kernels = importlib.import_module(f"alexnet_ext.ops.{op}.triton_kernels")
        first, *others = (cases.in_dtype(case, dtype) for case in cases.alexnet_cases(op, 128))
        if not cases.SPECS[op].gradient:
            for case in (first, *others) if channels == 96 else ():
                arguments = cases.raw_forward(case, without_values(case, dtype, layout))
                yield op, partial(kernels.forward, *arguments)
            continue
        widened = {"x": (128, channels, *first.shapes["x"][2:]), "bias": (channels,)}
        case = replace(first, shapes={name: widened[name] for name in first.shapes})
        tensors = without_values(case, dtype, layout)
        arguments = cases.raw_forward(case, tensors)
        yield op, partial(kernels.forward, *arguments)
        outputs = getattr(torch.ops.alexnet_ext, op)(*arguments)
        y, *saved = outputs if isinstance(outputs, tuple) else (outputs,)
        given = cases.SPECS[op].backward_arguments(y, tensors, y, saved, arguments[len(tensors) :])
        yield f"{op}_backward", partial(kernels.backward, *given)


def convolutions(layer: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    tensors = without_values(LAYERS[layer], dtype, torch.channels_last)
    x, weight, bias, *constants = cases.raw_forward(LAYERS[layer], tensors)
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
            yield name, torch.bfloat16, LAYERS[1].shapes["weight"][0], "channels_last", capability, run


def full(capability: int) -> Iterator[Work]:
    """Every kernel and every configuration; the code for fp16 and bf16 differs in the products alone."""
    others = (torch.float32, torch.float64)
    layouts = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    if capability != 90:
        del layouts["contiguous"]
    for layout, memory_format in layouts.items():
        for dtype, channels in ((torch.bfloat16, 96), *((other, 96) for other in others), *WIDTHS):
            for name, run in memory_bound(dtype, memory_format, channels):
                yield name, dtype, channels, layout, capability, run
    for layer in range(len(LAYERS)):
        for dtype in (torch.bfloat16, torch.float16, *others) if layer == 1 else (torch.bfloat16,):
            for name, run in convolutions(layer, dtype):
                yield name, dtype, LAYERS[layer].shapes["weight"][0], "channels_last", capability, run


def traced() -> None:
    """What torch.compile's backend is handed for each op and its backward: the kernels, or an op it cannot see into."""
    triton.runtime.driver.set_active(mock.Mock(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
    graphs: list[str] = []

    def capture(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.code)
        return make_boxed_func(module.forward)

    backward = (("_backward", cases.raw_backward),)
    for case in (case for case in cases.EXAMPLES + cases.OTHER_EXAMPLES if cases.SPECS[case.op].in_triton):
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


def main(work: Iterator[Work]) -> None:
    for name, dtype, channels, layout, capability, run in work:
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
        what = sys.argv[1]
        if what == "traced":
            traced()
        else:
            main(full(int(sys.argv[2])) if what == "full" else quick())
