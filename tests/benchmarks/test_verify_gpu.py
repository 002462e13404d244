"""The GPU verification, driven without a GPU: a stage's findings are kept, however it ends."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_ext.ops import _backend
from benchmarks import harness
from benchmarks.verify_gpu import __main__ as verify
from benchmarks.verify_gpu import conclusions, report, stages, timing
from benchmarks.verify_gpu.common import attempt, fused, preferring
from benchmarks.verify_gpu.report import Finding, Outcome
from benchmarks.verify_gpu.stages import Task, correctness, graphs, network, sanitizers, speed
from tests.support import ROOT, cases


def test_every_stage_is_a_module_and_every_module_a_stage() -> None:
    modules = {path.stem for path in Path(stages.__file__).parent.glob("*.py")} - {"__init__", "__main__"}
    assert {stage.name for stage in stages.STAGES} == modules


@pytest.mark.parametrize("name", ["graphs", "streams", "large", "sanitizers"])
def test_stages_that_need_a_gpu_find_nothing_on_a_cpu(name: str) -> None:
    stage = next(stage for stage in stages.STAGES if stage.name == name)
    assert list(stage.run(Task("cpu"))) == []


def test_the_steps_that_a_gpu_compares_train_on_a_cpu() -> None:
    """Without a graph: two runs have the same bits, and each step is on images of its own."""
    one, other, longer = (graphs.training(torch.device("cpu"), False, 2, 67, steps) for steps in (2, 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, longer, strict=True))


def test_the_lists_that_must_not_be_asked_of_the_package_are_its_own() -> None:
    assert set(stages.OPS) == set(_backend.OPS)
    assert set(stages.ON_GPU) == set(cases.named("on_gpu"))
    assert set(stages.DTYPES) == {cases.dtype_id(dtype) for dtype in correctness.DTYPES}
    assert {name.rpartition(" ")[0] for name in stages.NETWORKS} == set(harness.NETWORK)


def test_it_needs_no_more_than_the_build_does() -> None:
    """PyTorch and pytest alone: packages of the command line and of the CPU's benchmarks may be missing."""
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'pytest_benchmark', 'matplotlib', 'mlxtend', 'PIL'): sys.modules[name] = None\n"
        "import importlib, benchmarks.verify_gpu.__main__\n"
        "import benchmarks.verify_gpu.facts, benchmarks.verify_gpu.sanitized\n"
        "from benchmarks.verify_gpu.stages import STAGES\n"
        "for stage in STAGES: importlib.import_module(f'benchmarks.verify_gpu.stages.{stage.name}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_loads_no_library_that_the_first_stage_builds() -> None:
    code = "import sys, benchmarks.verify_gpu.__main__; print('torch' in sys.modules, 'alexnet_ext' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_check_that_raises_is_a_failed_finding() -> None:
    assert attempt("good", lambda: "seen") == Finding("good", True, "seen")
    assert attempt("bad", lambda: 1 / 0) == Finding("bad", False, "ZeroDivisionError: division by zero")


def test_preferring_changes_what_auto_runs_and_is_undone() -> None:
    before = _backend.decide("local_response_norm", torch.device("cpu")).backend
    with preferring("stock", "cpu"):
        assert _backend.decide("local_response_norm", torch.device("cpu")).backend == "stock"
    assert _backend.decide("local_response_norm", torch.device("cpu")).backend == before


