"""Fixtures of all tests: reproducible, without TF32, and on request with poisoned memory."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton's interpreter is chosen when Triton is first imported, so for the whole process: without a GPU its kernels run
# there, on CPU tensors. What is compiled ahead of time is compiled in a process of its own (triton_ahead.py).
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from alexnet_ext import _library
from alexnet_ext.ops import _backend, _known
from alexnet_ext.selfcheck import first_call
from tests.gpu_on_cpu import emulated
from tests.support import ROOT

# A shell's background job is started with Ctrl-C ignored, and so would be the processes that the tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Autograd looks for devices at a process's first backward, and starts a thread for each: then no fork can compute
# gradients. A fake CUDA tensor makes it find one, so the first backward must come before.
torch.ones((), requires_grad=True).backward()

# Workers share the cores.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


pytest_plugins = ["tests.support.parts"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulator", default=ROOT / "build" / "emulator", help="the folder that the emulator is built in")
    parser.addoption(
        "--emulated", choices=emulated.ORDERS, help="run the ops' CUDA kernels emulated, lanes in this order"
    )


def pytest_report_header() -> str:
    libraries = ", ".join(f"{lib.name}: {'loaded' if lib.loaded else lib.reason}" for lib in _library.LIBRARIES)
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, libraries {libraries}"


@pytest.fixture(autouse=True, scope="session")
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    order = request.config.getoption("--emulated")
    if order is None:
        yield
        return
    with emulated.kernels_emulated(Path(request.config.getoption("--emulator")), order) as emulator:
        yield
        assert emulator.alexnet_emulator_launches() > 0


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def native() -> None:
    """The test is about the compiled ops (test_structure fails where they are missing)."""
    library = _library.LIBRARIES[0]
    if not library.loaded:
        pytest.skip(f"the compiled CPU library is not loaded: {library.reason}")


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs Triton kernels in the interpreter: in few, large blocks, as there a program costs more than its
    numbers."""
    if not _library.INTERPRETED:
        pytest.skip(f"Triton's interpreter is not on: {_library.TRITON.reason or 'TRITON_INTERPRET is 0'}")
    from alexnet_ext.ops.conv2d_bias_relu import configs

    blocks = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(configs, "known", lambda *_: blocks)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN (integers: their maximum), so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def known_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of what is known of kernels: the test's own, and not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(first_call, "_warned", set())
    monkeypatch.setattr(first_call, "_attempted", set())
    _known.reopen()
    yield tmp_path / "cache" / "alexnet_ext" / "kernels"
    _known.reopen()


@pytest.fixture
def as_gpu(known_files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The CPU plays a GPU, whose kernels are left to the user's device to prove."""
    unknown = dict.fromkeys(("auto", "native", "triton"), _backend.UNKNOWN)
    monkeypatch.setitem(_backend.ORDER, "cpu", unknown)
    return known_files


@pytest.fixture
def threads() -> Iterator[None]:
    """The test sets the number of threads; afterwards it is as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
