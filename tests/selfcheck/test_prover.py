"""The process that proves kernels: whatever becomes of it, one kernel is refused at most, and no process is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import alexnet_ext as ax
from alexnet_ext.ops import _backend, _known
from alexnet_ext.ops._known import Unit
from alexnet_ext.selfcheck import prover
from alexnet_ext.selfcheck.prove import prove_units
from tests.support import ROOT

pytestmark = pytest.mark.usefixtures("cpu_as_gpu")
CPU = torch.device("cpu")
UNITS = [Unit(op, "native", "float32", "contiguous") for op in ("first", "second", "third")]
Speaks = Callable[..., None]
Started = list[subprocess.Popen[bytes]]


def examined(seconds: float = 60.0, tell: prover.Tell = lambda *_: None) -> tuple[list[str], list[str]]:
    """What comes of the three units: states, reasons."""
    found = prover.examine(UNITS, CPU, seconds, tell)
    assert list(found) == UNITS
    return [proof.state for proof in found.values()], [proof.reason for proof in found.values()]


SCRIPT = """
import json, os, signal, subprocess, sys, time

task = json.loads(sys.stdin.readline())


def answer(**said):
    print(json.dumps(said), flush=True)


def outcome(state="proven", reason="", usable=True):
    answer(state=state, reason=reason, seconds=0.0, usable=usable)


{before}
answer(ready=True)
for op, *_ in task["units"]:
    if op == "second":
        {at_second}
    outcome()
"""


@pytest.fixture
def speaks(monkeypatch: pytest.MonkeyPatch) -> Speaks:
    """``speaks(at_second=..., before=...)``: a small program takes the place of the one that proves kernels.

    It finds all kernels right. It runs these statements at the second unit, and before it is ready.
    """

    def program(at_second: str = "pass", before: str = "") -> None:
        source = SCRIPT.format(before=before, at_second=at_second)
        monkeypatch.setattr(prover, "command", lambda: [sys.executable, "-I", "-c", source])

    return program


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """The processes that are started in the test."""
    found: Started = []
    start = subprocess.Popen

    def noted(*given: object, **more: object) -> subprocess.Popen[bytes]:
        found.append(start(*given, **more))  # type: ignore[call-overload]
        return found[-1]

    monkeypatch.setattr(prover.subprocess, "Popen", noted)
    return found


def is_running(process: int) -> bool:
    """A process that has ended and that nobody has asked for is not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(process: int) -> bool:
    """Whether it ends within some seconds."""
    end = time.monotonic() + 20
    while is_running(process) and time.monotonic() < end:
        time.sleep(0.01)
    return not is_running(process)


DEATHS = {
    "os.kill(os.getpid(), signal.SIGSEGV)": "its process died of SIGSEGV",
    "os._exit(3)": "its process ended with code 3",
    "os._exit(0)": "its process ended with code 0",
    r"sys.exit('loading\nthe driver says no\n')": "its process ended with code 1: the driver says no",
}


@pytest.mark.parametrize("at_second", DEATHS)
def test_a_kernel_that_ends_the_process_is_refused_alone(at_second: str, speaks: Speaks, started: Started) -> None:
    speaks(at_second)
    assert examined() == (["proven", "refused", "proven"], ["", DEATHS[at_second], ""])
    assert len(started) == 2, "another process for the rest"


