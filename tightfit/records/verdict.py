"""What verifying found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tightfit.records import json_codec
from tightfit.records.notebook import html_table
from tightfit.units import format_bytes

_NAMED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What `verify` found.  A field is None where it was not checked.

        verdict = tightfit.verify(model, batch, plan, loss=loss_fn)
        assert verdict.ok, verdict.differing

    Attributes:
        ok: gradients were compared, all that was compared is bit-for-bit equal, and the measured peak is within the
            budget. None where it is not known: no gradient or not every planned region could be compared; `reason` says
            why.
        method: "whole-step": plain and planned steps were compared. "per-region": plain does not fit, or gives other
            bits each time, so calls of regions and of the loss function were, plain and planned, from identical inputs.
        loss_equal, gradients_equal, buffers_equal, rng_equal: the losses, the gradients (and the parameters after the
            optimizer's step), the buffers (and what else modules hold in attributes, such as counters), the random
            state afterwards are bit-for-bit equal.
        max_abs_difference: largest absolute difference in any compared tensor.
        compared_share: share of the gradients, by bytes, that was compared. Where regions were compared: of the
            parameters of these regions. 0 in files of versions that did not tell.
        differing: names of what differs from the plain step; of a region's own, after the region's key.
        plain_reproducible: two plain steps from the same state gave the same bits.
        not_reproducible: names of what differs between two plain steps: never blamed on the plan.
        unverified: regions that were not compared, because they cannot be run on their own.
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
    compared_share: float = 0.0

    @classmethod
    def of_kinds(cls, verdicts: Mapping[str, Verdict]) -> Verdict:
        """Return one verdict on all kinds of steps of one plan: peaks are the highest, times those of all together.

        Names are followed by the kind in brackets.
        """
        all_of = list(verdicts.values())
        plain_ms, step_ms = sum(one.plain_step_ms for one in all_of), sum(one.step_ms for one in all_of)
        differences = [one.max_abs_difference for one in all_of if one.max_abs_difference is not None]
        is_measured = all(one.plain_peak_source == "measured" for one in all_of)

        def named(field: str) -> tuple[str, ...]:
            return tuple(f"{name} ({kind})" for kind, one in verdicts.items() for name in getattr(one, field))

        return cls(
            ok=_all(one.ok for one in all_of),
            method="whole-step" if all(one.method == "whole-step" for one in all_of) else "per-region",
            loss_equal=_all(one.loss_equal for one in all_of),
            gradients_equal=_all(one.gradients_equal for one in all_of),
            buffers_equal=_all(one.buffers_equal for one in all_of),
            rng_equal=_all(one.rng_equal for one in all_of),
            max_abs_difference=max(differences, default=None),
            differing=named("differing"),
            plain_reproducible=_all(one.plain_reproducible for one in all_of),
            not_reproducible=named("not_reproducible"),
            unverified=named("unverified"),
            steps=sum(one.steps for one in all_of),
            budget_bytes=max(one.budget_bytes for one in all_of),
            plain_peak_bytes=max(one.plain_peak_bytes for one in all_of),
            plain_peak_source="measured" if is_measured else "predicted",
            predicted_peak_bytes=max(one.predicted_peak_bytes for one in all_of),
            measured_peak_bytes=max(one.measured_peak_bytes for one in all_of),
            plain_step_ms=plain_ms,
            plain_step_source="measured" if is_measured else "predicted",
            step_ms=step_ms,
            overhead_ratio=step_ms / plain_ms - 1 if plain_ms else 0.0,
            replayed_ops=sum(one.replayed_ops for one in all_of),
            mismatches=sum(one.mismatches for one in all_of),
            tape_host_bytes=max(one.tape_host_bytes for one in all_of),
            compared_share=min(one.compared_share for one in all_of),
        )

    @property
    def reason(self) -> str:
        """Why `ok` is not True: what differs, or what could not be compared; empty where it is True."""
        if self.ok:
            return ""
        return "; ".join(self._failures() if self.ok is False else self._gaps())

    def _failures(self) -> list[str]:
        found = []
        if self.differing:
            of_step = [name for name in self.differing if ": " not in name] or self.differing
            regions = sorted({name.partition(": ")[0] for name in self.differing if ": " in name})
            names = listed(sorted(of_step, key=lambda name: (not name.startswith("gradient"), name)))
            size = f", by {self.max_abs_difference:.3g} at most" if self.max_abs_difference else ""
            where = f" (in {listed(regions)})" if regions else ""
            found.append(f"{names} differ from the plain step's{size}{where}")
        if self.measured_peak_bytes > self.budget_bytes:
            found.append(
                f"the measured peak of {format_bytes(self.measured_peak_bytes)} is over the budget of "
                f"{format_bytes(self.budget_bytes)}"
            )
        return found or ["in another process a result differs, or the measured peak is over the budget"]

    def _gaps(self) -> list[str]:
        found = []
        plain_ran = self.plain_peak_source == "measured"
        if self.not_reproducible and (plain_ran or not self.compared_share):
            found.append(f"two plain steps from one state differ in {listed(self.not_reproducible)}")
        if self.unverified:
            rest = "" if plain_ran else ", and the plain step does not fit"
            found.append(f"{listed(self.unverified)} cannot be compared alone{rest}")
        return [*found, f"{self.compared_share:.0%} of the gradients (by bytes) were compared"]

    def summary(self) -> list[tuple[str, str]]:
        """Return what was found as labels and texts, as the command line and notebooks show them."""
        proven = {True: "proven", False: "FAILED", None: "not fully proven"}[self.ok]
        kept = "kept" if self.measured_peak_bytes <= self.budget_bytes else "EXCEEDED"
        rows = [
            ("verdict", f"{proven}: {self.method}, {self.steps} steps"),
            ("loss", _equal(self.loss_equal)),
            ("gradients", f"{_equal(self.gradients_equal)}; {self.compared_share:.0%} of their bytes were compared"),
            ("buffers", _equal(self.buffers_equal)),
            ("random", _equal(self.rng_equal)),
            ("peak", f"{format_bytes(self.measured_peak_bytes)} measured, "
                     f"{format_bytes(self.predicted_peak_bytes)} predicted, budget "
                     f"{format_bytes(self.budget_bytes)} {kept}"),
            ("plain peak", f"{format_bytes(self.plain_peak_bytes)} ({self.plain_peak_source})"),
            ("time", f"{self.step_ms:.1f} ms, plain {self.plain_step_ms:.1f} ms ({self.plain_step_source}): "
                     f"{self.overhead_ratio:+.1%}"),
        ]  # fmt: skip
        if self.reason:
            rows.append(("because", self.reason))
        lists = (("differs", self.differing), ("unstable", self.not_reproducible), ("unverified", self.unverified))
        return rows + [(label, listed(names)) for label, names in lists if names]

    def _repr_html_(self) -> str:
        return html_table("Verdict", self.summary())

    def save(self, path: str | Path) -> None:
        """Write the verdict to a file, as JSON."""
        json_codec.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Verdict:
        """Read a verdict from a file. Raises `PlanMismatch` if the file is not one."""
        return json_codec.load(cls, path)


def listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _all(found: Iterable[bool | None]) -> bool | None:
    """Return False where one is False, else None where one is unknown."""
    known = list(found)
    return False if False in known else None if None in known else True


def _equal(equal: bool | None) -> str:
    return {True: "bit for bit equal to plain", False: "NOT EQUAL to plain", None: "not compared"}[equal]
