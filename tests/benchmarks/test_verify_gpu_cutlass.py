"""What the GPU verification asks of CUTLASS's kernels, with stock PyTorch in their place."""

from __future__ import annotations

import pytest
import torch

from alexnet_ext import _library
from alexnet_ext.ops import _backend
from benchmarks.verify_gpu.stages import correctness, speed
from tests.ops.conv2d_bias_relu.spec import LAYERS
from tests.ops.conv2d_bias_relu.test_cutlass import BUILT, cutlass, gpu, hopper, kernels  # noqa: F401  (fixtures)
from tests.support import cases
from tests.support.cases import Case


@pytest.mark.usefixtures("kernels", "hopper")
@pytest.mark.parametrize(
    ("dtype", "sm90"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "float32-sm90", "bfloat16-sm90"],
)
@pytest.mark.parametrize("case", cases.params(LAYERS))
def test_what_a_gpu_will_be_asked(case: Case, dtype: torch.dtype, sm90: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of ``benchmarks.verify_gpu`` passes for what is right, and fails for a ReLU that loses NaN."""
    if not sm90:
        monkeypatch.setattr(cutlass, "capability", lambda _: (8, 0))
    correctness.compare_cutlass(case, dtype, "cpu", sm90)
    right = cutlass.forward
    monkeypatch.setattr(cutlass, "forward", lambda *given, **how: right(*given, **how).nan_to_num(0))
    with pytest.raises(AssertionError, match="NaN in other places"):
        correctness.compare_cutlass(case, dtype, "cpu", sm90)


@pytest.mark.usefixtures("interpreter", "kernels", "hopper")
def test_every_candidate_will_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = speed.SIZES["cpu"]._replace(dtypes=(torch.float16, torch.float32))
    monkeypatch.setitem(speed.SIZES, "cpu", sizes)
    monkeypatch.setattr(speed.cases, "alexnet_cases", lambda op, batch: [LAYERS[3]])
    monkeypatch.setattr(
        speed, "median_ms", lambda runs, device: {name: float(bool(run())) for name, run in runs.items()}
    )
    monkeypatch.setitem(_backend.KERNELS["conv2d_bias_relu"]["cpu"], "auto", "conv2d_bias_relu_auto")
    monkeypatch.setattr(_library, "CUTLASS", BUILT)
    monkeypatch.setattr(_library, "SM90", _library.Library("sm90", "cuda", True))
    findings = list(speed.convolution_findings("cpu"))
    assert len(findings) == 12
    assert all({"cudnn channels_last ms", "triton ms"} <= set(finding.numbers) for finding in findings)
    assert all("cutlass sm90 ms" in finding.numbers for finding in findings[:6])
    assert all("cutlass ms" in finding.numbers for finding in findings[6:])


@pytest.mark.parametrize(("capability", "asked"), [((8, 0), {"cutlass"}), ((9, 0), {"sm90"}), ((10, 0), {"cutlass"})])
def test_products_of_two_bytes_are_checked_where_they_are(
    capability: tuple[int, int], asked: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(correctness, "attempt", lambda name, *_, **__: name.split()[-1])
    monkeypatch.setattr(_library, "CUTLASS", BUILT)
    monkeypatch.setattr(_library, "SM90", _library.Library("sm90", "cuda", True))
    found = list(correctness.cutlass_findings(torch.bfloat16))
    assert {name for name in found if isinstance(name, str)} == asked
    (skipped,) = (finding for finding in found if not isinstance(finding, str))
    assert (skipped.ok, skipped.detail.split()[0]) == (None, "skipped:")
