"""The training step: no value read on the host, one graph for it, fp32 masters of bf16 weights, too little memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from alexnet_ext import models
from alexnet_ext.data import CommandError, Synthetic
from alexnet_ext.data.batches import Batch, Drawn
from alexnet_ext.data.preprocessing import Preprocessing
from alexnet_ext.ops import _backend
from alexnet_ext.ops.augment.reference import augment
from alexnet_ext.training import checkpoint, graph
from alexnet_ext.training.feed import Feed, Inputs
from alexnet_ext.training.interrupt import Interrupted
from alexnet_ext.training.losses import Losses
from alexnet_ext.training.process import prepare
from alexnet_ext.training.recipe import Recipe
from alexnet_ext.training.state import load
from alexnet_ext.training.step import Taken, TrainingStep
from alexnet_ext.training.trainer import freeze
from tests.training.test_readers import raising
from tests.training.test_training import SIZE, TINY, reporter, resumed, same, trainer

PREPROCESSING = Synthetic.preprocessing(SIZE)
CPU = torch.device("cpu")


def network(recipe: Recipe = TINY, classes: int = 3) -> models.AlexNet:
    torch.manual_seed(0)
    model = models.alexnet(recipe.model, not recipe.stock, classes, SIZE, dropout=recipe.dropout, init=recipe.init)
    if recipe.freeze is not None:
        freeze(model, recipe.freeze)
    for parameter in model.parameters():  # model.to(...) refuses parameters without values
        if parameter.dim() == 4:
            parameter.data = parameter.detach().contiguous(memory_format=torch.channels_last)
    return model


def batch(count: int, seed: int = 0, drawn: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    side = SIZE + 5 if drawn else SIZE
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    targets, indices = torch.randint(0, 3, (count,), generator=generator), torch.arange(count)
    offsets = torch.randint(0, 6, (count, 2), generator=generator)
    flips, shifts = offsets[:, 0] % 2 == 0, torch.randn(count, 3, generator=generator)
    return Batch(images, targets, indices, [], Drawn(offsets, flips, shifts) if drawn else None)


def inputs(group: list[Batch]) -> list[Inputs]:
    return [Inputs(part.images, part.targets, part.drawn) for part in group]


def step_of(recipe: Recipe = TINY, **rest: Any) -> TrainingStep:
    return TrainingStep(network(recipe), recipe, CPU, **rest)


# Nothing on the host depends on a value.


def run_on_fakes(recipe: Recipe, drawn: bool = True) -> None:
    """Two steps on tensors without values, as a GPU would run them: the second finds the optimizer's state there."""
    on_cpu = {op: {**devices, "cpu": devices["cuda"]} for op, devices in _backend.KERNELS.items()}
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.MonkeyPatch.context() as patch,
        _backend.preferring(("auto", "native"), "cpu"),
    ):
        patch.setattr(_backend, "KERNELS", on_cpu)
        taking = step_of(recipe)
        taking.rate = taking.rate.float()
        for parameters in taking.optimizer.param_groups:
            parameters["lr"] = taking.rate
        images = torch.empty(2, 3, SIZE + 5, SIZE + 5, dtype=torch.uint8)
        if not drawn:
            images = images[:, :, :SIZE, :SIZE]
        numbers = Drawn(torch.empty(2, 2).long(), torch.empty(2).bool(), torch.empty(2, 3)) if drawn else None
        group = [Inputs(images, torch.empty(2).long(), numbers)] * recipe.accumulate
        for _ in range(2):
            taking._on_device(group, PREPROCESSING)


@pytest.mark.parametrize("drawn", [True, False], ids=["files", "digits"])
@pytest.mark.parametrize(
    "changed", [{}, {"accumulate": 2}, {"clip_norm": 1.0}, {"label_smoothing": 0.1}, {"freeze": "features"}], ids=str
)
def test_the_step_reads_no_value_on_the_host(changed: dict[str, Any], drawn: bool) -> None:
    run_on_fakes(replace(TINY, precision="bf16", **changed), drawn)


@pytest.mark.parametrize(
    "read",
    [lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: x.nonzero().tolist()],
    ids=["item", "bool", "nonzero"],
)
def test_a_value_that_the_step_reads_is_noticed(read: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *a, **rest: (read(logits), right(logits, *a, **rest))[1])
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        run_on_fakes(replace(TINY, precision="bf16"))


