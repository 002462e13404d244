"""The command as a process: its time to answer, and the effect of signals and of readers that go away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alexnet_ext import cli
from alexnet_ext.training import checkpoint
from alexnet_ext.training.interrupt import Interrupt, Interrupted
from alexnet_ext.training.log import read_metrics
from alexnet_ext.training.progress import lasting_console
from tests.support import ROOT

COMMAND = [sys.executable, "-m", "alexnet_ext"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TRAIN = ["train", "--data", "synthetic", "--image-size", "67", "--batch-size", "2", "--lr", "0.001"]


def begin(*arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )


def wait_for(steps: int, out: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while (
        sum(line["kind"] == "train" for line in read_metrics(out / "metrics.jsonl")) < steps
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["prepare", "--help"], 0),
        (["summary"], 0),
        (["train", "--speed", "9"], 2),
        (["train", "--lr", "inf"], 2),
        (["prepare", "SRC"], 2),
        (["summary", "--image-size", "9"], 2),
    ],
)
def test_what_needs_no_pytorch_does_not_import_it(arguments: list[str], code: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "alexnet_ext", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert ran.returncode == code
    assert {"typer", "alexnet_ext.cli"} <= imported
    assert {"torch", "numpy"} & imported == set()


@pytest.mark.parametrize("first", ["", "import torch;"])
def test_a_library_registers_its_ops_and_imports_no_compiler(first: str) -> None:
    code = (
        f"{first}import sys, alexnet_ext; assert 'torch._dynamo' not in sys.modules;"
        "import torch; print(torch.ops.alexnet_ext.local_response_norm.default, alexnet_ext.nn.__name__)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=True
    ).stdout
    assert printed == "alexnet_ext.local_response_norm.default alexnet_ext.nn\n"


def test_a_script_of_ones_own_called_alexnet_is_no_command(tmp_path: Path) -> None:
    script = tmp_path / "alexnet"
    for text, torch in (("import alexnet_ext", True), ("from alexnet_ext.cli import main", False)):
        script.write_text(f"import sys\n{text}\nprint('torch' in sys.modules)\n")
        ran = subprocess.run([sys.executable, script], capture_output=True, text=True, env=ENVIRONMENT, check=True)
        assert ran.stdout == f"{torch}\n"


@pytest.mark.parametrize("after", [0.15, 0.5, 1.2])
def test_ctrl_c_at_the_start_is_one_line(tmp_path: Path, after: float) -> None:
    process = begin(*TRAIN, "--out", str(tmp_path / "run"))
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "alexnet: stopped\n")


def test_ctrl_c_within_a_command_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.layers, "render", interrupted)
    assert cli.run_command(["summary"]) == 130
    assert capsys.readouterr().err == "alexnet: stopped\n"


def test_a_second_ctrl_c_ends_at_once_and_a_checkpoint_before_it_stays(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = begin(*TRAIN, "--out", str(out), "--workers", "1", "--save-every", "2", "--batch-size", "64")
    wait_for(3, out, process)
    while not checkpoint.generations(out):  # written while training goes on
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - began < 5
    assert "once more to stop at once" in errors
    assert checkpoint.damage(checkpoint.newest(out, pytest.fail)) is None


def test_a_hang_up_that_nohup_has_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
            os.kill(os.getpid(), signal.SIGUSR2)
            with pytest.raises(Interrupted):
                interrupt.look()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_goes_away_ends_no_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = begin(*TRAIN, "--steps", "6", "--out", str(out), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("AlexNet")
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) == 0
    assert (out / "result.json").exists()


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    lasting_console(quiet=True).print("a line")
    lasting_console().print("another")
    assert capsys.readouterr().out == "another\n"


@pytest.mark.parametrize(("typed", "offered"), [("alexnet ev", "evaluate"), ("alexnet train --recip", "--recipe")])
def test_a_shell_completes_commands_and_options(typed: str, offered: str) -> None:
    asked = {"_ALEXNET_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=ENVIRONMENT | asked)
    assert done.stdout.split() == [offered], done.stderr
