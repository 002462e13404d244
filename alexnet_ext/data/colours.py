"""Mean and principal components of the colours of images, from exact sums: the same in any order of adding."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Sums:
    """Over some pixels x, RGB in 0 to 255: their number, the sum of x, (3,), and of x xᵀ, (3, 3)."""

    pixels: int = 0
    first: list[int] = field(default_factory=lambda: [0] * 3)
    second: list[list[int]] = field(default_factory=lambda: [[0] * 3 for _ in range(3)])

    def __add__(self, other: Sums) -> Sums:
        rows = zip(self.second, other.second, strict=True)
        return Sums(self.pixels + other.pixels, _added(self.first, other.first), [_added(*pair) for pair in rows])

    @classmethod
    def of(cls, pixels: np.ndarray) -> Sums:
        """The sums of an image, uint8 (height, width, 3) of at most 2^37 pixels: exact in float64."""
        planes = np.ascontiguousarray(pixels.reshape(-1, 3).T).astype(np.float64)
        # Not np.dot: BLAS would start its threads in each of the processes.
        products = [[int(np.einsum("i,i->", a, b)) for b in planes] for a in planes]
        return cls(planes.shape[1], [int(plane.sum()) for plane in planes], products)


def _added(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]


def components(sums: Sums) -> tuple[list[float], list[float], list[list[float]]]:
    """The mean of the pixels' RGB, the eigenvalues of its covariance, descending, and its eigenvectors in rows.

    For pixels x in 0 to 1, section 4.1 of the paper takes C = E(x xᵀ) - E(x) E(x)ᵀ over the pixels of all training
    images, its eigenvalues λ and eigenvectors p. An image's colour is shifted by α1 λ1 p1 + α2 λ2 p2 + α3 λ3 p3, with
    each α drawn from a normal distribution of deviation 0.1. The largest number of each p is made positive.
    """
    n = sums.pixels
    mean = [s / (255 * n) for s in sums.first]
    covariance = [
        [(n * product - a * b) / (255 * n) ** 2 for b, product in zip(sums.first, row, strict=True)]
        for a, row in zip(sums.first, sums.second, strict=True)
    ]
    values, vectors = np.linalg.eigh(np.array(covariance))
    rows = [row * np.sign(row[np.abs(row).argmax()]) for row in vectors.T[::-1]]
    return mean, [max(0.0, float(value)) for value in values[::-1]], [row.tolist() for row in rows]
