"""`apply`: install a plan on a model, and take it away again.

Nothing but an instance-level `forward` is installed, on the modules that are regions: classes, `state_dict` keys,
`isinstance`, repr and user hooks (which run around forward) are untouched.  A plan that drops nothing installs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

import torch

from tightfit.distributed._fsdp_private import around_machinery
from tightfit.errors import PlanMismatch, UnsupportedInput
from tightfit.installation.resolved_plan import LivePlan
from tightfit.operators.escaped_memory import with_fast_paths
from tightfit.operators.region_names import LOSS, ROOT
from tightfit.records import Plan, Profile, Verdict
from tightfit.replay.executors import RegionCall
from tightfit.replay.session import Installed
from tightfit.replay.statistics import Statistics
from tightfit.step.batch import describe_batch
from tightfit.step.fingerprint import fingerprint
from tightfit.step.model import check_model
from tightfit.step.step import Step


class RegionForward:
    """The forward of a region module: runs the module's own forward inside the plan's session."""

    def __init__(self, module: torch.nn.Module, path: str, installed: Installed) -> None:
        self.had_own = "forward" in vars(module)
        self.original: Callable[..., Any] = module.forward
        self._module = module
        self._path = path
        self._installed = installed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward; without gradients, or when paused, as if nothing were installed."""
        if not (torch.is_grad_enabled() and self._installed.enabled):
            return self.original(*args, **kwargs)
        call = RegionCall(self._module, self.original, args, kwargs, self._installed.statistics)
        with self._installed.region(self._path, call) as run:
            return run(call)

    # A copied or unpickled model is unplanned and uses its own weights: what is copied is the forward that was there
    # before, bound to the copy.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.had_own:
            return _identity, (self.original,)
        return getattr, (self.original.__self__, "forward")  # type: ignore[attr-defined]  # a bound method


def _identity(thing: Any) -> Any:
    return thing


