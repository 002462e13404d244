"""The output of evaluate and predict: for one image and for many, for people and for programs."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from alexnet_ext import cli, models
from alexnet_ext.data.folder import imagenet_preprocessing
from alexnet_ext.data.images import read_image
from alexnet_ext.training import checkpoint, pictures
from alexnet_ext.training.evaluate import Evaluation
from alexnet_ext.training.files import check_outside, check_target, new_file, write_file
from alexnet_ext.training.predict import picture_of
from alexnet_ext.training.results import by_class, wrong_images
from tests.cli.test_cli import fails
from tests.support import ROOT
from tests.training.test_training import Valued, pixels

CLASSES = ("cat", "dog", "eel")


def write_weights(path: Path, change: Callable[[torch.Tensor], object] = lambda _: None) -> Path:
    """Weights of three classes that record no data; ``change`` is called with the last bias."""
    torch.manual_seed(0)
    model = models.alexnet("paper", num_classes=3, image_size=67, init="kaiming")
    with torch.no_grad():
        change(model.state_dict()["classifier.fc8.bias"])
    description = checkpoint.Description(model.config, CLASSES, imagenet_preprocessing(67), "", 0)
    checkpoint.write_weights(path, model, description)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "net.safetensors")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two images of the same name in each of three classes; output without a path goes next to them."""
    for number in range(6):
        path = tmp_path / "images" / CLASSES[number % 3] / f"{number // 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 30), 20 * number + 10).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "images"


def prints(capfdbinary: pytest.CaptureFixture[bytes], *arguments: str | Path, code: int = 0) -> bytes:
    assert cli.run_command([str(argument) for argument in arguments]) == code
    return capfdbinary.readouterr().out


def test_images_of_one_name_get_pictures_of_their_own(weights: Path, images: Path) -> None:
    files = sorted(images.glob("*/0.png"))
    for path in [*files, *files]:
        assert cli.run_command(["predict", str(path), "--weights", str(weights)]) == 0
    written = sorted(Path("predictions").iterdir())
    assert len(written) == 3, "and the same image the same one"
    assert Path("predictions/0.png") in written
    assert {pictures.drawn_of(path) for path in written} == {str(path) for path in files}
    Image.new("RGB", (9, 9)).save("predictions/1.png")
    assert cli.run_command(["predict", str(images / "cat" / "1.png"), "--weights", str(weights)]) == 0
    assert Image.open("predictions/1.png").size == (9, 9), "no picture takes the place of another's file"


