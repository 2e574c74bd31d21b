"""Plans for batches of other shapes than the one that `fit` was given: made before the step runs, and kept.

What decides about a plan is compared before each step (`step_shape`).  For a shape without a plan:

* Where the model, its mode or the settings are new too (an adapter, eval mode, another dtype), a plan is made as `fit`
  makes one: measured, solved, run once under the meter, repaired.
* Where only sizes are new, the step is measured anew (`measure_reshaped`), without data if that is possible, so that
  every size and lifetime is known exactly.  If the plain step fits, nothing is dropped.  Else the decisions of shapes
  of similar size are tried by simulation, which takes milliseconds; the fastest that fits is reused.  A plan is solved
  for where none fits, and where reusing has by now cost more time than solving takes: so at most as much time goes into
  solving as was lost by not solving.
* No run under the meter confirms such a plan, so a margin is kept, and what repair had to add elsewhere is added here.
  Where the budget leaves no room for the margin, or a region is recomputed for the first time, there is such a run.
  A model that FSDP2 has sharded is never run so: a trial would need all its processes.
* A batch so small that its plain step must fit several times over is not even measured.

A step whose operations were not those of its plan is counted; the shape is planned again before its next step, and
after 2, 4, 8, ... further such steps: a flag that was flipped for good is learnt, a branch that depends on the data
costs little.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch

from tightfit._torch_private import profiler_is_running
from tightfit.distributed.fsdp import is_sharded
from tightfit.errors import BudgetInfeasible
from tightfit.installation.applied import Applied
from tightfit.installation.resolved_plan import LivePlan
from tightfit.profiling.measure import measure_step
from tightfit.profiling.remeasure import measure_reshaped, operations
from tightfit.records import Decision, Plan, Profile, SharedTape
from tightfit.replay.executors import executor_of
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.solver.plan_builder import build_plan
from tightfit.solver.solver import Solver
from tightfit.step.key import ModelWatch, StepShape, ambient_autocast, step_shape
from tightfit.step.model import device_of
from tightfit.step.step import Step
from tightfit.units import format_bytes

_log = logging.getLogger(__name__)

GradCheckpoint = Literal["auto", "full", "off"]

#: Plans that are kept; the one unused for longest goes first.
MOST_PLANS = 256
#: Kinds of steps (see `StepShape.kind`) of which a profile is kept to measure others by.
MOST_KINDS = 8
#: Part of the memory above the baseline that a plan leaves free if no metered run confirmed it: the memory model's own
#: bar for its largest error before repair.
UNCONFIRMED_MARGIN = 0.02
#: Calls of the model that are looked at for each shape of a batch: later ones are like the first ones.
_CALLS_LOOKED_AT = 4 * MOST_KINDS
#: Shapes whose decisions are tried for a new one.
_NEIGHBOURS = 4
#: A batch is not measured if the plain step of one like it, grown by the cube of the ratio of sizes, fits so often.
_AMPLE = 2.0


@dataclass(slots=True)
class PlanStatistics:
    """What became of batches of other shapes."""

    guarded: int = 0
    """Plans made as `fit` makes them, with a metered run."""
    solved: int = 0
    """Plans solved for a measured shape."""
    reused: int = 0
    """Shapes that were measured and got decisions made for another."""
    plain: int = 0
    """Shapes that were measured and need nothing dropped."""
    ample: int = 0
    """Shapes so small that they were not measured."""
    replanned: int = 0
    """Plans made again because steps did not follow them."""
    mismatched_steps: int = 0
    """Steps in which a region ran other operations than its plan's: safe, but not as planned."""
    unplanned_calls: int = 0
    """Forwards of a shape without a plan, which nobody announced with a batch: all that is replayable was dropped."""
    forgotten: int = 0
    """Plans that went because there were too many."""
    planning_ms: float = 0.0
    """Time spent on all this."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Reference:
    """A step that was measured in full and run under the meter."""

    shape: StepShape
    call: StepShape | None
    """Shape of the model's call in it."""
    profile: Profile
    live: LivePlan
    plain_peak_bytes: int
    correction_bytes: int
    """What the meter saw beyond the prediction."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Entry:
    live: LivePlan
    kind: Hashable
    elements: int
    is_reused: bool = False
    is_data_dependent: bool = False
    mismatched_steps: int = 0
    replan_at: int = 1
    calls: set[StepShape] = field(default_factory=set)
    calls_looked_at: int = 0

    @property
    def added_ms(self) -> float:
        plan = self.live.plan
        return plan.predicted_step_ms - plan.plain_step_ms if plan is not None else 0.0


class _InOpenAutocast(Step):
    """A step inside an autocast context that stays open around it, run as if the context were opened for each step.

    PyTorch forgets the weights that it has cast when the outermost context closes, which is then the user's; what the
    runs for planning cast must not be found by the user's own step, nor by each other.  A context that stays open over
    several forwards forgets them, too, when one of these has to be planned.
    """

    def run_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        torch.clear_autocast_cache()
        try:
            return super().run_loss(model, batch)
        finally:
            torch.clear_autocast_cache()


class PlanCache:
    """See the module.  Made by `fit`, for one model."""

    def __init__(
        self,
        model: torch.nn.Module,
        applied: Applied,
        spec: Step,
        budget_bytes: int,
        grad_checkpoint: GradCheckpoint,
        plan_guarded: Callable[[Any, Step], Applied],
        planning_ms: float,
    ) -> None:
        """`plan_guarded`: makes a plan for a batch as `fit` does and leaves it installed; `planning_ms`: its time."""
        self.statistics = PlanStatistics()
        self._model = model
        self._applied = applied
        self._spec = spec
        self._budget_bytes = budget_bytes
        self._grad_checkpoint = grad_checkpoint
        self._plan_guarded = plan_guarded
        self._is_sharded = is_sharded(model)
        self._solving_ms = planning_ms
        self._lost_ms = 0.0
        self._entries: OrderedDict[StepShape, _Entry] = OrderedDict()
        self._calls: dict[StepShape, _Entry] = {}
        self._references: list[_Reference] = []  # the latest last
        self._watch = ModelWatch(model)
        self._current: _Entry | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, batch: Any, applied: Applied) -> None:
        """Note a plan that a metered run confirmed, for batches like `batch`."""
        shape = self._shape_of(batch)
        self._current = self._note(shape, self._confirmed(shape, applied))

    # ------------------------------------------------------------------------------------------------ before a step

    def plan_for(self, batch: Any) -> LivePlan:
        """The plan for a batch, made now if there is none yet.

        Raises:
            BudgetInfeasible: no plan for this batch fits the budget. Nothing has changed.
        """
        shape = self._shape_of(batch)
        entry = self._entries.get(shape)
        if entry is None or self._is_due(entry):
            if not self._can_measure():
                if entry is None:
                    return self._unplanned()
            else:
                entry = self._note(shape, self._timed(shape, batch, entry))
        self._entries.move_to_end(shape)
        if entry.is_reused:
            self._lost_ms += entry.added_ms
        self._current = entry
        return entry.live

    def note_call(self, args: Any, kwargs: Any) -> None:
        """The model is called with these arguments, for the batch that `plan_for` was last asked about."""
        if self._current is not None and self._current.calls_looked_at < _CALLS_LOOKED_AT:
            self._current.calls_looked_at += 1
            call = self._shape_of((args, kwargs))
            if len(self._current.calls) < MOST_KINDS:
                self._current.calls.add(call)
                self._calls[call] = self._current
            for reference in self._references:
                if reference.live is self._current.live and reference.call is None:
                    reference.call = call

    def plan_for_call(self, args: Any, kwargs: Any) -> LivePlan:
        """The plan for a call of the model whose batch nobody told."""
        call = self._shape_of((args, kwargs))
        self._current = self._calls.get(call)
        if self._current is not None:
            return self._current.live
        if any(r.call is not None and self._is_ample(call, r.call, r) for r in self._references):
            return LivePlan.dropping_nothing()
        return self._unplanned()

    def note_mismatch(self) -> None:
        """The forward that just ended did not follow the plan that was last asked for."""
        if self._current is not None:
            self._current.mismatched_steps += 1
            self.statistics.mismatched_steps += 1

    def _shape_of(self, batch: Any) -> StepShape:
        return step_shape(self._watch, batch, self._spec.optimizers)

    def _unplanned(self) -> LivePlan:
        self.statistics.unplanned_calls += 1
        self._current = None
        if self._grad_checkpoint == "off":
            return LivePlan.dropping_nothing()
        return LivePlan.dropping_everything(self._references[-1].profile.region_paths)

    def _can_measure(self) -> bool:
        """Scratch is measured with PyTorch's profiler, of which a process can run one; and not inside a forward."""
        return not profiler_is_running() and not self._applied.is_running

    def _is_due(self, entry: _Entry) -> bool:
        """Whether to plan a known shape again."""
        if entry.mismatched_steps >= entry.replan_at and not (entry.is_data_dependent or self._is_sharded):
            return True
        return entry.is_reused and self._lost_ms > self._solving_ms

    # ------------------------------------------------------------------------------------------------ making plans

    def _note(self, shape: StepShape, entry: _Entry) -> _Entry:
        self._entries[shape] = entry
        while len(self._entries) > MOST_PLANS:
            _, oldest = self._entries.popitem(last=False)
            self.statistics.forgotten += 1
            for call in oldest.calls:
                if self._calls.get(call) is oldest:
                    del self._calls[call]
        return entry

    def _timed(self, shape: StepShape, batch: Any, known: _Entry | None) -> _Entry:
        begin = time.perf_counter()
        reference = self._reference(shape.kind)
        try:
            if known is not None and known.mismatched_steps >= known.replan_at:
                self.statistics.replanned += 1
                entry = self._guarded(shape, batch)
                entry.mismatched_steps, entry.replan_at = known.mismatched_steps, 2 * known.mismatched_steps
                return entry
            if reference is None:
                self._tell_of_new_kind()
                return self._guarded(shape, batch)
            if self._is_ample(shape, reference.shape, reference):
                self.statistics.ample += 1
                return _Entry(live=LivePlan.dropping_nothing(), kind=shape.kind, elements=shape.elements)
            if reference.profile.data_dependent:
                return self._guarded(shape, batch)
            return self._unguarded(shape, batch, reference, begin)
        finally:
            self.statistics.planning_ms += (time.perf_counter() - begin) * 1e3

    def _tell_of_new_kind(self) -> None:
        trained = {id(p) for one in self._spec.optimizers for group in one.param_groups for p in group["params"]}
        names = [n for n, p in self._model.named_parameters() if p.requires_grad and id(p) not in trained]
        if self._spec.optimizers and names:
            _log.warning(
                "%d parameters that require a gradient (%s, ...) are in none of the optimizers that fit was given, so "
                "the memory of their optimizer is not in the budget. Add them with add_param_group, or fit again.",
                len(names),
                names[0],
            )
        _log.info("the model, its mode, or PyTorch's settings are not as when fit planned them; planning again")

    def _is_ample(self, shape: StepShape, known: StepShape, reference: _Reference) -> bool:
        if self._grad_checkpoint == "full" or shape.kind != known.kind:
            return False
        baseline_bytes = reference.profile.baseline_bytes
        growth = shape.growth_from(known) ** 3
        most_bytes = baseline_bytes + _AMPLE * growth * (reference.plain_peak_bytes - baseline_bytes)
        return most_bytes <= self._budget_bytes

    def _step_spec(self) -> Step:
        """The step as it runs now: an open autocast context counts as the step's own."""
        ambient = ambient_autocast(self._watch.device_type)
        if ambient is None:
            return self._spec
        settings = {one.name: getattr(self._spec, one.name) for one in fields(self._spec) if one.init}
        return _InOpenAutocast(**{**settings, "autocast": ambient})

    def _guarded(self, shape: StepShape, batch: Any) -> _Entry:
        spec = self._step_spec()
        if self._is_sharded:  # a trial needs all processes, and the others may know their shapes already
            return self._untried(shape, batch, spec)
        with self._applied.removed(), _no_ambient_autocast(self._model):
            applied = self._plan_guarded(batch, spec)
            applied.remove()
        self.statistics.guarded += 1
        return self._confirmed(shape, applied)

    def _untried(self, shape: StepShape, batch: Any, spec: Step) -> _Entry:
        """A plan from a measurement of its own, corrected by what the latest trial showed."""
        latest = self._references[-1]
        with self._applied.paused(), _no_ambient_autocast(self._model):
            profile = measure_step(self._model, batch, spec, budget_bytes=self._budget_bytes)
        profile = replace(profile, correction_bytes=latest.correction_bytes)
        plan, is_reused = self._choose(profile, shape)
        self.statistics.solved += 1
        return _Entry(live=LivePlan.of(plan), kind=shape.kind, elements=shape.elements, is_reused=is_reused)

    def _confirmed(self, shape: StepShape, applied: Applied) -> _Entry:
        profile, live = applied.profile, applied.live
        assert profile is not None
        assert live.plan is not None
        measured_bytes = applied.guarded_peak_bytes or 0
        reference = _Reference(
            shape=shape,
            call=None,
            profile=profile,
            live=live,
            plain_peak_bytes=live.plan.plain_peak_bytes,
            correction_bytes=max(
                0,
                profile.correction_bytes,
                profile.correction_bytes + measured_bytes - live.plan.predicted_peak_bytes,
            ),
        )
        known = self._reference(shape.kind, profile)
        if known is not None:  # the same operations: what was calibrated there counts here, and the other way round
            known.live.calibrated.update(live.calibrated)
            for key, positions in live.refused.items():
                known.live.refused.setdefault(key, set()).update(positions)
            live.calibrated, live.refused = known.live.calibrated, known.live.refused
        others = [one for one in self._references if one is not known]
        self._references = [*others[1 - MOST_KINDS :], reference]
        return _Entry(live=live, kind=shape.kind, elements=shape.elements, is_data_dependent=profile.data_dependent)

    def _reference(self, kind: Hashable, like: Profile | None = None) -> _Reference | None:
        """The latest one of that kind (with the operations of `like`)."""
        wanted = operations(like) if like is not None else None
        for one in reversed(self._references):
            if one.shape.kind == kind and wanted in (None, operations(one.profile)):
                return one
        return None

    def _unguarded(self, shape: StepShape, batch: Any, reference: _Reference, begin: float) -> _Entry:
        spec = self._step_spec()
        with self._applied.paused(), _no_ambient_autocast(self._model):
            profile = measure_reshaped(self._model, batch, spec, reference.profile, self._budget_bytes)
        same = self._reference(shape.kind, profile)
        if same is None or profile.method != same.profile.method:  # another branch, perhaps by the batch's size
            return self._guarded(shape, batch)
        reference = same
        profile = self._with_margin(profile, reference)
        try:
            plan, is_reused = self._choose(profile, shape)
        except BudgetInfeasible as error:
            required_bytes = error.required_bytes - profile.margin_bytes
            if required_bytes - profile.correction_bytes > self._budget_bytes:
                raise BudgetInfeasible(required_bytes, self._budget_bytes, error.where) from None
            return self._guarded(shape, batch)
        if _estimated(profile) - _estimated(reference.profile):  # they could not be run alone within the budget
            return self._guarded(shape, batch)
        if _replaying(plan) - reference.live.calibrated:  # a first call checks its replay, which takes memory
            return self._guarded(shape, batch)
        if plan.is_plain:
            self.statistics.plain += 1
        elif is_reused:
            self.statistics.reused += 1
        else:
            self.statistics.solved += 1
            self._lost_ms = 0.0
            self._solving_ms = (self._solving_ms + (time.perf_counter() - begin) * 1e3) / 2
        _log.info(
            "planned %s: %s, peak %s", profile.batch, "reused" if is_reused else "solved",
            format_bytes(plan.predicted_peak_bytes),
        )  # fmt: skip
        live = LivePlan.of(plan, like=reference.live)
        return _Entry(live=live, kind=shape.kind, elements=shape.elements, is_reused=is_reused)

    def _with_margin(self, profile: Profile, reference: _Reference) -> Profile:
        growth = max(1.0, _activation_bytes(profile) / max(1, _activation_bytes(reference.profile)))
        margin_bytes = int(UNCONFIRMED_MARGIN * max(0, self._budget_bytes - profile.baseline_bytes))
        return replace(
            profile,
            correction_bytes=int(reference.correction_bytes * growth),
            margin_bytes=profile.margin_bytes + margin_bytes,
        )

    def _choose(self, profile: Profile, shape: StepShape) -> tuple[Plan, bool]:
        """A plan that fits, and whether its decisions are another shape's."""
        solver = Solver(profile)
        budget_bytes = self._budget_bytes
        plain = solver.plain(budget_bytes)
        if self._grad_checkpoint != "auto":
            plan = solver.full(budget_bytes) if self._grad_checkpoint == "full" else plain
            if plan.predicted_peak_bytes > budget_bytes:
                raise BudgetInfeasible(plan.predicted_peak_bytes, budget_bytes, plan.peak_where)
            return plan, False
        if plain.predicted_peak_bytes <= budget_bytes:
            return plain, False
        rivals = [p for p in self._neighbours(solver.index, shape) if p.predicted_peak_bytes <= budget_bytes]
        is_solved = not rivals or self._lost_ms > self._solving_ms
        if is_solved:
            rivals.append(solver.solve(budget_bytes))
        return min(rivals, key=lambda plan: plan.predicted_step_ms), not is_solved

    def _neighbours(self, index: ProfileIndex, shape: StepShape) -> list[Plan]:
        """Plans for this profile that follow the decisions of shapes of similar size."""
        near = sorted(
            (e for e in self._entries.values() if e.kind == shape.kind and e.live.plan and not e.live.plan.is_plain),
            key=lambda entry: abs(entry.elements - shape.elements),
        )
        found: dict[tuple[tuple[Decision | None, ...], tuple[SharedTape, ...]], None] = {}
        for entry in near:
            assert entry.live.plan is not None
            decisions = decisions_of(entry.live.plan, index.profile)
            if decisions is not None:
                found[tuple(decisions), entry.live.plan.shared_tapes] = None
            if len(found) == _NEIGHBOURS:
                break
        return [build_plan(index, decisions, self._budget_bytes, shared_tapes=shared) for decisions, shared in found]


