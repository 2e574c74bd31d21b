"""Check at the first call of each region that nothing is written unseen.

The contents of everything the tape may replay are checksummed when made and compared each time they are seen again: a
raw kernel that wrote behind the dispatcher's back (NumPy, Triton, ctypes) is found, whatever buffer it wrote into.
What failed is written down per region, so that later calls keep it.  (`repeats` asks whether an operation gives the
same bits twice.)
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from tightfit.operators.facts import OpInfo, tensors_in
from tightfit.replay.contents import Checksum, checksum

if TYPE_CHECKING:
    from tightfit.replay.values import TapedOp, TapedValue


class SelfCheck:
    """The self-check of one tape's region calls.  What must not be replayed is noted in its region's `refused`."""

    def __init__(self) -> None:
        self._checksums: dict[TapedValue, Checksum] = {}
        self._dropped: dict[TapedValue, weakref.ref[torch.UntypedStorage]] = {}
        self._readers: dict[TapedValue, list[TapedOp]] = {}  # operations that read the value

    def remember(self, value: TapedValue, tensor: torch.Tensor) -> None:
        """Remember the contents of a value that was just made, or seen for the first time; `tensor` is a view of it."""
        self._checksums[value] = checksum(tensor)

    def unchanged(self, value: TapedValue, tensor: torch.Tensor) -> bool:
        """Return whether a value still has the contents that it was made with.

        If not, its operation is refused from now on, and so are those that read it before the hidden write: their
        replay would find the new contents.
        """
        expected = self._checksums.get(value)
        if expected is None or value.uninitialised:
            return True
        if tensor.untyped_storage().nbytes() < value.nbytes:  # FSDP2 gathers it again before somebody reads it
            return True
        if checksum(tensor) == expected:
            return True
        if value.op is not None:
            value.op.region.refused.add(value.op.position)
        for op in self._readers.get(value, ()):
            op.region.refused.add(op.position)
        return False

    def copied(self, value: TapedValue, copy: TapedValue) -> None:
        """Note that a value has a copy, which has the same contents."""
        if value in self._checksums:
            self._checksums[copy] = self._checksums[value]
        if value in self._dropped:
            self._dropped[copy] = self._dropped[value]

    def dropped(self, value: TapedValue, tensor: torch.Tensor) -> None:
        """Note that autograd saved the value, and that it is dropped."""
        self._dropped[value] = weakref.ref(tensor.untyped_storage())

    def written_since(self, value: TapedValue) -> torch.UntypedStorage | None:
        """Return the storage that the dropped value was in, if it is there and was written: what plain would read."""
        reference = self._dropped.get(value)
        storage = reference() if reference is not None else None
        if storage is None:
            return None
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return None if self.unchanged(value, whole) else storage

    def note_reads(self, op: TapedOp) -> None:
        """Note what an operation that is about to run reads."""
        for value in op.inputs:
            self._readers.setdefault(value, []).append(op)

    def look_at(self, info: OpInfo, args: tuple[Any, ...]) -> list[tuple[int, torch.Tensor, Checksum]]:
        """Return position, tensor and checksum of each tensor argument that the operation should leave alone."""
        declared = {place for place, _ in info.mutates}
        return [
            (place, tensor, checksum(tensor))
            for place, argument in enumerate(args)
            if place not in declared
            for tensor in tensors_in((argument,))
            if tensor.layout is torch.strided and type(tensor) is torch.Tensor
        ]

    def changed_since(self, looked_at: list[tuple[int, torch.Tensor, Checksum]]) -> list[tuple[int, torch.Tensor]]:
        """Return those whose contents are other than they were."""
        return [(place, tensor) for place, tensor, before in looked_at if checksum(tensor) != before]
