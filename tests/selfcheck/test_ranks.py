"""Two processes under gloo prove kernels once, and run stock PyTorch where what they run on differs."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import alexnet_ext as ax
from alexnet_ext.ops import _backend, _known
from alexnet_ext.ops._known import Proof, Race, Unit
from alexnet_ext.selfcheck import prove, prover, ranks
from alexnet_ext.selfcheck.prove import Proved

RANKS, CPU = 2, torch.device("cpu")
UNIT = Unit("relu_max_pool2d", "native", "float32", "contiguous")
CALL = _known.call_of("relu_max_pool2d", "float32", "contiguous", (1, 2, 9, 9))


class Work:
    """What ``together`` is to have done once: each rank's would find something else."""

    def __init__(self, rank: int, error: Exception | None = None) -> None:
        self.rank, self.error, self.calls = rank, error, 0

    def __call__(self) -> Proved:
        self.calls += 1
        if self.error is not None:
            raise self.error
        _known.on(CPU).add({str(UNIT): Proof("proven")}, {CALL: Race("native", {"native": float(self.rank)})})
        return Proved(f"by rank {self.rank}", 1.0)


Outcome = dict[str, Any]


def found(proved: Proved | None, calls: int) -> Outcome:
    """What this rank knows afterwards."""
    known = _known.on(CPU)
    race = known.races.get(CALL)
    proof = known.proof(UNIT)
    x = torch.randn(1, 2, 9, 9)
    decision = _backend.decide("relu_max_pool2d", CPU, x=x)
    return {
        "calls": calls,
        "by": proved and proved.device,
        "state": proof.state,
        "reason": proof.reason,
        "time": race.microseconds["native"] if race else None,
        "files": len(_known.files()),
        "runs": decision.backend,
        "y": ax.ops.relu_max_pool2d(x, 3).shape == (1, 2, 3, 3),
    }


def alike(rank: int) -> Outcome:
    work = Work(rank)
    return found(ranks.together(CPU, work), work.calls)


def other_driver(rank: int) -> Outcome:
    """Where this rank had its own proofs before."""
    work = Work(rank)
    with mock.patch.object(_known, "driver", functools.cache(lambda: f"driver {rank}")):
        _known.reopen()
        _known.on(CPU).add({str(UNIT): Proof("proven")})
        return found(ranks.together(CPU, work), work.calls)


def other_setting(rank: int) -> Outcome:
    work = Work(rank)
    torch.backends.cuda.matmul.fp32_precision = ("ieee", "tf32")[rank]
    try:
        return found(ranks.together(CPU, work), work.calls)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def two_kinds(rank: int) -> Outcome:
    """Each kind has a driver of its own, which is no difference."""
    work = Work(rank)
    facts = mock.patch.object(_known, "device_facts", return_value={"device": f"GPU {rank}", "capability": "9.0"})
    driver = mock.patch.object(_known, "driver", functools.cache(lambda: f"driver {rank}"))
    with facts, driver:
        _known.reopen()
        return found(ranks.together(CPU, work), work.calls)


def failing(rank: int) -> Outcome:
    work = Work(rank, ValueError("no memory"))
    with pytest.raises(RuntimeError) as caught:
        ranks.together(CPU, work)
    return {"calls": work.calls, "error": str(caught.value)}


def failing_kind(rank: int) -> Outcome:
    """The leader of the second kind fails; the first kind's rank must know."""
    work = Work(rank, ValueError("no memory") if rank else None)
    with mock.patch.object(_known, "device_facts", return_value={"device": f"GPU {rank}", "capability": "9.0"}):
        _known.reopen()
        with pytest.raises(RuntimeError) as caught:
            ranks.together(CPU, work)
    return {"calls": work.calls, "error": str(caught.value)}


def proved(rank: int) -> Outcome:
    """By the public function: units are examined by one rank, and all follow."""
    examined: list[Unit] = []

    def examine(units: list[Unit], *_: object) -> dict[Unit, Proof]:
        examined.extend(units)
        return {unit: Proof("proven") for unit in units}

    layer = ax.nn.ReLUMaxPool2d(3)
    examining = mock.patch.object(prover, "examine", examine)
    racing = mock.patch.object(prove, "race_calls", return_value=())
    with examining, racing:
        outcome = ax.prove("cpu", layer, (1, 2, 9, 9), dtype=torch.float32, layout=torch.contiguous_format)
    return found(outcome, UNIT in examined) | {"right": "refused" not in str(outcome)}


