"""`apply`: install a plan on a model that it was made for."""

from __future__ import annotations

import torch

from tightfit._torch_private.modules import is_compiled
from tightfit.errors import PlanMismatch, UnsupportedInput
from tightfit.installation.applied import Applied
from tightfit.installation.region_forward import is_planned
from tightfit.records import Plan, Profile
from tightfit.step.exclude import is_inside
from tightfit.step.fingerprint import fingerprint
from tightfit.step.model import check_model
from tightfit.step.models import Models, as_model, name_of
from tightfit.step.step import Step


def apply(model: Models, plan: Plan, *, step: Step | None = None, profile: Profile | None = None) -> Applied:
    """Install `plan` on `model`: from now on, its training steps drop and recompute as the plan says.

    Only an instance-level ``forward`` is installed on the modules that the plan names.  Batches of another shape than
    the plan's run with all dropped that is provably replayable; `fit` plans them, too.

        plan = tightfit.Plan.load("plan.json")
        with tightfit.apply(model, plan) as applied:
            model(**batch).loss.backward()

    Args:
        model: the model that the plan was solved for, or the container of several.
        plan: from `solve`, `fit` or `Plan.load`.
        step: how `Applied.loss` computes the loss; by default from the model's own result.
        profile: what the plan was solved from, to be found in the result.

    Returns:
        `Applied`: a context that uninstalls the plan when it is left, as its `remove` does.

    Raises:
        PlanMismatch: the plan is of another model.
        UnsupportedInput: a plan is installed already, or the model cannot be planned.
    """
    applied = install(as_model(model), plan, step=step, profile=profile)
    applied.keep_promises()
    return applied


def install(model: torch.nn.Module, plan: Plan, *, step: Step | None = None, profile: Profile | None = None) -> Applied:
    """Install `plan` as `apply` does, with nobody watching how the model is used: for steps of tightfit's own."""
    check_model(model)
    if any(is_planned(module) for module in model.modules()):
        raise UnsupportedInput(
            "the model has a plan installed already. Two plans would both replay the same operations. "
            "Call remove() on what apply() or fit() returned, then apply the new plan."
        )
    found = fingerprint(model)
    if found != plan.fingerprint:
        raise PlanMismatch(
            f"the plan is of another model: it was made for {plan.model} with fingerprint {plan.fingerprint}, and this "
            f"{name_of(model)} has {found} (names, shapes, dtypes and requires_grad of parameters and buffers). "
            "Measure and solve for this model."
        )
    compiled = [name for name, module in model.named_modules() if is_compiled(module)]
    inside = [path for path in plan.region_paths if is_inside(path, compiled)]
    if inside:
        raise UnsupportedInput(
            f"{inside[0]}, in which the plan recomputes, was compiled with torch.compile after the plan was made. "
            "Nothing can be dropped inside compiled code, and the budget would not hold. Measure and solve for the "
            "model as it is now."
        )
    return Applied(model, plan, step or Step(), profile)
