"""Kernels are proven on the GPU before they are used: what `alexnet train` and `evaluate` do first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.text import Text
from torch import nn

from .._errors import first_line
from ..ops import _backend


def prove_kernels(
    model: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: torch.device, console: Console
) -> None:
    """Prove and race what ``model`` calls in ``dtype``, with a line of progress, and print the outcome.

    Nothing is done on a device whose kernels the authors have proven. A failure leaves stock PyTorch and says so.
    """
    if not _backend.proves(device):
        return
    from ..selfcheck import first_call
    from ..selfcheck.prove import prove

    first_call.silence(device)
    try:
        with console.status(Text("proving kernels")) as status:
            proved = prove(
                device,
                model,
                shape,
                dtype=dtype,
                layout=torch.channels_last,
                tell=lambda line: status.update(Text(line)),
            )
            outcome = str(proved)
    except (RuntimeError, OSError) as error:
        outcome = f"the layers run on stock PyTorch, as the kernels could not be proven: {first_line(error)}"
    console.print(f"  {outcome}", highlight=False, markup=False, soft_wrap=True)
