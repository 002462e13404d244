"""``info`` reports the installation; ``check`` passes if all is correct, and fails for every planted fault."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alexnet_ext as ax
from alexnet_ext import _library, ops
from alexnet_ext.ops import _backend, _known
from alexnet_ext.ops._known import Proof, Race
from alexnet_ext.selfcheck import compare
from alexnet_ext.selfcheck.cases import integers
from alexnet_ext.selfcheck.compare import check, check_table, verdict
from alexnet_ext.selfcheck.info import Choice, choice
from tests.support import cases

OPS = _backend.OPS
CPU = torch.device("cpu")


@pytest.mark.usefixtures("known_files")
def test_info_of_this_installation() -> None:
    info = ax.info()
    text = str(info)
    assert text == repr(info)
    assert f"alexnet_ext {ax.__version__}" in text
    assert torch.__version__ in text
    assert torch.backends.cpu.get_cpu_capability() in text
    assert f"{torch.get_num_threads()} threads" in text
    assert {(c.op, c.device) for c in info.choices} == {(op, device) for op in OPS for device in ("cpu", "cuda")}
    for c in info.choices:
        assert c.reason
        assert (c.backend == "native") == (c.device == "cpu" and "native" in _backend.kernels(c.op, "cpu"))
    assert json.loads(json.dumps(info.as_dict()))["version"] == ax.__version__


def test_info_names_what_is_missing_why_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _library.Library("cpu", "cpu", False, "no compiler was found", "apt install g++")
    unwanted = _library.Library("cuda", "cuda", False, "this torch is a CPU build")
    monkeypatch.setattr(_library, "LIBRARIES", (missing, unwanted))
    monkeypatch.setattr(_library, "build_record", dict)
    untritoned = _library.Library("triton", "cuda", False, "Triton is not installed", "pip install triton")
    monkeypatch.setattr(_library, "TRITON", untritoned)
    headless = _library.Library("cutlass", "cuda", False, "no headers were found", "pip install nvidia-cutlass")
    monkeypatch.setattr(_library, "CUTLASS", headless)
    elsewhere = _library.Library("sm90", "cuda", False, "9.0 was not wanted", "want it")
    monkeypatch.setattr(_library, "SM90", elsewhere)
    monkeypatch.setattr(_backend, "KERNELS", {op: {} for op in OPS})
    lines = str(ax.info()).splitlines()
    assert "  cpu     not loaded: no compiler was found" in lines
    assert "          to mend it: apt install g++" in lines
    assert "  cuda    not loaded: this torch is a CPU build" in lines
    assert "  triton  not loaded: Triton is not installed" in lines
    assert "          to mend it: pip install triton" in lines
    assert "  cutlass not loaded: no headers were found" in lines
    assert "          to mend it: pip install nvidia-cutlass" in lines
    assert "  sm90    not loaded: 9.0 was not wanted" in lines
    assert "  none: nothing has been built in this folder" in lines
    assert {(c.device, c.backend, c.reason) for c in ax.info().choices} == {
        ("cpu", "stock", "no compiler was found"),
        ("cuda", "stock", "this torch is a CPU build"),
    }


@pytest.mark.usefixtures("known_files")
def test_info_says_why_each_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = (_library.Library("cpu", "cpu", True), _library.Library("cuda", "cuda", True))
    monkeypatch.setattr(_library, "LIBRARIES", libraries)
    monkeypatch.setattr(_library, "build_record", lambda: {"torch": "2.13.0", "isa": ["AVX2", "AVX512"]})
    kernels = {op: {"cpu": {"native": op}, "cuda": {}} for op in OPS}
    kernels[OPS[0]]["cuda"] = {"native": OPS[0]}
    kernels[OPS[2]]["cuda"] = {"triton": f"{OPS[2]}_triton"}
    monkeypatch.setattr(_backend, "KERNELS", kernels)
    text = str(ax.info())
    assert "  cpu     loaded" in text
    assert '  isa: ["AVX2", "AVX512"]' in text
    assert choice(OPS[1], "cpu").reason == "compiled kernel"
    unproven = "not yet proven on this device: `alexnet_ext.prove()` or `alexnet tune` does it"
    for op in (OPS[0], OPS[2]):
        assert choice(op, "cuda") == Choice(op, "cuda", "stock", unproven)
    with ax.use_backend("native"):
        assert choice(OPS[0], "cuda").backend == "native"
    with ax.use_backend("triton"):
        assert choice(OPS[2], "cuda").reason == "Triton kernel"
    with ax.use_backend("native"):
        assert choice(OPS[2], "cuda") == Choice(
            OPS[2],
            "cuda",
            "none",
            f"backend='native' does not cover device 'cuda' (no compiled kernel for {OPS[2]} is loaded; "
            "`alexnet info` says why)",
        )
    monkeypatch.setitem(_backend.ORDER["cuda"], "triton", _backend.PROVEN)
    assert choice(OPS[2], "cuda") == Choice(OPS[2], "cuda", "triton", "Triton kernel")
    kernels[OPS[3]]["cpu"] = {"triton": f"{OPS[3]}_triton"}
    assert choice(OPS[3], "cpu").reason == "no compiled kernel is loaded, and Triton's interpreter is for tests"
    kernels[OPS[2]]["cuda"] = {"auto": f"{OPS[2]}_auto", **kernels[OPS[2]]["cuda"]}
    _known.reopen()
    assert choice(OPS[2], "cuda").backend == "triton", "what is not proven is passed over"
    monkeypatch.setitem(_backend.ORDER["cuda"], "auto", _backend.PROVEN)
    assert choice(OPS[2], "cuda").reason == "each direction by whatever measures fastest"
    assert choice(OPS[1], "cuda") == Choice(OPS[1], "cuda", "stock", "the cuda library has no kernel for it")
    with ax.use_backend("stock"):
        assert {c.backend for c in ax.info().choices} == {"stock"}
        assert "use_backend('stock') is in force" in str(ax.info())


def test_info_shows_what_is_known_of_the_kernels(as_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State, age, time and reason of each proof; choice, age and times of each race; of old drivers too."""
    assert str(ax.info()).endswith(f"Kernels proven and raced on this machine ({as_gpu})\n  none")
    now = time.time()
    unit, another = (
        _known.Unit("relu_max_pool2d", "native", "float32", layout) for layout in ("contiguous", "strided")
    )
    with monkeypatch.context() as patch:
        patch.setattr(_known, "driver", functools.cache(lambda: "an old driver"))
        _known.reopen()
        _known.on(CPU).add(proofs={str(unit): Proof("proven", "", 0.5, now - 3 * 86400)})
    _known.reopen()
    proofs = {
        str(unit): Proof("proven", "", 1.25, now - 3700),
        str(another): Proof("refused", "y is off by 0.5", 2.0, now - 7300),
    }
    _known.on(CPU).add(proofs, {"a call": Race("native", {"stock": 12.5, "native": 10.0}, now - 61)})
    lines = str(ax.info()).splitlines()
    old, new = (i for i, line in enumerate(lines) if line.startswith("  cpu, "))
    assert lines[old].startswith("  cpu, of another driver, version, code or setting: not followed (")
    assert lines[old + 1] == f"    proven, 3 days ago, in 0.5 s: {unit}"
    assert lines[new:] == [
        f"  cpu, in force ({_known.on(CPU).path})",
        f"    proven, 1 hour ago, in 1.2 s: {unit}",
        f"    refused, 2 hours ago, in 2.0 s: {another}: y is off by 0.5",
        "    native, 1 minute ago: a call (native 10.0 us, stock 12.5 us)",
    ]
    (*_, known) = json.loads(json.dumps(ax.info().as_dict()))["known"]
    assert known["proofs"][str(another)]["reason"] == "y is off by 0.5"
    assert known["races"]["a call"]["microseconds"] == {"stock": 12.5, "native": 10.0}


