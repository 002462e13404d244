"""A folder of images decoded by NVIDIA DALI. It has not run yet with DALI itself: tests check the calls alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._errors import CommandError
from .._optional import require
from .batches import Batch, Key, collate
from .folder import ImageFolder
from .images import middle

THREADS = 4
PAGE = "https://docs.nvidia.com/deeplearning/dali/user-guide/docs/installation.html"


class DaliFolder(ImageFolder):
    """The same images and random numbers as ``ImageFolder``, whose training squares DALI decodes and scales on a GPU.
    Pixels differ a little from Pillow's. A batch with a file that DALI cannot read is read by Pillow."""

    threads = False  # DALI has its own

    def __init__(self, folder: ImageFolder, device: torch.device) -> None:
        """CommandError if DALI is missing, or ``device`` is no GPU."""
        super().__init__(folder.root, folder.samples, folder.classes, folder.preprocessing, folder.augment, folder.seed)
        self.components, self.eigenvalues = folder.components, folder.eigenvalues
        self.device = device
        self.pipelines: dict[int, Any] = {}  # by the images of a batch
        if device.type != "cuda":
            raise CommandError(f"--loader dali: needs a GPU, and the device is {device}", 2)
        try:
            self.dali = require("nvidia.dali")
        except CommandError as error:
            raise CommandError(f"--loader dali: NVIDIA DALI is not installed; {PAGE} says how") from error

    def _pipeline(self, images: int) -> Any:
        """The pipeline of a batch of this size: encoded files to squares, uint8 (side, side, 3)."""
        if images not in self.pipelines:
            fn, types, side = self.dali.fn, self.dali.types, self.preprocessing.resize
            made = self.dali.Pipeline(
                batch_size=images, num_threads=THREADS, device_id=self.device.index or 0, prefetch_queue_depth=1
            )
            with made:
                files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
                decoded = fn.decoders.image(files, device="mixed", output_type=types.RGB)
                scaled = fn.resize(decoded, resize_shorter=side, interp_type=types.INTERP_LINEAR, antialias=True)
                made.set_outputs(fn.crop(scaled, crop=(side, side), dtype=types.UINT8))
            made.build()
            self.pipelines[images] = made
        return self.pipelines[images]

    def _decoded(self, indices: np.ndarray) -> Tensor:
        made = self._pipeline(len(indices))
        made.feed_input("files", [np.fromfile(self.samples[index][0], np.uint8) for index in indices.tolist()])
        (squares,) = made.run()
        return torch.from_dlpack(squares.as_tensor()).clone()  # the pipeline writes the next batch in the same place

    def begin(self) -> None:
        """Nothing: no file is mapped."""

    def batch(self, keys: Sequence[Key], pin_memory: bool = False) -> Batch:
        """The images of some keys of one epoch, (N, 3, side, side), channels-last, on the GPU."""
        indices = np.array([index for _, index in keys])
        try:
            images = self._decoded(indices)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError):  # by Pillow, which names the file if it cannot read it either
            self.pipelines.pop(len(indices), None)  # a pipeline that failed may not run again
            return collate([self[key] for key in keys])
        targets = torch.tensor([self.samples[index][1] for index in indices.tolist()])
        drawn = self.drawn(keys[0][0], indices) if self.augment else None
        if drawn is None:
            start, size = middle(self.preprocessing.resize, self.preprocessing.size), self.preprocessing.size
            images = images[:, start : start + size, start : start + size]
        return Batch(images.permute(0, 3, 1, 2), targets, torch.from_numpy(indices), [], drawn)

    def will_need(self, keys: Sequence[Key]) -> None:
        """Nothing: the files are small, and read at once."""
