"""The random numbers of images: a pure function of seed, epoch and index, for a whole batch at once."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from .batches import Drawn

# The paper's colour shift, section 4.1: of the covariance of ImageNet's RGB values (in 0 to 1) the eigenvectors, in
# columns, and the eigenvalues.
COMPONENTS = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
COLOUR_SHIFT = 0.1
WORDS = 6  # of 32 bits to an image: two offsets, a flip, three normal numbers


@functools.lru_cache(maxsize=2)
def _words(seed: int, epoch: int, images: int) -> np.ndarray:
    """uint32 (images, WORDS). A row depends on seed, epoch and its place alone: NumPy keeps the stream of a bit
    generator from version to version, and fills it in order."""
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return stream.random_raw(images * WORDS // 2).view(np.uint32).reshape(-1, WORDS)


def draw(
    seed: int,
    epoch: int,
    indices: np.ndarray,
    images: int,
    room: int,
    components: Tensor = COMPONENTS,
    eigenvalues: Tensor = EIGENVALUES,
) -> Drawn:
    """The random numbers of the images ``indices``, int64 (N,), of ``images``, whose crop may move by ``room`` pixels.

    They are the paper's crop, mirror and shift of colour: along each principal component (columns of ``components``) by
    its eigenvalue times a normal number of deviation ``COLOUR_SHIFT``. Which other images are asked for changes no bit
    of them.
    """
    words = _words(seed, epoch, images)[indices]
    offsets = (words[:, :2].astype(np.uint64) * np.uint64(room + 1)) >> np.uint64(32)
    # From the middle of each of 2^32 steps: never 0 or 1, whose normal numbers are infinite.
    normal = torch.erfinv(torch.from_numpy((words[:, 3:] + 0.5) / 2**31 - 1)) * (2**0.5 * COLOUR_SHIFT * 255)
    # One by one: a product of matrices may round otherwise in a batch of another size.
    parts = [normal[:, i, None] * (components[:, i].double() * eigenvalues[i].double()) for i in range(3)]
    return Drawn(
        torch.from_numpy(offsets.astype(np.int64)),
        torch.from_numpy(words[:, 2] < 2**31),
        (parts[0] + parts[1] + parts[2]).float(),
    )
