"""`apply`: install a plan on a model, and take it away again.

Nothing but an instance-level `forward` is installed, on the modules that are regions: classes, `state_dict` keys,
`isinstance`, repr and user hooks (which run around forward) are untouched.  A plan that drops nothing installs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from recollect.errors import PlanMismatch, UnsupportedInput
from recollect.measure.profiler import fingerprint
from recollect.measure.step import StepSpec, check_model
from recollect.records import Plan, Profile, Verdict
from recollect.replay.cursor import LOSS, ROOT
from recollect.replay.exposure import with_fast_paths
from recollect.replay.recipe import LiveRecipe
from recollect.replay.session import Installed
from recollect.replay.statistics import Statistics


class RegionForward:
    """The forward of a region module: runs the module's own forward inside the plan's session."""

    def __init__(self, module: torch.nn.Module, path: str, installed: Installed) -> None:
        self.had_own = "forward" in vars(module)
        self.original: Callable[..., Any] = module.forward
        self._path = path
        self._installed = installed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward; without gradients, or when paused, as if nothing were installed."""
        if not (torch.is_grad_enabled() and self._installed.enabled):
            return self.original(*args, **kwargs)
        with self._installed.region(self._path):
            return self.original(*args, **kwargs)

    # A copied or unpickled model is unplanned and uses its own weights: what is copied is the forward that was there
    # before, bound to the copy.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.had_own:
            return _identity, (self.original,)
        return getattr, (self.original.__self__, "forward")  # type: ignore[attr-defined]


def _identity(thing: Any) -> Any:
    return thing


class Applied:
    """A plan in force on a model.  Leaving it as a context, or `remove`, restores the model."""

    def __init__(self, model: torch.nn.Module, plan: Plan, spec: StepSpec, profile: Profile | None = None) -> None:
        self.plan = plan
        self.profile = profile
        """What the plan was solved from; None for a plan from a file."""
        self.verdict: Verdict | None = None
        """What the guarded run found; None until something ran it."""
        self._model = model
        self._spec = spec
        self._installed = Installed(recipes=_live_recipes(plan), fast_paths=with_fast_paths(model))
        self._modules: list[torch.nn.Module] = []
        if not plan.is_plain:
            self._install()

    @property
    def statistics(self) -> Statistics:
        """What the engine did since the last `statistics.reset()`."""
        return self._installed.statistics

    @property
    def installed(self) -> bool:
        """Whether anything is installed on the model."""
        return bool(self._modules)

    @property
    def refused(self) -> dict[str, set[int]]:
        """Positions of operations, by region key, that calibration found unfit for replay."""
        return {key: set(positions) for key, positions in self._installed.refused.items() if positions}

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The loss on a batch, under the plan, what runs outside the model included."""
        with self.step():
            return self._spec.run_loss(model, batch)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context for the forward of model and loss (backward may be inside or outside)."""
        if self._modules and self._installed.enabled and torch.is_grad_enabled():
            with self._installed.region(LOSS):
                yield
        else:
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the model runs as plain PyTorch."""
        before = self._installed.enabled
        self._installed.enabled = False
        try:
            yield
        finally:
            self._installed.enabled = before

    def remove(self) -> None:
        """Restore the model. Graphs that were built under the plan stay valid."""
        for module in self._modules:
            forward = vars(module).get("forward")
            if isinstance(forward, RegionForward):
                if forward.had_own:
                    module.__dict__["forward"] = forward.original
                else:
                    del module.__dict__["forward"]
        self._modules = []

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _install(self) -> None:
        modules = dict(self._model.named_modules())
        for path in self.plan.region_paths:
            if ("" if path == ROOT else path) not in modules:
                raise PlanMismatch(
                    f"the plan has a region {path!r}, but {type(self._model).__name__} has no module of that name. "
                    "The plan is of another model. Measure and solve for this one."
                )
        for path in self.plan.region_paths:
            module = modules["" if path == ROOT else path]
            module.__dict__["forward"] = RegionForward(module, path, self._installed)
            self._modules.append(module)


def apply(
    model: torch.nn.Module, plan: Plan, *, spec: StepSpec | None = None, profile: Profile | None = None
) -> Applied:
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
    return Applied(model, plan, spec or StepSpec(), profile)


def _live_recipes(plan: Plan) -> dict[str, LiveRecipe | None]:
    live = [LiveRecipe(recipe) for recipe in plan.recipes]
    return {region.key: live[region.recipe] if region.recipe >= 0 else None for region in plan.regions}
