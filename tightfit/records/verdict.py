"""What verifying found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tightfit.records import json_codec


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What `verify` found. A field is None where it was not checked."""

    ok: bool | None
    """Everything that was compared is bit-for-bit equal and the measured peak is within the budget; None when a part
    could not be compared."""
    method: str
    """"whole-step": plain and planned steps compared. "per-region": each region class plain and replayed from identical
    inputs. "guarded": only the planned step was run, and its peak measured."""
    loss_equal: bool | None
    gradients_equal: bool | None
    buffers_equal: bool | None
    rng_equal: bool | None
    max_abs_difference: float | None
    """Largest absolute difference in any compared tensor."""
    differing: tuple[str, ...]
    """Names of tensors that differ from the plain step."""
    plain_reproducible: bool | None
    """Two plain steps from the same state gave the same bits."""
    not_reproducible: tuple[str, ...]
    """Names of tensors that differ between two plain steps: never blamed on the plan."""
    unverified: tuple[str, ...]
    """Regions that were not compared, because they did not fit."""
    steps: int
    """Optimizer steps (or forward-backward passes without an optimizer) that were compared."""
    budget_bytes: int
    plain_peak_bytes: int
    plain_peak_source: str
    """"measured" or "predicted"."""
    predicted_peak_bytes: int
    measured_peak_bytes: int
    plain_step_ms: float
    plain_step_source: str
    """"measured" or "predicted"."""
    step_ms: float
    overhead_ratio: float
    """`step_ms` / `plain_step_ms` - 1."""
    replayed_ops: int
    """Operations replayed in one step, counted by the engine."""
    mismatches: int
    """Region calls whose operations were not those of the plan (handled safely, but not as planned)."""
    tape_host_bytes: int = 0
    """Host memory that the tapes' own Python objects took, at most, by the operations and values that were counted."""

    def save(self, path: str | Path) -> None:
        """Write the verdict as JSON."""
        json_codec.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Verdict:
        """Read a verdict. Raises `PlanMismatch` if the file is not one."""
        return json_codec.load(cls, path)
