"""The GPU verification, driven without a GPU: what a stage finds is kept, whatever ends it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.verify_gpu import __main__ as verify
from benchmarks.verify_gpu import report, stages
from benchmarks.verify_gpu.common import attempt, preferring
from benchmarks.verify_gpu.report import Finding, Outcome

ROOT = Path(__file__).parents[1]


def test_every_stage_is_a_module_and_every_module_a_stage() -> None:
    modules = {path.stem for path in Path(stages.__file__).parent.glob("*.py")} - {"__init__", "__main__"}
    assert {stage.name for stage in stages.STAGES} == modules


@pytest.mark.parametrize("name", ["graphs", "streams", "large", "sanitizers"])
def test_stages_that_need_a_gpu_find_nothing_on_a_cpu(name: str) -> None:
    stage = next(stage for stage in stages.STAGES if stage.name == name)
    assert list(stage.run("cpu")) == []


def test_a_check_that_raises_is_a_failed_finding() -> None:
    assert attempt("good", lambda: "seen") == Finding("good", True, "seen")
    assert attempt("bad", lambda: 1 / 0) == Finding("bad", False, "ZeroDivisionError: division by zero")


def test_preferring_changes_what_auto_runs_and_is_undone() -> None:
    from alexnet_ext.ops import _backend

    before = _backend.preferred("local_response_norm", "cpu")
    with preferring("stock", "cpu"):
        assert _backend.preferred("local_response_norm", "cpu") == "stock"
    assert _backend.preferred("local_response_norm", "cpu") == before


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run_stage(stage: stages.Stage, device: str, seconds: float) -> Outcome:
        seen.append(len(json.loads(next(tmp_path.glob("*.json")).read_text())["stages"]) if seen else 0)
        verdict = "failed" if stage.name == "streams" else "passed"
        return Outcome(stage.name, stage.purpose, verdict, 0.1, (Finding("x", verdict == "passed"),))

    monkeypatch.setattr(verify, "run_stage", run_stage)
    monkeypatch.setattr(verify, "circumstances", lambda device: {"device": "My GPU (x)", "date": "2026-01-01"})
    app = verify.typer.Typer()
    app.command()(verify.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "FAILED x" in result.output
    assert seen == list(range(len(stages.STAGES)))
    assert (tmp_path / "verify-my-gpu-x-2026-01-01.md").exists()
    assert CliRunner().invoke(app, ["--stage", "build", "--out", str(tmp_path)]).exit_code == 0
    unknown = CliRunner().invoke(app, ["--stage", "nonsense", "--out", str(tmp_path)])
    assert unknown.exit_code == 2
    assert "--stage must be of build, correctness" in unknown.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    app = verify.typer.Typer()
    app.command()(verify.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "no CUDA device is available: --device cpu runs what applies without one" in result.output
    assert list(tmp_path.iterdir()) == []
