"""Let steps on batches of several sizes share what the allocator has cached.

What one size leaves in the cache may serve the next one not at all, and both together can exceed a budget that each of
them keeps.  To give the cache back between them waits for the device, as no plain step does.  But what the largest step
leaves serves smaller ones, if these hold less at a time.  So a smaller size takes the fastest plan whose steps keep the
budget in turn with the others', the largest first, by the model of the allocator.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from tightfit.installation.resolved_plan import ResolvedPlan
from tightfit.records import Plan
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.reserved import totals_in_turn
from tightfit.simulation.step_requests import StepRequests, requests_of

_log = logging.getLogger(__name__)

#: Steps that are walked in turn: those that reserve the most.
_MOST_WALKED = 6


@dataclass(frozen=True, slots=True)
class _Sharer:
    reserved_bytes: int
    requests: StepRequests


class SharedCache:
    """Know which plans keep the budget in turn, and how much the process then holds."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._largest: list[_Sharer] = []
        self._members: list[ResolvedPlan] = []

    def fastest(self, index: ProfileIndex, rivals: Iterable[Plan]) -> Plan:
        """Return the first plan, of some in the order of their times, that shares the cache; the first if none does."""
        first: Plan | None = None
        for plan in rivals:
            if (
                index.profile.allocator is None
                or self._total_bytes(index, self._with(index, plan)) <= self._budget_bytes
            ):
                return plan
            first = first or plan
        assert first is not None
        return first

    def join(self, index: ProfileIndex, resolved: ResolvedPlan) -> None:
        """Let a plan share the cache, if it keeps the budget in turn with the others."""
        if resolved.plan is None or index.profile.allocator is None:
            return
        sharers = self._with(index, resolved.plan)
        total_bytes = self._total_bytes(index, sharers)
        if total_bytes > self._budget_bytes:
            _log.info(
                "the plan for %s shares no cache with those for other sizes: it is given back around its steps, which "
                "waits for the device",
                resolved.plan.batch,
            )
            return
        self._largest = sharers[:_MOST_WALKED]
        self._members.append(resolved)
        for member in self._members:
            member.may_find_bytes = max(member.may_find_bytes, total_bytes)

    def _with(self, index: ProfileIndex, plan: Plan) -> list[_Sharer]:
        sharer = _Sharer(plan.predicted_reserved_bytes, requests_of(index, plan.decisions, plan.shared_tapes))
        return sorted([*self._largest, sharer], key=lambda one: -one.reserved_bytes)

    def _total_bytes(self, index: ProfileIndex, sharers: list[_Sharer]) -> int:
        """Return what the process holds at most where such steps run in turn."""
        profile = index.profile
        assert profile.allocator is not None
        steps = [one.requests for one in sharers]
        return profile.correction_bytes + totals_in_turn(steps, profile.allocator, passes=profile.accumulation_steps)
