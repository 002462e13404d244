"""The specs for pytest: parametrizations by case, dtype and layout, and the one tolerance table.

What needs no pytest is in specs.py (lists, tensors, calls) and spec.py (what a spec is), and reached as cases.NAME too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from tests.ops.augment.spec import augment as augment
from tests.ops.blocks import BLOCKS as BLOCKS
from tests.ops.blocks import block as block
from tests.ops.conv2d_bias_relu.spec import conv as conv
from tests.ops.linear_bias_relu.spec import linear as linear
from tests.ops.local_response_norm.spec import lrn as lrn
from tests.ops.relu_max_pool2d.spec import pool as pool
from tests.ops.sgd_step.spec import sgd as sgd
from tests.support.spec import *  # noqa: F403
from tests.support.spec import DTYPES, LAYOUTS, Case
from tests.support.specs import *  # noqa: F403
from tests.support.specs import EXAMPLES


def params(cases: Iterable[Case]) -> list[Any]:
    """Cases for parametrize, with their ids."""
    return [pytest.param(case, id=case.id) for case in cases]


def dtype_id(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_example = pytest.mark.parametrize("case", params(EXAMPLES))
