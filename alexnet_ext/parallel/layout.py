"""Which rows of each parameter a rank has, in a mesh of ranks that torch makes; on disk there is always the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from .collectives import Wire
from .volume import TOWERS, check


class Layout:
    """Where this rank is among all ranks of the default process group.

    ``"data"``: each rank has the whole network and its share of the images. ``"towers"``: ranks 2i and 2i + 1 have
    a tower each, and the same images; fc8 is whole on both. ``"weird-trick"``: each rank has whole convolutions and
    fc8 for its share of the images, and a part of fc6 and of fc7 for all images (Krizhevsky 2014).

    ``mesh`` is the DeviceMesh, with the dimensions ``"data"`` and, for towers, ``"towers"``. ``data`` and ``parts``
    are the process groups of the ranks with other images, and of those with other parts of the same layers: for
    ``"weird-trick"`` both are all ranks. Raises ValueError as ``check`` does.
    """

    def __init__(self, name: str, variant: str, device_type: str = "cpu", lrn_border: str = "exchange") -> None:
        ranks = dist.get_world_size()
        check(name, variant, ranks, lrn_border=lrn_border)
        self.name, self.lrn_border = name, lrn_border
        towers = name == "towers"
        shape, names = ((ranks // TOWERS, TOWERS), ("data", "towers")) if towers else ((ranks,), ("data",))
        self.mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
        self.data = Wire(self.mesh.get_group("data"))
        self.parts = Wire(self.mesh.get_group("towers")) if towers else self.data

    def splits(self, name: str) -> bool:
        """Whether a rank has part of the rows (dim 0) of the parameter ``name``, such as ``"classifier.fc6.bias"``."""
        layer = name.split(".")[-2]
        return layer in {"data": (), "weird-trick": ("fc6", "fc7")}.get(self.name, (layer,)) and not (
            self.name == "towers" and layer == "fc8"
        )

    def sums(self, name: str) -> bool:
        """Whether the gradient of the parameter ``name`` is to be summed over ``data``."""
        return self.name != "weird-trick" or not self.splits(name)

    def own(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of tensors by the names of their parameters: a state_dict, momenta, an average.

        Copies of the parts; whole tensors as they are. A tensor without dimensions, such as a counter, is whole.
        """
        return {
            name: tensor.chunk(self.parts.size)[self.parts.rank].clone()
            if tensor.dim() and self.splits(name)
            else tensor
            for name, tensor in whole.items()
        }

    def whole(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors of every rank's ``own``, on the CPU and on every rank. All ranks must call it."""
        return {name: self._whole(name, tensor.detach().cpu()) for name, tensor in own.items()}

    def _whole(self, name: str, own: Tensor) -> Tensor:
        if not own.dim() or not self.splits(name):
            return own
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.parts.size)]
        dist.all_gather(parts, own, self.parts.group)
        return torch.cat(parts)

    def total_norm(self, gradients: Iterable[tuple[str, Tensor]]) -> Tensor:
        """The 2-norm of the whole network's gradients, from this rank's by name. All ranks must call it."""
        found = {True: [], False: []}  # type: dict[bool, list[Tensor]]
        for name, gradient in gradients:
            found[self.splits(name)].append(gradient)
        split = torch.nn.utils.get_total_norm(found[True]).square()
        if self.parts.size > 1 and found[True]:
            dist.all_reduce(split, group=self.parts.group)
        return (split + torch.nn.utils.get_total_norm(found[False]).square()).sqrt()
