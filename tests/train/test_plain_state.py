from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tightfit.errors import UnsupportedInput
from tightfit.train.plain_state import pack, unpack


def there_and_back(state: Any, folder: Path) -> Any:
    tensors, plain = pack(state)
    save_file(tensors, folder / "tensors")
    return unpack(json.loads(json.dumps(plain, allow_nan=False)), load_file(folder / "tensors"))


def test_plain_data_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "a": [1, 2.5, None, True, "ä"],
        "b": (1, (2,)),
        3: {"x": 2**70},
        "c": b"\x00\xff",
        "d": {},
        "e": {"dict": 1},
    }
    found = there_and_back(state, tmp_path)
    assert found == state
    assert type(found["b"]) is tuple


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_has_not(number: float, tmp_path: Path) -> None:
    assert repr(there_and_back([number], tmp_path)) == repr([number])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(3, 4).T,
        torch.randn(5, 4)[1:, 2:],
        torch.randn(3, 1).expand(3, 4),
        torch.randn(4).bfloat16(),
        torch.randn(4, dtype=torch.complex64),
        torch.tensor(3),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.tensor([math.nan, math.inf, -0.0]),
        torch.eye(3).to_sparse(),
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}{tensor.layout}",
)
def test_tensors_come_back_with_their_bits(tensor: torch.Tensor, tmp_path: Path) -> None:
    found = there_and_back({"t": [tensor]}, tmp_path)["t"][0]
    assert (found.dtype, found.shape, found.layout) == (tensor.dtype, tensor.shape, tensor.layout)
    if tensor.layout is torch.sparse_coo:
        assert torch.equal(found.to_dense(), tensor.to_dense())
        return
    assert found.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize(
    "tensor", [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.randn(3, 4).T], ids=["image", "T"]
)
def test_the_order_in_memory_stays(tensor: torch.Tensor, tmp_path: Path) -> None:
    assert there_and_back(tensor, tmp_path).stride() == tensor.stride()


def test_what_shares_memory(tmp_path: Path) -> None:
    """A tied weight is written once; views of one storage are written apart, and all come back right."""
    whole = torch.arange(6.0)
    state = {"a": whole, "tied": whole, "part": whole[2:4]}
    assert set(pack(state)[0]) == {"a", "part"}
    found = there_and_back(state, tmp_path)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_what_only_code_could_load_is_refused_with_its_place() -> None:
    with pytest.raises(UnsupportedInput, match=r"holds a pathlib.* as 'model.extra.0', which a checkpoint cannot hold"):
        pack({"model": {"extra": [Path("x")]}})


@pytest.mark.parametrize("plain", [{"other": 1}, {"tensor": "absent"}, {"a": 1, "b": 2}, {}, {"items": 3}])
def test_what_was_not_packed_raises(plain: Any) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        unpack(plain, {})
