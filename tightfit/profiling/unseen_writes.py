"""Notice in a real step what kernels write past the dispatcher, as the self-check of a plan does in its first step.

A plan keeps what was written unseen.  The smallest budget that is named follows from the profile, which has to know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tightfit.profiling.storage_ledger import StorageLedger
from tightfit.replay.contents import Checksum, checksum

_WRITTEN = "what it made or read was written past PyTorch"


class UnseenWrites:
    """Compares what storages hold each time that they are seen (see `tightfit.replay.self_check.SelfCheck`)."""

    def __init__(self, ledger: StorageLedger) -> None:
        self._ledger = ledger
        self._checksums: dict[int, Checksum] = {}  # by value
        self._readers: dict[int, list[int]] = {}  # operations, by value

    def look_at(self, tensors: Sequence[torch.Tensor], reader: int = -1) -> None:
        """Compare what tensors hold, which an operation is about to read, or autograd saves."""
        for tensor in tensors:
            value = self._seen(tensor)
            if value >= 0 and reader >= 0:
                self._readers.setdefault(value, []).append(reader)

    def remember(self, tensors: Sequence[torch.Tensor]) -> None:
        """Remember what tensors hold that an operation has made or written."""
        for tensor in tensors:
            value = self._ledger.value_of(tensor)
            if value >= 0 and not self._ledger.is_uninitialised(value):
                self._checksums[value] = checksum(tensor)

    def _seen(self, tensor: torch.Tensor) -> int:
        """Return the value that a tensor holds now."""
        ledger = self._ledger
        value = ledger.value_of(tensor)
        if value < 0 or ledger.is_uninitialised(value):
            return -1
        now = checksum(tensor)
        if self._checksums.setdefault(value, now) == now:
            return value
        observation = ledger.observation
        for op in (observation.values[value].op, *self._readers.get(value, ())):
            if op >= 0:
                observation.ops[op].keep_reason = observation.ops[op].keep_reason or _WRITTEN
        value = ledger.overwrite(tensor)
        self._checksums[value] = now
        return value
