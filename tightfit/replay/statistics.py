"""Count what the engine really did: tests assert the counts exactly, verdicts report them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Statistics:
    """Counts since the last `reset`, over all regions."""

    taped_ops: int = 0
    """Operations written to a tape."""
    dropped_slots: int = 0
    """Saved tensors that became handles."""
    kept_unsafe: int = 0
    """Saved tensors that the plan would drop but the live tape could not prove replayable."""
    replayed_ops: int = 0
    """Operations recomputed in backward; of modules that are recomputed as a whole, as many as the plan says."""
    recomputed_calls: int = 0
    """Module calls that were made again as a whole in backward."""
    mismatches: int = 0
    """Region calls whose operations were not those of the plan."""
    unplanned_calls: int = 0
    """Region calls that the plan has no decision for."""
    written_after_drop: int = 0
    """Dropped values that were then written, unseen by autograd's version counters."""
    kept_graphs: int = 0
    """Reads of dropped tensors by backwards that keep their graphs (``retain_graph=True``)."""
    refused_ops: int = 0
    """Operations that a self-check found unfit for replay."""

    def reset(self) -> None:
        """Set all counts to zero."""
        for name in self.__slots__:
            setattr(self, name, 0)
