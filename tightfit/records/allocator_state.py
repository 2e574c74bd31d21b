"""What a device's caching allocator is like before a step."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.records.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorState:
    """How the allocator of the measured device is set up, and what the process holds there beside the step."""

    settings: str
    """Its options, as in ``PYTORCH_ALLOC_CONF``."""
    capacity_bytes: int
    """All the device's memory."""
    beside_bytes: int
    """Bytes that PyTorch has allocated for other things than the step: workspaces of cuBLAS for each thread, tensors
    of somebody else's."""
    outside_bytes: int
    """Bytes of the process that PyTorch does not manage: the context, libraries."""
    cap_bytes: int | None = None
    """The most that PyTorch may reserve in this process; None: all that the device has."""

    def check(self) -> None:
        """Raise ValueError where a size cannot be right."""
        sizes = (self.capacity_bytes, self.beside_bytes, self.outside_bytes, self.cap_bytes or 0)
        require(min(sizes) >= 0, "the allocator has a negative size")
