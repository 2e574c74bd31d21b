from __future__ import annotations

import torch

from tightfit.profiling.signatures import SignatureTable


def test_a_storage_among_the_arguments_is_known_by_its_size_and_not_read() -> None:
    """Its repr is all its bytes, each read on its own: minutes for the weights of an LSTM on a GPU."""
    table = SignatureTable()
    func = torch.ops.aten.set_.source_Storage
    first, again, other = (
        table.add(func, (torch.empty(0), torch.full((count,), value).untyped_storage()), {})
        for count, value in ((4000, 1.0), (4000, 2.0), (8000, 1.0))
    )
    assert first == again != other
    assert all(len(key) < 500 for key in table.keys)


def test_the_parts_of_one_tensor_are_one_call_where_a_kernel_cannot_tell_them_apart() -> None:
    """The steps of a loop over time were as many kinds of calls, each measured, in as many kinds of regions."""
    table = SignatureTable()
    parts = torch.empty(6, 256)
    calls = [table.add(torch.ops.aten.neg.default, (part,), {}) for part in parts]
    assert len(set(calls)) == 1
    assert table.add(torch.ops.aten.neg.default, (parts.view(-1)[1:257],), {}) not in calls
