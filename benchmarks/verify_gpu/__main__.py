"""Runs the stages one after another, each in a process of its own and within its time, and writes the report.

    python -m benchmarks.verify_gpu                    # the GPU, ten minutes
    python -m benchmarks.verify_gpu --device cpu       # what applies without one, at small sizes

The report is benchmarks/results/DEVICE-DATE.md and .json. Exit code 1 when a stage did not pass.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from . import report, stages
from .report import Finding, Outcome

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def circumstances(device: str) -> dict[str, Any]:
    """Asked of a fresh process: this one must not hold the GPU, nor a library that the first stage builds anew."""
    asked = subprocess.run(
        [sys.executable, "-m", "benchmarks.verify_gpu.facts", device], cwd=ROOT, capture_output=True, text=True
    )
    if asked.returncode:
        raise RuntimeError(f"PyTorch does not start: {asked.stderr.strip()[-500:]}")
    return {
        **json.loads(asked.stdout.splitlines()[-1]),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python -m benchmarks.verify_gpu", *sys.argv[1:]]),
    }


def run_stage(stage: stages.Stage, device: str, seconds: float) -> Outcome:
    """The stage's findings come line by line through a file, so that those before a crash or a time limit count."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lines, said = Path(folder, "findings"), Path(folder, "output")
        command = [sys.executable, "-m", "benchmarks.verify_gpu.stages", stage.name, device, str(lines)]
        with said.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code: int | None = process.wait(max(1.0, seconds))
            except subprocess.TimeoutExpired:
                code = None
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
                process.wait()
        found = lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []
        text = said.read_text(encoding="utf-8", errors="replace")
    findings = tuple(Finding(**json.loads(line)) for line in found)
    if code is None:
        verdict = "timed out"
    elif code:
        verdict = "crashed"
    elif not findings:
        verdict = "not applicable"
    else:
        verdict = "failed" if any(finding.ok is False for finding in findings) else "passed"
    return Outcome(stage.name, stage.purpose, verdict, time.monotonic() - start, findings, text)


def main(
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    only: Annotated[list[str] | None, typer.Option("--stage", help="A stage to run (again for more); all.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for all of it.", min=1)] = 570,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = RESULTS,
) -> None:
    """Prove the kernels on a GPU: right, fast, capturable, deterministic; into one report."""
    chosen = [stage for stage in stages.STAGES if not only or stage.name in only]
    if unknown := set(only or ()) - {stage.name for stage in chosen}:
        typer.echo(f"--stage must be of {', '.join(s.name for s in stages.STAGES)}, got {', '.join(unknown)}", err=True)
        raise typer.Exit(2)
    end = time.monotonic() + seconds
    try:
        facts = circumstances(device)
    except RuntimeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    slug = re.sub(r"[^a-z0-9]+", "-", f"verify {facts['device']}".lower()).strip("-")
    path = out / f"{slug}-{facts['date']}.md"
    outcomes: list[Outcome] = []
    for stage in chosen:
        left = end - time.monotonic()
        if left < 5:
            outcomes.append(Outcome(stage.name, stage.purpose, "not reached", 0.0))
        else:
            outcomes.append(run_stage(stage, device, min(left, stage.seconds)))
        report.write(path, facts, outcomes)
        last = outcomes[-1]
        failures = [finding for finding in last.findings if finding.ok is False]
        typer.echo(f"{last.stage}: {last.verdict}, {len(last.findings)} findings, {last.seconds:.0f} s")
        for finding in failures[:5]:
            typer.echo(f"  FAILED {finding.name}: {' '.join(finding.detail.split())[:300]}")
        if last.verdict in ("crashed", "timed out"):
            typer.echo("  " + "\n  ".join(last.output.splitlines()[-8:]))
    typer.echo(f"written to {path} and {path.with_suffix('.json').name}")
    raise typer.Exit(0 if all(outcome.ok for outcome in outcomes) else 1)


if __name__ == "__main__":
    typer.run(main)
