"""State dicts without code: tensors by names, as safetensors holds them, and all else as JSON that refers to them.

Nothing that is read is ever executed: what this cannot write down is refused when it is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tightfit.distributed.dtensor import is_dtensor
from tightfit.errors import UnsupportedInput


class _Packer:
    def __init__(self, *, shares: bool) -> None:
        self._shares = shares
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[object, ...], str] = {}
        self._storages: set[int] = set()

    def pack(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        if isinstance(value, Tensor):
            return self._pack_tensor(value.detach(), path)
        if isinstance(value, Mapping):
            items = [(key, self.pack(item, f"{path}.{key}" if path else f"{key}")) for key, item in value.items()]
            if all(isinstance(key, str) for key, _ in items):
                return {"dict": dict(items)}
            return {"items": [[self.pack(key, path), item] for key, item in items]}
        if isinstance(value, list | tuple):
            packed = [self.pack(item, f"{path}.{place}") for place, item in enumerate(value)]
            return packed if isinstance(value, list) else {"tuple": packed}
        raise UnsupportedInput(
            f"the training state holds a {type(value).__module__}.{type(value).__qualname__} as {path!r}, which a "
            f"checkpoint cannot hold: loading it would have to run code. Keep tensors, numbers, strings and containers "
            f"of them in state dicts."
        )

    def _pack_tensor(self, tensor: Tensor, path: str) -> Any:
        if self._shares and is_dtensor(tensor) and not tensor.is_complex():
            self.tensors[path] = tensor
            return {"tensor": path, "shape": list(tensor.shape)}
        if tensor.layout is torch.sparse_coo:
            parts = [tensor.coalesce().indices(), tensor.coalesce().values()]
            packed = [self._pack_tensor(part, f"{path}.{place}") for place, part in enumerate(parts)]
            return {"sparse": packed, "size": list(tensor.shape)}
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
            raise UnsupportedInput(
                f"the training state holds a {type(tensor).__qualname__} of layout {tensor.layout} as {path!r}, which "
                f"a checkpoint cannot hold. Keep plain tensors in state dicts."
            )
        if tensor.is_complex():
            return {"complex": self._pack_tensor(torch.view_as_real(tensor.resolve_conj()), path)}
        strides = tensor.stride()
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, strides, tensor.dtype)
        reference: dict[str, Any] = {"tensor": self._names.get(key, path)}
        if not tensor.is_contiguous() and _is_dense(tensor):  # channels last, or transposed
            reference["strides"] = list(strides)
        if reference["tensor"] == path:
            if tensor.numel():
                self._names[key] = path
            if self._shares:
                self.tensors[path] = tensor
                return reference
            host = tensor.cpu().contiguous()
            storage = host.untyped_storage().data_ptr()
            self.tensors[path] = host.clone() if storage in self._storages else host
            self._storages.add(storage)
        return reference


def _is_dense(tensor: Tensor) -> bool:
    """Tell whether the tensor's elements fill its part of memory, each once, in whatever order."""
    wanted = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != wanted:
            return False
        wanted *= size
    return True


def pack(state: Any, *, shares: bool = False) -> tuple[dict[str, Tensor], Any]:
    """Take a state apart: its tensors by names, and JSON that refers to them.

    Args:
        state: tensors, plain data and containers of them.
        shares: return the tensors themselves, or their shards; else contiguous ones in host memory, each of its own.

    Raises:
        UnsupportedInput: it holds something else than tensors, plain data and containers of them.
    """
    packer = _Packer(shares=shares)
    plain = packer.pack(state, "")
    return packer.tensors, plain


def unpack(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put together what `pack` has taken apart.

    Raises:
        ValueError, KeyError, TypeError: it is not what `pack` returned.
    """
    if isinstance(plain, list):
        return [unpack(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if "complex" in plain:
        return torch.view_as_complex(unpack(plain["complex"], tensors))
    if "sparse" in plain:
        indices, values = unpack(plain["sparse"], tensors)
        return torch.sparse_coo_tensor(indices, values, plain["size"], check_invariants=True).coalesce()
    (kind,) = plain.keys() - {"strides", "shape"}
    content = plain[kind]
    if kind == "tensor":
        tensor = tensors[content]
        if plain.get("shape", list(tensor.shape)) != list(tensor.shape):
            raise ValueError(f"a shard of {content} is missing")
        if "strides" not in plain:
            return tensor
        if list(tensor.stride()) == plain["strides"]:
            return tensor
        return torch.empty_strided(tensor.shape, plain["strides"], dtype=tensor.dtype).copy_(tensor)
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content.items()}
    if kind == "items":
        return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "float":
        return float(content)
    raise ValueError(f"{kind!r} is no kind of plain state")