# The same weights.


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_a_plain_loop_bit_for_bit(accumulate: int) -> None:
    recipe = replace(TINY, accumulate=accumulate)
    taking, model = step_of(recipe), network(recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    groups = [[batch(2, seed=10 * at + part, drawn=False) for part in range(accumulate)] for at in range(3)]
    torch.manual_seed(1)
    losses = [float(taking(group, PREPROCESSING, 0.01 * at)[0]) for at, group in enumerate(groups, 1)]
    torch.manual_seed(1)
    for at, group in enumerate(groups, 1):
        optimizer.param_groups[0]["lr"] = 0.01 * at
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in group:
            x = PREPROCESSING(part.images).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), part.targets) / accumulate
            loss.backward()
            total += loss.detach()
        optimizer.step()
        assert losses[at - 1] == float(total)
    for name, weight in model.state_dict().items():
        assert torch.equal(taking.weights()[name], weight), name
    assert taking.optimizer.param_groups[0]["lr"] == 0.03, "a number, as checkpoints have it"


def test_bf16_weights_are_their_masters_rounded_and_the_start_is_kept() -> None:
    recipe = replace(TINY, precision="bf16", freeze="conv2")
    model = network(recipe)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    taking = TrainingStep(model, recipe, CPU)
    assert all(torch.equal(weight, start[name]) for name, weight in taking.weights().items()), "nothing is rounded"
    for seed in range(2):
        taking([batch(2, seed)], PREPROCESSING, 0.01)
    for name, weight in taking.weights().items():
        assert weight.dtype == torch.float32
        frozen = "conv2" in name
        assert torch.equal(weight, start[name]) == frozen, name
        assert torch.equal(model.state_dict()[name], weight if frozen else weight.bfloat16()), name


def test_gradients_of_several_bf16_batches_are_added_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    taking = step_of(replace(TINY, precision="bf16", accumulate=2))
    seen: list[torch.dtype] = []
    monkeypatch.setattr(taking, "_update", lambda: seen.extend(p.grad.dtype for p in taking.trained.values()))
    taking([batch(2, 0), batch(2, 1)], PREPROCESSING, 0.01)
    assert set(seen) == {torch.float32}


def test_bf16_goes_on_bit_for_bit_from_weights_and_optimizer_state() -> None:
    recipe = replace(TINY, precision="bf16", dropout=0.0)
    straight, again = step_of(recipe), step_of(recipe)
    for seed in range(2):
        straight([batch(2, seed)], PREPROCESSING, 0.01)
    state = straight.optimizer_state()
    assert {name for values in state["state"].values() for name in values} == {"momentum_buffer"}
    again.optimizer.load_state_dict(state)
    again.load_weights({name: weight.clone() for name, weight in straight.weights().items()})
    for taking in (straight, again):
        taking([batch(2, 7)], PREPROCESSING, 0.01)
    for name, weight in straight.weights().items():
        assert torch.equal(again.weights()[name], weight), name


def test_a_bf16_run_is_resumed_bit_for_bit_and_keeps_fp32_files(tmp_path: Path) -> None:
    recipe = replace(TINY, precision="bf16")
    straight = trainer(tmp_path / "straight", recipe)
    expected = straight.run(reporter())
    with pytest.raises(Interrupted):
        trainer(tmp_path / "broken", recipe).run(reporter(), stop_at=2)
    torch.manual_seed(99)
    again = resumed(tmp_path / "broken", recipe)
    path = checkpoint.newest(again.out, lambda text: pytest.fail(text)) / checkpoint.WEIGHTS
    assert {weight.dtype for weight in load_file(path).values()} == {torch.float32}
    result = again.run(reporter())
    assert same(straight, again)
    assert torch.equal(result.probabilities, expected.probabilities)
    for name, weight in straight.take.weights().items():
        assert torch.equal(again.take.weights()[name], weight), name


def test_an_optimizer_state_of_fp32_weights_goes_on_in_bf16() -> None:
    """As runs in bf16 had it when autocast cast their weights."""
    before, after = step_of(), step_of(replace(TINY, precision="bf16"))
    before([batch(2)], PREPROCESSING, 0.01)
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    after.load_weights(before.weights())
    for old, new in zip(before.trained.values(), after.trained.values(), strict=True):
        momenta = [taking.optimizer.state[p]["momentum_buffer"] for taking, p in ((before, old), (after, new))]
        assert torch.equal(*momenta)
    assert all(torch.equal(weight, before.weights()[name]) for name, weight in after.weights().items())
    after([batch(2, 1)], PREPROCESSING, 0.01)


# Memory that is too small.


