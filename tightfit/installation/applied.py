"""A plan that is installed on a model, and how it is uninstalled again.

Nothing but an instance-level `forward` is installed, on the modules that are regions: classes, `state_dict` keys,
`isinstance`, repr and user hooks (which run around forward) are untouched.  A plan that drops nothing installs nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch

from tightfit._torch_private.compiling import is_traced, not_traced
from tightfit._torch_private.dispatch import is_transformed
from tightfit.errors import UnsupportedInput
from tightfit.installation.cache_room import CacheRoom
from tightfit.installation.kinds import KindOfStep, known_kind
from tightfit.installation.model_forwards import ModelForwards, paths_around
from tightfit.installation.optimizer_watch import OptimizerWatch
from tightfit.installation.own_loss import looking_at_own_loss
from tightfit.installation.plans import Plans
from tightfit.installation.promises import Promises
from tightfit.installation.region_forward import WHY_NOT_TRACED, RegionForward
from tightfit.installation.resolved_plan import ResolvedPlan
from tightfit.installation.wrappers import wrapper_that_calls
from tightfit.operators.escaped_memory import with_fast_paths
from tightfit.operators.region_names import LOSS, ROOT, is_module_below
from tightfit.records import Plan, Profile, Verdict
from tightfit.replay.installed import Installed
from tightfit.replay.statistics import Statistics
from tightfit.step.batch import describe_batch
from tightfit.step.models import Models, ModelSet
from tightfit.step.resident import tensors_beside
from tightfit.step.step import Step


class RootForward(RegionForward):
    """The forward of the model itself: activates the plan for the step, or for the arguments' shapes, first."""

    def __init__(self, model: torch.nn.Module, applied: Applied) -> None:
        super().__init__(model, ROOT, applied._installed)
        self._applied = applied
        self._running = False

    def run_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's forward as if nothing were installed."""
        if torch.is_grad_enabled() and not self._installed.enabled:
            self._applied._watch.planned_forward()  # plain, as the user asked for
        return super().run_plain(args, kwargs)

    @not_traced(WHY_NOT_TRACED)
    def run_planned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's forward under its plan."""
        if is_transformed():
            self._applied._watch.planned_forward()  # plain, as is told
        if self._running or is_transformed() or is_traced():
            return super().run_planned(args, kwargs)
        self._running = True
        try:
            self._applied._model_called(args, kwargs)
            if not self._applied.installed:
                return self.original(*args, **kwargs)
            with self._applied._noticing_mismatches():
                self._applied._was_called = True
                return super().run_planned(args, kwargs)
        finally:
            self._running = False


