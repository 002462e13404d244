"""Two and four processes under gloo: two towers and the weird trick against one process, values and bytes.

Each number of processes is started once and makes all its checks, which the tests below read by name.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import alexnet_ext as ax
from alexnet_ext import layers
from alexnet_ext.models import AlexNet
from alexnet_ext.parallel import network as network_module
from alexnet_ext.parallel import volume
from alexnet_ext.parallel.collectives import Wire, gather
from alexnet_ext.parallel.layout import Layout
from alexnet_ext.parallel.network import RankAlexNet
from tests.support import oracle

STEPS, CLASSES, SIDE, IMAGES = 20, 5, 67, 5
HIDDEN = 256  # outputs of fc6 and fc7, in place of 4096: else they take nearly all of the time
WORLDS = (2, 4)
WAYS = ("forward", "backward")


def whole(variant: str = "paper", fused: bool = True, side: int = SIDE, dropout: float = 0.5) -> AlexNet:
    torch.manual_seed(0)
    return ax.models.alexnet(variant, fused, CLASSES, side, dropout, init="kaiming").double()


def batch(images: int = IMAGES, side: int = SIDE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(images)
    x = torch.randn(images, 3, side, side, dtype=torch.float64, generator=generator)
    return x, torch.arange(images) % CLASSES


def loss_of(logits: Tensor, labels: Tensor, images: int) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum") / images


def train(model: nn.Module, steps: int) -> None:
    """One process's training, which the ranks' must equal."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    for step in range(steps):
        x, labels = batch(IMAGES - step % 2)
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss_of(model(x), labels, len(x)).backward()
        optimizer.step()


def summed(wire: Wire, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=wire.group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class Part:
    """A rank's part of a network, which takes global batches."""

    def __init__(self, model: AlexNet, layout: Layout) -> None:
        self.layout, self.network = layout, RankAlexNet(model, layout)
        self.module: nn.Module = self.network
        if layout.data.size > 1:
            alone = [name for name, _ in self.network.named_parameters() if not layout.sums(name)]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.network, alone)
            ddp = DistributedDataParallel(self.network, process_group=layout.data.group)
            # DDP refuses an annotation that is a string, as all are here.
            ddp.register_comm_hook(layout.data, lambda wire, bucket: summed(wire, bucket))
            self.module = ddp

    def images(self, count: int) -> list[int]:
        return [len(part) for part in torch.arange(count).tensor_split(self.layout.data.size)]

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """Leave the gradients, return this rank's logits."""
        images, rank = self.images(len(x)), self.layout.data.rank
        logits = self.module(x.split(images)[rank], images=images)
        loss_of(logits, labels.split(images)[rank], len(x)).backward()
        return logits.detach()

    def train(self, steps: int) -> None:
        optimizer = torch.optim.SGD(self.network.parameters(), 0.01, 0.9)
        for step in range(steps):
            x, labels = batch(IMAGES - step % 2)
            torch.manual_seed(step)
            optimizer.zero_grad()
            self.step(x, labels)
            optimizer.step()


def assert_close(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert found.keys() == exact.keys()
    for name, tensor in exact.items():
        oracle.assert_accurate(name, found[name], tensor, None, terms=9216)


def assert_same_step(model: AlexNet, layout: Layout, x: Tensor, exact: nn.Module | None = None) -> Part:
    """Logits, every gradient and their norm as ``exact`` (else ``model``) has them alone."""
    part, alone = Part(model, layout), model if exact is None else exact
    labels = torch.arange(len(x)) % CLASSES
    torch.manual_seed(1)
    logits = alone(x)
    loss_of(logits, labels, len(x)).backward()
    torch.manual_seed(1)
    found = part.step(x, labels)
    images = part.images(len(x))
    assert_close({"logits": found}, {"logits": logits.detach().split(images)[layout.data.rank]})
    own = {name: p.grad for name, p in part.network.named_parameters() if p.grad is not None}
    gradients = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    assert_close(layout.whole(own), gradients)
    exact_norm = torch.nn.utils.get_total_norm(gradients.values())
    assert_close({"norm": layout.total_norm(own.items())}, {"norm": exact_norm})
    return part


def learns(layout: Layout, folder: Path) -> None:
    """20 steps with dropout and momentum, of 5 and of 4 images, end in one process's weights."""
    part = Part(whole(), layout)
    part.train(STEPS)
    found = layout.whole(part.network.state_dict())
    if dist.get_rank() == 0:
        exact = torch.load(folder / "exact.pt")
        assert_close(found, exact)
        assert not torch.equal(found["features.conv1.weight"], whole().features.conv1.weight)


def variants(layout: Layout, folder: Path) -> None:
    """Every variant with two towers, fused and stock, where caffe's pooling rounds up and where not; channels-last."""
    for variant in ("paper", "caffe", "caffenet", "tutorial"):
        for fused in (True, False):
            side = 71 if variant == "caffe" else SIDE
            x = batch(3, side)[0]
            if fused:
                x = x.contiguous(memory_format=torch.channels_last)
            try:
                assert_same_step(whole(variant, fused, side), layout, x)
            except AssertionError as error:
                raise AssertionError(f"{variant}, fused={fused}: {error}") from error


def few_images(layout: Layout, folder: Path) -> None:
    """A batch of one image: other ranks have none. Other sides than image_size."""
    assert_same_step(whole(), layout, batch(1)[0])
    model = whole()
    model.take_sides([99])
    assert_same_step(model, layout, batch(3, 99)[0])


class SideBySide(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(half) for half in x.chunk(2, 1)], 1)