@contextlib.contextmanager
def memory_for(images: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Context manager: a loss of more images than these raises ``error``."""
    right, seen = TrainingStep._loss, []

    def limited(self: TrainingStep, part: Inputs, preprocessing: Preprocessing) -> Any:
        seen.append(len(part.targets))
        if len(part.targets) > images:
            raise error
        return right(self, part, preprocessing)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "_loss", limited)
        yield seen


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["GPU", "CPU", "library"])
def test_a_batch_beyond_memory_is_halved_and_its_gradient_is_the_same(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(TINY, dropout=0.0, batch_size=7)
    whole, parts, notes = step_of(recipe), step_of(recipe), list[str]()
    parts.note = notes.append
    expected = whole([batch(7)], PREPROCESSING, 0.01)
    with memory_for(2, error, monkeypatch) as seen:
        found = parts([batch(7)], PREPROCESSING, 0.01)
        assert seen == [7, 4, 2, 2, 2, 1], "each weighs as many as it has"
        parts([batch(7, 1)], PREPROCESSING, 0.01)
        assert seen[6:] == [2, 2, 2, 1], "remembered"
        assert parts.last_loss() is not None
    assert [note.partition(" images")[0] + note[-38:] for note in notes] == [
        "7: now 4, with their gradients added up",
        "4: now 2, with their gradients added up",
    ]
    torch.testing.assert_close(found.loss, expected.loss)
    assert int(found.right) == int(expected.right)
    whole([batch(7, 1)], PREPROCESSING, 0.01)
    for name, weight in whole.weights().items():
        torch.testing.assert_close(parts.weights()[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_memory_that_a_later_step_lacks_is_found_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where images grow, or a smaller last batch runs beside the graph."""
    taking = step_of(replace(TINY, batch_size=2))
    for seed in range(4):
        taking([batch(2, seed)], PREPROCESSING, 0.01)
    with memory_for(1, OUT_OF_MEMORY[0], monkeypatch) as seen:
        taking([batch(2)], PREPROCESSING, 0.01)
    assert seen == [2, 1, 1]


@pytest.mark.parametrize("case", ["in a capture", "one image", "another error"])
def test_other_lack_of_memory_is_an_error(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taking = step_of(replace(TINY, batch_size=2))
    if case == "in a capture":
        taking.device = torch.device("cuda")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(taking, "_gradients", lambda *_: raising(OUT_OF_MEMORY[0])())
    error = RuntimeError("shapes do not fit") if case == "another error" else OUT_OF_MEMORY[0]
    limit = 0 if case == "one image" else 1
    with memory_for(limit, error, monkeypatch), pytest.raises(RuntimeError, match=r"out of memory|do not fit"):
        taking([batch(2)], PREPROCESSING, 0.01)
    assert taking.pieces == (2 if case == "one image" else 1)


def test_a_resumed_run_keeps_the_pieces_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path / "run")
    with memory_for(1, OUT_OF_MEMORY[0], monkeypatch), pytest.raises(Interrupted):
        run.run(reporter(), stop_at=1)
    text = io.StringIO()
    with memory_for(1, OUT_OF_MEMORY[0], monkeypatch) as seen:
        resumed(run.out, TINY).run(reporter(text))
    assert max(seen) == 1, "no step runs out of memory again"
    assert "batches stay in 2 pieces: memory was too small before" in text.getvalue()
    path = checkpoint.newest(run.out, pytest.fail)
    state, weights = checkpoint.read_state(path / checkpoint.STATE), load_file(path / checkpoint.WEIGHTS)
    for kept, pieces in (({}, 1), ({"pieces": 4}, 4)):  # earlier versions record none
        load(run, path, {k: v for k, v in state.items() if k != "pieces"} | kept, weights)
        assert run.take.pieces == pieces
    with pytest.raises(CommandError, match="pieces is 0"):
        load(run, path, state | {"pieces": 0}, weights)


# Batches on their way to the device.


def test_a_batch_on_the_device_is_not_pinned() -> None:
    """PyTorch pins dense CPU tensors alone."""
    feed, given = Feed(CPU), batch(2)
    feed.device = torch.device("meta")
    there = given._replace(images=given.images.to("meta"), targets=given.targets.to("meta"))
    assert there.drawn is not None
    there = there._replace(drawn=Drawn(*(tensor.to("meta") for tensor in there.drawn)))
    found = feed._copied(there)
    assert [(tensor.device.type, tensor.shape) for tensor in found.tensors()] == [
        ("meta", tensor.shape) for tensor in inputs([given])[0].tensors()
    ]


def test_a_run_on_another_gpu_makes_it_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    prepare(torch.device("cuda"), 0)
    assert chosen == []
    prepare(torch.device("cuda:1"), 0)
    assert chosen == [torch.device("cuda:1")]


def test_no_constant_is_copied_from_the_host_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From pageable memory, which no capture allows."""
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    offsets, mean, std = torch.zeros(2, 2, dtype=torch.int64), PREPROCESSING.mean, PREPROCESSING.std
    drawn = offsets, offsets[:, 0] > 0, torch.zeros(2, 3)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("made on the host"))
    augmented = augment(images.permute(0, 2, 3, 1), *drawn, SIZE, mean, std, torch.float32, 1)
    torch.testing.assert_close(augmented, PREPROCESSING(images), check_stride=False)


# The graph, whose calls a stand-in for CUDA's records.


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Graph:
    """Records: what is done while it captures is done again, on the same tensors, by ``replay``."""

    def __init__(self) -> None:
        self.work: Callable[[], None] = lambda: None
        self.replays = 0
        self.mode = "not captured"

    def replay(self) -> None:
        self.replays += 1
        self.work()


def capture(into: Graph, stream: Stream, capture_error_mode: str = "global") -> contextlib.nullcontext[None]:
    into.mode = capture_error_mode
    return contextlib.nullcontext()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """torch.cuda as far as a step needs it."""
    made: list[Graph] = []

    def new() -> Graph:
        made.append(Graph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    return made


def test_a_graph_reads_its_own_inputs_and_one_is_made_for_each_shape(graphs: list[Graph]) -> None:
    seen: list[tuple[int, ...]] = []
    results = torch.zeros(()), torch.zeros(())

    def work(given: list[Inputs], _preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        seen.append(tuple(part.images.data_ptr() for part in given))

        def again() -> None:
            results[0].fill_(float(given[0].images.float().sum()))
            results[1].fill_(float(given[0].targets.sum()))

        again()
        if graphs:
            graphs[-1].work = again
        return results

    graphed = graph.Graphed(work)
    given = [inputs([batch(2, seed)]) for seed in range(6)]
    found = [graphed(part, PREPROCESSING) for part in given]
    assert len(seen) == graph.WARM_UP + 1, "steps to warm up, and the capture"
    assert [len(graphs), graphs[0].replays] == [1, 3]
    assert graphs[0].mode == "thread_local", "other threads may pin memory meanwhile"
    read, _ = found[-1]
    assert read[0].images.data_ptr() == seen[-1][0] != given[-1][0].images.data_ptr()
    for part, (_, (total, _)) in list(zip(given, found, strict=True))[graph.WARM_UP :]:
        assert float(total) == float(part[0].images.float().sum()), "each result is its own step's"
    for size in (SIZE, SIZE - 4):  # another preprocessing is another graph, too
        for seed in range(graph.WARM_UP + 1):
            graphed(inputs([batch(3, seed)]), replace(PREPROCESSING, size=size))
    assert len(graphs) == 3
    graphed.forget()
    before = len(seen)
    graphed(inputs([batch(3)]), replace(PREPROCESSING, size=SIZE - 4))
    assert len(seen) == before + 1
    assert len(graphs) == 3, "it warms up anew"


def test_full_batches_go_through_the_graph_and_train_on_what_is_new(
    graphs: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in runs the very step on the graph's inputs, so the weights are those of eager steps."""
    recipe = replace(TINY, dropout=0.0)
    eager, replayed = step_of(recipe), step_of(recipe)
    sizes: list[int] = []

    def work(given: list[Inputs], preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        def again() -> None:
            sizes.append(len(given[0].targets))
            results[:] = replayed._on_device(given, preprocessing)

        results: list[Tensor] = []
        if not graphs or graphs[-1].replays:
            again()
            return results[0], results[1]
        graphs[-1].work = again
        return torch.zeros(()), torch.zeros(())  # a capture computes nothing

    replayed.graph = graph.Graphed(work)
    for seed, count in enumerate([2, 2, 2, 2, 2, 1, 2]):
        for taking in (eager, replayed):
            taking([batch(count, seed)], PREPROCESSING, 0.01)
        for name, weight in eager.weights().items():
            assert torch.equal(replayed.weights()[name], weight), (seed, name)
        assert replayed.last_loss() == eager.last_loss()
    assert len(sizes) == 6, "the smaller batch ran by itself"
    assert graphs[0].replays == 3


# Losses on their way to the host.


class Event:
    passed = False

    def record(self, _stream: Any) -> None:
        pass

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True


def taken(value: float) -> Taken:
    return Taken(torch.tensor(value), torch.tensor(1), 2)


def test_losses_are_read_once_their_copy_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: events.append(Event()) or events[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    losses = Losses(torch.device("cuda"))
    for number in range(losses.every):
        assert losses.read() == []
        losses.add(number, taken(float(number)), {"lr": number})
    assert losses.read() == [], "not there yet"
    events[0].passed = True
    found = losses.read()
    assert [(one.step, one.loss, one.accuracy, one.images) for one in found] == [
        (number, float(number), 0.5, 2) for number in range(losses.every)
    ]
    losses.add(99, taken(9.0), {})
    assert [one.step for one in losses.read(wait=True)] == [99]
    for number in range(4 * losses.every):
        losses.add(number, taken(1.0), {})
    assert len(losses.read()) == 2 * losses.every, "the host is no further ahead than two copies"


def test_on_the_cpu_each_loss_is_read_at_once() -> None:
    losses = Losses(CPU)
    losses.add(1, taken(2.5), {})
    assert [(one.step, one.loss) for one in losses.read()] == [(1, 2.5)]
