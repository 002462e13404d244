"""Two processes under gloo: DDP and FSDP2 around accelerated models and the network, one step against one process."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import alexnet_ext as ax
from tests.support import networks, oracle

RANKS, SIDE = 2, 67


def stock() -> nn.Module:
    torch.manual_seed(0)
    return networks.CaffeNet(5, 16, SIDE).double().eval()


def network() -> nn.Module:
    torch.manual_seed(0)
    model = ax.models.alexnet("paper", num_classes=5, image_size=SIDE, init="kaiming")
    model.classifier.fc6, model.classifier.fc7 = nn.Linear(256, 16), nn.Linear(16, 16)  # else most of the time
    model.classifier.fc8 = nn.Linear(16, 5)
    return model.double().eval()


def shard(model: nn.Module) -> nn.Module:
    """Shard each layer with weights by itself, then the rest."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in list(model.modules()):
        if next(layer.parameters(recurse=False), None) is not None:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_whole(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))


def accelerated(model: nn.Module) -> nn.Module:
    assert any(row.action == "fused" for row in ax.accelerate(model))
    return model


# How each process prepares its model from the stock one (or the network).
WAYS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "accelerate, DDP": (stock, lambda model: DistributedDataParallel(accelerated(model))),
    "DDP, accelerate": (stock, lambda model: accelerated(DistributedDataParallel(model))),
    "accelerate, FSDP2": (stock, lambda model: shard_whole(accelerated(model))),
    "accelerate, FSDP2 by layer": (stock, lambda model: shard(accelerated(model))),
    "FSDP2, accelerate": (stock, lambda model: accelerated(shard_whole(model))),
    "network, DDP": (network, DistributedDataParallel),
    "network, FSDP2": (network, shard),
}


def batch() -> Tensor:
    return torch.randn(2 * RANKS, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet, patience = f"file://{folder}/meet", timedelta(minutes=3)  # if one rank dies, the other must not wait for ever
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=RANKS, timeout=patience)
    try:
        for name, (build, prepare) in WAYS.items():
            model = prepare(build())
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            x = batch()[rank::RANKS]
            step(model, optimizer, x)
            # The second step with the stock layers, unless FSDP2 made another class of the fused ones.
            if name == "accelerate, FSDP2 by layer":
                with pytest.raises(RuntimeError, match="cannot restore '0': it is a FSDPConv2dReLUMaxPool2dLRN now"):
                    ax.restore(model)
            else:
                ax.restore(model)
            step(model, optimizer, x)
            if rank == 0:
                torch.save(weights(model), f"{folder}/{name}.pt")
            else:
                weights(model)  # gathering needs both ranks
    finally:
        dist.destroy_process_group()
    # FSDP keeps the group alive. A gloo thread that frees a tensor while the interpreter shuts down aborts the process
    # (pytorch/pytorch#179291): leave without shutting down.
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the weights of each way after two steps in two processes."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(path),), nprocs=RANKS)
    return path


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_learn_what_one_does(folder: Path, name: str) -> None:
    reference = WAYS[name][0]()
    before = copy.deepcopy(reference)
    optimizer = torch.optim.SGD(reference.parameters(), 0.01)
    for _ in range(2):
        step(reference, optimizer, batch())
    found = torch.load(folder / f"{name}.pt")
    for ours, exact, start in zip(found, reference.parameters(), before.parameters(), strict=True):
        oracle.assert_accurate("weights", ours, exact, None, terms=25 * 9216)
        assert not torch.equal(ours, start)