def lazy(rank: int) -> Outcome:
    """A first call proves nothing: the other ranks may not come to it."""
    with mock.patch.dict(os.environ, ALEXNET_EXT_PROVE="lazy"), mock.patch.object(prover, "examine", pytest.fail):
        return found(None, 0)


SCENES: dict[str, Callable[[int], Outcome]] = {
    scene.__name__: scene
    for scene in (alike, other_driver, other_setting, two_kinds, failing, failing_kind, proved, lazy)
}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    meet, patience = f"file://{folder}/meet", timedelta(minutes=3)  # if one rank dies, the other must not wait for ever
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=RANKS, timeout=patience)
    _backend.ORDER["cpu"] = {"native": _backend.UNKNOWN}
    outcomes = {}
    for name, scene in SCENES.items():
        os.environ["XDG_CACHE_HOME"] = f"{folder}/{name}-{rank}"
        _known.reopen()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcomes[name] = scene(rank) | {"warnings": [str(w.message) for w in caught]}
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    dist.barrier()
    # A gloo thread that frees a tensor while the interpreter shuts down aborts the process (pytorch/pytorch#179291):
    # leave without shutting down.
    os._exit(0)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    """What each rank found in each scene."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]


pytestmark = pytest.mark.usefixtures("native")


def of(outcomes: list[dict[str, Outcome]], scene: str, name: str) -> list[Any]:
    return [outcome[scene][name] for outcome in outcomes]


@pytest.mark.parametrize("scene", ["alike", "proved"])
def test_one_rank_does_the_work_and_all_follow_its_table(scene: str, outcomes: list[dict[str, Outcome]]) -> None:
    assert of(outcomes, scene, "calls") == [1, 0]
    assert of(outcomes, scene, "state") == ["proven"] * 2
    assert of(outcomes, scene, "runs") == ["native"] * 2
    assert of(outcomes, scene, "files") == [1, 0], "the others keep no file"
    assert of(outcomes, scene, "warnings") == [[], []]
    by, by_other = of(outcomes, scene, "by")
    assert by == by_other


def test_the_others_take_the_races_too(outcomes: list[dict[str, Outcome]]) -> None:
    assert of(outcomes, "alike", "time") == [0.0, 0.0]
    assert of(outcomes, "alike", "by") == ["by rank 0"] * 2


@pytest.mark.parametrize(
    ("scene", "difference"),
    [
        ("other_driver", "driver is 'driver 1' on rank 1, and 'driver 0' on rank 0"),
        ("other_setting", "matmul is 'tf32' on rank 1, and 'ieee' on rank 0"),
    ],
)
def test_ranks_that_differ_all_run_stock(scene: str, difference: str, outcomes: list[dict[str, Outcome]]) -> None:
    """And one of them says so: a rank whose table is another's would compute what nobody has checked."""
    assert of(outcomes, scene, "calls") == [0, 0]
    assert of(outcomes, scene, "by") == [None, None]
    assert of(outcomes, scene, "state") == ["refused"] * 2
    assert of(outcomes, scene, "reason") == [f"the ranks differ: {difference}"] * 2
    assert of(outcomes, scene, "runs") == ["stock"] * 2
    assert of(outcomes, scene, "y") == [True] * 2
    said = f"all ops run on stock PyTorch, as the ranks differ: {difference}"
    assert of(outcomes, scene, "warnings") == [[said], []]


def test_each_kind_of_device_has_a_leader(outcomes: list[dict[str, Outcome]]) -> None:
    assert of(outcomes, "two_kinds", "calls") == [1, 1]
    assert of(outcomes, "two_kinds", "by") == ["by rank 0", "by rank 1"]
    assert of(outcomes, "two_kinds", "time") == [0.0, 1.0]
    assert of(outcomes, "two_kinds", "files") == [1, 1]
    assert of(outcomes, "two_kinds", "warnings") == [[], []]


@pytest.mark.parametrize(("scene", "rank", "calls"), [("failing", 0, [1, 0]), ("failing_kind", 1, [1, 1])])
def test_an_error_of_one_is_raised_on_all(
    scene: str, rank: int, calls: list[int], outcomes: list[dict[str, Outcome]]
) -> None:
    said = f"rank {rank} could not prove the kernels: ValueError: no memory"
    assert of(outcomes, scene, "error") == [said] * 2
    assert of(outcomes, scene, "calls") == calls


def test_no_rank_proves_at_a_first_call(outcomes: list[dict[str, Outcome]]) -> None:
    assert of(outcomes, "lazy", "runs") == ["stock"] * 2
    for said in of(outcomes, "lazy", "warnings"):
        (warning,) = said
        assert "its kernels were not yet proven there" in warning
