"""One network on many ranks, each with a share of every batch: DistributedDataParallel, and dropout of the whole batch.

Gradients add up. A rank's loss is that of its images divided by the images of all ranks, so the sum over the ranks is
the gradient of the whole batch, however many images each of them has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Place(NamedTuple):
    """A rank's images in the whole batch of ``images``: from number ``first`` on."""

    first: int
    images: int


def share(total: int, rank: int, size: int) -> range:
    """The numbers of ``total`` that are ``rank``'s: neighbours, at most one more than another rank has."""
    return range(-(-total * rank // size), -(-total * (rank + 1) // size))


class SharedDropout(nn.Module):
    """``nn.Dropout`` on a rank's rows of a batch, and its ``columns``: each rank draws the mask of all, from generators
    in the same state, so that it does not depend on the number of ranks. On a CPU the mask is that of ``F.dropout``."""

    def __init__(self, p: float, features: int, columns: slice = slice(None)) -> None:
        super().__init__()
        self.p, self.features, self.columns = p, features, columns
        self.place, self.mask = Place(0, 0), None

    mask: Tensor | None

    def begin(self, place: Place) -> None:
        """The next rows are those of ``place``, of another batch."""
        self.place, self.mask = place, None

    def draw(self, like: Tensor) -> Tensor:
        """The mask of the whole batch, drawn once; the values that are kept are scaled."""
        if self.mask is None:
            mask = torch.empty(self.place.images, self.features, dtype=like.dtype, device=like.device)
            self.mask = mask.bernoulli_(1 - self.p).div_(1 - self.p) if self.p < 1 else mask.zero_()
        return self.mask

    def forward(self, x: Tensor) -> Tensor:
        """(N, columns) in training: the next N rows."""
        if not self.training or self.p == 0:
            return x
        first = self.place.first
        self.place = self.place._replace(first=first + len(x))
        return x * self.draw(x)[first : first + len(x), self.columns]

    def extra_repr(self) -> str:
        return f"p={self.p}, features={self.features}"


class _OrNothing(nn.Module):
    """The network; without images a zero that depends on each weight, as the exchange waits for all gradients."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor | None) -> Tensor:
        if images is not None:
            scores: Tensor = self.network(images)
            return scores
        trained = [p for p in self.network.parameters() if p.requires_grad]
        return torch.stack([p.flatten()[0].float() for p in trained]).sum() * 0


class DataParallel:
    """``network``, called with a rank's images; its gradients are summed over the ranks during the backward."""

    def __init__(self, network: nn.Module, model: nn.Module) -> None:
        self.dropouts = _share_dropout(model)
        self.parallel = DistributedDataParallel(_OrNothing(network), gradient_as_bucket_view=True)
        self.parallel.register_comm_hook(None, lambda _state, bucket: _add_up(bucket.buffer()))

    def __call__(self, images: Tensor) -> Tensor:
        scores: Tensor = self.parallel(images)
        return scores

    def begin(self, place: Place) -> None:
        """The next images are those of ``place``, in another batch."""
        for dropout in self.dropouts:
            dropout.begin(place)

    def nothing(self, dtype: torch.dtype) -> Tensor:
        """In place of a loss where this rank has no image. Draws what the others draw."""
        for dropout in self.dropouts:
            if dropout.p > 0:
                device = next(self.parallel.parameters()).device
                dropout.draw(torch.empty(0, dtype=dtype, device=device))
        zero: Tensor = self.parallel(None)
        return zero

    @contextmanager
    def exchanging(self, wanted: bool) -> Iterator[None]:
        """Context manager around a forward and its backward: only ``wanted`` gradients are summed, with those kept
        before."""
        if wanted:
            yield
            return
        with self.parallel.no_sync():
            yield


def _add_up(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """DDP's own exchange without its division by the number of ranks."""
    work = dist.all_reduce(gradients, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _share_dropout(model: nn.Module) -> list[SharedDropout]:
    """Put a SharedDropout in the place of each nn.Dropout, after which comes a linear layer."""
    found: list[SharedDropout] = []
    for parent in model.modules():
        features = 0
        for name, child in reversed(list(parent.named_children())):
            features = getattr(child, "in_features", features)
            if isinstance(child, nn.Dropout):
                shared = SharedDropout(child.p, features)
                setattr(parent, name, shared)
                found.insert(0, shared)
    return found
