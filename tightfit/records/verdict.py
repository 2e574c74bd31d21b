"""What verifying found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tightfit.records import json_codec


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What `verify` found.  A field is None where it was not checked.

        verdict = tightfit.verify(model, batch, plan, loss=loss_fn)
        assert verdict.ok, verdict.differing

    Attributes:
        ok: everything that was compared is bit-for-bit equal and the measured peak is within the budget; None when a
            part could not be compared.
        method: "whole-step": plain and planned steps were compared. "per-region": plain does not fit, so each class of
            equal regions was, plain and planned, from identical inputs.
        loss_equal, gradients_equal, buffers_equal, rng_equal: the losses, the gradients (and the parameters after the
            optimizer's step), the buffers, the random state afterwards are bit-for-bit equal.
        max_abs_difference: largest absolute difference in any compared tensor.
        differing: names of tensors that differ from the plain step.
        plain_reproducible: two plain steps from the same state gave the same bits.
        not_reproducible: names of tensors that differ between two plain steps: never blamed on the plan.
        unverified: regions that were not compared, because they did not fit.
        steps: optimizer steps (or forward-backward passes without an optimizer) that were compared.
        budget_bytes: the budget that the plan was solved for.
        plain_peak_bytes, plain_peak_source: peak of the plain step, and whether it was "measured" or "predicted".
        predicted_peak_bytes, measured_peak_bytes: peak of the planned step, as predicted and as measured.
        plain_step_ms, plain_step_source: time of the plain step, and whether it was "measured" or "predicted".
        step_ms: measured time of the planned step.
        overhead_ratio: `step_ms` / `plain_step_ms` - 1.
        replayed_ops: operations recomputed in one step, counted by the engine.
        mismatches: region calls whose operations were not those of the plan (handled safely, but not as planned).
        tape_host_bytes: host memory that the tapes' own Python objects took, at most, by the operations and values that
            were counted.
    """

    ok: bool | None
    method: str
    loss_equal: bool | None
    gradients_equal: bool | None
    buffers_equal: bool | None
    rng_equal: bool | None
    max_abs_difference: float | None
    differing: tuple[str, ...]
    plain_reproducible: bool | None
    not_reproducible: tuple[str, ...]
    unverified: tuple[str, ...]
    steps: int
    budget_bytes: int
    plain_peak_bytes: int
    plain_peak_source: str
    predicted_peak_bytes: int
    measured_peak_bytes: int
    plain_step_ms: float
    plain_step_source: str
    step_ms: float
    overhead_ratio: float
    replayed_ops: int
    mismatches: int
    tape_host_bytes: int = 0

    def save(self, path: str | Path) -> None:
        """Write the verdict to a file, as JSON."""
        json_codec.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Verdict:
        """Read a verdict from a file. Raises `PlanMismatch` if the file is not one."""
        return json_codec.load(cls, path)
