"""What would help: each way is the step that was seen, planned or measured again in another form."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tightfit._torch_private.dispatch import tree_map
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.errors import BudgetInfeasible, TightfitError
from tightfit.explanation.code import Script, fit_code, foreach_code, microbatch_code, precision_code
from tightfit.profiling.measure import measure_step
from tightfit.records import Plan, Profile
from tightfit.solver.solver import Solver, solver_of
from tightfit.step.batch import batch_tensors
from tightfit.step.step import Step
from tightfit.units import format_budget, parse_bytes

_log = logging.getLogger(__name__)

#: Shares of the plain peak that are planned, beside the smallest budget and the one that is asked for.
_SHARES = (0.75, 0.5)
#: The smallest budget is planned with room for what a trial run may show.
_ROOM = 1.03
#: A way that saves less than this share of the peak is not told.
_WORTH_TELLING = 0.03


@dataclass(frozen=True, kw_only=True)
class Way:
    """One thing that would help, with what it was found to need."""

    name: str
    """``recompute``, ``microbatches``, ``autocast`` or ``foreach``."""
    title: str
    """In a few words."""
    peak_bytes: int
    """Predicted, in the terms of a budget: `plain_peak_bytes` is what the step takes now, in the same terms."""
    plain_peak_bytes: int
    step_ms: float
    plain_step_ms: float
    exactness: str
    """``bitwise`` (the same numbers), ``rounding`` (sums in another order) or ``other`` (another computation)."""
    code: str
    """To paste."""
    budget_bytes: int | None = None
    """What to give `tightfit.fit`; None for ways without it."""
    plan: Plan | None = field(default=None, repr=False)

    @property
    def saved_ratio(self) -> float:
        """Share of the peak that it saves."""
        return 1 - self.peak_bytes / self.plain_peak_bytes

    @property
    def overhead_ratio(self) -> float:
        """Time that it adds, as a share of the step; negative if it is faster."""
        return self.step_ms / self.plain_step_ms - 1 if self.plain_step_ms else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        names = (
            "name", "title", "peak_bytes", "plain_peak_bytes", "saved_ratio", "step_ms", "plain_step_ms",
            "overhead_ratio", "exactness", "budget_bytes", "code",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def find_ways(
    model: torch.nn.Module,
    batch: Any,
    step: Step,
    profile: Profile,
    script: Script,
    *,
    now: Plan,
    target_bytes: int | None,
    room_bytes: int | None = None,
    is_optimizer_peak: bool = False,
) -> tuple[Way, ...]:
    """Return what would help, best first.

    First what leaves all numbers as they are.  With a target: what keeps it, fastest first, then what comes nearest.
    Without: by the share of memory saved less the share of time added.

    Args:
        model, batch, step, profile: the measured step.
        script: how the code to paste names things.
        now: the step as it is, which may checkpoint a part of itself.
        target_bytes: the memory that there is for a step.
        room_bytes: as for `measure_step`, what measuring may take.
        is_optimizer_peak: the peak is in the optimizer's step.
    """
    solver = solver_of(profile)
    found = [_of_plan(plan, now, script) for plan in _plans(solver, now.plain_peak_bytes, target_bytes)]
    variants = [_microbatches(batch, step, script, model), _autocast(profile, batch, step, script, model)]
    if is_optimizer_peak:
        variants.append(_without_foreach(batch, step, script))
    for variant in variants:
        if variant is not None:
            found += _measured(variant, model, now, room_bytes)
    worth = [way for way in found if way.saved_ratio >= _WORTH_TELLING]

    def rank(way: Way) -> tuple[float, ...]:
        changes, balance = _CHANGES[way.exactness], way.overhead_ratio - way.saved_ratio
        if target_bytes is None:
            return changes, balance
        return (0, changes, way.step_ms) if way.peak_bytes <= target_bytes else (1, way.peak_bytes)

    return tuple(sorted(worth, key=rank))


_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)
_CHANGES = {"bitwise": 0, "rounding": 1, "other": 2}


# ------------------------------------------------------------------------------------------------ recomputing


def _plans(solver: Solver, now_bytes: int, target_bytes: int | None) -> Iterator[Plan]:
    least_bytes = min(round(solver.minimum_budget()[0] * _ROOM), now_bytes)
    budgets = {round(share * now_bytes) for share in _SHARES} | {least_bytes}
    if target_bytes is not None:
        budgets.add(target_bytes)
    seen: set[int] = set()
    for budget in sorted(budgets):
        rounded = _as_written(budget, target_bytes)
        if not least_bytes <= rounded < now_bytes:
            continue
        try:
            plan = solver.solve(rounded)
        except BudgetInfeasible:
            continue
        if not plan.is_plain and plan.predicted_peak_bytes not in seen:
            seen.add(plan.predicted_peak_bytes)
            yield plan


def _as_written(budget_bytes: int, most: int | None) -> int:
    """Return the budget as the code to paste names it: rounded, but not beyond what there is."""
    written = parse_bytes(format_budget(budget_bytes))
    return budget_bytes if most is not None and budget_bytes <= most < written else written


def _of_plan(plan: Plan, now: Plan, script: Script) -> Way:
    planned = sum(region.recipe >= 0 for region in plan.regions)
    return Way(
        name="recompute",
        title=f"recompute a part of forward in backward ({planned} of {len(plan.regions)} regions)",
        peak_bytes=plan.predicted_peak_bytes,
        plain_peak_bytes=now.plain_peak_bytes,
        step_ms=plan.predicted_step_ms,
        plain_step_ms=now.plain_step_ms,
        exactness="bitwise",
        budget_bytes=plan.budget_bytes,
        plan=plan,
        code=fit_code(script, plan.budget_bytes),
    )


# ------------------------------------------------------------------------------------------------ other steps


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """The step in another form, to be measured."""

    name: str
    title: str
    exactness: str
    code: str
    batch: Any
    step: Step
    foreach: bool | None = None


def _measured(variant: _Variant, model: torch.nn.Module, now: Plan, room_bytes: int | None) -> list[Way]:
    """Measure a variant; nothing where it cannot be: the code around the model counts on the batch's size, perhaps."""
    try:
        with _foreach(variant.step.optimizers, variant.foreach):
            profile = measure_step(model, variant.batch, variant.step, budget_bytes=room_bytes, as_it_is=True)
    except Exception as problem:  # whatever the script's own code raises
        if isinstance(problem, TightfitError) or not is_out_of_memory(problem):
            _log.info("%s cannot be measured: %s", variant.name, problem)
        return []
    measured = solver_of(profile).plain(0)
    way = Way(
        name=variant.name,
        title=variant.title,
        peak_bytes=measured.plain_peak_bytes,
        plain_peak_bytes=now.plain_peak_bytes,
        step_ms=measured.plain_step_ms,
        plain_step_ms=now.plain_step_ms,
        exactness=variant.exactness,
        code=variant.code,
    )
    return [way]


