"""``python -m benchmarks.verify_gpu.facts DEVICE``: the device and the versions, as a line of JSON."""

import importlib.util
import json
import shutil
import subprocess
import sys

import torch

import alexnet_ext as ax

from ..harness import device_name


def facts(device: str) -> dict[str, str]:
    found = {"torch": torch.__version__, "alexnet_ext": ax.__version__}
    if importlib.util.find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    if device != "cuda":
        return {"device": device_name(), **found}
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is available: --device cpu runs what applies without one")
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        **told("driver, clocks, power limit", "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit"),
        **told("nvcc", "nvcc", "--version"),
        **found,
    }


def told(what: str, program: str, option: str) -> dict[str, str]:
    """The last line that a program prints, or a note that it is not installed."""
    if shutil.which(program) is None:
        return {what: f"{program} is not on PATH"}
    options = [option, "--format=csv,noheader"] if program == "nvidia-smi" else [option]
    lines = subprocess.run([program, *options], capture_output=True, text=True).stdout.split("\n")
    return {what: next((line for line in reversed(lines) if line.strip()), "")}


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1])))