@pytest.mark.filterwarnings("ignore:.*is of another device, driver or version and is not used")
def test_info_does_not_call_in_force_what_is_not_followed(as_gpu: Path) -> None:
    """A file that was copied over this GPU's."""
    _known.on(CPU).add(races={"a call": Race("native", {})})
    (file,) = as_gpu.glob("*.json")
    held = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(held | {"identity": held["identity"] | {"driver": "another"}}), encoding="utf-8")
    _known.reopen()
    assert [known.current for known in ax.info().known] == [False]
    _known.on(CPU).add()
    assert [known.current for known in ax.info().known] == [True]


def test_info_passes_over_a_file_that_cannot_be_read(as_gpu: Path) -> None:
    _known.on(CPU).add(races={"a call": Race("native", {})})
    (as_gpu / "broken.json").write_text("{")
    with pytest.warns(UserWarning, match="broken.json cannot be read and is not used"):
        (known,) = ax.info().known
    assert list(known.races) == ["a call"]


@pytest.fixture(scope="module")
def op_rows() -> list[compare.CheckRow]:
    """All rows of all ops."""
    return list(check("cpu", variants=()))


def test_every_op_passes(op_rows: list[compare.CheckRow]) -> None:
    assert verdict(op_rows) == (True, "all 54 comparisons are within tolerance"), op_rows
    names = {row.name.split(",")[0] for row in op_rows}
    assert names == set(OPS)
    combinations = {(row.dtype, row.layout) for row in op_rows}
    assert combinations == {(d, m) for d in ("fp32", "bf16", "fp16") for m in ("contiguous", "channels_last")}
    for row in op_rows:
        assert row.ok
        assert 0 <= row.error <= row.tolerance
        assert (row.stock_error is None) == bool(row.note), "where stock has no kernel the note says so"


