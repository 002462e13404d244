"""What runs under compute-sanitizer: forward and backward of each op, once a backend and layout."""

import torch

from tests import cases

from .common import examples, gradients

for case, backend in examples("cuda"):
    for layout in ("contiguous", "channels_last"):
        gradients(case, cases.make(case, layout=layout, device="cuda"), backend)
torch.cuda.synchronize()
print("all ops ran")
