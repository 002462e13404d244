"""Runs the stages one after another, each in processes of its own and within its time, and writes the report.

    python -m benchmarks.verify_gpu                    # the GPU, ten minutes
    python -m benchmarks.verify_gpu --stage images --stage sanitizers --stage prove --stage compiled    # the rest
    python -m benchmarks.verify_gpu --device cpu       # the stages that apply to a CPU, at small sizes

The second needs the build that the first leaves, and adds its stages to the first one's report,
benchmarks/results/verify-DEVICE-DATE.md and .json. Exit code 1 if a stage did not pass. Needs the packages of the
build, and pytest, which tests/support/cases.py imports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from . import report, stages
from .report import Finding, Outcome

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
KEPT = 20_000
"""Characters kept of a part's output: its end."""
VERDICTS = ("not applicable", "passed", "not reached", "failed", "timed out", "crashed")
"""From the best to the worst: a stage is as good as its worst part."""


class Part(NamedTuple):
    verdict: str
    findings: tuple[Finding, ...] = ()
    output: str = ""


def circumstances(device: str) -> dict[str, Any]:
    """Facts from a fresh process: this one must not hold the GPU, nor a library that the first stage rebuilds."""
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


def run_part(stage: stages.Stage, part: str, device: str, seconds: float, threads: int | None) -> Part:
    """Run one part. Findings come line by line through a file, so those before a crash or a time limit count."""
    with tempfile.TemporaryDirectory() as folder:
        lines, said = Path(folder, "findings"), Path(folder, "output")
        command = [sys.executable, "-m", "benchmarks.verify_gpu.stages", stage.name, part, device, str(seconds)]
        environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with said.open("wb") as output:
            process = subprocess.Popen(
                [*command, str(lines)],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            except BaseException:  # interrupted: leave no process on the GPU
                os.killpg(process.pid, signal.SIGKILL)
                raise
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)  # and all that it has started
                process.wait()
        found = lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []
        text = said.read_text(encoding="utf-8", errors="replace")[-KEPT:]
    findings = tuple(Finding(**json.loads(line)) for line in found)
    if code is None:
        verdict = "timed out"
    elif code:
        verdict = "crashed"
    elif not findings:
        verdict = "not applicable"
    else:
        verdict = "failed" if any(finding.ok is False for finding in findings) else "passed"
    return Part(verdict, findings, text)


def run_stage(
    stage: stages.Stage, device: str, seconds: float, tell: Callable[[Outcome], None] = lambda outcome: None
) -> Outcome:
    """Run all parts within ``seconds``; ``tell`` gets the outcome so far each time a part has ended."""
    start = time.monotonic()
    parts = stage.parts if device == "cuda" else ("",)
    cores = os.cpu_count() or 1
    workers = min(len(parts), cores) if stage.parallel else 1
    threads = max(1, cores // workers) if workers > 1 else None
    done: dict[str, Part] = {}

    def one(part: str) -> Part:
        """The remaining parts share the remaining time evenly."""
        left = start + seconds - time.monotonic()
        share = left * workers / (len(parts) - len(done)) if stage.parallel else left
        return run_part(stage, part, device, min(left, share), threads) if left >= 1 else Part("not reached")

    def outcome() -> Outcome:
        known = {part: done[part] for part in parts if part in done}
        verdict = max((found.verdict for found in known.values()), key=VERDICTS.index)
        broken = {part: found for part, found in known.items() if found.verdict in VERDICTS[2:]}
        output = "\n".join(f"{part}\n{found.output}".strip() for part, found in broken.items() if found.output)
        unfinished = tuple(
            f"{part} {found.verdict}".strip() for part, found in broken.items() if found.verdict != "failed"
        )
        unfinished += tuple(f"{part} not reached" for part in parts if part not in done)
        findings = tuple(finding for found in known.values() for finding in found.findings)
        return Outcome(stage.name, stage.purpose, verdict, time.monotonic() - start, findings, output, unfinished)

    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(one, part): part for part in parts}
        for future in as_completed(running):
            done[running[future]] = future.result()
            tell(outcome())
    return outcome()


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    names = [stage.name for stage in stages.STAGES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify_gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stage", action="append", choices=names, help="a stage to run (again for more); all")
    parser.add_argument("--seconds", type=float, default=570, help="time for all of it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Prove the kernels on a GPU: correct, fast, capturable, deterministic. Writes one report."""
    asked = arguments(given)
    end = time.monotonic() + asked.seconds
    try:
        facts = circumstances(asked.device)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    slug = re.sub(r"[^a-z0-9]+", "-", f"verify {facts['device']}".lower()).strip("-")
    path = asked.out / f"{slug}-{facts['date']}.md"
    chosen = [stage for stage in stages.STAGES if not asked.stage or stage.name in asked.stage]
    known = {outcome.stage: outcome for outcome in report.read(path)} if asked.stage else {}

    def tell(outcome: Outcome) -> None:
        known[outcome.stage] = outcome
        report.write(path, facts, [known[stage.name] for stage in stages.STAGES if stage.name in known])

    for stage in chosen:
        left = end - time.monotonic()
        if left < 5:
            last = Outcome(stage.name, stage.purpose, "not reached", 0.0)
        else:
            last = run_stage(stage, asked.device, min(left, stage.seconds), tell)
        tell(last)
        print(f"{last.stage}: {last.verdict}, {len(last.findings)} findings, {last.seconds:.0f} s", flush=True)
        for finding in [finding for finding in last.findings if finding.ok is False][:5]:
            print(f"  FAILED {finding.name}: {' '.join(finding.detail.split())[:300]}")
        if last.verdict in ("crashed", "timed out"):
            print("  " + "\n  ".join([", ".join(last.unfinished)[:1000], *last.output.splitlines()[-8:]]))
    print(f"written to {path} and {path.with_suffix('.json').name}")
    return 0 if all(known[stage.name].ok for stage in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