def _microbatches(batch: Any, step: Step, script: Script, model: torch.nn.Module) -> _Variant | None:
    """Return the step on two halves of the batch."""
    sizes = [tensor.shape[0] for tensor in batch_tensors(batch) if tensor.dim()]
    if not sizes or sizes[0] < 2 or sizes[0] % 2:
        return None
    size = sizes[0]

    def halve(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == size:
            return leaf[: size // 2].clone()
        return leaf

    normed = any(isinstance(module, _NORMS) for module in model.modules())
    return _Variant(
        name="microbatches",
        title=f"half the batch twice as often ({size // 2} samples), gradients accumulated"
        + (", BatchNorm sees half a batch" if normed else ""),
        exactness="other" if normed else "rounding",
        code=microbatch_code(script, size),
        batch=tree_map(halve, batch),
        step=replace(step, accumulation_steps=2 * step.accumulation_steps),
    )


def _autocast(profile: Profile, batch: Any, step: Step, script: Script, model: torch.nn.Module) -> _Variant | None:
    """Return the step under bfloat16 autocast, where the model is in single precision and none is used."""
    wide = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    if step.autocast is not None or script.has_autocast or not wide:
        return None
    return _Variant(
        name="autocast",
        title="compute forward in bfloat16",
        exactness="other",
        code=precision_code(script, profile.device),
        batch=batch,
        step=replace(step, autocast=torch.bfloat16),
    )


def _without_foreach(batch: Any, step: Step, script: Script) -> _Variant | None:
    """Return the step with an optimizer that goes through the parameters one by one."""
    if not step.optimizers or any(
        group.get("fused") or group.get("foreach") is False for one in step.optimizers for group in one.param_groups
    ):
        return None
    kind = type(step.optimizers[0]).__name__
    return _Variant(
        name="foreach",
        title=f"{kind} parameter by parameter, without temporaries for all of them at once",
        exactness="rounding",
        code=foreach_code(script, kind),
        batch=batch,
        step=step,
        foreach=False,
    )


@contextmanager
def _foreach(optimizers: Sequence[torch.optim.Optimizer], value: bool | None) -> Iterator[None]:
    groups = [group for one in optimizers for group in one.param_groups if "foreach" in group and value is not None]
    before = [group["foreach"] for group in groups]
    for group in groups:
        group["foreach"] = value
    try:
        yield
    finally:
        for group, own in zip(groups, before, strict=True):
            group["foreach"] = own
