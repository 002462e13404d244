"""What a training step launches besides the network and the optimizer: each operation on a scalar is a launch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.predict.step import Recorder
from tests.training.test_step import PREPROCESSING, batch, inputs, step_of
from tests.training.test_training import TINY

READ = ["nll_loss_forward", "sum"]  # the loss, the number of right guesses
SUMMED = ["nll_loss_forward", "full_like", "mul", "sum"] * 2 + ["add", "add"]


@pytest.mark.parametrize(("batches", "expected"), [(1, READ), (2, SUMMED)])
def test_scalars_are_summed_only_where_there_are_several(batches: int, expected: list[str]) -> None:
    taking = step_of(replace(TINY, accumulate=batches))
    with Recorder() as recorder:
        taking._gradients(inputs([batch(2, seed) for seed in range(batches)]), PREPROCESSING)
    made = [operation for operation in recorder.operations if operation.outputs]
    assert [operation.name for operation in made if all(not t.shape for t in operation.outputs)] == expected