def test_a_kernel_that_hangs_is_refused_alone(
    speaks: Speaks, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaks("time.sleep(1000)")

    def tell(done: int, of: int, unit: Unit) -> None:
        monkeypatch.setattr(prover, "CASE_SECONDS", 1.0 if unit == UNITS[1] else 30.0)

    assert examined(tell=tell) == (["proven", "refused", "proven"], ["", "a case did not end within 1 s", ""])
    assert [ends(process.pid) for process in started] == [True, True]


def test_a_process_that_stops_to_answer_is_not_waited_for(
    speaks: Speaks, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that the driver of a GPU keeps while it ends."""
    monkeypatch.setattr(prover, "END_SECONDS", 0.5)
    speaks("os.close(1); time.sleep(1000)")
    reason = "its process answers no more"
    assert examined() == (["proven", "refused", "proven"], ["", reason, ""])
    assert ends(started[0].pid)


def test_a_device_that_is_spoiled_gets_another_process(speaks: Speaks, started: Started) -> None:
    speaks("outcome('refused', 'an illegal access', usable=False); break")
    assert examined() == (["proven", "refused", "proven"], ["", "an illegal access", ""])
    assert len(started) == 2


def test_words_that_are_no_answer_are_passed_over(speaks: Speaks) -> None:
    """As a start-up file of this Python may print some."""
    speaks(before="print('welcome', flush=True)")
    assert examined()[0] == ["proven"] * 3


NOT_STARTED = {
    "sys.exit('no library')": "did not start: its process ended with code 1: no library",
    "os.kill(os.getpid(), signal.SIGKILL)": "did not start: its process died of SIGKILL",
    "time.sleep(1000)": "did not start within 1 s",
    "answer(ready=False); time.sleep(1000)": "cannot use this device",
}


@pytest.mark.parametrize("before", NOT_STARTED)
def test_a_process_that_does_not_start_refuses_nothing(
    before: str, speaks: Speaks, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaks(before=before)
    if "within" in NOT_STARTED[before]:
        monkeypatch.setattr(prover, "START_SECONDS", 1.0)
    reason = f"the process that proves kernels {NOT_STARTED[before]}"
    assert examined() == (["unknown"] * 3, [reason] * 3)
    (process,) = started
    assert ends(process.pid)


def test_a_process_that_dies_before_it_has_its_task_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prover, "command", lambda: [sys.executable, "-I", "-c", "exit('no library')"])
    start = subprocess.Popen

    def ended(*given: object, **more: object) -> subprocess.Popen[bytes]:
        process = start(*given, **more)  # type: ignore[call-overload]
        process.wait()
        return process

    monkeypatch.setattr(prover.subprocess, "Popen", ended)
    reason = "the process that proves kernels did not start: its process ended with code 1: no library"
    assert examined() == (["unknown"] * 3, [reason] * 3)


def test_a_command_that_is_not_there_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prover, "command", lambda: ["/nowhere/python"])
    reason = "no process can be started to prove kernels: No such file or directory"
    assert examined() == (["unknown"] * 3, [reason] * 3)


def test_what_there_is_no_time_for_stays_unknown(speaks: Speaks, started: Started) -> None:
    reason = "there was no time for it within 2 s"
    speaks("time.sleep(1000)")
    assert examined(2.0) == (["proven", "unknown", "unknown"], ["", reason, reason])
    assert examined(0.0)[0] == ["unknown"] * 3
    assert len(started) == 1
    assert ends(started[0].pid)


def test_an_interrupted_proof_leaves_no_process(speaks: Speaks, started: Started, tmp_path: Path) -> None:
    """Nor the compilers that it has started."""
    note = tmp_path / "compiler"
    sleep = "subprocess.Popen([sys.executable, '-I', '-c', 'import time; time.sleep(1000)'])"
    speaks(before=f"open({str(note)!r}, 'w').write(str({sleep}.pid))", at_second="time.sleep(1000)")

    def tell(done: int, of: int, unit: Unit) -> None:
        if done == 1:
            assert is_running(int(note.read_text()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examined(tell=tell)
    assert started[0].returncode == -signal.SIGKILL
    assert ends(int(note.read_text()))


def planted(monkeypatch: pytest.MonkeyPatch, *faults: str) -> None:
    """The process that proves kernels is a true one, in which these kernels have faults."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setattr(prover, "command", lambda: [sys.executable, "-m", "tests.selfcheck.planted", *faults])


def test_kernels_that_crash_hang_or_spoil_the_device(monkeypatch: pytest.MonkeyPatch, started: Started) -> None:
    """In one run, in processes that are what a user has."""
    planted(
        monkeypatch,
        "local_response_norm=crashes",
        "relu_max_pool2d=hangs",
        "relu_max_pool2d_lrn=spoils_the_device",
    )
    reasons = {
        "local_response_norm": "its process died of SIGSEGV",
        "relu_max_pool2d": "a case did not end within 1 s",
        "relu_max_pool2d_lrn": "the device does not compute any more after it",
    }
    units = [Unit(op, "native", "float32", "contiguous") for op in (*reasons, "linear_bias_relu")]

    def tell(line: str) -> None:
        monkeypatch.setattr(prover, "CASE_SECONDS", 1.0 if ", relu_max_pool2d |" in line else 60.0)
        assert re.fullmatch(r"proving kernels on cpu: \d of 4, \w+ \| native \| float32 \| contiguous", line)

    found = prove_units(units, CPU, 300, tell)
    assert {unit.op: proof.reason for unit, proof in found.items() if proof.state == "refused"} == reasons
    assert found[units[3]].state == "proven"
    assert len(started) == 4
    assert all(ends(process.pid) for process in started)
    _known.reopen()
    for unit in units:
        decision = _backend.decide(unit.op, CPU)
        if unit.op in reasons:
            assert (decision.backend, "refused on this device" in decision.reason) == ("stock", True)
            assert f": {unit}: {reasons[unit.op]}" in str(ax.info())
        else:
            assert decision.backend == "native"


def test_the_process_ends_with_the_one_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """However that ends, its end of the pipe closes."""
    planted(monkeypatch, "relu_max_pool2d=hangs")
    process = subprocess.Popen(prover.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        unit = Unit("relu_max_pool2d", "native", "float32", "contiguous")
        task = {"device": "cpu", "settings": _known.settings(), "units": [unit]}
        process.stdin.write(f"{json.dumps(task)}\n".encode())
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"ready": True}
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(60) == 1
        assert b"state" not in process.stdout.read(), "no unit has ended"
    finally:
        process.kill()
        process.wait()