def test_tolerances_are_tight(op_rows: list[compare.CheckRow]) -> None:
    """Within a few roundings of the dtype: what a wrong constant, window or order cannot meet."""
    for row in op_rows:
        limit = {"fp32": 3e-6, "bf16": 4e-2, "fp16": 5e-3}[row.dtype]
        assert 0 < row.tolerance < limit
        assert row.stock_error is None or row.tolerance <= 2 * row.stock_error + limit / 3


@pytest.mark.parametrize("variant", ["paper", "caffenet", "torchvision"])
def test_networks_pass(variant: str) -> None:
    rows = list(islice(check("cpu", op_names=(), variants=[variant], dtypes=["fp32"]), 1))
    assert verdict(rows) == (True, "all 1 comparisons are within tolerance"), rows
    assert rows[0].name == f"alexnet, {variant}"
    assert rows[0].error < 1e-5


def test_network_in_bf16() -> None:
    rows = list(check("cpu", op_names=(), variants=["paper"], dtypes=["bf16"]))
    assert [(row.dtype, row.layout, row.ok) for row in rows] == [
        ("bf16", "contiguous", True),
        ("bf16", "channels_last", True),
    ]
    assert all(row.stock_error is not None and row.error > 1e-3 for row in rows), "bf16 was really in use"


def value_off_by_one_part_in_ten_thousand(y: Tensor, x: Tensor) -> Tensor:
    largest = y.detach().abs().flatten().argmax()
    factor = torch.ones(y.numel(), dtype=y.dtype)
    factor[largest] += 1e-4
    return y * factor.view_as(y)


def gradient_off_by_one_part_in_ten_thousand(y: Tensor, x: Tensor) -> Tensor:
    return y + (y - y.detach()) * 1e-4


def one_nan(y: Tensor, x: Tensor) -> Tensor:
    hole = torch.zeros(y.numel(), dtype=y.dtype)
    hole[7] = torch.nan
    return y + hole.view_as(y)


class _NanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        gradient = dy.new_zeros(ctx.shape)
        gradient.view(-1)[3] = torch.nan
        return gradient


def one_nan_in_the_gradient(y: Tensor, x: Tensor) -> Tensor:
    return y + _NanBackward.apply(x)


def raises(y: Tensor, x: Tensor) -> Tensor:
    raise RuntimeError("the kernel is broken")


FAULTS = [
    value_off_by_one_part_in_ten_thousand,
    gradient_off_by_one_part_in_ten_thousand,
    one_nan,
    one_nan_in_the_gradient,
    raises,
]


