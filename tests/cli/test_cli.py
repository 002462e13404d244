"""The command line: the result of each command; one line and an exit code for each error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from alexnet_ext import cli, models
from alexnet_ext.data import Digits, Synthetic
from alexnet_ext.data.folder import imagenet_preprocessing
from alexnet_ext.selfcheck import compare
from alexnet_ext.selfcheck.info import info
from alexnet_ext.training import checkpoint
from alexnet_ext.training.log import read_metrics
from tests.support import ROOT

SMALL = ["--image-size", "67", "--batch-size", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on digits; tests that damage it work on a copy."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert cli.run_command(["train", *SMALL, "--steps", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten classes, named as digits are, of two images each."""
    for number in range(20):
        path = tmp_path / "images" / str(number % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 40), (number * 12, 255 - number * 12, 90)).save(path)
    return tmp_path / "images"


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str | Path) -> str:
    """Run a command that must fail with ``code`` and one line on stderr. Returns the line."""
    capsys.readouterr()
    assert cli.run_command([str(argument) for argument in arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("alexnet: ")
    return lines[0]


def test_a_run_folder_is_complete(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    expected = {"recipe.json", "result.json", "metrics.jsonl", "curves.png", "conv1.png", "guesses.png", "samples"}
    assert expected <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"{digit}.png" for digit in range(10)]
    for name in ("curves.png", "conv1.png", "guesses.png"):
        with Image.open(run / name) as image:
            assert image.width > 500
    result = json.loads((run / "result.json").read_text())
    assert (result["images"], result["steps"]) == (1000, 2)
    assert json.loads((run / "recipe.json").read_text())["init"] == "kaiming"
    description, weights = checkpoint.read_weights(checkpoint.find_weights(run, pytest.fail))
    assert (description.data, description.config.variant, description.step) == ("digits", "paper", 2)
    assert weights["classifier.fc8.weight"].shape == (10, 4096)


def test_train_says_how_well_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.run_command(["train", "--data", "synthetic", *SMALL, "--steps", "1", "--stock", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    right = json.loads((out / "result.json").read_text())["right"]
    assert f"of the 200 held-out images right ({right};" in printed
    assert "stock layers" in printed
    assert "after 1 step, " in printed


def test_train_on_a_folder_with_a_broken_image(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    shutil.copytree(images, root / "val")
    images.rename(root / "train")
    broken = root / "train" / "3" / "13.png"
    os.truncate(broken, 50)
    arguments = ["train", str(root), *SMALL, "--steps", "12", "--lr", "0.001", "--out", str(tmp_path / "run")]
    assert cli.run_command(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"skipped {broken}: ") == 1
    assert "1 of 20 training images were unreadable and left out" in printed
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped"] == 1
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["init"] == "kaiming"
    assert cli.run_command(["evaluate", "--weights", str(tmp_path / "run")]) == 0
    assert "on 20 images" in capsys.readouterr().out


def test_evaluate_counts_the_held_out_digits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(["evaluate", "--weights", str(run)]) == 0
    printed = capsys.readouterr().out
    expected = json.loads((run / "result.json").read_text())
    assert f"top-1 {expected['top1']:.2%}, top-5 {expected['top5']:.2%}" in printed
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    assert sum(int(row[1]) for row in rows) == expected["right"]
    assert sum(int(row[2]) for row in rows) == 1000


def test_evaluate_a_folder(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = images / "0" / "0.png"
    broken.write_text("text")
    assert cli.run_command(["evaluate", "--weights", str(run), str(images), "--stock"]) == 0
    captured = capsys.readouterr()
    assert "on 19 images" in captured.out
    assert f"skipped {broken}: not an image" in captured.err
    (images / "zebra").mkdir()
    assert "zebra: not one of the 10 classes" in fails(capsys, 2, "evaluate", "--weights", run, images)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of two classes that record no data, as `alexnet export` writes them."""
    path = tmp_path_factory.mktemp("bare") / "net.safetensors"
    model = models.alexnet("paper", num_classes=2, image_size=67, init="kaiming")
    checkpoint.write_weights(
        path, model, checkpoint.Description(model.config, ("[red]y", "z"), imagenet_preprocessing(67), "", 0)
    )
    return path


def test_names_are_printed_letter_by_letter(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names may look like rich's markup."""
    (tmp_path / "images" / "[red]y").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "[red]y" / "a.png")
    assert cli.run_command(["evaluate", "--weights", str(bare), str(tmp_path / "images")]) == 0
    assert "│ [red]y │" in capsys.readouterr().out
    assert "these weights name no data of their own" in fails(capsys, 2, "evaluate", "--weights", bare)
    out = tmp_path / "a[" / "b].safetensors"
    assert cli.run_command(["export", "--format", "safetensors", "--weights", str(bare), "--out", str(out)]) == 0
    assert f"{out}: " in capsys.readouterr().out


def test_predict_shows_and_saves_five_guesses(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sample = run / "samples" / "7.png"
    assert cli.run_command(["predict", str(sample), "--weights", str(run)]) == 0
    printed = capsys.readouterr().out.splitlines()
    guesses = [line.split() for line in printed[:5]]
    shares = [float(guess[1].rstrip("%")) for guess in guesses]
    assert shares == sorted(shares, reverse=True)
    assert 50 < sum(shares) <= 100.2
    assert all(len(guess[2]) == round(share * 0.4) for guess, share in zip(guesses, shares, strict=True) if share > 2)
    with Image.open("predictions/7.png") as picture:
        assert picture.width > 500
    with Image.open(sample) as digit:
        ImageOps.invert(digit).save("dark.png")
    assert cli.run_command(["predict", "dark.png", "--weights", str(run), "--out", "deep/er/p.png"]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == printed[:5], "dark on light reads like light on dark"
    assert Path("deep/er/p.png").exists()


def test_what_is_read_is_not_written_over(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image, before = Path("predictions") / "a.png", bare.read_bytes()
    image.parent.mkdir()
    Image.new("RGB", (9, 9)).save(image)
    export = ["export", "--format", "onnx", "--weights", bare, "--out"]
    assert f"--out {image}: is what would be read" in fails(capsys, 2, "predict", image, "--weights", bare)
    assert f"--out {bare}: is what would be read" in fails(capsys, 2, *export, bare)
    assert ".: is a folder" in fails(capsys, 2, "predict", image, "--weights", bare, "--out", ".")
    assert f"{tmp_path}: is a folder" in fails(capsys, 2, *export, tmp_path)
    with Image.open(image) as unchanged:
        assert unchanged.size == (9, 9)
    assert bare.read_bytes() == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "predictions"]


@pytest.mark.parametrize("kind", ["missing", "text", "half", "empty"])
def test_predict_names_a_bad_image(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = tmp_path / "image.jpg"
    if kind == "text":
        path.write_text("no image")
    elif kind != "missing":
        Image.effect_noise((90, 90), 50).save(path)
        os.truncate(path, 0 if kind == "empty" else path.stat().st_size // 2)
    out = tmp_path / "p.png"
    assert str(path) in fails(capsys, 1, "predict", path, "--weights", run, "--out", out)
    assert not out.exists()


def test_summary_prints_the_published_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "device_of", lambda _: torch.device("cuda"))
    assert cli.run_command(["summary"]) == 0
    printed = capsys.readouterr().out
    assert "60,965,224" in printed
    assert "724,406,816" in printed
    assert cli.run_command(["summary", "--model", "torchvision", "--classes", "10"]) == 0
    parameters = sum(p.numel() for p in models.alexnet("torchvision", num_classes=10, init="torch").parameters())
    assert f"{parameters:,}" in capsys.readouterr().out
    for command in ("summary", "tune"):
        assert "image_size=20" in fails(capsys, 2, command, "--image-size", "20")


def test_info_prints_what_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(["info"]) == 0
    assert capsys.readouterr().out == f"{info()}\n"


def test_check_compares_and_its_exit_code_tells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = compare.CheckRow("lrn", "fp32", "contiguous", "native", "y", 1e-7, 1e-7, 1e-6, True)
    asked: list[object] = []

    def check(device: object, **chosen: object) -> list[compare.CheckRow]:
        asked.append(chosen)
        return [row]

    monkeypatch.setattr(compare, "check", check)
    assert cli.run_command(["check", "--only", "relu_max_pool2d", "--only", "paper"]) == 0
    assert asked == [{"op_names": ["relu_max_pool2d"], "variants": ["paper"]}]
    assert "lrn" in capsys.readouterr().out
    monkeypatch.setattr(compare, "check", lambda *_, **__: [compare.CheckRow(*[*vars(row).values()][:-2], False)])
    assert cli.run_command(["check"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert "expected one of augment, " in fails(capsys, 2, "check", "--only", "lenet")


def test_check_passes_for_an_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command(["check", "--only", "relu_max_pool2d"]) == 0
    assert "within tolerance" in capsys.readouterr().out


def test_wrong_usage_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("file", "net.pth"):
        (tmp_path / name).write_text("x")
    cases: list[tuple[list[str | Path], str]] = [
        (["train", "--model", "vgg"], "'vgg'"),
        (["train", "--data", "cats"], "'cats'"),
        (["train", "--precision", "int8"], "'int8'"),
        (["train", "--batch-size", "0"], "batch-size"),
        (["train", "--steps", "many"], "--steps many: "),
        (["train", "--lr=fast"], "--lr fast: "),
        (["train", "--seed", str(2**64)], "--seed"),
        (["train", "--speed", "9"], "--speed"),
        (["train", "--threads", "99999999"], "--threads 99999999: "),
        (["train", "--threads", "0"], "--threads 0: "),
        (["train", "--workers", "100000"], "--workers 100000: "),
        (["summary", "--classes", "-1"], "--classes -1: "),
        (["trian"], "trian"),
        (["train", tmp_path / "missing"], f"{tmp_path}/missing: no such folder"),
        (["train", tmp_path / "file"], f"{tmp_path}/file: not a folder"),
        (["train", tmp_path / "empty"], f"{tmp_path}/empty: no folders"),
        (["train", tmp_path, "--data", "digits"], "give one of them"),
        (["train", "--device", "gpu7"], "gpu7"),
        (["train", "--device", "cuda:99"], "torch sees"),
        (["train", "--data", "synthetic", "--image-size", "20", "--out", tmp_path / "o"], "image_size=20"),
        (["train", "--data", "synthetic", *SMALL, "--out", tmp_path], "not empty"),
        (["train", "--data", "synthetic", *SMALL, "--out", tmp_path / "file"], f"--out {tmp_path}/file: not a folder"),
        (["train", "--data", "synthetic", *SMALL, "--out", "/dev/null"], "--out /dev/null: not a folder"),
        (["train", ""], "an empty one"),
        (["evaluate", "--weights", ""], "an empty one"),
        (["train", "--resume", tmp_path / "missing"], f"{tmp_path}/missing: no such file or folder"),
        (["train", "--resume", tmp_path / "empty"], f"{tmp_path}/empty: no checkpoint"),
        (["train", "--resume", tmp_path, "--out", tmp_path], "--out and --resume"),
        (["evaluate"], "--weights"),
        (["evaluate", "--weights", tmp_path / "missing"], f"{tmp_path}/missing"),
        (["evaluate", "--weights", tmp_path / "net.pth"], "net.pth: not a .safetensors file; `alexnet export"),
        (["predict", "x.png", "--weights", tmp_path / "empty"], f"{tmp_path}/empty"),
    ]
    for arguments, words in cases:
        assert words in fails(capsys, 2, *arguments)
    assert not (tmp_path / "o").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    line = fails(capsys, 1, "train", "--data", "synthetic", *SMALL, "--out", tmp_path / "file" / "run")
    assert f"{tmp_path}/file/run: Not a directory" in line


def test_what_the_system_or_memory_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "x" * 300
    assert fails(capsys, 1, "evaluate", "--weights", name) == f"alexnet: {name}: File name too long"
    assert "File name too long" in fails(capsys, 1, "train", "--data", "synthetic", *SMALL, "--out", tmp_path / name)
    huge = ["train", "--data", "synthetic", "--image-size", "4000000", "--out", tmp_path / "run"]
    assert "out of memory" in fails(capsys, 1, *huge)


def test_weights_of_another_variant_and_damaged_ones(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = run / "samples" / "1.png"
    for command in (["evaluate"], ["predict", sample]):
        line = fails(capsys, 1, *command, "--weights", run, "--model", "caffenet")
        assert "weights of variant 'paper', not 'caffenet'" in line
        assert str(run) in line
    assert "variant 'paper', not 'tutorial'" in fails(capsys, 1, "train", "--resume", run, "--model", "tutorial")
    assert "--lr 0.5" in fails(capsys, 2, "train", "--resume", run, "--lr", "0.5")
    assert "beyond the 1 asked for" in fails(capsys, 2, "train", "--resume", run, "--steps", "1")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights = checkpoint.generations(copy)[0] / checkpoint.WEIGHTS
    os.truncate(weights, 1000)
    for command in (["evaluate", "--weights"], ["train", "--resume"]):
        assert str(weights) in fails(capsys, 1, *command, copy)
    assert "damaged" in fails(capsys, 1, "predict", sample, "--weights", weights)


def test_a_loss_that_is_no_number_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--data", "synthetic", *SMALL, "--lr", "1e30", "--warmup", "0", "--steps", "9"]
    assert "try a lower --lr" in fails(capsys, 1, *arguments, "--out", tmp_path / "run")


def test_a_reading_process_that_dies_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel kills one when memory runs out."""
    monkeypatch.setattr(Synthetic, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    arguments = ["train", "--data", "synthetic", *SMALL, "--workers", "1", "--out", tmp_path / "run"]
    line = fails(capsys, 1, *arguments)
    assert line.startswith("alexnet: a process that reads images has died (by SIGKILL); try fewer --workers")


@pytest.mark.parametrize("module", ["mlxtend", "matplotlib"])
def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    Digits.split.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    line = fails(capsys, 1, "train", *SMALL, "--steps", "1", "--out", tmp_path / "run")
    assert line == f"alexnet: {module} is not installed: pip install -e '.[train]'"
    assert not (tmp_path / "run").exists()


def test_importing_the_package_imports_none_of_the_command_lines() -> None:
    extras = ("rich", "typer", "matplotlib", "mlxtend", "PIL", "tensorboard", "torchvision", "safetensors")
    code = f"import sys, alexnet_ext; print([m for m in {extras} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed == "[]\n"


def steps_in(run: Path) -> list[int]:
    """The steps in a run's metrics."""
    return [line["step"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_it(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "alexnet_ext", "train"]
    options = ["--data", "synthetic", *SMALL, "--out", str(out), "--workers", "1", "--lr", "0.001"]
    process = subprocess.Popen(
        [*command, *options], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(steps_in(out)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    # As from a terminal: to the trainer and to the processes that read images.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    path = checkpoint.newest(out, pytest.fail)
    first, second = errors.splitlines()
    assert first == "alexnet: stopping after this step, with a checkpoint; once more to stop at once"
    assert second.endswith(f", saved in {path}; to go on: alexnet train --resume {out}")
    step = checkpoint.read_state(path / checkpoint.STATE)["step"]
    assert step == len(steps_in(out)) >= 3
    assert cli.run_command(["train", "--resume", str(out), "--steps", str(step + 2)]) == 0
    assert steps_in(out) == list(range(1, step + 3))
    assert json.loads((out / "recipe.json").read_text())["steps"] == step + 2


def test_module_and_console_script_are_the_same_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "alexnet_ext", "train", "--model", "vgg"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("alexnet: ")
    assert result.stderr.count("\n") == 1
    script = (ROOT / "pyproject.toml").read_text()
    assert 'alexnet = "alexnet_ext.cli:main"' in script


def test_an_output_that_takes_no_more_or_not_every_letter(bare: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "alexnet_ext"]
    for name in ("summary", "info"):
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                [*command, name], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
            )
        assert (result.returncode, result.stderr) == (1, "alexnet: standard output: No space left on device\n")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    predict = ["predict", str(tmp_path / "a.png"), "--weights", str(bare), "--out", str(tmp_path / "b.png")]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    result = subprocess.run([*command, *predict], capture_output=True, env=environment, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"%  ??" in result.stdout


def test_a_stream_that_is_closed_from_the_start() -> None:
    for closed, arguments, code in ((">&-", "summary", 0), ("2>&-", "summary --model vgg", 2), (">&- 2>&-", "info", 0)):
        command = f'exec "$0" -m alexnet_ext {arguments} {closed}'
        result = subprocess.run(
            ["sh", "-c", command, sys.executable], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert (result.returncode, result.stderr) == (code, "")


def test_a_run_folder_whose_name_is_no_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / os.fsdecode(b"caf\xe9")
    assert cli.run_command(["train", "--data", "synthetic", *SMALL, "--steps", "1", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("TensorBoard") == 1
    assert not list(out.glob("events*"))
    assert [line["kind"] for line in read_metrics(out / "metrics.jsonl") if line["kind"] != "span"] == [
        "train",
        "evaluate",
    ]
    assert cli.run_command(["train", "--resume", str(out), "--steps", "2"]) == 0
    sample = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(sample)
    assert cli.run_command(["predict", str(sample), "--weights", str(out), "--out", str(out / "b.png")]) == 0
    assert (out / "b.png").exists()
    other = tmp_path / "other"
    options = ["--data", "synthetic", *SMALL, "--steps", "1", "--out", str(other)]
    assert cli.run_command(["train", *options, "--weights", str(out)]) == 0


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_command([]) == 0
    printed = capsys.readouterr().out
    for command in ("train", "evaluate", "predict", "summary", "info", "check", "tune"):
        assert command in printed
