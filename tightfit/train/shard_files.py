"""Tensors of a checkpoint on disk: each process writes its own shards, and reads those parts of any that it needs.

What belongs to whom is planned by the planners of `torch.distributed.checkpoint`, so no process ever holds the whole
model, and shards are read into any other layout.  Each file is a safetensors file: a shard's name says where in its
tensor it begins (``model.weight@128,0``), and nothing else is needed to read it again: no code, no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tightfit.distributed.dtensor import is_dtensor, local_shard
from tightfit.distributed.process_group import ProcessGroup
from tightfit.errors import UnsupportedInput
from tightfit.step.host_copy import memory_of_dense
from tightfit.train.manifest import Written

_CHUNK_BYTES = 2**24
_SHARD = re.compile(r"(.*)@((?:\d+(?:,\d+)*)?)", re.DOTALL)
#: As the format calls them: https://huggingface.co/docs/safetensors.
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A tensor that one process writes, or its shard of one."""

    name: str
    tensor: Tensor

    def copied(self) -> Piece:
        """Return the same piece in host memory of its own."""
        return Piece(self.name, self.tensor.to("cpu", copy=True, memory_format=torch.contiguous_format))


def pieces_of(tensors: Mapping[str, Tensor], group: ProcessGroup) -> list[Piece]:
    """Return what this process writes of a run's tensors, sharing their memory.  All processes call this.

    What all of them have alike, rank 0 writes.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise UnsupportedInput(
                f"the training state holds {name!r} of dtype {tensor.dtype}, which a checkpoint cannot hold. Keep "
                f"tensors of usual dtypes in state dicts."
            )
    if not any(map(is_dtensor, tensors.values())):
        return (
            [Piece(_named(name, tensor.dim()), tensor) for name, tensor in tensors.items()]
            if group.is_main_process
            else []
        )
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    planner.set_up_planner(dict(tensors), is_coordinator=group.is_main_process)
    plans, _ = planner.create_global_plan(group.all_gather(planner.create_local_plan()))
    found = []
    for item in planner.finish_plan(plans[group.rank]).items:
        shard, data = planner.resolve_data(item), item.tensor_data
        assert isinstance(shard, Tensor)
        assert data is not None
        if data.chunk.sizes == data.size:
            found.append(Piece(_named(item.index.fqn, shard.dim()), shard.detach()))
        elif shard.numel():
            offsets = ",".join(map(str, data.chunk.offsets))
            found.append(Piece(f"{item.index.fqn}@{offsets}", shard.detach()))
    return found


def in_order(pieces: Iterable[Piece]) -> list[Piece]:
    """Return pieces in the order in which they are written: so all are aligned."""
    return sorted(pieces, key=lambda piece: (-piece.tensor.itemsize, piece.name))


def save_file(path: Path, pieces: Sequence[Piece], contents: Iterable[Tensor] | None = None) -> Written:
    """Write a safetensors file and flush it to disk, holding no more than one tensor beside what there is.

    Args:
        path: of the file.
        pieces: what it is to hold, in order.
        contents: the tensors, if those of the pieces only say what they are like.
    """
    digest = hashlib.sha256()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.tensor.numel() * piece.tensor.itemsize
        shape, dtype = list(piece.tensor.shape), _NAMES[piece.tensor.dtype]
        header[piece.name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as stream:

        def write(data: Any) -> None:
            rest = memoryview(data)
            while rest:
                chunk = rest[: stream.write(rest[:_CHUNK_BYTES])]
                digest.update(chunk)
                rest = rest[len(chunk) :]

        write(len(text).to_bytes(8, "little") + text)
        for tensor in contents or (piece.tensor for piece in pieces):
            if tensor.numel():
                here = memory_of_dense(tensor.detach().cpu().resolve_neg().contiguous())
                assert here is not None
                write(here)
        os.fsync(stream.fileno())
        return Written(path.name, stream.tell(), digest.hexdigest())


class ShardFiles:
    """The tensors in some files that `save_file` wrote.

    Raises:
        ValueError, KeyError, SafetensorError, OSError: they are not such files, or do not belong together.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            MetadataIndex,
            TensorProperties,
            TensorStorageMetadata,
        )

        self.tensors: dict[str, TensorStorageMetadata] = {}
        """What there is, by names."""
        self._places: dict[MetadataIndex, tuple[Path, str]] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # it is no mapping
                    described = file.get_slice(key)
                    sizes, dtype = torch.Size(described.get_shape()), _DTYPES[described.get_dtype()]
                    shard = _SHARD.fullmatch(key)
                    name = key if shard is None else shard[1]
                    offsets = torch.Size(
                        [0] * len(sizes) if shard is None else map(int, filter(None, shard[2].split(",")))
                    )
                    end = torch.Size(offset + size for offset, size in zip(offsets, sizes, strict=True))
                    known = self.tensors.setdefault(
                        name, TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=end, chunks=[])
                    )
                    if known.properties.dtype != dtype or len(known.size) != len(end):
                        raise ValueError(f"the shards of {name} do not belong together")
                    known.size = torch.Size(map(max, known.size, end))
                    known.chunks.append(ChunkStorageMetadata(offsets, sizes))
                    self._places[MetadataIndex(name, offsets)] = path, key
        for name, tensor in self.tensors.items():
            if sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
                raise ValueError(f"a shard of {name} is missing")
            if _overlap([(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]):
                raise ValueError(f"shards of {name} overlap")

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Fill tensors, sharded in whatever way, with what the files hold under their names.

        Raises:
            ValueError: one has another size.
        """
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.metadata import Metadata

        metadata = Metadata({name: self.tensors[name] for name in targets}, storage_data=self._places)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(targets), metadata, is_coordinator=True)
        requests: dict[Path, list[tuple[str, Any]]] = {}
        for item in planner.finish_plan(planner.create_local_plan()).items:
            path, key = self._places[item.storage_index]
            requests.setdefault(path, []).append((key, item))
        for path, wanted in requests.items():
            with safe_open(path, framework="pt") as file:
                for key, item in wanted:
                    described = file.get_slice(key)
                    part = tuple(
                        slice(offset, offset + length)
                        for offset, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    is_whole = list(item.lengths) == described.get_shape()
                    target = planner.resolve_tensor(item)
                    with torch.no_grad():
                        target.detach().copy_(file.get_tensor(key) if is_whole else described[part])
                    planner.commit_tensor(item, target)


def nbytes_of(pieces: Sequence[Piece]) -> int:
    """Bytes of all pieces."""
    return sum(local_shard(piece.tensor).nbytes for piece in pieces)


def _overlap(chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Tell whether two of these have an element in common; each is where it begins, and its sizes."""
    if len(chunks) < 2:
        return False
    dimensions = range(len(chunks[0][0]))
    along = max(dimensions, key=lambda dimension: len({begins[dimension] for begins, _ in chunks}), default=None)
    if along is None:  # a number, twice
        return True
    inside = sorted((one for one in chunks if all(one[1])), key=lambda one: one[0][along])
    for place, (begins, sizes) in enumerate(inside):
        for others, their_sizes in inside[place + 1 :]:
            if others[along] >= begins[along] + sizes[along]:
                break
            if all(begins[d] < others[d] + their_sizes[d] and others[d] < begins[d] + sizes[d] for d in dimensions):
                return True
    return False


def _named(name: str, dimensions: int) -> str:
    """Return the name in the file of a tensor that is written whole."""
    return f"{name}@{','.join('0' * dimensions)}" if _SHARD.fullmatch(name) else name
