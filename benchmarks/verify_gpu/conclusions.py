"""Conclusions of the findings: the kernels that ``backend="auto"`` may run, their order, the targets met."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..predict import fit

if TYPE_CHECKING:
    from .report import Finding, Outcome

    Table = tuple[str, list[str], list[list[Any]]]

PROOFS = ("correctness", "network", "graphs", "streams", "determinism", "large", "sanitizers")
WAYS = ("native", "triton", "auto")
CONTESTANTS = (*WAYS, "stock", "compiled stock")


def tables(outcomes: Iterable[Outcome], device: str) -> Iterator[Table]:
    """(title, headings, rows) of each conclusion that the findings allow."""
    known = {outcome.stage: outcome for outcome in outcomes}
    findings = [finding for outcome in known.values() for finding in outcome.findings]
    if known.keys() & set(PROOFS):
        yield (
            "ORDER of ops/_backend.py",
            ["unknown", "checks passed", "it"],
            [unproven(way, known) for way in WAYS],
        )
    by_kind = {kind: [f for f in findings if f.about.get("kind") == kind] for kind in ("op", "convolution", "images")}
    if by_kind["op"]:
        headings = ["op", "dtype", "layout", *(f"{name} ms" for name in CONTESTANTS), "order"]
        yield (
            "KERNELS of ops/_backend.py: times of all layers and directions",
            headings,
            preferences(by_kind["op"]),
        )
        headings = ["", "% of floor", "target", "times compiled"]
        yield "Ops that miss a target", headings, missed(by_kind["op"])
        yield from beside_predictions(by_kind["op"], device)
    if by_kind["convolution"]:
        headings = ["", "fastest", "ms", "next", "ms", "fastest stock", "times stock"]
        yield "The convolution: what won", headings, [won(finding) for finding in by_kind["convolution"]]
    if by_kind["images"]:
        headings = ["", "beside stock", "ours", "images/s", "target", "times the best stock"]
        yield "The network", headings, [network(finding) for finding in by_kind["images"]]


def unproven(way: str, known: dict[str, Outcome]) -> list[Any]:
    """One UNKNOWN of ORDER: it may go if every proof was finished and none about it failed."""
    failed, passed, open_proofs = [], 0, []
    for stage in PROOFS:
        outcome = known.get(stage)
        if outcome is None or outcome.verdict == "not reached":
            open_proofs.append(f"{stage} not run")
            continue
        judged = [f for f in outcome.findings if f.about.get("backend") == way and f.ok is not None]
        failed += [f"{stage}: {f.name}" for f in judged if not f.ok]
        passed += sum(bool(f.ok) for f in judged)
        others = [other for other in WAYS if other != way]
        open_proofs += [
            f"{stage}: {part}" for part in outcome.unfinished if not any(other in part.split() for other in others)
        ]
        # The silence of a tool that does not see a planted bug proves nothing.
        failed += [f"{stage}: {f.name}" for f in outcome.findings if f.ok is False and "planted" in f.name]
    if failed:
        says = f"stays: {len(failed)} failed, {'; '.join(failed[:3])}"
    elif open_proofs or not passed:
        says = f"is open: {'; '.join(open_proofs[:5]) or 'nothing was checked'}"
    else:
        says = "may go"
    return [f'("{way}", "cuda")', f"{passed} of {passed + len(failed)}", says]


def preferences(findings: list[Finding]) -> list[list[Any]]:
    """A row an op, dtype and layout, and one for all of an op: sums over the layers that every contestant ran."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        about = finding.about
        groups.setdefault((about["op"], about["dtype"], about["layout"]), []).append(finding)
    rows: dict[str, list[list[Any]]] = {}
    for (op, dtype, layout), members in groups.items():
        rows.setdefault(op, []).append([op, dtype, layout, *sums(members)])
    for op, found in rows.items():
        found.append([f"**{op}**", "all", "all", *sums([f for f in findings if f.about["op"] == op])])
    return [row for found in rows.values() for row in found]


def sums(findings: list[Finding]) -> list[Any]:
    """Each contestant's ms (None if a layer lacks it), and their names, fastest first."""
    totals: dict[str, float | None] = {}
    for name in CONTESTANTS:
        values = [finding.numbers.get(f"{name} ms") for finding in findings]
        totals[name] = None if None in values else sum(values)
    eager = {name: ms for name, ms in totals.items() if ms is not None and name != "compiled stock"}
    return [*totals.values(), ", ".join(sorted(eager, key=eager.__getitem__))]


def missed(findings: list[Finding]) -> list[list[Any]]:
    """Rows of ops that miss their target against a copy, or are slower than compiled stock."""
    rows = []
    for finding in findings:
        rate, target, times = (finding.numbers.get(name) for name in ("% of floor", "target", "times compiled"))
        # Written so that a NaN, which means that it did not run, misses.
        if (target is not None and not rate >= target) or (times is not None and not times > 1):
            rows.append([finding.name, rate, target, times])
    return rows or [["none", None, None, None]]


def beside_predictions(findings: list[Finding], device: str) -> Iterator[Table]:
    """The compiled kernels' times over those of benchmarks.predict, and the constants that fit them."""
    gpu = fit.gpu_of(device)
    if gpu is None:
        return
    measured = [
        fit.Measured(f.name, f.numbers["native ms"], f.numbers["floor ms"], f.numbers["MB"])
        for f in findings
        if f.numbers.get("native ms")
    ]
    compared = fit.compare(measured, gpu)
    headings = ["", "predicted ms", "measured ms", "measured / predicted", "predicted limit", "share of it reached"]
    rows: list[list[Any]] = [[c.name, c.predicted, c.measured, c.ratio, c.limit, c.share] for c in compared]
    yield f"Predicted by benchmarks.predict for {gpu.name}, and measured", headings, rows
    rows = [[name, *values] for name, values in fit.fitted(compared).items()]
    yield "Constants of benchmarks/predict/gpus.py", ["", "assumed", "fits", "kernels"], rows


def won(finding: Finding) -> list[Any]:
    times = {name.removesuffix(" ms"): ms for name, ms in finding.numbers.items() if name.endswith(" ms")}
    ours = sorted((ms, name) for name, ms in times.items() if not name.startswith("stock"))
    (best, name), (second, following) = (*ours, (None, ""))[:2]
    numbers = finding.numbers
    return [finding.name, name, best, following, second, numbers.get("fastest stock"), numbers.get("times stock")]


def network(finding: Finding) -> list[Any]:
    rates = {n.removesuffix(" images/s"): rate for n, rate in finding.numbers.items() if n.endswith(" images/s")}
    ours = {name: rate for name, rate in rates.items() if "stock" not in name}
    best = max(ours, key=ours.__getitem__, default="none runs")
    numbers = finding.numbers
    against = finding.about["against"]
    return [finding.name, against, best, ours.get(best), numbers.get("target"), numbers.get("times stock")]
