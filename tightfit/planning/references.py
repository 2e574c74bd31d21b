"""The steps that were measured in full and tried: others are planned by what was learnt from them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from tightfit.installation.resolved_plan import ResolvedPlan
from tightfit.planning.search import FoundPlan
from tightfit.profiling.remeasure import operations
from tightfit.records import Profile
from tightfit.step.key import StepKey

#: Kinds of steps (see `StepKey.kind`) of which a profile is kept to measure others by.
MOST_KINDS = 8


@dataclass(eq=False, kw_only=True, slots=True)
class Reference:
    """A step that was measured in full and tried."""

    key: StepKey
    call: StepKey | None
    """Key of the model's call in it."""
    profile: Profile
    resolved: ResolvedPlan
    plain_peak_bytes: int
    correction_bytes: int
    """What the meter saw beyond the prediction."""


class References:
    """The latest references, of a few kinds of steps."""

    def __init__(self) -> None:
        self._found: list[Reference] = []  # the latest last

    def __iter__(self) -> Iterator[Reference]:
        return iter(self._found)

    def add(self, key: StepKey, found: FoundPlan) -> None:
        """Add a step whose plan a trial run confirmed; it takes the place of one with the same operations."""
        resolved, profile = found.resolved, found.profile
        excess_bytes = found.outcome.peak_bytes - found.plan.predicted_peak_bytes
        reference = Reference(
            key=key,
            call=None,
            profile=profile,
            resolved=resolved,
            plain_peak_bytes=found.plan.plain_peak_bytes,
            correction_bytes=max(0, profile.correction_bytes, profile.correction_bytes + excess_bytes),
        )
        known = self.of_kind(key.kind, profile)
        if known is not None:  # the same operations: what was checked there counts here, and the other way round
            known.resolved.checked.update(resolved.checked)
            known.resolved.moves.update(resolved.moves)
            for region, positions in resolved.refused.items():
                known.resolved.refused.setdefault(region, set()).update(positions)
            resolved.checked, resolved.refused = known.resolved.checked, known.resolved.refused
            resolved.moves = known.resolved.moves
        others = [one for one in self._found if one is not known]
        self._found = [*others[1 - MOST_KINDS :], reference]

    def note_call(self, resolved: ResolvedPlan, call: StepKey) -> None:
        """Note the key of the model's call in the step that a plan is for."""
        for reference in self._found:
            if reference.resolved is resolved and reference.call is None:
                reference.call = call

    def of_kind(self, kind: Hashable, like: Profile | None = None) -> Reference | None:
        """Return the latest of that kind (with the operations of `like`)."""
        wanted = operations(like) if like is not None else None
        for one in reversed(self._found):
            if one.key.kind == kind and wanted in (None, operations(one.profile)):
                return one
        return None

    def of_step(self, step: str) -> list[Reference]:
        """Return those of a kind of step by its name, the latest last."""
        return [one for one in self._found if one.key.step == step]

    def latest(self, step: str) -> Reference:
        """Return the latest of a kind of step by its name, or of any where there is none."""
        return (self.of_step(step) or self._found)[-1]
