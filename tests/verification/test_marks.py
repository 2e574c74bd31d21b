"""Marks: equal for equal contents, other for all else."""

from __future__ import annotations

import pytest
import torch

from tightfit.step.host_copy import HostCopy
from tightfit.verification import marks
from tightfit.verification.marks import Mark, keeper

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.complex64, torch.complex128)


def changed(x: Tensor, *changes: tuple[int, int]) -> Tensor:
    """Add to the bits of elements, by their flat places."""
    copy = x.clone()
    for place, added in changes:
        copy.view(torch.int32).view(-1)[place] += added
    return copy


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_contents_count_and_not_how_they_lie_in_memory(dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (37, 5)).to(dtype)
    assert Mark.of(x) == Mark.of(x.t().contiguous().t()) == Mark.of(torch.cat([x, x])[37:])
    assert Mark.of(x) != Mark.of(x.t())
    assert Mark.of(x) != Mark.of(x.flatten())
    other = x.clone()
    other[3, 2] = 0 if other[3, 2] else 1
    assert Mark.of(other) != Mark.of(x)


def test_errors_that_cancel_in_sums_by_row_and_column_show() -> None:
    x = torch.randn(61, 61)
    for other in (
        changed(x, (0, 1), (1, -1), (61, -1), (62, 1)),
        changed(x, (0, 1), (1, -1)),
        changed(x, (5, 1 << 22)),
        x.flip(0),
        x.roll(1),
    ):
        for one, another in zip(Mark.of(other).sums, Mark.of(x).sums, strict=True):
            assert one != another


def test_bits_count_not_values() -> None:
    assert Mark.of(torch.tensor([0.0])) != Mark.of(torch.tensor([-0.0]))
    assert Mark.of(torch.tensor([float("nan")])) == Mark.of(torch.tensor([float("nan")]))
    x = torch.randn(4, dtype=torch.complex64)
    assert Mark.of(x.conj()) == Mark.of(x.conj().resolve_conj()) != Mark.of(x)


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1000)
    whole = Mark.of(x)
    monkeypatch.setattr(marks, "_PIECE_ELEMENTS", 64)
    assert Mark.of(x) == whole


def test_of_a_cpu_tensor_the_contents_are_kept() -> None:
    kept = keeper()("x", torch.ones(3))
    assert isinstance(kept, HostCopy)
    assert kept.load().tolist() == [1, 1, 1]