class RootForward(RegionForward):
    """The forward of the model itself: has the plan of the arguments' shapes put in force first."""

    def __init__(self, model: torch.nn.Module, applied: Applied) -> None:
        super().__init__(model, ROOT, applied._installed)
        self._applied = applied
        self._running = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward."""
        if self._running or not (torch.is_grad_enabled() and self._installed.enabled):
            return super().__call__(*args, **kwargs)
        self._running = True
        try:
            self._applied._model_called(args, kwargs)
            if not self._applied.installed:
                return self.original(*args, **kwargs)
            with self._applied._noticing_mismatches():
                return super().__call__(*args, **kwargs)
        finally:
            self._running = False


class Plans(Protocol):
    """Knows the plan for a batch; see `tightfit.planning.plan_cache`."""

    def plan_for(self, batch: Any) -> LivePlan:
        """The plan for a batch, made now if there is none yet."""

    def note_call(self, args: Any, kwargs: Any) -> None:
        """The model is called with these arguments, for the batch that `plan_for` was last asked about."""

    def plan_for_call(self, args: Any, kwargs: Any) -> LivePlan:
        """The plan for a call of the model whose batch nobody told."""

    def note_mismatch(self) -> None:
        """The forward that just ended did not follow the plan that was last asked for."""


class Applied:
    """A plan in force on a model.  Leaving it as a context, or `remove`, restores the model."""

    def __init__(self, model: torch.nn.Module, plan: Plan, spec: Step, profile: Profile | None = None) -> None:
        self.plan = plan
        """The plan for the batch that was given; see `plan_in_force`."""
        self.profile = profile
        """What the plan was solved from; None for a plan from a file."""
        self.verdict: Verdict | None = None
        """What the guarded run found; None until something ran it."""
        self.guarded_peak_bytes: int | None = None
        """Measured peak of the last run that `fit` made to see whether the plan holds."""
        self._model = model
        self._spec = spec
        self._own = self._live = LivePlan.of(plan)
        self._installed = Installed(recipes={}, fast_paths=with_fast_paths(model))
        self._modules: list[torch.nn.Module] = []
        self._leave_machinery: Callable[[], None] | None = None  # ends that FSDP2's work goes by unseen
        self.plans: Plans | None = None
        """Plans for batches of other shapes; None unless `fit` made this."""
        self._batch_is_known = False
        self._put_in_force(self._own)

    @property
    def statistics(self) -> Statistics:
        """What the engine did since the last `statistics.reset()`."""
        return self._installed.statistics

    @property
    def live(self) -> LivePlan:
        """What is in force."""
        return self._live

    @property
    def is_running(self) -> bool:
        """A planned forward is open in some thread."""
        return bool(self._installed.sessions)

    @property
    def installed(self) -> bool:
        """Whether regions of the model run under a plan: False while the plan in force drops nothing."""
        return bool(self._modules) and bool(self._live.region_paths)

    @property
    def plan_in_force(self) -> Plan | None:
        """The plan of the last batch; None if that had none: because its shape was never planned, so that all that is
        provably replayable was dropped, or because it is so small that nothing needs to be dropped.
        """
        return self._live.plan

    @property
    def refused(self) -> dict[str, set[int]]:
        """Positions of operations, by region key, that calibration found unfit for replay."""
        return {key: set(positions) for key, positions in self._installed.refused.items() if positions}

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The loss on a batch, under the plan for its shape, what runs outside the model included.

        After `fit`, a batch whose shape has no plan yet is measured and solved first.

        Raises:
            BudgetInfeasible: no plan for this batch fits the budget; nothing was run, nothing changed.
        """
        with self.step(batch):
            return self._spec.run_loss(model, batch)

    def prepare(self, batch: Any) -> None:
        """Make the plan for batches of this shape now, if there is none yet (after `fit`; else this does nothing).

        `loss` and `step(batch)` do so by themselves.

        Raises:
            BudgetInfeasible: no plan for this batch fits the budget; nothing was run, nothing changed.
        """
        if self.plans is not None and self._is_active():
            self.plans.plan_for(batch)

    @contextmanager
    def step(self, batch: Any = None) -> Iterator[None]:
        """A context for the forward of model and loss (backward may be inside or outside).

        With `batch`, the plan for its shape is in force inside, made first if there is none yet.  Without, the model
        recognises its arguments' shapes; where they were never planned, all that is provably replayable is dropped.
        """
        if not self._is_active():
            yield
            return
        before = self._batch_is_known
        if batch is not None:
            self._put_in_force(self._plan_for(batch))
            self._batch_is_known = True
        try:
            if self.installed:
                with self._noticing_mismatches(), self._installed.region(LOSS):
                    yield
            else:
                yield
        finally:
            self._batch_is_known = before

    def adapt(self, shapes: Plans) -> None:
        """From now on, `shapes` has the plan for each batch."""
        self.plans = shapes
        self._put_in_force(self._live)

    def _is_active(self) -> bool:
        return bool(self._modules) and self._installed.enabled and torch.is_grad_enabled()

    def _plan_for(self, batch: Any) -> LivePlan:
        if self.plans is not None:
            return self.plans.plan_for(batch)
        if self.plan.is_plain or describe_batch(batch) == self.plan.batch:
            return self._own
        return LivePlan.dropping_everything(self.plan.region_paths)

    @contextmanager
    def _noticing_mismatches(self) -> Iterator[None]:
        counts = self._installed.statistics
        outermost = not self.is_running
        before = counts.mismatches + counts.unplanned_calls
        yield
        if outermost and self.plans is not None and counts.mismatches + counts.unplanned_calls > before:
            self.plans.note_mismatch()

    def _model_called(self, args: Any, kwargs: Any) -> None:
        if self.plans is None:
            return
        if self._batch_is_known:
            self.plans.note_call(args, kwargs)
        else:
            self._put_in_force(self.plans.plan_for_call(args, kwargs))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model runs as plain PyTorch."""
        before = self._installed.enabled
        self._installed.enabled = False
        try:
            yield
        finally:
            self._installed.enabled = before

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Inside, nothing is installed, so that another plan can be."""
        self._take_off()
        try:
            yield
        finally:
            self._put_in_force(self._live)

    def remove(self) -> None:
        """Restore the model. Graphs that were built under the plan stay valid."""
        self._take_off()
        self.plans = None

    def _take_off(self) -> None:
        for module in self._modules:
            forward = vars(module).get("forward")
            if isinstance(forward, RegionForward):
                if forward.had_own:
                    module.__dict__["forward"] = forward.original
                else:
                    del module.__dict__["forward"]
        self._modules = []
        if self._leave_machinery is not None:
            self._leave_machinery()
            self._leave_machinery = None

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _put_in_force(self, live: LivePlan) -> None:
        """Let regions follow `live`.  Graphs built under another plan stay valid: they hold tapes, which hold all that
        they need.
        """
        paths = live.region_paths or ((ROOT,) if self.plans is not None else ())
        wanted = [self._module(path) for path in paths]
        if len(wanted) != len(self._modules) or any(a is not b for a, b in zip(wanted, self._modules, strict=True)):
            self._take_off()
            for path, module in zip(paths, wanted, strict=True):
                root = path == ROOT
                forward = RootForward(module, self) if root else RegionForward(module, path, self._installed)
                module.__dict__["forward"] = forward
                self._modules.append(module)
            self._installed.fast_paths = with_fast_paths(self._model)
            if wanted:
                self._leave_machinery = around_machinery(self._model, self._installed.aside)
        self._live = live
        self._installed.recipes = live.recipes
        self._installed.refused = live.refused
        self._installed.calibrated = live.calibrated

    def _module(self, path: str) -> torch.nn.Module:
        try:
            return self._model.get_submodule("" if path == ROOT else path)
        except AttributeError:
            raise PlanMismatch(
                f"the plan has a region {path!r}, but {type(self._model).__name__} has no module of that name. "
                "The plan is of another model. Measure and solve for this one."
            ) from None


def apply(model: torch.nn.Module, plan: Plan, *, spec: Step | None = None, profile: Profile | None = None) -> Applied:
    """Install `plan` on `model`.

    Args:
        model: the model that the plan was solved for.
        plan: from `solve`, `fit` or `Plan.load`.
        spec: how `Applied.loss` computes the loss; by default from the model's own result.
        profile: noted in the result.

    Raises:
        PlanMismatch: the plan is of another model.
        UnsupportedInput: a plan is installed already, or the model cannot be planned.
    """
    check_model(model)
    if any(isinstance(vars(module).get("forward"), RegionForward) for module in model.modules()):
        raise UnsupportedInput(
            "the model has a plan installed already. Two plans would both replay the same operations. "
            "Call remove() on what apply() or fit() returned, then apply the new plan."
        )
    found = fingerprint(model)
    if found != plan.fingerprint:
        raise PlanMismatch(
            f"the plan is of another model: it was made for {plan.model} with fingerprint {plan.fingerprint}, and this "
            f"{type(model).__name__} has {found} (names, shapes, dtypes and requires_grad of parameters and buffers). "
            "Measure and solve for this model."
        )
    return Applied(model, plan, spec or Step(), profile)
