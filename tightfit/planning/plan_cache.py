"""Keep plans by step key, and have one made before a step runs whose key has none.

What decides about a plan is compared before each step (`StepKey`); how a plan for a new key is made, `replan` decides.
A plan that follows the decisions made for another batch is solved for once such reuse has cost more time than solving
takes: so at most as much time goes into solving as was lost by not solving.

A step whose operations were not those of its plan is counted; its key is planned again before its next step, and after
2, 4, 8, ... further such steps: a flag that was flipped for good is learnt, a branch that depends on the data costs
little.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tightfit.installation.plans import PlanStatistics
from tightfit.installation.resolved_plan import ResolvedPlan
from tightfit.interrupts import waiting_interrupts
from tightfit.planning.references import MOST_KINDS
from tightfit.planning.replan import Replanned, Replanner
from tightfit.planning.search import FoundPlan
from tightfit.progress import showing_when_long
from tightfit.records import Plan
from tightfit.step.key import ModelWatch, StepKey, step_key
from tightfit.step.step import Step

#: Plans that are kept; the one unused for longest goes first.
MOST_PLANS = 256
#: Calls of the model that are looked at for each step key: later ones are like the first ones.
_CALLS_LOOKED_AT = 4 * MOST_KINDS


@dataclass(eq=False, kw_only=True, slots=True)
class _Entry:
    key: StepKey
    made: Replanned
    mismatched_steps: int = 0
    replan_at: int = 1
    calls: set[StepKey] = field(default_factory=set)
    calls_looked_at: int = 0

    @property
    def plan(self) -> Plan | None:
        return self.made.resolved.plan

    @property
    def added_ms(self) -> float:
        return self.plan.predicted_step_ms - self.plan.plain_step_ms if self.plan is not None else 0.0

    @property
    def is_unlike_its_steps(self) -> bool:
        return self.mismatched_steps >= self.replan_at


class PlanCache:
    """Keep the plans of one model and one budget, as `installation.plans.Plans` asks for them.  Made by `fit`."""

    def __init__(
        self,
        replanner: Replanner,
        watch: ModelWatch,
        steps: Mapping[str, Step],
        planning_ms: float,
    ) -> None:
        """`planning_ms`: what planning the first step took, until something else was planned.

        `steps`: each kind by its name; all have the same optimizers.
        """
        self.statistics = PlanStatistics()
        self._replanner = replanner
        self._watch = watch
        self._steps = steps
        self._optimizers = next(iter(steps.values())).all_optimizers
        self._solving_ms = planning_ms
        self._lost_ms = 0.0
        self._entries: OrderedDict[StepKey, _Entry] = OrderedDict()
        self._calls: dict[StepKey, _Entry] = {}
        self._current: _Entry | None = None
        self._last_step = ""

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: StepKey, found: FoundPlan) -> None:
        """Keep a plan that a trial run confirmed, for steps of that key."""
        self._last_step = key.step
        self._current = self._keep(_Entry(key=key, made=self._replanner.learn(key, found)))

    # ------------------------------------------------------------------------------------------------ before a step

    def plan_for(self, batch: Any, step: str = "") -> ResolvedPlan:
        """Return the plan for a batch in a kind of step, made now if there is none yet.

        Raises:
            BudgetInfeasible: no plan for this batch fits the budget. Nothing has changed.
        """
        self._last_step = step
        key = self._key_of(batch, step, self._steps[step].autocast)
        entry = self._entries.get(key)
        if entry is None or self._is_due(entry):
            if self._replanner.can_measure:
                with showing_when_long(), waiting_interrupts(), self._replanner.budget.in_totals():
                    entry = self._keep(self._planned(key, batch, entry))
            elif entry is None:
                return self._unplanned(step)
        self._entries.move_to_end(key)
        if entry.made.way == "reused":
            self._lost_ms += entry.added_ms
        self._current = entry
        return entry.made.resolved

    def note_call(self, args: Any, kwargs: Any) -> None:
        """Note that the model is called with these arguments, for the batch that `plan_for` was last asked about."""
        if self._current is not None and self._current.calls_looked_at < _CALLS_LOOKED_AT:
            self._current.calls_looked_at += 1
            call = self._key_of((args, kwargs), self._current.key.step)
            if len(self._current.calls) < MOST_KINDS:
                self._current.calls.add(call)
                self._calls[call] = self._current
            self._replanner.note_call(self._current.made.resolved, call)

    def plan_for_call(self, args: Any, kwargs: Any, step: str = "") -> ResolvedPlan:
        """Return the plan for a forward call made without `step(batch)`, in a kind of step."""
        self._last_step = step
        call = self._key_of((args, kwargs), step)
        self._current = self._calls.get(call)
        if self._current is not None:
            return self._current.made.resolved
        if self._replanner.is_ample_for(call):
            return ResolvedPlan.dropping_nothing()
        return self._unplanned(step)

    def note_mismatch(self) -> None:
        """Note that the forward that just ended did not follow the plan that was last asked for."""
        if self._current is not None:
            self._current.mismatched_steps += 1
            self.statistics.mismatched_steps += 1

    def note_kept_graph(self) -> int:
        """Note that the last step's backward kept its graph: plans for its kind are for such steps from now on.

        Returns:
            The peak in bytes of steps under the plans until now, if that is above the budget; else 0.
        """
        step = self._last_step
        if self._replanner.keeps_graphs(step):
            return 0
        with waiting_interrupts():
            made, peak_bytes = self._replanner.keep_graphs(step)
        for entry in [one for one in self._entries.values() if one.key.step == step]:
            planned = made.get(id(entry.made.resolved))
            if planned is None:
                self._forget(self._entries.pop(entry.key))
            else:
                entry.made = planned
        self.statistics.replanned += 1
        return peak_bytes if peak_bytes > self._replanner.budget.step_bytes else 0

    def _key_of(self, batch: Any, step: str, autocast: torch.dtype | None = None) -> StepKey:
        return step_key(self._watch, batch, self._optimizers, step, autocast)

    def _unplanned(self, step: str) -> ResolvedPlan:
        self.statistics.unplanned_calls += 1
        self._current = None
        return self._replanner.without_plan(step)

    def _is_due(self, entry: _Entry) -> bool:
        """Tell whether to plan a known key again."""
        if entry.is_unlike_its_steps and self._replanner.can_try and not entry.made.is_learnt:
            return True
        return entry.made.way == "reused" and self._lost_ms > self._solving_ms

    # ------------------------------------------------------------------------------------------------ keeping plans

    def _keep(self, entry: _Entry) -> _Entry:
        self._entries[entry.key] = entry
        while len(self._entries) > MOST_PLANS:
            _, oldest = self._entries.popitem(last=False)
            self.statistics.forgotten += 1
            self._forget(oldest)
        return entry

    def _forget(self, entry: _Entry) -> None:
        for call in entry.calls:
            if self._calls.get(call) is entry:
                del self._calls[call]

    def _planned(self, key: StepKey, batch: Any, known: _Entry | None) -> _Entry:
        """Have the step planned; count it, and the time that it took."""
        begin = time.perf_counter()
        try:
            if known is not None and known.is_unlike_its_steps and self._replanner.can_try:
                self.statistics.replanned += 1
                made = self._replanner.plan_by_trial(key, batch, again=True)
                mismatched_steps = known.mismatched_steps
                entry = _Entry(key=key, made=made, mismatched_steps=mismatched_steps, replan_at=2 * mismatched_steps)
            else:
                may_reuse = self._lost_ms <= self._solving_ms
                made = self._replanner.plan(key, batch, self._neighbours(key), may_reuse=may_reuse)
                entry = _Entry(key=key, made=made)
        finally:
            took_ms = (time.perf_counter() - begin) * 1e3
            self.statistics.planning_ms += took_ms
        self.statistics.count(made.way)
        if made.way == "solved":
            self._lost_ms = 0.0
            self._solving_ms = (self._solving_ms + took_ms) / 2
        return entry

    def _neighbours(self, key: StepKey) -> list[Plan]:
        """Return the plans that drop something for steps of the same kind, those of the most similar size first."""
        entries = [one for one in self._entries.values() if one.key.kind == key.kind]
        entries.sort(key=lambda one: abs(one.key.elements - key.elements))
        return [one.plan for one in entries if one.plan is not None and not one.plan.is_plain]