def plant(monkeypatch: pytest.MonkeyPatch, op: str, fault: Callable[[Tensor, Tensor], Tensor]) -> None:
    right = getattr(ops, op)

    def in_place(parameters: list[Tensor], **kwargs: Any) -> None:
        right(parameters, **kwargs)
        parameters[0].copy_(fault(parameters[0].clone(), parameters[0]))

    def returning(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return fault(right(x, *args, **kwargs), x)

    monkeypatch.setattr(ops, op, returning if cases.SPECS[op].in_place is None else in_place)


@pytest.mark.parametrize(
    ("op", "fault"),
    [
        (op, fault)
        for op in OPS
        for fault in FAULTS
        if op not in cases.WITHOUT_GRADIENT or "gradient" not in fault.__name__
    ],
)
def test_a_faulty_op_fails(op: str, fault: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, op, fault)
    row = next(check("cpu", op_names=[op], variants=()))
    assert not row.ok, row
    passed, sentence = verdict([row])
    assert not passed
    assert sentence == f"1 of 1 comparisons failed: {row.name}"
    if fault is raises:
        assert row.note == "RuntimeError: the kernel is broken"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("window one channel off", lambda x, n, *rest: F.local_response_norm(x.roll(1, 1), n, *rest).roll(-1, 1)),
        ("alpha not divided", lambda x, n, alpha, *rest: F.local_response_norm(x, n, alpha * n, *rest)),
        ("k one percent off", lambda x, n, a, b, k: F.local_response_norm(x, n, a, b, k * 1.01)),
        ("odd window only", lambda x, n, *rest: F.local_response_norm(x, n | 1, *rest)),
    ],
)
def test_a_wrong_normalization_fails(name: str, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "local_response_norm", lambda x, *args: wrong(x.float(), *args).to(x.dtype))
    rows = list(check("cpu", op_names=["local_response_norm"], variants=()))
    failed = {(row.name.split(", ")[1], row.dtype) for row in rows if not row.ok}
    assert ("n = 4", "fp32") in failed, name


