"""Shards of tensors on disk: read into any other layout; what does not belong together is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tightfit.distributed.process_group import SINGLE_PROCESS
from tightfit.errors import UnsupportedInput
from tightfit.train.manifest import _digest
from tightfit.train.shard_files import Piece, ShardFiles, in_order, pieces_of, save_file


def write(folder: Path, *shards: dict[str, Tensor]) -> list[Path]:
    """A file for each process, of what it has."""
    paths = []
    for rank, tensors in enumerate(shards):
        paths.append(folder / f"{rank}.safetensors")
        save_file(paths[-1], in_order(Piece(name, tensor) for name, tensor in tensors.items()))
    return paths


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 3),
        torch.randn(4, 6).T,
        torch.randn(6, 4)[::2, 1:],
        torch.tensor(2.5),
        torch.empty(0, 3),
        torch.tensor([math.nan, -math.inf, -0.0]),
        *(torch.arange(7).to(dtype) for dtype in (torch.bool, torch.int8, torch.uint16, torch.bfloat16, torch.float64)),
        torch.arange(7).to(torch.float8_e4m3fn),
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}",
)
def test_whole_tensors_come_back_and_others_can_read_them(tensor: Tensor, tmp_path: Path) -> None:
    (path,) = write(tmp_path, {"odd": torch.ones(3, dtype=torch.uint8), "t": tensor})
    files = ShardFiles([path])
    target = torch.zeros(tensor.shape, dtype=tensor.dtype)
    files.read_into({"t": target})
    for found in (target, load_file(path)["t"]):
        assert found.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_what_was_written_is_known_without_reading_it_again(tmp_path: Path) -> None:
    written = save_file(tmp_path / "f", in_order([Piece("a", torch.randn(100, 100))]))
    assert (written.size_bytes, written.sha256) == ((tmp_path / "f").stat().st_size, _digest(tmp_path / "f"))


def test_shards_are_put_together_in_any_order(tmp_path: Path) -> None:
    whole = torch.arange(35.0).reshape(7, 5)
    paths = write(tmp_path, {"w@0,0": whole[:3], "b": torch.ones(2)}, {"w@3,0": whole[3:6]}, {"w@6,0": whole[6:]})
    files = ShardFiles(paths[::-1])
    assert files.tensors["w"].size == whole.shape
    target = torch.zeros(7, 5)
    files.read_into({"w": target})
    assert torch.equal(target, whole)


def test_a_name_that_looks_like_a_place_is_a_name(tmp_path: Path) -> None:
    tensors = {"w@1": torch.randn(2, 2), "w@": torch.tensor(3.0), "@0,0": torch.randn(2), "w": torch.randn(3)}
    path = tmp_path / "f"
    save_file(path, in_order(pieces_of(tensors, SINGLE_PROCESS)))
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    ShardFiles([path]).read_into(targets)
    assert all(torch.equal(targets[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "shards",
    [
        [{"w@0,0": torch.ones(2, 2)}, {"w@3,0": torch.ones(2, 2)}],
        [{"w@0,0": torch.ones(2, 2)}, {"w@2,0": torch.ones(2, 2).double()}],
        [{"w@0,0": torch.ones(2, 2)}, {"w@2": torch.ones(2)}],
        [{"w@99999999999": torch.ones(2)}],
        [{"w@0": torch.ones(2, 2)}],
    ],
)
def test_what_does_not_belong_together_is_refused(shards: list[dict[str, Tensor]], tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        ShardFiles(write(tmp_path, *shards))


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64, b"\x08\x00\x00\x00\x00\x00\x00\x00[]      "])
def test_what_is_no_such_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "f").write_bytes(content)
    with pytest.raises((SafetensorError, ValueError)):
        ShardFiles([path])


def test_a_dtype_that_the_format_has_not_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="'w' of dtype"):
        pieces_of({"w": torch.ones(2, dtype=torch.complex64)}, SINGLE_PROCESS)
