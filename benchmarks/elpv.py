"""``python -m benchmarks.elpv DIR``: real photographs to train on, one folder a class.

Cells of solar modules by electroluminescence, 300 x 300, grey, of the package elpv-dataset (``pip install
'.[interop]'``; its licence is non-commercial). Each of its 2,624 cells has a probability of being defective. Those that
are surely whole (0, 1,508 cells) or surely broken (1, 715 cells) are written. Published on all cells: 88.4 % right by a
fine-tuned VGG-19, 82.4 % by a support vector machine (Deitsch et al., "Automatic classification of defective
photovoltaic module cells in electroluminescence images", Solar Energy 185, 2019).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from alexnet_ext._optional import require

CLASSES = {"whole": 0.0, "broken": 1.0}


def write(folder: Path) -> dict[str, int]:
    """Write ``folder/CLASS/NUMBER-TYPE.png``; returns the images of each class. Raises FileExistsError where there are
    such folders already."""
    images, probabilities, kinds = require("elpv_dataset.utils", "interop").load_dataset()
    counts = dict.fromkeys(CLASSES, 0)
    for name, wanted in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for number in (probabilities == wanted).nonzero()[0]:
            picture = require("PIL.Image").fromarray(images[number])
            picture.save(folder / name / f"{number:04}-{kinds[number]}.png")
            counts[name] += 1
    return counts


def main(folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")]) -> None:
    print(f"{folder}: " + ", ".join(f"{count:,} {name}" for name, count in write(folder).items()))


if __name__ == "__main__":
    typer.run(main)