def per_tower(layout: Layout, folder: Path) -> None:
    """LRN per tower is two LRNs side by side, and not the exchanged one."""
    cut = copy.copy(layout)
    cut.lrn_border = "per-tower"
    cut.parts.sent.clear()
    for fused in (True, False):
        exact = whole(fused=False)
        for index in (1, 2):
            setattr(exact.features, f"norm{index}", SideBySide(getattr(exact.features, f"norm{index}")))
        part = assert_same_step(whole(fused=fused), cut, batch(3)[0], exact)
        assert not any(layer.startswith("norm") for layer, _ in part.layout.parts.sent)
    with pytest.raises(AssertionError, match="error"):
        assert_same_step(whole(), cut, batch(3)[0])


def round_trip(layout: Layout, folder: Path) -> None:
    """Whole to own to whole changes no bit, and no layout's part is another's; counters stay whole."""
    state: dict[str, Any] = {**whole().state_dict(), "classifier.fc6.step": torch.tensor(3.0)}
    own = layout.own(state)
    again = layout.whole(own)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert len(own["classifier.fc7.weight"]) == HIDDEN // layout.parts.size
    assert len(own["features.conv1.weight"]) == (48 if layout.name == "towers" else 96)
    assert len(own["classifier.fc8.weight"]) == CLASSES
    other = Layout("weird-trick" if layout.name == "towers" else "towers", "paper")
    assert_same_step(whole(), other, batch(2)[0])
    loaded = RankAlexNet(whole(), other)
    loaded.load_state_dict(other.own({name: t for name, t in again.items() if not name.endswith("step")}))


def expected_bytes(layout: Layout, images: list[int]) -> dict[tuple[str, str], int]:
    """By hand, for float64 at 67 pixels: conv1 gives 15 x 15, conv2 7 x 7, conv3 sees 3 x 3, fc6 256 values."""
    n, ranks = images[layout.data.rank], layout.parts.size
    if layout.name == "towers":
        sent = {
            "norm1": 2 * 15 * 15,
            "norm2": 2 * 7 * 7,
            "conv3": 128 * 3 * 3,
            "fc6": 128,
            "fc7": HIDDEN // 2,
            "fc8": HIDDEN // 2,
        }
        found = {(name, way): 8 * n * count for name, count in sent.items() for way in ("forward", "backward")}
        del found["fc8", "backward"]
        return found
    columns, others = HIDDEN // ranks, ranks - 1
    padded, total = max(images), sum(images)
    both = {"fc6": 256 * padded * others, "fc7": columns * total * others}
    found = {(name, way): 8 * count for name, count in both.items() for way in ("forward", "backward")}
    found["fc8", "forward"] = 8 * columns * (total - n)
    found["fc8", "backward"] = 8 * columns * n * others
    return found


def wire(layout: Layout, folder: Path) -> None:
    """The bytes of one step are those of the formulas; evaluation sends the forward's alone."""
    part = Part(whole(), layout)
    layout.parts.sent.clear()
    part.step(*batch())
    expected = expected_bytes(layout, part.images(IMAGES))
    assert dict(layout.parts.sent) == expected
    if layout.data.rank == 0:  # it has the most images
        plan = volume.Plan(whole().config, layout.name, dist.get_world_size(), IMAGES, itemsize=8)
        assert volume.held(plan) == sum(p.numel() for p in part.network.parameters())
        counted = {(row.layer, way): getattr(row, way) for row in volume.exchanged(plan) for way in WAYS}
        assert {key: count for key, count in counted.items() if count and key[0] != "weights"} == expected
    layout.parts.sent.clear()
    images = part.images(IMAGES)
    with torch.no_grad():
        part.network(batch()[0].split(images)[layout.data.rank], images)
    assert dict(layout.parts.sent) == {key: count for key, count in expected.items() if key[1] == "forward"}
    with pytest.raises(ValueError, match=f"images must be {layout.data.size} numbers, 1 for rank"):
        part.network(torch.zeros(1, 3, SIDE, SIDE), [7] * layout.data.size)


