"""The command line and a GPU's kernels, which the CPU plays: proven before use, forgotten, exported and imported."""

from __future__ import annotations

import errno
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console

from alexnet_ext import cli
from alexnet_ext.ops import _known
from alexnet_ext.ops._backend import OPS
from alexnet_ext.ops._known import Proof, Race, Unit
from alexnet_ext.selfcheck import prove, prover, tables
from alexnet_ext.selfcheck.races import TunedRow
from alexnet_ext.training.proving import prove_kernels
from tests.cli.test_cli import SMALL, fails, images

__all__ = ["images"]  # a fixture

CPU = torch.device("cpu")


@pytest.fixture
def quick_proofs(as_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    """The CPU plays a GPU on which all is right; the units that were examined. Nothing is raced."""
    examined: list[Unit] = []

    def examine(units: list[Unit], *_: object) -> dict[Unit, Proof]:
        examined.extend(units)
        return {unit: Proof("proven") for unit in units}

    monkeypatch.setattr(prover, "examine", examine)
    monkeypatch.setattr(prove, "race_calls", lambda *_: iter(()))
    return examined


def test_train_and_evaluate_prove_the_kernels_first(
    tmp_path: Path, quick_proofs: list[Unit], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the dtype of the run, once; then they use them."""
    out = str(tmp_path / "run")
    options = [str(images), *SMALL, "--steps", "1", "--device", "cpu", "--out", out]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as that of a first call would be
        assert cli.run_command(["train", *options]) == 0
    outcome = rf"  proved {len(OPS)} ops on cpu in \d+ s: {len(OPS)} right, 0 faster than PyTorch\n"
    assert len(re.findall(outcome, capsys.readouterr().out)) == 1
    assert {unit.dtype for unit in quick_proofs} == {"float32"}
    assert {unit.op for unit in quick_proofs} == set(OPS)
    count = len(quick_proofs)
    evaluate = ["evaluate", "--weights", out, "--device", "cpu"]
    assert cli.run_command(evaluate) == 0
    assert len(re.findall(outcome, capsys.readouterr().out)) == 1
    assert len(quick_proofs) == count, "what is known is not examined again"
    assert cli.run_command([*evaluate, "--stock"]) == 0
    assert "proved" not in capsys.readouterr().out
    assert cli.run_command([*evaluate, "--precision", "bf16"]) == 0
    assert len(re.findall(outcome, capsys.readouterr().out)) == 1
    assert {unit.dtype for unit in quick_proofs[count:]} == {"bfloat16"}


def test_train_and_evaluate_go_on_where_nothing_can_be_proven(
    tmp_path: Path,
    quick_proofs: list[Unit],
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a line, and no warning besides."""
    out = str(tmp_path / "run")
    train = ["train", str(images), *SMALL, "--steps", "1", "--device", "cpu", "--out", out]
    evaluate = ["evaluate", "--weights", out, "--device", "cpu"]
    for command, error in (
        (train, OSError(errno.ENOMEM, "Cannot allocate memory")),
        (evaluate, RuntimeError("rank 1 could not\nand more")),
    ):

        def examine(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(prover, "examine", examine)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cli.run_command(command) == 0
        first = str(error).splitlines()[0]
        said = f"  the layers run on stock PyTorch, as the kernels could not be proven: {first}\n"
        assert capsys.readouterr().out.count(said) == 1
    assert (tmp_path / "run" / "result.json").exists()
    assert _known.files() == []


def test_what_the_authors_have_proven_needs_no_proof(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prove, "prove", pytest.fail)
    prove_kernels(torch.nn.ReLU(), (2, 3, 9, 9), torch.float32, CPU, Console())
    assert capsys.readouterr().out == ""


TUNE = ["tune", "--device", "cpu", *SMALL]


def test_tune_proves_races_and_says_where_it_is_kept(
    quick_proofs: list[Unit], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def race_calls(_calls: object, _where: object, _end: float, again: bool) -> list[TunedRow]:
        asked.append(again)
        return [TunedRow("conv1", "conv2d_bias_relu", "forward", "native", {"stock": 20.4, "native": 10.2})]

    monkeypatch.setattr(prove, "race_calls", race_calls)
    assert cli.run_command(TUNE) == 0
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if "conv1" in line]
    assert [part.strip() for part in row.split("│")[1:-1]] == ["conv1", "forward", "native", "native 10, stock 20"]
    assert f"proved {len(OPS)} ops on cpu in 0 s: {len(OPS)} right, 0 faster than PyTorch" in printed
    assert f"Kept in {_known.on(CPU).path}" in printed.replace("\n", "")
    assert {unit.dtype for unit in quick_proofs} == {"bfloat16", "float32"}, "gradients of fp32 parameters too"
    assert asked == [True], "tune races again"


def test_tune_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cpu: kernels are proven and raced on a GPU" in fails(capsys, 1, "tune", "--device", "cpu")


def test_tune_forgets(as_gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _known.on(CPU).add(races={"call": Race("native", {})})
    (as_gpu / "broken.json").write_text("{")
    for count in (2, 0):
        assert cli.run_command(["tune", "--forget"]) == 0
        assert capsys.readouterr().out == f"removed {count} files of {as_gpu}\n"
        assert list(as_gpu.glob("*.json")) == []
    assert _known.on(CPU).races == {}


@pytest.mark.parametrize("second", [["--export", "b"], ["--import", "c"]])
def test_tune_does_one_thing_at_a_time(second: list[str], as_gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _known.on(CPU).add(races={"call": Race("native", {})})
    for options in (["--forget", *second], ["--export", "b", "--import", "c"]):
        said = fails(capsys, 2, "tune", *options)
        assert said == "alexnet: --forget, --export and --import: give one of them"
    assert len(_known.files()) == 1


UNIT = Unit("relu_max_pool2d", "native", "bfloat16", "channels_last")


@pytest.fixture
def exported(tmp_path: Path, quick_proofs: list[Unit], capsys: pytest.CaptureFixture[str]) -> Path:
    """What another machine of this kind has proven and raced; here nothing is known yet."""
    _known.on(CPU).add({str(UNIT): Proof("proven")}, {"call": Race("native", {"stock": 2.0, "native": 1.0}, 1e9)})
    file = tmp_path / "exported.json"
    assert cli.run_command(["tune", "--export", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert quick_proofs == [], "exporting proves nothing"
    _known.forget()
    return file


def test_imported_choices_hold_and_kernels_are_proven_again(
    exported: Path, quick_proofs: list[Unit], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(prove, "race_calls", lambda *given: asked.append(given[-1]) or iter(()))
    assert cli.run_command([*TUNE, "--import", str(exported)]) == 0
    assert capsys.readouterr().out.startswith(f"1 choices taken from {exported}\n")
    assert UNIT in quick_proofs, "another machine's proof does not count"
    assert asked == [False], "what was raced there is not raced here"
    _known.reopen()
    assert _known.on(CPU).races["call"] == Race("native", {"stock": 2.0, "native": 1.0}, 1e9)


def test_an_import_alone_proves_nothing(exported: Path) -> None:
    assert tables.import_races(exported, CPU) == 1
    assert _known.on(CPU).proofs == {}


@pytest.mark.parametrize(
    "name",
    [
        "device",
        "capability",
        "multiprocessors",
        "alexnet_ext",
        "torch",
        "cudnn",
        "deterministic",
        "matmul",
        "convolution",
    ],
)
def test_choices_of_another_gpu_version_or_setting_are_not_taken(name: str, exported: Path) -> None:
    held = json.loads(exported.read_text())
    held[0]["identity"][name] = "another"
    exported.write_text(json.dumps(held))
    assert tables.import_races(exported, CPU) == 0
    assert _known.on(CPU).races == {}


@pytest.mark.parametrize("name", ["driver", "library", "sources"])
def test_choices_of_another_driver_or_build_are_taken(name: str, exported: Path) -> None:
    """They are times; whether a kernel is right is found out here."""
    held = json.loads(exported.read_text())
    held[0]["identity"][name] = "another"
    exported.write_text(json.dumps(held))
    assert tables.import_races(exported, CPU) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe", "codec can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"{}", "not a file of `alexnet tune --export`"),
        (b"[1]", "not a file of `alexnet tune --export`"),
        (None, "No such file"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("quick_proofs")
def test_an_import_of_another_file_is_one_line(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "given"
    if content is not None:
        file.write_bytes(content)
    line = fails(capsys, 1, *TUNE, "--import", file)
    assert line.startswith(f"alexnet: {file}: ")
    assert said in line
    assert _known.files() == []


def test_an_import_passes_over_entries_of_another_form(exported: Path) -> None:
    held = json.loads(exported.read_text())
    for races in (3, {"call": 3}, {"call": {"choice": "native", "microseconds": {"native": "fast"}}}):
        exported.write_text(json.dumps([{}, {"identity": 3}, held[0] | {"races": races}]))
        assert tables.import_races(exported, CPU) == 0


@pytest.mark.usefixtures("as_gpu")
def test_an_export_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "below", tmp_path):
        assert fails(capsys, 1, "tune", "--export", out).startswith(f"alexnet: {out}")