def test_a_fault_in_half_precision_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correct in fp32, with a second rounding to 5 bits in bf16: only the bf16 rows can show it."""
    right = ops.local_response_norm

    def coarse(x: Tensor, *args: Any) -> Tensor:
        y = right(x, *args)
        return y.to(torch.float8_e5m2).to(x.dtype) if x.dtype == torch.bfloat16 else y

    monkeypatch.setattr(ops, "local_response_norm", coarse)
    rows = list(check("cpu", op_names=["local_response_norm"], variants=()))
    assert {row.dtype for row in rows if not row.ok} == {"bf16"}


def test_a_fault_in_one_layout_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.relu_max_pool2d

    def confused(x: Tensor, *args: Any) -> Tensor:
        y = right(x, *args)
        return y if x.is_contiguous() else y.transpose(2, 3)

    monkeypatch.setattr(ops, "relu_max_pool2d", confused)
    rows = list(check("cpu", op_names=["relu_max_pool2d"], variants=()))
    assert {row.layout for row in rows if not row.ok} == {"channels_last"}


def test_a_faulty_network_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.relu_lrn_max_pool2d

    def other_k(x: Tensor, bias: Tensor, size: int, alpha: float, beta: float, k: float, *window: Any) -> Tensor:
        return right(x, bias, size, alpha, beta, k - 1, *window)

    monkeypatch.setattr(ops, "relu_lrn_max_pool2d", other_k)
    row = next(check("cpu", op_names=(), variants=["paper"]))
    assert not row.ok
    assert row.error > 1e-2


def test_a_network_with_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "relu_max_pool2d", gradient_off_by_one_part_in_ten_thousand)
    row = next(check("cpu", op_names=(), variants=["torchvision"]))
    assert not row.ok
    assert row.tensor.startswith("d")


def test_nothing_compared_is_no_pass() -> None:
    assert verdict(list(check("cpu", op_names=(), variants=()))) == (False, "nothing was compared")


def test_unknown_names_raise_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"op_names must be of augment, .*, got 'lrn'"):
        check("cpu", op_names=["lrn"])
    with pytest.raises(ValueError, match="dtypes must be of fp32, bf16, fp16, got 'fp8'"):
        check("cpu", dtypes=["fp8"])
    with pytest.raises(ValueError, match=r"variants must be of paper, .*, got 'vgg'"):
        check("cpu", variants=["vgg"])


def test_stock_without_a_kernel_leaves_the_cap() -> None:
    reference = [torch.ones(3, dtype=torch.float64)]

    def no_kernel() -> list[Tensor]:
        raise NotImplementedError("\"max_pool\" not implemented for 'Half'\nand more")

    baseline = compare._baseline(no_kernel, reference, math.inf)
    assert baseline == ([None], "stock: \"max_pool\" not implemented for 'Half'")
    label = ("op", "fp16", "contiguous", "native")
    for error, ok in ((0.5, True), (2.0, False)):
        ours = [reference[0] + error]
        row = compare._row(label, ["y"], lambda ours=ours: ours, baseline, reference, math.inf, [(0.1, 1)])
        assert (row.ok, row.error, row.tolerance, row.stock_error) == (ok, error, 1, None)


def test_a_stock_that_is_worse_than_the_cap_excuses_nothing() -> None:
    reference = [torch.ones(3, dtype=torch.float64)]
    for stock_error in (50.0, float("nan"), float("inf")):
        row = compare._row(
            ("op", "fp16", "contiguous", "native"),
            ["y"],
            lambda: [reference[0] + 2],
            ([stock_error], ""),
            reference,
            math.inf,
            [(0.1, 1)],
        )
        assert not row.ok
        assert row.tolerance == 1


@pytest.fixture
def medium_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.usefixtures("medium_precision")
def test_tf32_is_off_meanwhile_and_back_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(y: Tensor, x: Tensor) -> Tensor:
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return y

    plant(monkeypatch, "relu_max_pool2d", spy)
    rows = check("cpu", op_names=["relu_max_pool2d"], variants=())
    assert next(rows).ok
    assert seen == [("highest", False)]
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("medium", True)


def test_check_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    next(check("cpu", op_names=["relu_max_pool2d"], variants=()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("variant", ["paper", "tutorial"])
def test_no_decision_of_the_networks_is_left_to_rounding(variant: str) -> None:
    """What compare.IMAGE_SEEDS claims: the nearest ReLU or window is 9e-6 standard deviations from a tie."""
    model = compare._build(variant, fused=False)
    weights = {name: w.double() for name, w in compare.network_weights(model).items()}
    model.load_state_dict(weights, assign=True)
    margins = []

    def relu_margin(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        margins.append(float(x.abs()[x != 0].min() / x.std()))

    def pool_margin(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        first, second = F.unfold(x.flatten(0, 1)[:, None], 3, stride=2).topk(2, dim=1).values.unbind(1)
        margins.append(float((first - second)[first != second].min() / x.std()))

    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_pre_hook(relu_margin)
        elif isinstance(layer, nn.MaxPool2d):
            layer.register_forward_pre_hook(pool_margin)
    with torch.no_grad():
        model(integers(compare.IMAGE_SEEDS[variant], (1, 3, 227, 227), 0.25).double())
    assert len(margins) == 10
    assert min(margins) > 9e-6


def test_integers_are_exact_in_every_dtype() -> None:
    drawn = integers(5, (1_500_000,), 2.0**-10)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(drawn.to(dtype).float(), drawn)
    assert float(drawn.min()) == -127 * 2**-10
    assert float(drawn.max()) == 127 * 2**-10
    assert torch.equal(drawn[1_000_003:], drawn[: 1_500_000 - 1_000_003])
    assert not torch.equal(integers(6, (9,), 1.0), integers(5, (9,), 1.0))


def test_table_shows_rows_notes_and_the_verdict() -> None:
    from rich.console import Console

    rows = [
        compare.CheckRow("good", "fp32", "contiguous", "native", "y", 1e-7, 2e-7, 5e-7, True),
        compare.CheckRow("bad", "bf16", "channels_last", "stock", "dx", 0.5, None, 0.1, False, "stock: no kernel"),
    ]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(check_table(rows))
    text = console.export_text()
    assert "1 of 2 comparisons failed: bad" in text
    assert "[1] stock: no kernel" in text
    good, bad = (next(line.split() for line in text.splitlines() if line.split()[:1] == [n]) for n in ("good", "bad"))
    assert good == ["good", "fp32", "contiguous", "native", "y", "1.0e-07", "2.0e-07", "5.0e-07", "ok"]
    assert bad == ["bad", "bf16", "channels_last", "stock", "dx", "5.0e-01", "none", "1.0e-01", "FAILED", "[1]"]
