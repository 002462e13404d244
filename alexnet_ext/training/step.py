"""One step of training: bytes of images in, new weights, the loss and the number of right guesses out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models
from .._errors import is_out_of_memory
from ..data.batches import Batch
from ..data.preprocessing import Preprocessing
from ..optim import LARS, SGD
from ..parallel.data import DataParallel, Place
from ..parallel.ranks import ALONE, Ranks
from .evaluate import DTYPES, autocast, to_device
from .feed import Feed, Inputs
from .finite import Finite
from .graph import Graphed
from .recipe import Recipe


class Taken(NamedTuple):
    """What a step measured, on the device: the mean loss and the number of right guesses of ``images`` images. Of
    several ranks each has a part of both, and ``images`` are those of all."""

    loss: Tensor
    right: Tensor
    images: int


class TrainingStep:
    """Steps of SGD or LARS on ``model`` by ``recipe``; ``last_loss()`` is that of the images of the last one.

    bf16 weights have fp32 masters in the optimizer (``alexnet_ext.optim.SGD``): ``weights()`` returns them. LARS, the
    stock network, fp16 and several batches a step have fp32 weights that autocast casts.

    On a GPU full batches run as one CUDA graph. fp16, the stock network, ``detect_nan`` and several ``ranks`` run
    eagerly, and so do smaller batches. ``note`` is called with a line for the user.
    """

    def __init__(
        self,
        model: models.AlexNet,
        recipe: Recipe,
        device: torch.device,
        detect_nan: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.recipe, self.device, self.ranks = model, recipe, device, ranks
        self.note: Callable[[str], None] = lambda _text: None
        dtype = DTYPES[recipe.precision]
        depth = model.take_depth(device, dtype)
        # In autocast's dtype at once, and with the depth that conv1 takes: no other pass over the images follows.
        self.augmented: dict[str, Any] = {"space_to_depth": depth, "dtype": dtype}
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Gradients are in their weights' dtype: those of several batches are added up in fp32.
        plain = recipe.optimizer == "sgd" and recipe.accumulate == 1
        self.has_masters = recipe.precision == "bf16" and plain and model.fused
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=recipe.precision == "fp16")
        # Read on the device, so that a graph is replayed with the rate that it then has. PyTorch's SGD reads fp32 on a
        # GPU, and any float on a CPU.
        wide = device.type == "cpu" and not self.has_masters
        self.rate = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)
        self.one = torch.ones((), device=device)  # the gradient of a loss, which backward() would fill at each step
        compiled = recipe.compile and not detect_nan  # which looks at each operation
        network: Any = torch.compile(model, dynamic=False) if compiled else model
        self.parallel = DataParallel(network, model) if ranks.many else None
        self.network: Callable[[Tensor], Tensor] = self.parallel or network
        self.feed = Feed(device)
        self.finite = Finite(model, self.trained, backward=not self.scaler.is_enabled()) if detect_nan else None
        self.graph = Graphed(self._on_device) if self.eager_reason() is None else None
        self.places: list[Place] = []  # of the batches among those of all ranks
        self.pieces = 1  # of each batch, whose gradients are added up
        self.number = 0  # of the last step in the run
        self.last: tuple[Inputs, Preprocessing] | None = None

    def eager_reason(self) -> str | None:
        """Why the steps are not replayed as a CUDA graph; None if they are."""
        if self.device.type != "cuda":
            return "there is no GPU"
        if self.scaler.is_enabled():
            return "fp16's scaling of the loss is not captured"
        if not self.model.fused:
            return "the network is the stock one"
        if self.ranks.many:
            return "the ranks exchange gradients meanwhile"
        return "--detect-nan looks at each operation" if self.finite is not None else None

    def _optimizer(self) -> torch.optim.Optimizer:
        recipe, parameters = self.recipe, list(self.trained.values())
        settings: dict[str, Any] = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
        if recipe.optimizer == "lars":  # a trust of 1: the rate is the step relative to a layer's weights
            return LARS(parameters, **settings, trust_coefficient=1.0)
        if not self.has_masters:
            return torch.optim.SGD(parameters, **settings, fused=True)
        optimizer = SGD(parameters, **settings)
        for parameter in parameters:  # frozen ones stay fp32: autocast casts them
            optimizer.state[parameter]["master"] = parameter.detach()
            parameter.data = parameter.data.bfloat16()
        return optimizer

    def __call__(
        self,
        group: list[Batch],
        preprocessing: Preprocessing,
        rate: float,
        number: int = 1,
        places: list[Place] | None = None,
    ) -> Taken:
        """Step ``number``, from 1, at learning rate ``rate`` on all images of some batches, each of at least one image.

        Of several ranks ``places`` says which images of each batch this one has, maybe none. Raises NotFinite with
        ``detect_nan``.
        """
        self.number = number
        self.places = places or []
        inputs = self.feed(group)
        self.rate.fill_(rate)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.rate
        full = [len(part.targets) for part in inputs] == [self.recipe.batch_size] * self.recipe.accumulate
        if self.graph is not None and full:
            inputs, (loss, right) = self.graph(inputs, preprocessing)
        else:
            loss, right = self._on_device(inputs, preprocessing)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate  # a number in a checkpoint
        own = [part for part in inputs if len(part.targets)]
        self.last = (own[-1], preprocessing) if own else self.last
        return Taken(loss, right, self._images(inputs))

    def _images(self, group: list[Inputs]) -> int:
        """The images of all ranks in some batches."""
        if self.parallel is not None:
            return sum(place.images for place in self.places)
        return sum(len(part.targets) for part in group)

    def _on_device(self, group: list[Inputs], preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        """The whole step by tensors alone: the mean loss and the number of right guesses. Without
        ``detect_nan`` nothing on the host depends on a value, so that a graph can repeat it."""
        with self._watching():
            measured = self._fitting_gradients(group, preprocessing)
        self._update()
        if self.finite is not None:
            self.finite.examine()
        return measured

    def _watching(self) -> AbstractContextManager[None]:
        return nullcontext() if self.finite is None else self.finite.watching(self.number)

    def _fitting_gradients(self, group: list[Inputs], preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        """``_gradients``, of smaller and smaller pieces of the batches until one fits into memory."""
        captures = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()  # nothing may wait then
        while True:
            largest = max(len(part.targets) for part in self._pieces(group))
            try:
                return self._gradients(group, preprocessing)
            except RuntimeError as error:
                # Other ranks would wait for gradients that are not there.
                if captures or self.ranks.many or largest == 1 or not is_out_of_memory(error):
                    raise
            self.pieces *= 2  # not above: there the error still holds the memory of what failed
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            size = max(len(part.targets) for part in self._pieces(group))
            self.note(f"{largest} images at a time do not fit into memory: now {size}, with their gradients added up")

    def _pieces(self, group: list[Inputs]) -> Iterator[Inputs]:
        for part in group:
            yield from part.split(self.pieces)

    def _gradients(self, group: list[Inputs], preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        images = self._images(group)
        losses, right = [], []
        for part in self._exchanged(group):
            if not len(part.targets):
                assert self.parallel is not None
                self.parallel.nothing(DTYPES[self.recipe.precision]).backward()
                losses.append(torch.zeros_like(self.one))
                right.append(torch.zeros_like(self.one, dtype=torch.int64))
                continue
            logits, mean = self._loss(part, preprocessing)
            share = len(part.targets) / images
            whole = share == 1  # as most are: then no scalar is filled, multiplied or added, by a launch each
            self.scaler.scale(mean).backward(self.one if whole else torch.full_like(self.one, share))
            losses.append(mean.detach() if whole else mean.detach() * share)
            right.append((logits.argmax(1) == part.targets).sum())
        return reduce(torch.add, losses), reduce(torch.add, right)

    def _exchanged(self, group: list[Inputs]) -> Iterator[Inputs]:
        """The pieces, one after another; the ranks add up their gradients during the backward of the last."""
        if self.parallel is None:
            yield from self._pieces(group)
            return
        for number, (part, place) in enumerate(zip(group, self.places, strict=True), 1):
            self.parallel.begin(place)
            with self.parallel.exchanging(number == len(group)):
                yield part

    def _loss(self, part: Inputs, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
        """Scores and the mean loss. Only full pieces are compiled: each other size would be compiled anew."""
        images = to_device(part.images, preprocessing, self.device, part.drawn, **self.augmented)
        whole = self.parallel is not None or len(part.targets) == -(-self.recipe.batch_size // self.pieces)
        with autocast(self.device, self.recipe.precision):
            logits = self.network(images) if whole and self.model.training else self.model(images)
            mean = F.cross_entropy(logits, part.targets, label_smoothing=self.recipe.label_smoothing)
        return logits.detach(), mean

    def _update(self) -> None:
        if self.recipe.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def last_loss(self) -> float | None:
        """The loss of the last step's images by the weights after it, without dropout; None before the first step."""
        if self.last is None:
            return None
        part, preprocessing = self.last
        self.model.eval()
        with torch.no_grad(), self._watching():
            losses = [self._loss(piece, preprocessing)[1] * len(piece.targets) for piece in part.split(self.pieces)]
        self.model.train()
        return float(sum(losses)) / len(part.targets)

    def weights(self) -> dict[str, Tensor]:
        """The network's state_dict in fp32, its tensors those that training goes on to change."""
        masters = {name: self.optimizer.state[p]["master"] for name, p in self.trained.items() if self.has_masters}
        return {name: masters.get(name, tensor) for name, tensor in self.model.state_dict().items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over a state_dict in fp32. Raises as ``nn.Module.load_state_dict`` does."""
        self.model.load_state_dict(weights)
        for name, parameter in self.trained.items() if self.has_masters else ():
            master = torch.empty_like(parameter, dtype=torch.float32)
            self.optimizer.state[parameter]["master"] = master.copy_(weights[name])
        if self.graph is not None:
            self.graph.forget()

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state_dict without the masters, which are the weights."""
        state = self.optimizer.state_dict()
        kept = {index: {k: v for k, v in values.items() if k != "master"} for index, values in state["state"].items()}
        return state | {"state": kept}
