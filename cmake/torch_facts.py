"""Prints facts of PyTorch as a CMake list: folder, version, CUDA version, architectures of the GPUs present."""

from pathlib import Path

import torch

gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
capabilities = sorted({torch.cuda.get_device_capability(i) for i in gpus})
architectures = ",".join(f"{major}.{minor}" for major, minor in capabilities)
print(Path(torch.__file__).parent, torch.__version__, torch.version.cuda or "", architectures, sep=";")
