"""The data in a folder: parts, classes, images. Files left out are named; held-out images stay held out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_ext.data import CommandError, ImageFolder
from alexnet_ext.data.folder import FolderSplit
from alexnet_ext.data.listing import FOREIGN, Listing, hold_out, list_images


def fill(root: Path, **classes: int) -> Path:
    """Writes that number of images for each class, each of a colour of its own."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.full((9, 9, 3), (number, len(name), count), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of six images."""
    return fill(tmp_path / "images", cat=6, dog=6)


def split(root: Path, **options: object) -> FolderSplit:
    return ImageFolder.split(root, 67, 0, **options)  # type: ignore[arg-type]


def names(samples: list[tuple[str, int]]) -> list[str]:
    return ["/".join(Path(path).parts[-2:]) for path, _ in samples]


def refused(root: Path, **options: object) -> str:
    with pytest.raises(CommandError) as caught:
        split(root, **options)
    assert caught.value.code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_in_the_order_of_their_names_and_their_classes(folder: Path) -> None:
    fill(folder / "cat", b=1, a=1)
    samples, classes, notes = list_images(folder)
    assert (classes, notes) == (("cat", "dog"), ())
    assert [target for _, target in samples] == [0] * 8 + [1] * 6
    assert names(samples)[:8] == [*(f"cat/{i:03}.png" for i in range(6)), "a/000.png", "b/000.png"]


def test_what_archives_and_systems_leave_is_no_data(folder: Path) -> None:
    expected = list_images(folder)
    for name in (*FOREIGN, ".git", ".thumbnails"):
        for parent in (folder, folder / "cat"):
            fill(parent / name, cat=1)
            (parent / name / "dog").mkdir()
    for path, _ in expected.samples:
        (Path(path).parent / f"._{Path(path).name}").write_bytes(b"\0\5\x16\7")
    (folder / ".DS_Store").touch()
    assert list_images(folder) == expected


@pytest.mark.parametrize("place", ["runs/one", "one", "cat/runs/one"])
def test_run_folders_are_no_data(folder: Path, place: str) -> None:
    expected = list_images(folder)
    run = fill(folder / place, samples=10)
    (run / "recipe.json").write_text("{}")
    (run / "metrics.jsonl").touch()
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    found = list_images(folder)
    assert found[:2] == expected[:2]
    assert found.notes == (f"{folder}: left out the run folders {place}",)
    (run / "recipe.json").unlink()
    assert len(list_images(folder).samples) == 22, "without what tells a run it is a folder as any"


def test_what_is_not_read_is_counted_by_ending(folder: Path) -> None:
    for name in ("a.heic", "b.HEIC", "c.tif", "d", "../e.jpg", "../f.csv"):
        (folder / "cat" / name).touch()
    Image.new("RGB", (9, 9)).save(folder / "dog" / "x.JFIF", format="JPEG")
    found = list_images(folder)
    assert names(found.samples)[-1] == "dog/x.JFIF"
    assert found.notes == (
        f"{folder}: left out 2 .heic, 1 .tif, 1 without an ending in its folders",
        f"{folder}: left out 1 .jpg, 1 .csv beside its folders",
    )


def test_classes_without_images_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "eel").mkdir()
    assert refused(folder).startswith(f"{folder}/eel: no images in it; expected .jpg, ")
    for number in range(3):
        (folder / "eel" / f"{number}.tiff").touch()
    assert f"{folder}/eel: no images in it, but 3 .tiff; expected" in refused(folder)
    fill(folder, eel=2)
    for path in (folder / "eel").glob("*.png"):
        os.truncate(path, 50)
    line = refused(folder)
    assert line.startswith(f"{folder}/eel/000.png: a damaged image")
    assert line.endswith("none of the 2 images of class eel can be read")
    fill(folder, eel=1)
    assert len(split(folder).train.classes) == 3, "one is enough"
    held_out = list_images(fill(tmp_path / "val", cat=1, dog=0, eel=0), ("cat", "dog", "eel"))
    assert held_out.notes == (f"{tmp_path}/val: no images in dog, eel",)