def fake_stage(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> stages.Stage:
    """A stage whose process runs ``body`` with ``find`` at hand."""
    script = folder / "sitecustomize.py"
    script.write_text(
        "import sys\n"
        "if 'benchmarks.verify_gpu.stages' in sys.orig_argv:\n"
        "    import json, os, time\n"
        "    lines = open(sys.orig_argv[-1], 'w', buffering=1)\n"
        "    find = lambda name, ok: print(json.dumps({'name': name, 'ok': ok}), file=lines)\n"
        f"    {body}\n"
        "    lines.close()\n"
        "    os._exit(0)\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    return stages.Stage("fake", "nothing", seconds)


@pytest.mark.parametrize(
    ("body", "verdict", "names"),
    [
        ("find('a', True); find('b', None)", "passed", ["a", "b"]),
        ("find('a', True); find('b', False)", "failed", ["a", "b"]),
        ("find('a', True); print('said', flush=True); os._exit(3)", "crashed", ["a"]),
        ("find('a', True); print('said', flush=True); os.kill(os.getpid(), 11)", "crashed", ["a"]),
        ("find('a', True); print('said', flush=True); time.sleep(600)", "timed out", ["a"]),
        ("pass", "not applicable", []),
    ],
    ids=["passed", "failed", "exit code", "signal", "timed out", "not applicable"],
)
def test_how_a_stage_ends(
    body: str, verdict: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = fake_stage(body, tmp_path, monkeypatch, seconds=2 if "sleep" in body else 60)
    outcome = verify.run_stage(stage, "cpu", stage.seconds)
    assert outcome.verdict == verdict
    assert [finding.name for finding in outcome.findings] == names
    assert outcome.ok == (verdict in ("passed", "not applicable"))
    if "said" in body:
        assert "said" in outcome.output
    assert outcome.seconds < 60


def test_the_report_names_failures_and_holds_the_numbers(tmp_path: Path) -> None:
    outcomes = [
        Outcome("speed", "fast", "passed", 3.2, (Finding("lrn", None, numbers={"ms": 1.25, "floor ms": None}),)),
        Outcome("correctness", "right", "failed", 1.0, (Finding("pool", False, "off | by\none"), Finding("lrn"))),
        Outcome("graphs", "captured", "timed out", 9.0, (), "stuck here"),
        Outcome("large", "offsets", "not reached", 0.0),
    ]
    path = tmp_path / "results" / "verify.md"
    report.write(path, {"device": "a GPU", "date": "2026-01-01"}, outcomes)
    text = path.read_text(encoding="utf-8")
    assert "| correctness | right | failed | 1 of 2 | 1 |" in text
    assert "- FAILED pool: off | by one" in text
    assert "| lrn | 1.25 |  |" in text
    assert "stuck here" in text
    assert "| large | offsets | not reached | 0 of 0 | 0 |" in text
    data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert [stage["verdict"] for stage in data["stages"]] == ["passed", "failed", "timed out", "not reached"]
    assert {file.name for file in path.parent.iterdir()} == {"verify.md", "verify.json"}


def test_the_command_writes_after_each_stage_and_fails_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def run_stage(stage: stages.Stage, device: str, seconds: float, tell: Callable[[Outcome], None]) -> Outcome:
        seen.append(len(json.loads(next(tmp_path.glob("*.json")).read_text())["stages"]) if seen else 0)
        verdict = "failed" if stage.name == "streams" else "passed"
        return Outcome(stage.name, stage.purpose, verdict, 0.1, (Finding("x", verdict == "passed"),))

    monkeypatch.setattr(verify, "run_stage", run_stage)
    monkeypatch.setattr(verify, "circumstances", lambda device: {"device": "My GPU (x)", "date": "2026-01-01"})
    assert verify.main(["--out", str(tmp_path)]) == 1
    assert "FAILED x" in capsys.readouterr().out
    assert seen == list(range(len(stages.STAGES)))
    path = tmp_path / "verify-my-gpu-x-2026-01-01.md"
    assert path.exists()
    # Stages that run later are added to the report; earlier ones stay.
    assert verify.main(["--stage", "build", "--out", str(tmp_path)]) == 0
    assert [outcome.stage for outcome in report.read(path)] == [stage.name for stage in stages.STAGES]
    with pytest.raises(SystemExit, match="2"):
        verify.main(["--stage", "nonsense", "--out", str(tmp_path)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--out", str(tmp_path)]) == 1
    assert "no CUDA device is available: --device cpu runs what applies without one" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_ends_badly_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        "part = sys.orig_argv[-4]; find(part, part != 'b'); part == 'c' and os._exit(3); part == 'd' and time.sleep(99)"
    )
    stage = replace(fake_stage(body, tmp_path, monkeypatch, 20), parts=("a", "b", "c", "d", "e"), parallel=True)
    told: list[Outcome] = []
    outcome = verify.run_stage(stage, "cuda", 20, told.append)
    assert [finding.name for finding in outcome.findings] == ["a", "b", "c", "d", "e"]
    assert outcome.verdict == "crashed"
    assert outcome.unfinished == ("c crashed", "d timed out")
    assert outcome.seconds < 30
    assert [len(found.findings) for found in told] == [1, 2, 3, 4, 5]  # written as they come
    assert len(told[0].unfinished) >= 4


def test_what_a_report_says_is_read_back(tmp_path: Path) -> None:
    finding = Finding("lrn", None, numbers={"ms": 1.25, "fastest": "native"}, about={"backend": "native"})
    outcomes = [Outcome("speed", "fast", "timed out", 3.2, (finding,), "said", ("augment timed out",))]
    assert report.read(tmp_path / "none.md") == []
    report.write(tmp_path / "it.md", {"device": "a GPU", "date": "2026-01-01"}, [])
    assert report.read(tmp_path / "it.md") == []
    report.write(tmp_path / "it.md", {"device": "a GPU", "date": "2026-01-01"}, outcomes)
    assert report.read(tmp_path / "it.md") == outcomes


# ---- the report's conclusions


def proofs(**verdicts: str) -> list[Outcome]:
    """Every proof, with one check of each entry passed in it."""
    checks = tuple(Finding(f"of {way}", about={"backend": way}) for way in conclusions.WAYS)
    return [Outcome(stage, "", verdicts.get(stage, "passed"), 1.0, checks) for stage in conclusions.PROOFS]


def entries(outcomes: list[Outcome]) -> dict[str, str]:
    (_, _, rows) = next(conclusions.tables(outcomes, "cpu"))
    return {row[0].split('"')[1]: row[2] for row in rows}


def test_an_entry_goes_when_every_proof_is_finished_and_nothing_of_it_failed() -> None:
    assert entries(proofs()) == dict.fromkeys(conclusions.WAYS, "may go")
    outcomes = proofs()
    outcomes[1] = replace(outcomes[1], findings=(Finding("lrn", False, about={"backend": "triton"}),))
    found = entries(outcomes)
    assert found["triton"] == "stays: 1 failed, network: lrn"
    assert found["native"] == found["auto"] == "may go"


def test_an_entry_is_open_while_a_proof_of_it_is_not_finished() -> None:
    outcomes = proofs()
    outcomes[0] = replace(outcomes[0], verdict="crashed", unfinished=("native augment float32 crashed",))
    assert entries(outcomes)["native"] == "is open: correctness: native augment float32 crashed"
    assert entries(outcomes)["triton"] == "may go"
    assert set(entries(proofs(large="not reached")).values()) == {"is open: large not run"}
    assert all("sanitizers not run" in says for says in entries(proofs()[:-1]).values())
    blind = proofs()
    blind[-1] = replace(blind[-1], findings=(*blind[-1].findings, Finding("memcheck sees the planted bug", False)))
    assert all(says.startswith("stays: 1 failed") for says in entries(blind).values())


def timed(layer: str, about: dict[str, str], **milliseconds: float) -> Finding:
    numbers = speed.compared(about["op"], {n.replace("_", " "): ms for n, ms in milliseconds.items()}, 10, 1.0)
    return Finding(f"{about['op']} {layer}", None, numbers=numbers, about={"kind": "op", **about})


def test_the_order_is_by_the_sum_of_what_all_layers_have() -> None:
    about = {"op": "local_response_norm", "dtype": "bfloat16", "layout": "channels_last"}
    findings = (
        timed("one", about, native=3.0, triton=1.1, stock=9.0, compiled_stock=2.0),
        timed("two", about, native=1.1, triton=4.0, stock=9.0),
    )
    _, (_, headings, rows), (_, _, slow) = conclusions.tables([Outcome("large", "", "passed", 1, findings)], "cpu")
    row = dict(zip(headings, rows[0], strict=True))
    assert (row["native ms"], row["compiled stock ms"]) == (4.1, None)
    assert row["order"] == "native, triton, stock"
    assert rows[1][0] == "**local_response_norm**"
    assert slow == [["none", None, None, None]]


def test_what_misses_a_target_is_named() -> None:
    about = {"op": "relu_max_pool2d", "dtype": "bfloat16", "layout": "channels_last"}
    findings = [
        timed("as fast as it must be", about, native=1.14, stock=9.0, compiled_stock=1.2),
        timed("slower than the copy allows", about, native=1.16, stock=9.0),
        timed("slower than compiled", about, native=1.1, stock=9.0, compiled_stock=1.05),
        timed("no kernel runs", about, stock=9.0),
    ]
    names = [row[0] for row in conclusions.missed(findings)]
    assert names == [finding.name for finding in findings[1:]]


def test_the_convolution_that_won_stands_beside_stock() -> None:
    numbers = {
        "cudnn contiguous ms": 3.0,
        "triton ms": 2.0,
        "stock ms": 5.0,
        "fastest stock": "stock",
        "times stock": 2.5,
    }
    row = conclusions.won(Finding("forward", None, numbers=numbers))
    assert row == ["forward", "triton", 2.0, "cudnn contiguous", 3.0, "stock", 2.5]


# ---- measurements


def test_bytes_that_must_move() -> None:
    def moved(case: cases.Case, backward: bool) -> int:
        return cases.bytes_moved(case, 2)[backward]

    x, y = 2 * 2 * 6 * 7 * 9, 2 * 6 * 3 * 4  # bytes of x; elements of y
    assert moved(cases.lrn((2, 6, 7, 9)), False) == 2 * x
    assert moved(cases.lrn((2, 6, 7, 9)), True) == 3 * x
    assert moved(cases.pool((2, 6, 7, 9)), False) == moved(cases.pool((2, 6, 7, 9)), True) == x + 3 * y
    bias = 2 * 6
    assert moved(cases.block("relu_lrn_max_pool2d", (2, 6, 7, 9)), False) == x + bias + 3 * y
    assert moved(cases.block("relu_lrn_max_pool2d", (2, 6, 7, 9)), True) == 2 * x + 3 * y
    assert moved(cases.block("relu_max_pool2d_lrn", (2, 6, 7, 9)), False) == x + bias + 5 * y
    assert moved(cases.block("relu_max_pool2d_lrn", (2, 6, 7, 9)), True) == x + 5 * y


@pytest.mark.parametrize("what", ["forward", "input gradient", "weight gradient"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_stock_ways_to_convolve_compute_the_same(what: str, layout: str) -> None:
    case = cases.conv((2, 8, 7, 9), 6, (3, 3), padding=1, groups=2)
    tensors = speed.made(case, torch.float64, layout, "cpu")
    y = cases.stock(case, tensors).detach()
    found = {}
    for name, run in speed.stock_ways(case, tensors, y, f"conv2d_bias_relu {what}", "cpu").items():
        torch.manual_seed(0)
        (found[name],) = run()
    dense = found["stock dense with zeros"]
    if what == "weight gradient":
        dense = torch.cat([dense[:3, :4], dense[3:, 4:]])
    torch.testing.assert_close(dense, found["stock"])


def test_a_backward_is_timed_without_its_forward() -> None:
    x, order = torch.ones(3, requires_grad=True), []

    def forward() -> torch.Tensor:
        order.append("forward")
        return x * 2

    def noted(gradient: torch.Tensor) -> None:
        order.append("backward")

    x.register_hook(noted)
    run = timing.prepared(timing.Backward(forward, [x], torch.ones(3)))
    assert order == ["forward"]
    (gradient,) = run()
    assert gradient.tolist() == [2, 2, 2]


def test_what_raises_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise ValueError("no kernel")

    assert list(timing.median_ms({"good": lambda: None, "bad": fails}, "cpu")) == ["good"]
    assert "bad does not run: ValueError: no kernel" in capsys.readouterr().out
    assert list(timing.images_per_second({"good": lambda: None, "bad": fails}, 2, "cpu")) == ["good"]


def test_a_way_is_never_stock_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.lrn((2, 6, 5, 7))
    with pytest.raises(RuntimeError, match="local_response_norm has no kernel for 'auto' on cpu"):
        fused(case, cases.make(case), "auto")
    assert "conv2d_bias_relu by native" in network.runs_ours("native", "cpu")
    monkeypatch.setitem(_backend.KERNELS, "relu_max_pool2d", {})
    assert "relu_max_pool2d by stock" in network.runs_ours("native", "cpu")
    monkeypatch.setattr(network, "preferring", lambda way, device: preferring("stock", device))
    with pytest.raises(AssertionError, match=r"all of .* run stock"):
        network.runs_ours("native", "cpu")


def test_the_time_limit_leaves_a_fair_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: dict[str, Any] = {str(i): lambda: None for i in range(8)}
    (whole,) = correctness.held("lrn", checks, "native", float("inf"))
    assert (whole.ok, whole.detail) == (True, "8 of 8 as float64")
    now = iter(range(100))
    monkeypatch.setattr(correctness.time, "monotonic", lambda: next(now))
    (part,) = correctness.held("lrn", checks, "native", 4)
    assert (part.ok, part.detail) == (True, "5 of 5 as float64; time for 5 of 8")
    (none,) = correctness.held("lrn", checks, "native", -1)
    assert none.ok is False


def test_each_candidate_of_the_convolution_is_held_against_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's place is taken by PyTorch's convolution; a candidate that is wrong in one direction is seen."""
    candidates = importlib.import_module("alexnet_ext.ops.conv2d_bias_relu.candidates")
    case = cases.conv((2, 8, 7, 6), 8, (3, 3), padding=1, groups=2)
    monkeypatch.setitem(_backend.KERNELS["conv2d_bias_relu"]["cpu"], "auto", "conv2d_bias_relu_auto")
    monkeypatch.setattr(correctness, "layers", lambda: [case])
    checks = dict(correctness.candidate_checks(torch.float32, "cpu"))
    names = {name.removeprefix(f"{case.id} channels_last ") for name in checks}
    assert {"triton", "cudnn contiguous", "cudnn channels_last", "cudnn per tower"} <= names
    (finding,) = correctness.held("candidates", checks, "auto", float("inf"))
    assert finding.ok, finding.detail
    gradient = candidates.CuDNNByTower.gradient
    monkeypatch.setattr(candidates.CuDNNByTower, "gradient", lambda *given: gradient(*given) * 1.01)
    *failed, whole = correctness.held("candidates", checks, "auto", float("inf"))
    assert not whole.ok
    assert len(failed) == 2
    assert all(found.name.endswith("cudnn per tower") for found in failed)


# ---- compute-sanitizer, played by a script


TOOL = """#!/bin/sh
for last; do :; done
case "$*" in
  *planted*) echo "========= {seen}"; exit {code};;
  *) echo "ran lrn"; exit {ops};;
esac
"""


@pytest.mark.parametrize(
    ("seen", "code", "ops", "expected"),
    [
        ("Invalid __global__ write of size 4 bytes", 9, 0, [True, True]),
        ("Invalid __global__ write of size 4 bytes", 0, 0, [False, True]),
        ("Program hit cudaErrorNoKernelImageForDevice", 9, 0, [False, True]),
        ("Invalid __global__ write of size 4 bytes", 9, 9, [True, False]),
    ],
    ids=["right", "blind", "another error", "an op is wrong"],
)
def test_a_tool_is_believed_when_it_sees_its_own_planted_bug(
    seen: str, code: int, ops: int, expected: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("compute-sanitizer", TOOL.format(seen=seen, code=code, ops=ops)), ("nvcc", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = [
        finding.ok for part in ("planted memcheck", "triton memcheck") for finding in sanitizers.run(Task("cuda", part))
    ]
    assert found == expected


def test_a_tool_is_found_in_the_toolkit_of_an_nvcc_that_is_a_script(tmp_path: Path) -> None:
    tool, nvcc = tmp_path / "toolkit/bin/some-sanitizer", tmp_path / "nvcc"
    tool.parent.mkdir(parents=True)
    for path, text in ((tool, "#!/bin/sh\n"), (nvcc, f"#!/bin/sh\necho '#$ TOP={tmp_path}/toolkit' >&2\n")):
        path.write_text(text)
        path.chmod(0o755)
    assert sanitizers.tool_of("some-sanitizer", str(nvcc)) == str(tool)
    assert sanitizers.tool_of("no-such-tool", str(nvcc)) is None
    assert sanitizers.tool_of("no-such-tool", None) is None


def test_every_tool_has_a_bug_planted_for_it() -> None:
    source = (Path(stages.__file__).parent / "planted.cu").read_text(encoding="utf-8")
    assert set(re.findall(r'strcmp\(tool, "(\w+)"\)', source)) == set(stages.TOOLS) == set(sanitizers.SEEN)