def formats(layout: Layout, folder: Path) -> None:
    """Channels-last stays so in a gather along channels."""
    parts = layout.parts
    x = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5) + 1000 * parts.rank
    exact = torch.cat([x + 1000 * (rank - parts.rank) for rank in range(parts.size)], 1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = gather(x.contiguous(memory_format=memory_format), 1, parts, "x")
        assert torch.equal(y, exact)
        assert y.is_contiguous(memory_format=memory_format)


Check = Callable[[Layout, Path], None]
CHECKS: dict[str, tuple[str, tuple[int, ...], Check]] = {
    "towers learn what one process does": ("towers", WORLDS, learns),
    "the weird trick learns what one process does": ("weird-trick", WORLDS, learns),
    "towers, every variant": ("towers", (2,), variants),
    "the weird trick, every variant": ("weird-trick", (2,), variants),
    "towers, few images": ("towers", (4,), few_images),
    "the weird trick, few images": ("weird-trick", (4,), few_images),
    "LRN per tower": ("towers", (2,), per_tower),
    "towers, whole and own": ("towers", (4,), round_trip),
    "the weird trick, whole and own": ("weird-trick", (4,), round_trip),
    "towers, bytes": ("towers", WORLDS, wire),
    "the weird trick, bytes": ("weird-trick", WORLDS, wire),
    "memory formats": ("towers", (2,), formats),
}


def narrow(patch: Callable[[Any, str, int], None]) -> None:
    for module in (sys.modules["alexnet_ext.models.alexnet"], layers, volume, network_module):
        patch(module, "HIDDEN", HIDDEN)


def worker(rank: int, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    narrow(setattr)
    patience = timedelta(minutes=3)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{ranks}", rank=rank, world_size=ranks, timeout=patience
    )
    found: dict[str, str] = {}
    name = "start"
    try:
        layouts = {layout: Layout(layout, "paper") for layout in ("towers", "weird-trick")}
        for name, (layout, worlds, make) in CHECKS.items():
            if ranks in worlds:
                make(layouts[layout], Path(folder))
                dist.barrier()
                found[name] = ""
    except Exception:  # the process leaves, so that the others do not wait for it
        found[name] = traceback.format_exc()
    torch.save(found, f"{folder}/{ranks}-{rank}.pt")
    if not any(found.values()):
        dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter (pytorch/pytorch#179291)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("towers")
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch.setattr)
        model = whole()
    train(model, STEPS)
    torch.save(model.state_dict(), folder / "exact.pt")
    return folder


@pytest.fixture(scope="module")
def found(exact: Path) -> Callable[[int], list[dict[str, str]]]:
    """What each process found, by the number of processes, which the first call starts."""

    @functools.cache
    def start(ranks: int) -> list[dict[str, str]]:
        torch.multiprocessing.spawn(worker, (str(exact), ranks), nprocs=ranks)
        return [torch.load(exact / f"{ranks}-{rank}.pt") for rank in range(ranks)]

    return start


@pytest.mark.parametrize(
    ("ranks", "name"), [(ranks, name) for ranks in WORLDS for name, made in CHECKS.items() if ranks in made[1]]
)
def test_ranks_are_one_process(found: Callable[[int], list[dict[str, str]]], ranks: int, name: str) -> None:
    for rank, results in enumerate(found(ranks)):
        assert results.get(name) == "", f"rank {rank} of {ranks}:\n{results}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rows", "paper", 2), "layout must be one of data, towers, weird-trick, got 'rows'"),
        (("towers", "torchvision", 2), "layout 'towers' needs a variant with two towers, got 'torchvision'"),
        (("towers", "paper", 3), "layout 'towers' needs an even number of ranks, got 3"),
        (("weird-trick", "paper", 3), "layout 'weird-trick' needs a number of ranks that divides 4096, got 3"),
        (("towers", "paper", 2, "lars"), "cannot train with optimizer 'lars'"),
        (("towers", "paper", 2, "sgd", "none"), "lrn_border must be one of exchange, per-tower, got 'none'"),
        (("data", "paper", 2, "sgd", "per-tower"), "lrn_border 'per-tower' needs layout 'towers', got 'data'"),
    ],
)
def test_what_a_layout_cannot_train_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        volume.check(*arguments)
    volume.check("data", "torchvision", 3, "lars")
