"""Accelerated models and PyTorch's other tools: torch.func, checkpoint, saved-tensor hooks, determinism."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.utils.checkpoint import checkpoint_sequential

import alexnet_ext as ax
from tests.support.networks import BLOCK, sequential


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """(accelerated, stock) with the same weights, in float64."""
    block = sequential(*BLOCK, nn.Conv2d(6, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)).double()
    stock = sequential(*block)
    assert sum(row.action == "fused" for row in ax.accelerate(block)) == 2
    return block, stock


def image(batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, 13, 11, dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), [x, *model.parameters()]))


def test_torch_func() -> None:
    """Per-sample gradients, and forward-mode derivatives."""
    ours, stock = pair()
    x = image()

    def losses(model: nn.Module) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}

        def loss(given: dict[str, Tensor], one: Tensor) -> Tensor:
            return torch.func.functional_call(model, given, (one[None],)).square().sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        return each, torch.func.jvp(model, (x,), (torch.ones_like(x),))

    torch.testing.assert_close(losses(ours), losses(stock))
    ensemble = torch.func.vmap(lambda bias: torch.func.functional_call(ours, {"0.bias": bias}, (x,)))
    biases = torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([torch.func.functional_call(stock, {"0.bias": bias}, (x,)) for bias in biases])
        torch.testing.assert_close(ensemble(biases), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    """Cut between a fused layer and its placeholders too."""
    ours, stock = pair()
    x = image().requires_grad_()
    expected = gradients(stock, x, stock(x))
    for segments in (2, 3, len(ours)):
        y = checkpoint_sequential(ours, segments, x, use_reentrant=use_reentrant)
        if use_reentrant:  # torch.autograd.grad does not support these
            found = []
            y.square().sum().backward()
            for tensor in (x, *ours.parameters()):
                found.append(tensor.grad)
                tensor.grad = None
        else:
            found = gradients(ours, x, y)
        torch.testing.assert_close(found, expected)


def test_saved_tensors_may_live_elsewhere() -> None:
    ours, stock = pair()
    x = image().requires_grad_()
    packed: list[torch.dtype] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.dtype)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ours(x)
    torch.testing.assert_close(gradients(ours, x, y), gradients(stock, x, stock(x)))
    assert packed.count(torch.uint8) == 2, "the winners of both pools"
    with torch.autograd.graph.save_on_cpu():
        y = ours(x)
    torch.testing.assert_close(gradients(ours, x, y), gradients(stock, x, stock(x)))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_raise_nothing_and_repeat_every_bit() -> None:
    ours, _ = pair()
    ours = ours.float()
    x = image(8).float().requires_grad_()
    first = gradients(ours, x, ours(x))
    for _ in range(20):
        for again, once in zip(gradients(ours, x, ours(x)), first, strict=True):
            assert torch.equal(again, once)


def test_inference_mode_and_hooks_of_the_model() -> None:
    ours, stock = pair()
    x = image()
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), stock(x))
    seen: list[str] = []
    ours.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    ours.register_forward_hook(lambda module, inputs, output: seen.append("after"))
    ours.register_full_backward_hook(lambda module, given, sent: seen.append("backward"))
    ours[0].register_full_backward_hook(lambda module, given, sent: seen.append(str(tuple(given[0].shape))))
    ours(x.requires_grad_()).sum().backward()
    assert seen == ["before", "after", "(3, 4, 13, 11)", "backward"]


def test_autocast_and_channels_last() -> None:
    ours, stock = pair()
    ours, stock = (model.float().to(memory_format=torch.channels_last) for model in (ours, stock))
    x = image().float().to(memory_format=torch.channels_last)
    assert ours[0](x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x), stock(x))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x), stock(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """With a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_run_stock(mesh: DeviceMesh) -> None:
    """They have rules for PyTorch's operators only."""
    convolution = nn.Conv2d(4, 6, 3, padding=1)  # PyTorch 2.11 has no rule for one without padding, nor for pooling
    ours = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), ax.nn.LinearReLU(858, 3))
    assert ax.accelerate(ours)[0].action == "fused"
    x = torch.randn(3, 4, 13, 11)
    expected = ours(x)
    derivatives = torch.autograd.grad(expected.sum(), list(ours.parameters()))
    y = distribute_module(ours, mesh)(distribute_tensor(x, mesh, [Shard(0)]))
    found = torch.autograd.grad(y.sum(), list(ours.parameters()))
    torch.testing.assert_close([t.full_tensor() for t in (y, *found)], [expected, *derivatives])
    with pytest.raises(RuntimeError, match="backend='native' does not cover tensors of type DTensor"):
        ax.ops.relu_max_pool2d(y[None], 1, backend="native")
