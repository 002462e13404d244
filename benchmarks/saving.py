"""What a checkpoint of the paper's network costs training: written at once, and by the thread that writes copies.

    python -m benchmarks.saving [--folder DIR] [--batch-size 8] [--saves 4]

Prints for each save: seconds of a step without one; seconds of a save that blocks, and how many of them are CPU time;
seconds of the copies; seconds of the thread, CPU time; the steps taken meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from alexnet_ext.data import Split, Synthetic
from alexnet_ext.training import checkpoint, state
from alexnet_ext.training.recipe import Recipe
from alexnet_ext.training.trainer import Trainer

SIZE = 227


def measure(folder: Path, batch_size: int, saves: int) -> None:
    recipe = Recipe("synthetic", init="kaiming", batch_size=batch_size)
    split = Split(Synthetic(batch_size, 10, SIZE), Synthetic(1, 10, SIZE), Synthetic.preprocessing(SIZE))
    trainer = Trainer(recipe, split, folder, torch.device("cpu"))
    batch = next(trainer._loader())

    def step() -> float:
        began = time.perf_counter()
        trainer.take([batch], split.preprocessing, 0.001)
        return time.perf_counter() - began

    step()  # momenta
    for _ in range(saves):
        alone = statistics.median(step() for _ in range(3))
        trainer.step += 1
        began, cpu = time.perf_counter(), time.process_time()
        checkpoint.save(folder, state.weights(trainer), trainer.description, state.of(trainer))
        blocking, cpu = time.perf_counter() - began, time.process_time() - cpu
        trainer.step += 1
        began = time.perf_counter()
        weights, held = trainer.copies((state.weights(trainer), state.of(trainer)))
        copied = time.perf_counter()
        ended: list[float] = []

        def write(weights: object = weights, held: object = held, ended: list[float] = ended) -> None:
            checkpoint.save(folder, weights, trainer.description, held)  # type: ignore[arg-type]
            ended.extend((time.perf_counter(), time.thread_time()))

        trainer.writer.start(write)
        during = [step()]
        while not ended:
            during.append(step())
        print(
            f"step {alone:.2f}  blocking {blocking:.2f} (CPU {cpu:.2f})  copies {copied - began:.2f}  "
            f"thread {ended[0] - copied:.2f} (CPU {ended[1]:.2f})  steps {' '.join(f'{s:.2f}' for s in during)}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: that of temporary files")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--saves", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        measure(Path(made), options.batch_size, options.saves)
