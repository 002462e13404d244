"""Networks for other programs: ONNX in two runtimes, torch.export, AOTInductor, torch.compile and torch.jit.trace."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alexnet_ext as ax
from alexnet_ext import _library, export
from alexnet_ext.cli import run_command
from alexnet_ext.training import checkpoint
from tests.support import ROOT
from tests.support.networks import BLOCK, sequential

SIDE = 67


def network(variant: str = "paper", fused: bool = True) -> ax.models.AlexNet:
    return ax.models.alexnet(variant, fused, num_classes=5, image_size=SIDE, init="kaiming").eval()


def onnxruntime_runs(file: Path, x: Tensor) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def openvino_runs(file: Path, x: Tensor) -> Tensor:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([x.numpy()])[0].copy())


RUNTIMES = (onnxruntime_runs, openvino_runs)


def nodes(file: Path) -> list[str]:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    model = onnx.load(file)
    from alexnet_ext._onnx import OPSET

    onnx.checker.check_model(model, full_check=True)
    assert {(opset.domain, opset.version) for opset in model.opset_import} == {("", OPSET)}
    assert len(model.functions) == 0
    return [node.op_type for node in model.graph.node]


def to_onnx(model: nn.Module, x: Tensor, file: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    export.to_onnx(model, x, file)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


CONV, FC = ["Conv", "Relu"], ["Gemm", "Relu"]
STEMS = {
    "paper": [*CONV, "LRN", "MaxPool"] * 2,
    "caffenet": [*CONV, "MaxPool", "LRN"] * 2,
    "tutorial": ["Conv", "MaxPool", "LRN", "Relu"] * 2,
}


@pytest.mark.parametrize("variant", STEMS)
def test_alexnet_in_onnx_is_standard_nodes(tmp_path: Path, variant: str) -> None:
    model, x, file = network(variant, fused=False), torch.randn(3, 3, SIDE, SIDE), tmp_path / "a.onnx"
    to_onnx(model, x[:1], file)
    assert nodes(file) == [*STEMS[variant], *CONV * 3, "MaxPool", "Reshape", *FC * 2, "Gemm"]
    with torch.no_grad():
        for runtime in RUNTIMES:
            for batch in (x, x[:1]):
                close(runtime(file, batch), model(batch))
    again = ax.models.alexnet(variant, num_classes=5, image_size=SIDE, init="torch")
    ax.models.load_weights(again, file)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


STOCK_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "even": (lambda: sequential(nn.LocalResponseNorm(4, 1.5, 0.75, 2.0)), (7, 5, 6), ["Mul", "Pad", *["Slice"] * 4]),
    "even_3d": (lambda: sequential(nn.LocalResponseNorm(2, 1.5, 0.5, 1.0)), (5, 6), ["Mul", "Pad", *["Slice"] * 2]),
    "odd": (lambda: sequential(nn.LocalResponseNorm(3, 1.5, 0.75, 2.0)), (7, 5, 6), ["LRN"]),
    "block": (lambda: sequential(*BLOCK), (4, 11, 9), ["Conv", "Relu", "LRN", "MaxPool"]),
    "pool": (
        lambda: sequential(nn.Tanh(), nn.ReLU(), nn.MaxPool2d((3, 2), 2, (1, 0), ceil_mode=True)),
        (3, 10, 9),
        ["Tanh", "Relu", "MaxPool"],
    ),
    "grouped": (
        lambda: sequential(nn.Conv2d(4, 6, 3, 2, 1, 2, 2, bias=False), nn.ReLU()),
        (4, 11, 9),
        ["Conv", "Relu"],
    ),
}


@pytest.mark.parametrize(
    ("what", "fused"),
    [*((what, False) for what in STOCK_MODELS), *((what, True) for what in ("block", "pool", "grouped"))],
)
def test_layers_in_onnx(tmp_path: Path, what: str, fused: bool) -> None:
    build, shape, expected = STOCK_MODELS[what]
    model, x, file = build().train(), 2 * torch.randn(3, *shape), tmp_path / "a.onnx"
    y = model(x).detach()
    if fused:
        ax.accelerate(model)
    before = list(model)
    to_onnx(model, x, file)
    assert all(a is b for a, b in zip(model, before, strict=True))
    assert all(module.training for module in model.modules())
    found = [kind for kind in nodes(file) if not (fused and what == "block" and kind == "Add")]  # the bias
    assert found[: len(expected)] == expected
    for runtime in RUNTIMES:
        close(runtime(file, x), y)


PLANE = (7, 4, 5)


@pytest.mark.parametrize(
    ("shape", "constants", "dtype", "is_lrn"),
    [
        *((PLANE, some, torch.float32, True) for some in ((1, 1.5, 0.75, 2.0), (9, 1.5, 2.0, 0.0), (3, 1, 1, -1))),
        *(
            (PLANE, constants, torch.float32, False)
            for constants in (
                *((3, 0.0, 0.75, 2.0), (3, -0.1, 0.75, 9.0), (3, 1e-45, 0.75, 2.0), (5, 1.5, 0.0, 2.0)),
                *((5, 1.5, -1.0, 2.0), (1, 0.0, 0.0, 0.0), (4, 0.0, 0.5, 0.0), (2, -0.1, -0.5, 0.5)),
            )
        ),
        *((shape, (3, 1.5, 0.75, 2.0), torch.float32, False) for shape in ((7, 6), (7, 3, 4, 2), (7, 2, 3, 1, 2))),
        (PLANE, (3, 1.5, 0.75, 2.0), torch.float64, False),
    ],
    ids=str,
)  # fmt: skip
def test_lrn_of_any_rank_and_constants_runs_in_onnxruntime(
    tmp_path: Path, shape: tuple[int, ...], constants: tuple[Any, ...], dtype: torch.dtype, is_lrn: bool
) -> None:
    model = sequential(nn.LocalResponseNorm(*constants), nn.Tanh()).to(dtype)
    x, file = 2 * torch.randn(3, *shape, dtype=dtype), tmp_path / "a.onnx"
    to_onnx(model, x, file)
    assert ("LRN" in nodes(file)) == is_lrn
    for batch in (x, x[:1]):
        torch.testing.assert_close(onnxruntime_runs(file, batch), model(batch), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_every_op_of_a_network_has_a_translation() -> None:
    """augment makes a network's input and sgd_step changes its weights: neither is part of a network."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    table = export.onnx_translations()
    assert {op._schema.name.split("::")[1] for op in table} == set(ax.ops.__all__) - {
        "augment",
        "sgd_step",
        "use_backend",
    }


