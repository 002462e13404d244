"""Fences: memory is NaN until it is written, and a write outside of a tensor is seen."""

from __future__ import annotations

import pytest
import torch

from alexnet_ext.selfcheck.guards import BAND, Fences

CPU = torch.device("cpu")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_new_memory_is_nan(dtype: torch.dtype) -> None:
    with Fences(CPU) as fences:
        made = [
            torch.empty(3, 5, dtype=dtype),
            torch.empty((), dtype=dtype),
            torch.empty_strided((2, 3), (1, 4), dtype=dtype),
            torch.zeros(2, dtype=dtype).new_empty(7),
            torch.empty_like(torch.zeros(1, 4, 3, 2, dtype=dtype).to(memory_format=torch.channels_last)),
        ]
    assert all(x.dtype == dtype and x.isnan().all() for x in made)
    assert made[-1].is_contiguous(memory_format=torch.channels_last)
    assert made[2].stride() == (1, 4)
    assert all(x.data_ptr() % 64 == 0 for x in made), "as aligned as PyTorch's own"
    assert fences.broken() == ""


def test_integers_are_no_plausible_result() -> None:
    with Fences(CPU):
        assert torch.empty(4, dtype=torch.uint8).tolist() == [255] * 4
        assert torch.empty(2, dtype=torch.int64).tolist() == [-1, -1]


def test_tensors_without_elements_may_grow() -> None:
    with Fences(CPU) as fences:
        x = torch.empty(0, 3, dtype=torch.bfloat16)
        assert (x.shape, x.dtype) == ((0, 3), torch.bfloat16)
        assert torch.cat([torch.ones(2), torch.ones(3)], out=torch.empty(0)).sum() == 5
    assert fences.broken() == ""


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize(("where", "index"), [("before", -1), ("behind", 6)])
def test_a_write_outside_is_seen(where: str, index: int, dtype: torch.dtype) -> None:
    with Fences(CPU) as fences:
        torch.ones(5, dtype=dtype)
        x = torch.ones(2, 3, dtype=dtype)
        x.as_strided((1,), (1,), x.storage_offset() + index).zero_()
    assert fences.broken() == f"it wrote {where} a tensor of {6 * dtype.itemsize} bytes"
    assert fences.broken() == "", "the memory is let go"


@pytest.mark.parametrize("byte", [-BAND, -1, 24, 24 + BAND - 1])
def test_any_byte_of_a_band_counts(byte: int) -> None:
    with Fences(CPU) as fences:
        x = torch.ones(2, 3).view(torch.uint8)
        x.as_strided((1,), (1,), x.storage_offset() + byte).zero_()
    assert "it wrote" in fences.broken()


def test_the_gaps_of_a_strided_tensor_are_its_own() -> None:
    """A kernel that writes rows whole may fill them: nothing reads them."""
    with Fences(CPU) as fences:
        x = torch.empty_strided((3, 2), (4, 1))
        x.as_strided((10,), (1,)).zero_()
    assert fences.broken() == ""


def test_memory_is_pytorchs_own_again_afterwards() -> None:
    with pytest.raises(ZeroDivisionError), Fences(CPU) as fences:
        raise ZeroDivisionError
    x = torch.empty(6)
    assert x.untyped_storage().nbytes() == 24
    assert fences.held == []
