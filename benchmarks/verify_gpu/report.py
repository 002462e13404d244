"""Findings and the report, which is rewritten after every part, so that an interrupted run loses nothing."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import conclusions


@dataclass(frozen=True)
class Finding:
    """One result of a stage. ``ok`` is None for a measurement, which cannot fail; ``numbers`` become a table.

    ``about`` has the keys of the conclusions: the backend checked, or the thing measured.
    """

    name: str
    ok: bool | None = True
    detail: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A stage's result: ``verdict`` is passed, failed, crashed, timed out, not applicable or not reached.

    ``unfinished`` names the parts that crashed, timed out or were not reached.
    """

    stage: str
    purpose: str
    verdict: str
    seconds: float
    findings: tuple[Finding, ...] = ()
    output: str = ""
    unfinished: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.verdict in ("passed", "not applicable")


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(entry.replace("|", "\\|").replace("\n", " ") for entry in line) + " |" for line in lines]


def markdown(facts: dict[str, Any], outcomes: list[Outcome]) -> str:
    lines = [f"# {facts['device']}, {facts['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "## Stages", ""]
    stages = []
    for outcome in outcomes:
        judged = [finding for finding in outcome.findings if finding.ok is not None]
        good = sum(bool(finding.ok) for finding in judged)
        stages.append(
            [outcome.stage, outcome.purpose, outcome.verdict, f"{good} of {len(judged)}", f"{outcome.seconds:.0f}"]
        )
    lines += table(["stage", "what it proves", "verdict", "checks passed", "seconds"], stages)
    for title, headings, rows in conclusions.tables(outcomes, facts["device"]):
        lines += ["", f"## {title}", "", *table(headings, [[cell(value) for value in row] for row in rows])]
    for outcome in outcomes:
        lines += details(outcome)
    return "\n".join(lines) + "\n"


def details(outcome: Outcome) -> list[str]:
    failures = [finding for finding in outcome.findings if finding.ok is False]
    notes = [finding for finding in outcome.findings if finding.ok is not False and finding.detail]
    measured: dict[tuple[str, ...], list[Finding]] = {}
    for finding in outcome.findings:
        if finding.numbers:
            measured.setdefault(tuple(finding.numbers), []).append(finding)
    if not (failures or notes or measured or outcome.output or outcome.unfinished):
        return []
    lines = ["", f"## {outcome.stage}", ""]
    lines += [f"- UNFINISHED {part}" for part in outcome.unfinished if part]
    lines += [f"- FAILED {finding.name}: {' '.join(finding.detail.split())[:600]}" for finding in failures]
    lines += [f"- {finding.name}: {finding.detail}" for finding in notes]
    for columns, findings in measured.items():
        rows = [[f.name, *(cell(value) for value in f.numbers.values())] for f in findings]
        lines += ["", *table(["", *columns], rows)]
    if outcome.output and not outcome.ok:
        lines += ["", "```", outcome.output[-3000:], "```"]
    return lines


def write(path: Path, facts: dict[str, Any], outcomes: list[Outcome]) -> None:
    """Write ``path`` (.md) and its .json, each whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {**facts, "stages": [asdict(outcome) for outcome in outcomes]}
    for file, text in ((path, markdown(facts, outcomes)), (path.with_suffix(".json"), json.dumps(data, indent=2))):
        beside = file.with_suffix(f"{file.suffix}.new")
        beside.write_text(text + "\n" * (not text.endswith("\n")), encoding="utf-8")
        beside.replace(file)


def read(path: Path) -> list[Outcome]:
    """Read the outcomes that were written to ``path`` (.md) and its .json; empty without them."""
    try:
        data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []

    def outcome(stage: dict[str, Any]) -> Outcome:
        findings = tuple(Finding(**finding) for finding in stage.pop("findings"))
        return Outcome(**stage | {"unfinished": tuple(stage["unfinished"])}, findings=findings)

    return [outcome(stage) for stage in data["stages"]]
