"""On fake tensors, autograd reads empty tensors of the geometry that it saved, over storages of the same size."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tightfit.profiling.saved_tensors import SavedTensors, _Placeholder

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda x: x,
    "transposed": lambda x: x.t(),
    "a later part": lambda x: x[1:],
    "the first part": lambda x: x[:2],
    "a column": lambda x: x[:, 0],
    "expanded": lambda x: x[3:].clone().expand(5, -1),
    "nothing": lambda x: x[:0],
    "a number": lambda x: x.sum(),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_rebuilt_has_the_geometry_of_what_was_saved(name: str, dtype: torch.dtype) -> None:
    saved = VIEWS[name](torch.randn(4, 6, dtype=dtype))
    rebuilt = SavedTensors(None, nullcontext, None, None)._rebuild(_Placeholder(0, saved, None, lambda slot: None))
    assert (rebuilt.size(), rebuilt.stride(), rebuilt.dtype) == (saved.size(), saved.stride(), saved.dtype)
    assert rebuilt.storage_offset() == saved.storage_offset()
    assert rebuilt.untyped_storage().nbytes() == saved.untyped_storage().nbytes()
