"""The calls to NVIDIA DALI, which no test machine has: a module that stands in for it decodes by Pillow."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from alexnet_ext.data import CommandError, ImageFolder, Readers, batches
from alexnet_ext.data.batches import read_batch
from alexnet_ext.data.dali import DaliFolder
from alexnet_ext.data.images import square
from alexnet_ext.training import data_bench
from alexnet_ext.training.recipe import Recipe
from tests.training.test_packed import SIDE, opened, photos
from tests.training.test_training import SIZE

__all__ = ["photos"]  # a fixture

CUDA = torch.device("cuda:1")


class Pipeline:
    """Runs one operator after the other, as they were given."""

    made: ClassVar[list[Pipeline]] = []

    def __init__(self, batch_size: int, num_threads: int, device_id: int, prefetch_queue_depth: int) -> None:
        assert (device_id, prefetch_queue_depth) == (1, 1)
        self.batch_size, self.built, self.failed = batch_size, False, False
        self.files: list[np.ndarray] = []
        self.out = np.empty((batch_size, SIDE, SIDE, 3), np.uint8)  # overwritten by each run
        Pipeline.made.append(self)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def set_outputs(self, output: dict[str, Any]) -> None:
        names = []
        while output:
            names.append((output.pop("name"), output.pop("options")))
            output = output.pop("of")
        assert names == [
            ("crop", {"crop": (SIDE, SIDE), "dtype": "uint8"}),
            ("resize", {"resize_shorter": SIDE, "interp_type": "linear", "antialias": True}),
            ("image", {"device": "mixed", "output_type": "rgb"}),
            ("external_source", {"name": "files", "dtype": "uint8", "ndim": 1}),
        ]

    def build(self) -> None:
        self.built = True

    def feed_input(self, name: str, files: list[np.ndarray]) -> None:
        assert self.built
        assert not self.failed, "DALI may refuse to go on"
        assert name == "files"
        assert len(files) == self.batch_size
        self.files = files

    def run(self) -> tuple[Any]:
        for row, file in zip(self.out, self.files, strict=True):
            try:
                row[:] = np.asarray(square(Image.open(io.BytesIO(file.tobytes())).convert("RGB"), SIDE))
            except OSError as error:
                self.failed = True
                raise RuntimeError("nvJPEG: cannot decode") from error
        return (SimpleNamespace(as_tensor=lambda: self.out),)


def operator(name: str) -> Any:
    return lambda of=None, **options: {"name": name, "options": options, "of": of}


@pytest.fixture
def dali(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("nvidia.dali")
    module.Pipeline = Pipeline
    module.fn = SimpleNamespace(
        decoders=SimpleNamespace(image=operator("image")),
        **{name: operator(name) for name in ("external_source", "resize", "crop")},
    )
    module.types = SimpleNamespace(UINT8="uint8", RGB="rgb", INTERP_LINEAR="linear")
    monkeypatch.setitem(sys.modules, "nvidia.dali", module)
    Pipeline.made.clear()


def plain(photos: Path) -> ImageFolder:
    found = opened(photos).train
    assert isinstance(found, ImageFolder)
    return found


@pytest.mark.parametrize("augment", [True, False])
def test_batches_are_those_of_the_folder(dali: None, photos: Path, augment: bool) -> None:
    folder = plain(photos)
    folder.augment = augment
    data = DaliFolder(folder, CUDA)
    with Readers(data, 2) as readers:
        found = list(batches(data, 3, seed=1, epoch=2, read=readers))
        assert readers.processes == []
    assert [len(batch.targets) for batch in found] == [3, 3, 1]
    for mine, its in zip(found, batches(folder, 3, seed=1, epoch=2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine[:3], its[:3], strict=True))
        assert (mine.drawn is None) is not augment
        assert augment is False or all(map(torch.equal, mine.drawn or (), its.drawn or ()))
    assert [pipeline.batch_size for pipeline in Pipeline.made] == [3, 1], "one for each size"


def test_a_batch_with_a_file_that_dali_cannot_read_is_read_by_pillow(dali: None, tmp_path: Path, photos: Path) -> None:
    folder = plain(photos)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"text")
    folder.samples[1] = (str(broken), folder.samples[1][1])
    data = DaliFolder(folder, CUDA)
    found = read_batch(data, [(0, index) for index in range(3)])
    assert found.indices.tolist() == [0, 2]
    assert [error.path for error in found.errors] == [str(broken)]
    assert len(read_batch(data, [(0, index) for index in range(3, 6)]).targets) == 3
    assert len(Pipeline.made) == 2, "the next batch of that size has a new pipeline"


def test_a_lack_of_memory_is_told(dali: None, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Pipeline) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Pipeline, "run", run)
    with pytest.raises(torch.OutOfMemoryError):
        read_batch(DaliFolder(plain(photos), CUDA), [(0, 0)])


@pytest.mark.parametrize("installed", [True, False])
def test_data_bench_measures_it_where_it_is_installed(
    dali: None, photos: Path, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not installed:
        monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    read, right = [], data_bench.data_rate

    def rate(data: Any, *rest: Any) -> float:
        read.append(type(data).__name__)
        return right(data, *rest)

    class Network:
        def to(self, *_: Any, **__: Any) -> Network:
            return self

    for name in ("prepare", "prove_kernels", "synthetic_batch"):
        monkeypatch.setattr(data_bench, name, lambda *_: None)
    monkeypatch.setattr(data_bench, "data_rate", rate)
    monkeypatch.setattr(data_bench, "TrainingStep", lambda *_: lambda *_: SimpleNamespace(images=2))
    monkeypatch.setattr("alexnet_ext.models.alexnet", lambda *_, **__: Network())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    console = Console(file=io.StringIO())
    found = data_bench.measure(Recipe(str(photos), image_size=SIZE, batch_size=2), CUDA, 0, 0.01, console)
    assert found.packed is None
    assert all(value is not None and value > 0 for value in (found.folder, found.step))
    assert read == ["ImageFolder", "DaliFolder"][: 1 + installed]
    assert (found.dali is not None) is installed
    assert bool(Pipeline.made) is installed
    assert ("; by --loader dali images come at " in found.sentence("a GPU")) is installed


def test_what_is_missing_is_one_line(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError, match="--loader dali: needs a GPU, and the device is cpu"):
        DaliFolder(plain(photos), torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(CommandError, match="--loader dali: NVIDIA DALI is not installed; https"):
        DaliFolder(plain(photos), CUDA)