def test_onnx_without_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    missing = _library.Library("cpu", "cpu", False, "it is not built")
    monkeypatch.setattr(_library, "LIBRARIES", (missing,))
    with pytest.raises(RuntimeError, match="export to ONNX needs the compiled CPU library: it is not built"):
        export.onnx_translations()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network's safetensors file, as a run writes it."""
    from alexnet_ext.data.preprocessing import Preprocessing

    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    model = network("caffenet")
    classes = tuple("abcde")
    means = Preprocessing(SIDE, 80, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    checkpoint.write_weights(path, model, checkpoint.Description(model.config, classes, means, "digits", 7))
    return path


@pytest.mark.parametrize("kind", ["onnx", "torch-export", "safetensors"])
def test_the_command_writes(tmp_path: Path, weights: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    out = tmp_path / "new" / f"net.{'pt2' if kind == 'torch-export' else kind}"
    assert run_command(["export", "--format", kind, "--out", str(out), "--weights", str(weights)]) == 0
    assert f"{out}: " in capfd.readouterr().out.replace("\n", "")
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    model, _ = checkpoint.load_model(weights, None, True)
    model.eval()
    x = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        y = model(x)
        if kind == "onnx":
            close(onnxruntime_runs(out, x), y)
        elif kind == "torch-export":
            loaded = torch.export.load(out).module()
            close(loaded(x), y)
            close(loaded(x[:1]), model(x[:1]))
        else:
            again, description = checkpoint.load_model(out, None, True)
            assert torch.equal(again.eval()(x), y)
            assert (description.classes, description.step) == (tuple("abcde"), 7)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "onnx", "--out", "{out}", "--weights", "{none}"], 1, "none.pth: No such file or directory"),
        (["--format", "onnx", "--out", "{out}", "--weights", "{bad}"], 1, "bad.pth: damaged, or more than tensors"),
        (["--format", "onnx", "--out", "{out}", "--weights", "{weights}", "--variant", "paper"], 1, "not 'paper'"),
        (["--format", "aoti", "--out", "{out}"], 2, "a.onnx: the name of such a file must end in .pt2"),
        (["--format", "pdf", "--out", "{out}"], 2, "'pdf' is not one of"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, weights: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.pth").write_bytes(b"no")
    names = {"out": tmp_path / "a.onnx", "none": tmp_path / "none.pth", "bad": tmp_path / "bad.pth", "weights": weights}
    assert run_command(["export", *(argument.format(**names) for argument in arguments)]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("kind", ["torch-export", "safetensors"])
def test_a_file_that_cannot_be_whole_leaves_the_old_one(tmp_path: Path, weights: Path, kind: str) -> None:
    """In a process of its own: PyTorch's archive writer aborts the process if it fails."""
    out = tmp_path / "net.pt2"
    out.write_text("old")
    result = subprocess.run(
        [sys.executable, "-m", "alexnet_ext", "export", "--format", kind, "--weights", weights, "--out", out],
        cwd=ROOT, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY)),
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (1, f"alexnet: {out}: File too large\n")
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


TORCH_ALONE = """
import sys, torch
sys.modules["alexnet_ext"] = None  # importing it would raise
torch.ops.load_library(sys.argv[1])
run = torch._inductor.aoti_load_package(sys.argv[2])
x, y = torch.load(sys.argv[3])
for batch in (x, x[:1]):
    torch.testing.assert_close(run(batch), y[: len(batch)])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("native")
def test_an_aoti_package_runs_with_torch_and_the_library_alone(tmp_path: Path) -> None:
    caffenet = (BLOCK[0], BLOCK[1], BLOCK[3], BLOCK[2])
    model = sequential(*BLOCK, nn.ReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(6, 4, 1), nn.ReLU(), *caffenet).eval()
    ax.accelerate(model)
    x = torch.randn(3, 4, 19, 17)
    package, values = tmp_path / "a.pt2", tmp_path / "values.pt"
    export.to_aoti(model, x, package)
    torch.save((x, model(x).detach()), values)
    library = _library.FOLDER / "libalexnet_ext_cpu.so"
    command = [sys.executable, "-I", "-c", TORCH_ALONE, str(library), str(package), str(values)]
    result = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_torch_compile_with_any_batch(mode: str) -> None:
    """One graph, one compilation for all batch sizes, values and gradients."""
    torch._dynamo.reset()
    model = sequential(*BLOCK, nn.Conv2d(6, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    ax.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=None, mode=mode)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            x = torch.randn(batch, 4, 13, 11)
            torch._dynamo.mark_dynamic(x, 0)
            x.requires_grad_()
            ours, eager = compiled(x), model(x)
            torch.testing.assert_close(ours, eager)
            dy = torch.randn_like(eager)
            parameters = [x, *model.parameters()]
            torch.testing.assert_close(
                torch.autograd.grad(ours, parameters, dy), torch.autograd.grad(eager, parameters, dy)
            )


def test_alexnet_compiles_with_any_batch() -> None:
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for batch in (2, 3, 5):
            x = torch.randn(batch, 3, SIDE, SIDE)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("build", [lambda: network("caffenet"), lambda: sequential(*BLOCK)], ids=["alexnet", "block"])
def test_torch_jit_trace(build: Callable[[], Any]) -> None:
    model = build().eval()
    x = torch.randn(2, 3, SIDE, SIDE) if isinstance(model, ax.models.AlexNet) else torch.randn(2, 4, 9, 9)
    ax.accelerate(model)
    traced = torch.jit.trace(model, x)
    x = torch.cat([x, torch.randn_like(x)])
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