def decisions_of(plan: Plan, profile: Profile) -> list[Decision | None] | None:
    """The plan's decisions for the regions of another profile; None if it has other regions or operations."""
    recipes = {region.key: plan.recipes[region.recipe] if region.recipe >= 0 else None for region in plan.regions}
    if plan.shared_tapes and [region.key for region in plan.regions] != [region.key for region in profile.regions]:
        return None
    decisions: list[Decision | None] = []
    for key, names in operations(profile):
        if key not in recipes:
            return None
        recipe = recipes[key]
        if recipe is not None and recipe.op_names != names:
            return None
        decisions.append(None if recipe is None else recipe.decision)
    return decisions


def _activation_bytes(profile: Profile) -> int:
    return sum(storage.nbytes for storage in profile.storages if storage.component == "activation")


def _replaying(plan: Plan) -> set[str]:
    """Keys of the regions that the plan replays something in, by a tape."""
    return {r.key for r in plan.regions if r.recipe >= 0 and executor_of(plan.recipes[r.recipe]).on_tape}


def _estimated(profile: Profile) -> set[str]:
    return {signature.name for signature in profile.signatures if signature.note}


def _no_ambient_autocast(model: torch.nn.Module) -> torch.autocast:
    return torch.autocast(device_of(model).type, enabled=False)