def test_classes_that_cannot_be_listed_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = os.scandir

    def locked(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return right(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", locked)
        assert refused(folder) == f"{folder}/dog: Permission denied"
    (folder / "eel").symlink_to("nowhere")
    assert refused(folder) == f"{folder}/eel: a link that leads nowhere"


def test_errors_name_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    fill(tmp_path / "one" / "pets", cat=1)
    cases = {"missing": "no such folder", "file": "not a folder", "empty": "no folders in it"}
    cases |= {"hollow": "cat is its only folder", "one": "pets is its only folder; expected one a class"}
    for name, words in cases.items():
        assert refused(tmp_path / name).startswith(f"{tmp_path / name}: {words}")
    with pytest.raises(CommandError, match=r"images/cat: not one of the 1 classes"):
        list_images(folder, ("dog",))
    assert "one image a class is not enough" in refused(fill(tmp_path / "single", cat=1, dog=1))


@pytest.mark.parametrize("target", [".", "../dog", "..", "../..", "/"])
def test_a_link_that_would_count_images_twice_or_without_end_is_refused(folder: Path, target: str) -> None:
    (folder / "cat" / "more").symlink_to(target)
    assert refused(folder).endswith(" once more, by a link")


def test_a_folder_elsewhere_is_followed_by_a_link(folder: Path, tmp_path: Path) -> None:
    (folder / "dog").rename(tmp_path / "dogs")
    (folder / "dog").symlink_to(tmp_path / "dogs")
    assert [target for _, target in list_images(folder).samples] == [0] * 6 + [1] * 6


@pytest.mark.parametrize(("train", "held_out"), [("train", "val"), ("Training", "Test"), ("TRAIN", "Validation")])
def test_parts_are_known_by_their_names(folder: Path, tmp_path: Path, train: str, held_out: str) -> None:
    root = tmp_path / "both"
    root.mkdir()
    folder.rename(root / train)
    fill(root / held_out, dog=1)
    found = split(root)
    assert (len(found.train), len(found.held_out), found.notes) == (12, 1, ())
    assert found.held_out[0, 0].target == 1, "the class number is that of the training folder"
    evaluated, notes = ImageFolder.held_out(root, found.train.preprocessing, found.train.classes)
    assert evaluated.samples == found.held_out.samples
    assert notes == (f"{root}: the images are those of {held_out}",)
    fill(root, papers=2)
    assert split(root).notes == (f"{root}: left out papers, beside {train}, {held_out}",)
    assert f"--held-out 0.2: {root / held_out} holds the images held out already" in refused(root, held_out=0.2)


def test_a_training_part_alone_is_split(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "both"
    root.mkdir()
    folder.rename(root / "train")
    found = split(root, held_out=0.3)
    assert found.train.classes == ("cat", "dog")
    assert len(found.held_out) >= 2
    assert len(found.train) + len(found.held_out) == 12
    assert found.listing == split(root / "train", held_out=0.3).listing
    evaluated = split(root, val=fill(root / "kept", dog=3))
    assert (len(evaluated.train), len(evaluated.held_out)) == (12, 3)
    assert split(root).train.classes == ("kept", "train"), "beside other folders it is a class"


def test_folders_that_may_be_parts_are_told(tmp_path: Path) -> None:
    for part in ("day", "night"):
        fill(tmp_path / part, cat=2, dog=2)
    words = f"alexnet train {tmp_path}/day --val {tmp_path}/night"
    assert [words in note and "holds cat, dog" in note for note in split(tmp_path).notes] == [True]
    fill(tmp_path / "night", eel=1)
    assert split(tmp_path).notes == ()


def test_the_held_out_images_of_a_folder_of_their_own(folder: Path, tmp_path: Path) -> None:
    held_out = fill(tmp_path / "other", dog=3)
    found = split(folder, val=held_out)
    assert (len(found.train), len(found.held_out)) == (12, 3)
    shutil.move(held_out, folder / "kept")
    inside = split(folder, val=folder / "kept")
    assert inside.train.classes == ("cat", "dog")
    assert (len(inside.train), len(inside.held_out)) == (12, 3)
    assert "no such folder" in refused(folder, val=folder / "missing")
    assert "holds the images to train on" in refused(folder, val=tmp_path)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cat").symlink_to(folder / "cat")
    shutil.rmtree(folder / "kept")
    assert "once more, by a link" in refused(folder, val=tmp_path / "linked"), "trained on and held out"


def test_a_share_of_each_class_is_held_out(tmp_path: Path) -> None:
    found = split(fill(tmp_path, cat=300, dog=10, eel=2, fox=1))
    counts = [sum(target == wanted for _, target in found.held_out.samples) for wanted in range(4)]
    assert 20 <= counts[0] <= 40
    assert counts[1:] == [1, 1, 0]
    assert sorted(found.train.samples + found.held_out.samples) == sorted(list_images(tmp_path).samples)
    half = split(tmp_path, held_out=0.5)
    assert 120 <= sum(target == 0 for _, target in half.held_out.samples) <= 180
    assert set(found.held_out.samples) <= set(half.held_out.samples)
    almost = split(tmp_path, held_out=0.999999)
    assert {target for _, target in almost.train.samples} == {0, 1, 2, 3}, "no class is without images to train on"


def test_no_image_changes_its_part_when_another_comes_or_the_folder_moves() -> None:
    files = [(f"/a/{name}/{i}.jpg", target) for target, name in enumerate("xyz") for i in range(60)]
    _, whole = hold_out(Path("/a"), files, 0.1)
    for left_out in files:
        _, fewer = hold_out(Path("/a"), [file for file in files if file != left_out], 0.1)
        assert set(fewer) == set(whole) - {left_out}
    _, moved = hold_out(Path("/b/c"), [(path.replace("/a", "/b/c"), target) for path, target in files], 0.1)
    assert [path.removeprefix("/b/c") for path, _ in moved] == [path.removeprefix("/a") for path, _ in whole]


def test_the_checksum_is_of_the_names_and_the_parts(folder: Path, tmp_path: Path) -> None:
    first = split(folder).listing
    shutil.copytree(folder, tmp_path / "moved")
    assert split(tmp_path / "moved").listing == first
    assert split(folder, held_out=0.5).listing != first
    (folder / "cat" / "003.png").rename(folder / "cat" / "zz.png")
    renamed = split(folder).listing
    (folder / "cat" / "zz.png").rename(folder / "dog" / "zz.png")
    assert len({first, renamed, split(folder).listing}) == 3


def test_names_of_any_bytes(tmp_path: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 a**b[1]"))
    fill(root, **{os.fsdecode(b"\xff"): 2, "d" * 250: 2, "line\nbreak": 2})
    (root / os.fsdecode(b"\xff") / "000.png").rename(root / os.fsdecode(b"\xff") / os.fsdecode(b"\xfe" * 245 + b".png"))
    found = split(root)
    assert len(found.train) + len(found.held_out) == 6
    assert len(found.listing) == 64
    assert isinstance(list_images(root), Listing)