class Applied:
    """A plan installed on a model, as `apply` and `fit` return it.

    Leaving it as a context uninstalls the plan, as `remove` does.

        with tightfit.apply(model, plan, step=tightfit.Step(loss=loss_fn)) as applied:
            for batch in batches:
                applied.loss(model, batch).backward()

    Whoever computes the loss in a loop of their own opens `step(batch)` around forward and loss, or calls the model as
    ever.  Copying and pickling the model give an unplanned one.

    Attributes:
        plan: the `Plan` for the batch that was given; see `active_plan` for that of the last step.
        profile: the `Profile` that the plan was solved from; None for a plan from a file.
        verdict: the `Verdict` of the proof that `fit` made, of several kinds of steps all in one; None from `apply`.
        kinds: plan, profile and verdict of each kind of step, where `fit` was given several; else empty.
        steps_run: how often `fit` ran the step to try the plan and to prove it, measuring left out; 0 from `apply`.
        plans: the cache of plans for batches of other shapes, which `fit` makes; its `statistics` count what became of
            them (plans ``tried``, ``solved``, ``reused``, ``mismatched_steps``, ...). None from `apply`.
        cache_room: gives the memory that a GPU's allocator has cached back where another plan could need it.
    """

    def __init__(self, model: torch.nn.Module, plan: Plan, step: Step, profile: Profile | None = None) -> None:
        self.plan = plan
        self.profile = profile
        self.verdict: Verdict | None = None
        self.kinds: Mapping[str, KindOfStep] = {}
        self.steps_run = 0
        self.plans: Plans | None = None
        self._model = model
        self._steps: Mapping[str, Step] = {step.kind: step}
        self._kind = step.kind  # of the step that is open, or was last
        self._seen_kept_graphs = 0
        self._own = self._resolved = ResolvedPlan.of(plan)
        self._installed = Installed(
            recipes={},
            fast_paths=with_fast_paths(model),
            around_excluded=paths_around(model, plan.excluded),
        )
        self._forwards = ModelForwards(model, self._installed)
        self._when_removed: Callable[[], object] = lambda: None
        self._batch_is_known = False
        self._in_step = False
        self._loss_was_seen = False
        self.cache_room = CacheRoom(model, plan.budget_bytes, self._own)
        self._promises = Promises(model, plan.budget_bytes)
        self._watch = OptimizerWatch(model, self._promises)
        self._wrapper: weakref.ref[torch.nn.Module] | None = None
        self._was_called = False
        """Whether the model itself was called since the outermost forward or step began."""
        self._activate(self._own)

    @property
    def statistics(self) -> Statistics:
        """Counts of what the engine did since the last `statistics.reset()`."""
        return self._installed.statistics

    @property
    def resolved(self) -> ResolvedPlan:
        """The active plan, ready to be run, with what its regions' self-checks found."""
        return self._resolved

    @property
    def is_running(self) -> bool:
        """Whether a planned forward is open in some thread."""
        return bool(self._installed.sessions)

    @property
    def installed(self) -> bool:
        """Whether regions of the model run under a plan: False while the active plan drops nothing."""
        return self._forwards.are_on and bool(self._resolved.region_paths)

    @property
    def active_plan(self) -> Plan | None:
        """The plan of the last batch; None if that had none: because its shape was never planned, so that all that is
        provably replayable was dropped, or because it is so small that nothing needs to be dropped.
        """
        return self._resolved.plan

    @property
    def refused(self) -> dict[str, set[int]]:
        """Positions of operations, by region key, that a self-check found unfit for replay: they are kept."""
        return {key: set(positions) for key, positions in self._installed.refused.items() if positions}

    def loss(self, model: Models, batch: Any, *, kind: str | None = None) -> torch.Tensor:
        """Compute the loss on a batch under the plan for its shape, with what runs outside the model.

        After `fit`, a batch whose shape has no plan yet is measured and solved first.

        Args:
            model: the model, or what wraps it (DistributedDataParallel); of several models the container.
            batch: any batch.
            kind: which of the steps that `fit` was given, if it was a mapping.

        Returns:
            The loss, to call ``backward()`` on.

        Raises:
            BudgetInfeasible: no plan for this batch fits the budget; nothing was run, nothing changed.
            UnsupportedInput: there are several kinds of steps, and `kind` is none of them.
        """
        kind = known_kind(self._steps, kind)
        before = self._installed.loss_is_own
        self._installed.loss_is_own = True
        try:
            with self.step(batch, kind=kind):
                return self._steps[kind].run_loss(model, batch)
        finally:
            self._installed.loss_is_own = before

    def prepare(self, batch: Any, *, kind: str | None = None) -> None:
        """Make the plan for batches of this shape now, if there is none yet (after `fit`; else this does nothing).

        `loss` and `step(batch)` do so by themselves.  `kind` as for `loss`.

        Raises:
            BudgetInfeasible: no plan for this batch fits the budget; nothing was run, nothing changed.
        """
        kind = known_kind(self._steps, kind)
        if self.plans is not None and self._is_active():
            self._plan_for(batch, kind)

    @contextmanager
    def step(self, batch: Any = None, *, kind: str | None = None) -> Iterator[None]:
        """Open a context for the forward of model and loss (backward may be inside or outside).

        With `batch`, the plan for its shape is active inside, made first if there is none yet.  Without, the model
        recognises its arguments' shapes; where they were never planned, all that is provably replayable is dropped.
        Several models need the batch.  `kind` as for `loss`.

            with applied.step(batch):
                loss = loss_fn(model(batch["x"]), batch["y"])
            loss.backward()

        Raises:
            BudgetInfeasible: no plan for this batch fits the budget; nothing was run, nothing changed.
            UnsupportedInput: as `loss`; or several models, and no batch.
        """
        kind = known_kind(self._steps, kind)
        if batch is None and isinstance(self._model, ModelSet):
            raise UnsupportedInput(
                "a step of several models was opened without its batch. A single model recognises its arguments, but "
                "of several none is called first or always. Open `with applied.step(batch):`."
            )
        if not self._is_active():
            yield
            return
        self._watch.planned_forward()
        before = self._batch_is_known, self._in_step
        self._in_step, self._kind = True, kind
        if batch is not None:
            self.cache_room.begin_step()
            self._activate(self._plan_for(batch, kind))
            self._batch_is_known = True
        try:
            with self._looking_at_the_loss(batch):
                if self.installed:
                    with self._noticing_mismatches(), self._installed.region(LOSS):
                        yield
                else:
                    yield
        finally:
            self._batch_is_known, self._in_step = before

    @contextmanager
    def _looking_at_the_loss(self, batch: Any) -> Iterator[None]:
        """Compare, in the first step that somebody computes himself, what loss and model save with the profile."""
        resolved = self._resolved
        if (
            self._loss_was_seen
            or self.profile is None
            or resolved.plan is not self.plan
            or resolved.drops_in_loss
            or self._installed.loss_is_own
            or not self._promises.are_watched
        ):
            yield
            return
        self._loss_was_seen = True
        installed = self._installed if self.installed else None
        with looking_at_own_loss(self._model, batch, self.plan, self.profile, installed, self._promises.other_loss):
            yield

    def follow(self, plans: Plans, steps: Mapping[str, Step] | None = None) -> None:
        """Take the plan for each batch from `plans` from now on; `steps`: each kind of step by its name."""
        self.plans = plans
        self._steps = steps or self._steps
        self._activate(self._resolved)

    def _is_active(self) -> bool:
        is_on = self._forwards.are_on and self._installed.enabled and torch.is_grad_enabled()
        return is_on and not is_transformed()

    def _note_kept_graph(self) -> None:
        """Tell of a backward that has kept its graph: in it autograd gives nothing back, which plans count on."""
        if self.is_running:
            return
        seen, self._seen_kept_graphs = self._seen_kept_graphs, self._installed.statistics.kept_graphs
        if self._seen_kept_graphs in (0, seen):
            return
        if self.plans is None:
            if not self._steps[self._kind].retain_graph:
                self._promises.kept_graph()
        elif peak_bytes := self.plans.note_kept_graph():
            self._promises.kept_graph_until_now(peak_bytes)

    def _plan_for(self, batch: Any, kind: str) -> ResolvedPlan:
        self._note_kept_graph()
        if self.plans is not None:
            return self.plans.plan_for(batch, kind)
        if self.plan.is_plain or describe_batch(batch) == self.plan.batch:
            return self._own
        return ResolvedPlan.dropping_everything(self.plan)

    @contextmanager
    def _noticing_mismatches(self) -> Iterator[None]:
        counts = self._installed.statistics
        outermost = not self.is_running
        before = counts.mismatches + counts.unplanned_calls
        if outermost:
            self._was_called = False
        yield
        if outermost and self.plans is not None and counts.mismatches + counts.unplanned_calls > before:
            if f"{ROOT}#0" in self._installed.recipes and not self._was_called:
                self._promises.parts_alone()
            else:
                self.plans.note_mismatch()

    @property
    def wrapper(self) -> torch.nn.Module | None:
        """What the model was called through last, if that is another module that holds it."""
        return self._wrapper() if self._wrapper is not None else None

    def tell_of_wrapper(self, wrapper: torch.nn.Module) -> None:
        """Tell that the model is called through a wrapper under which it runs other operations than were planned."""
        self._promises.other_operations(type(wrapper).__name__)

    def _model_called(self, args: Any, kwargs: Any) -> None:
        self._watch.planned_forward()
        wrapper, is_compiled = wrapper_that_calls(self._model)
        self._wrapper = weakref.ref(wrapper) if wrapper is not None else None
        if is_compiled:
            self._promises.compiled()
        if not self._batch_is_known:
            self._note_kept_graph()
        if self.plans is not None:
            if self._batch_is_known:
                self.plans.note_call(args, kwargs)
            else:
                counts = self.plans.statistics
                before = counts.unplanned_calls
                self.cache_room.begin_step()
                self._activate(self.plans.plan_for_call(args, kwargs, self._kind if self._in_step else ""))
                if counts.unplanned_calls > before and self._model.training:
                    self._promises.unplanned_call(describe_batch((args, kwargs)))
        if not self._in_step and self._model.training:
            plan, loss_bytes = self._resolved.plan, self._resolved.loss_bytes
            if plan is not None and plan.predicted_peak_bytes + loss_bytes > plan.budget_bytes:
                self._promises.loss_outside(loss_bytes)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Open a context in which the model runs as plain PyTorch, with the plan left installed."""
        before = self._installed.enabled
        self._installed.enabled = False
        try:
            with self._unwatched():
                yield
        finally:
            self._installed.enabled = before

    @contextmanager
    def following(self, key: str) -> Iterator[None]:
        """Open a context for one call of a region's module alone, which follows the decision for the region `key`.

        For the loss's, the context is the region, and the other regions are left untouched.
        """
        recipes, plans = self._installed.recipes, self.plans
        if key.startswith(LOSS):
            self._installed.recipes = {k: recipe if k.startswith(LOSS) else None for k, recipe in recipes.items()}
        elif key in recipes:
            self._installed.recipes = {**recipes, f"{key.rpartition('#')[0]}#0": recipes[key]}
        self.plans = None  # they are not asked for such a call, nor told of it
        try:
            with self._installed.region(LOSS) if key.startswith(LOSS) else nullcontext():
                yield
        finally:
            self._installed.recipes, self.plans = recipes, plans

    @contextmanager
    def returning(self, results: Mapping[str, Sequence[Any]]) -> Iterator[None]:
        """Open a context in which each call of a model returns the next of its results instead of running.

        `results`: by the model's path, which is that of the root for a single one.
        """
        with self._forwards.returning(results):
            yield

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Open a context in which nothing is installed, so that another plan can be."""
        self._forwards.take_off()
        try:
            with self._unwatched():
                yield
        finally:
            self._activate(self._resolved)
            self._watch.planned_forward()

    def remove(self) -> None:
        """Uninstall the plan: the model is as it was before. Graphs that were built under the plan stay valid."""
        self._forwards.take_off()
        self.plans = None
        self._promises.are_watched = False
        self._watch.end()
        when_removed, self._when_removed = self._when_removed, lambda: None
        when_removed()

    def when_removed(self, action: Callable[[], object]) -> None:
        """Let `remove` do this, too, once."""
        self._when_removed = action

    def keep_promises(self, beside_step_bytes: int = 0) -> None:
        """Warn from now on, once each, where training leaves what the plan promises (see `Promises`)."""
        self._promises.are_watched = True
        self._installed.listener = self._promises
        step = next(iter(self._steps.values()))  # any of them: each knows what all hold
        self._watch.begin(
            step.all_optimizers,
            beside_step_bytes,
            lambda: tensors_beside(self._model, None, step.all_optimizers, step.reached(self._model)),
        )

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        """Open a context in which steps are plain on purpose, or not the user's."""
        before = self._watch.is_idle
        self._watch.is_idle = True
        try:
            yield
        finally:
            self._watch.is_idle = before

    def _repr_html_(self) -> str:
        plans = [one.plan for one in self.kinds.values()] or [self.plan]
        shown = (record for record in (*plans, self.verdict) if record is not None)
        return "".join(record._repr_html_() for record in shown)

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _activate(self, resolved: ResolvedPlan) -> None:
        """Let regions follow `resolved`.

        Graphs built under another plan stay valid: they hold tapes, which hold all that they need.
        """
        regions = resolved.region_paths or ((ROOT,) if self.plans is not None else ())
        paths = [path for path in regions if path == ROOT or is_module_below(path)]
        self._forwards.put_on(paths, lambda module: RootForward(module, self))
        if resolved is not self._resolved:
            self.cache_room.make_for(resolved, self._resolved)
        self._resolved = resolved
        self._watch.expects_forward = self.installed
        self._watch.plan = resolved.plan or self._watch.plan
        self._installed.recipes = resolved.recipes
        self._installed.checkpoints = resolved.checkpoints
        self._installed.region_paths = frozenset(resolved.region_paths)
        self._installed.refused = resolved.refused
        self._installed.checked = resolved.checked
        self._installed.moves = resolved.moves
