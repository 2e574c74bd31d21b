"""Count what autograd saves while a step runs: by which a loss shows that it is not the one that was planned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tightfit._torch_private.tensors import storage_bytes, storage_key
from tightfit.replay.values import Kept


class SavedBytes:
    """Counts the storages that autograd saves, resident ones left out."""

    def __init__(self, resident: Iterable[torch.Tensor]) -> None:
        self._storages = {storage_key(tensor): 0 for tensor in resident if tensor.layout is torch.strided}

    @property
    def nbytes(self) -> int:
        """Bytes of all storages so far, each counted once."""
        return sum(self._storages.values())

    def note(self, tensor: torch.Tensor) -> None:
        """Count a saved tensor."""
        if tensor.layout is torch.strided:
            self._storages.setdefault(storage_key(tensor), storage_bytes(tensor))

    def pack(self, tensor: torch.Tensor) -> Any:
        """Count a saved tensor, and hold it as autograd does."""
        self.note(tensor)
        return Kept(tensor)