def test_a_folder_of_images(weights: Path, images: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    lines = prints(capfdbinary, "predict", images, "--weights", weights, "--out", "drawn").decode().splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [str(path) for path in sorted(images.rglob("*.png"))]
    assert all(line.split()[1] in CLASSES and line.endswith("%") for line in lines[:-1])
    assert lines[-1] == "6 pictures in drawn"
    assert len(list(Path("drawn").iterdir())) == 6
    broken = images / "cat" / "0.png"
    os.truncate(broken, 60)
    arguments = ["predict", str(images / "cat"), str(images / "dog" / "1.png"), "--weights", str(weights)]
    assert cli.run_command([*arguments, "--no-picture"]) == 1
    captured = capfdbinary.readouterr()
    assert captured.err.decode().startswith(f"alexnet: skipped {broken}: a damaged image")
    assert len(captured.out.splitlines()) == 2
    assert not Path("predictions").exists()


def test_predictions_for_programs(weights: Path, images: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    odd = images / os.fsdecode(b'caf\xe9, "1".png')
    (images / "cat" / "0.png").rename(odd)
    files = [odd, images / "dog" / "0.png"]
    command = ["predict", *files, "--weights", weights, "--no-picture"]
    found = json.loads(prints(capfdbinary, *command, "--json"))
    assert [one["image"] for one in found] == [str(path) for path in files]
    assert all(one["picture"] is None for one in found)
    for one in found:
        shares = [best["probability"] for best in one["best"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
    text = prints(capfdbinary, *command, "--csv").decode("utf-8", "surrogateescape")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["image"] for row in rows] == [str(path) for path in files for _ in range(3)]
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 2
    expected = [(best["class"], best["probability"]) for one in found for best in one["best"]]
    assert [(row["class"], float(row["probability"])) for row in rows] == expected


def test_an_evaluation_for_programs(weights: Path, images: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    command = ["evaluate", "--weights", weights, images]
    lines = prints(capfdbinary, *command).decode()
    found = json.loads(prints(capfdbinary, *command, "--json", "--wrong", "wrong.csv", "--confusion", "taken.png"))
    assert f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}, loss {found['loss']:.4f} on 6 images" in lines
    assert [one["class"] for one in found["classes"]] == list(CLASSES)
    assert [one["images"] for one in found["classes"]] == [2, 2, 2]
    right = sum(one["right"] for one in found["classes"])
    assert right == round(6 * found["top1"])
    rows = list(csv.DictReader(Path("wrong.csv").read_text().splitlines()))
    assert len(rows) == 6 - right > 0
    assert all(Path(row["image"]).parent.name == row["class"] != row["guess"] for row in rows)
    assert pixels(Path("taken.png")).shape[0] > 300


def outcome(targets: list[int], guesses: list[int], classes: int) -> Evaluation:
    shares = torch.full((len(targets), 1), 0.5)
    truth = torch.tensor([0.1 + 0.01 * i for i in range(len(targets))])
    return Evaluation(
        1.0, 1.0, torch.arange(len(targets)), torch.tensor(targets), torch.tensor(guesses)[:, None], shares, truth
    )


def test_tables_end_at_twenty_classes_and_images_of_no_file_have_numbers() -> None:
    result = outcome([0, 1, 1], [0, 0, 1], 2)
    assert by_class(result, ["a", "b"]) is not None
    assert by_class(result, [str(i) for i in range(21)]) is None
    rows = wrong_images(result, Valued([0, 0, 0], [0, 1, 1], 2)).decode().splitlines()
    assert rows[1:] == ["1,1,0,0.5,0.11"]


@pytest.mark.parametrize("classes", [2, 12, 60])
def test_a_confusion_is_drawn_for_any_number_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    written, right = [], pictures._write
    monkeypatch.setattr(pictures, "_write", lambda figure, path: (right(figure, path), written.append(figure)))
    result = outcome([0, 1, 1, 1], [0, 1, 0, 1], classes)
    pictures.confusion(tmp_path / "a.png", result, [f"class {i} of a long name" for i in range(classes)])
    axes = written[0].axes[0]
    shares = axes.images[0].get_array()
    assert shares.shape == (classes, classes)
    assert shares[1].tolist()[:2] == pytest.approx([1 / 3, 2 / 3])
    assert [text.get_text() for text in axes.texts] == (["1", "1", "2"] if classes <= 20 else [])


def test_guesses_are_of_all_classes_and_say_what_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(pictures, "_write", lambda figure, _: written.append(figure))
    names = [f"kind {number}" for number in range(4)]
    targets = [number // 25 for number in range(100)]  # in the order of the classes, as folders are listed
    data, result = Valued([0] * 100, targets, 4), outcome(targets, [0] * 100, 4)

    def titles(seed: int) -> list[str]:
        pictures.guesses(tmp_path / "g.png", data, result, names, seed)
        return [axes.get_title() for figure in written[-1].subfigs for axes in figure.axes[:1]]

    assert sorted(titles(0)[:4]) == names
    assert len({tuple(titles(seed)) for seed in range(6)}) > 1
    assert "the lower row is the most wrong" in written[-1].get_suptitle()
    few = outcome([0, 1, 1], [0, 0, 1], 2)
    pictures.guesses(tmp_path / "g.png", Valued([0] * 3, [0, 1, 1], 2), few, ["a", "b"])
    assert "lower row" not in written[-1].get_suptitle()
    assert len(written[-1].subfigs) == 3


def test_steps_are_whole_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(pictures, "_write", lambda figure, _: written.append(figure))
    lines = [{"kind": "train", "step": step, "loss": 1.0, "accuracy": 0.5} for step in (1, 2)]
    pictures.curves(tmp_path / "c.png", lines)
    assert all(float(tick).is_integer() for axes in written[0].axes for tick in axes.get_xticks())


@pytest.mark.parametrize(
    ("name", "kind"), [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.png", "PNG"), ("a.webp", "WEBP"), ("a", "PNG")]
)
def test_a_pictures_format_is_its_endings(weights: Path, images: Path, name: str, kind: str) -> None:
    command = ["predict", str(images / "cat" / "0.png"), "--weights", str(weights), "--out", name]
    assert cli.run_command(command) == 0
    with Image.open(name) as image:
        assert image.format == kind


def test_outputs_that_cannot_be(weights: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = images / "cat" / "0.png"
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    for out in ("/dev/full", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "pipe", "link"):
        line = fails(capsys, 2, "predict", sample, "--weights", weights, "--out", out)
        assert line == f"alexnet: --out {out}: no regular file, expected the name of one"
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    for option in ("--wrong", "--confusion"):
        assert f"{option} pipe: no regular file" in fails(
            capsys, 2, "evaluate", images, "--weights", weights, option, "pipe"
        )
    expected = "a.gif: expected a name with one of the endings .png, .jpg"
    assert expected in fails(capsys, 2, "predict", sample, "--weights", weights, "--out", "a.gif")
    assert expected in fails(capsys, 2, "evaluate", images, "--weights", weights, "--confusion", "a.gif")
    folder = ("predict", images, "--weights", weights, "--out")
    assert f"--out {sample}: not a folder" in fails(capsys, 2, *folder, sample)
    for options in (["--json", "--csv"], ["--no-picture", "--out", "a.png"]):
        assert "give one of them" in fails(capsys, 2, "predict", sample, "--weights", weights, *options)
    (images / "none").mkdir()
    assert "none: no images" in fails(capsys, 2, "predict", images / "none", "--weights", weights)


@pytest.mark.parametrize("stream", ["/dev/stdout", "/proc/self/fd/1"])
def test_what_the_shell_opened_is_not_replaced(tmp_path: Path, stream: str) -> None:
    code = f"from alexnet_ext.training.files import *; check_target(Path({stream!r}), None)"
    with (tmp_path / "file").open("w") as file:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=file, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
        )
    assert "no regular file" in result.stderr


def test_links_lead_to_what_is_written_and_devices_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a.txt", tmp_path / "a.txt"
    link.symlink_to("real/a.txt")
    for content in (b"new", b"newer"):  # where there is nothing yet, too
        write_file(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content
    with new_file(link) as beside:
        assert beside.suffix == ".txt"
        beside.write_bytes(b"newest")
    assert link.is_symlink()
    assert target.read_bytes() == b"newest"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Exception, match="no regular file"):
        write_file(tmp_path / "pipe", b"")
    with pytest.raises(Exception, match="no regular file"), new_file(tmp_path / "pipe"):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "pipe", "real"]
    check_target(link, None)


def test_a_link_to_itself_is_one_line(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = tmp_path / "loop.png"
    link.symlink_to(link.name)
    sample = tmp_path / "sample.png"
    Image.new("RGB", (9, 9)).save(sample)
    for arguments in (["predict", sample], ["evaluate", tmp_path, "--wrong", link], ["export", "--format", "onnx"]):
        option = "--wrong" if "--wrong" in arguments else "--out"
        more = [] if option == "--wrong" else [option, link]
        line = fails(capsys, 2, *arguments, "--weights", weights, *more)
        assert line == f"alexnet: {option} {link}: Too many levels of symbolic links"
    check_outside(link, tmp_path / "data")  # refused when the run's folder is made


@pytest.mark.parametrize(
    "name", [b"i" * 251 + b".jpg", b"\xff\xfe" * 100 + b".png", b"a**b[0].png", b"-.png", "é".encode() * 120 + b".png"]
)
def test_images_of_any_name(weights: Path, images: Path, name: bytes) -> None:
    image = images / os.fsdecode(name)
    Image.new("RGB", (9, 9)).save(image, format="PNG")
    for _ in range(2):
        assert cli.run_command(["predict", str(image), "--weights", str(weights)]) == 0
        assert len(list(Path("predictions").iterdir())) == 1
        (images.parent / "elsewhere").mkdir(exist_ok=True)
    other = images.parent / "elsewhere" / image.name
    image.rename(other)
    assert picture_of(other, Path("predictions")).name != picture_of(image, Path("predictions")).name
    assert cli.run_command(["predict", str(other), "--weights", str(weights)]) == 0
    assert len(list(Path("predictions").iterdir())) == 2


def nan(bias: torch.Tensor) -> None:
    bias[0] = torch.nan


def test_weights_and_outputs_that_are_no_numbers(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_weights(tmp_path / "nan.safetensors", nan)
    commands = (["predict", images / "cat" / "0.png"], ["evaluate", images])
    for command in commands:
        line = fails(capsys, 1, *command, "--weights", path)
        assert line == (f"alexnet: {path}: classifier.fc8.bias holds NaN or infinity, as a run that diverged leaves it")
    good = write_weights(tmp_path / "good.safetensors")
    monkeypatch.setattr(models.AlexNet, "forward", lambda _, x: torch.full((len(x), 3), torch.nan))
    for command in commands:
        assert "outputs are no finite numbers" in fails(capsys, 1, *command, "--weights", good)
    assert not Path("predictions").exists()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    image.convert(mode).save(tmp_path / "a.png")
    result = read_image(tmp_path / "a.png")
    assert result.mode == "RGB"
    assert result.getpixel((0, 0)) == (255, 255, 255)
    assert result.getpixel((3, 3)) == read_image_opaque(image, mode)


def read_image_opaque(image: Image.Image, mode: str) -> tuple[int, ...]:
    return image.convert(mode).convert("RGB").getpixel((3, 3))  # type: ignore[return-value]


def test_a_home_that_cannot_be_written_to_is_no_news(weights: Path, images: Path) -> None:
    environment = os.environ | {"HOME": "/proc/nowhere", "XDG_CONFIG_HOME": "/proc/nowhere"}
    environment |= {"XDG_CACHE_HOME": "/proc/nowhere", "MPLCONFIGDIR": "/proc/nowhere"}
    command = [sys.executable, "-m", "alexnet_ext", "predict", str(images / "cat" / "0.png"), "--weights", str(weights)]
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stderr) == (0, "")
