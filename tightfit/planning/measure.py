"""`measure`, the verb: a profile whose smallest budget is one that runs."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from tightfit.device.described.cards import card_for
from tightfit.device.described.gpu import DescribedDevice
from tightfit.distributed.fsdp import reducing_each_backward
from tightfit.errors import VerificationFailed
from tightfit.interrupts import waiting_interrupts
from tightfit.operators.facts import describe, operation_named
from tightfit.planning.search import confirm_smallest
from tightfit.profiling.measure import measure_described, measure_together
from tightfit.progress import progress, showing_when_long
from tightfit.records import Profile
from tightfit.step.exclude import Exclude, excluded_paths
from tightfit.step.model import check_model
from tightfit.step.models import Models, as_model
from tightfit.step.open_autocast import as_it_runs_now, without_open_autocast
from tightfit.step.step import LossFunction, Optimizers, Step, as_step
from tightfit.verification.trial import Trial

_log = logging.getLogger(__name__)


@showing_when_long()
@waiting_interrupts()
def measure(
    model: Models,
    batch: Any,
    *,
    step: Step | None = None,
    loss: LossFunction | None = None,
    optimizer: Optimizers = None,
    accumulation_steps: int = 1,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    exclude: Exclude = (),
    cost_cache: bool = True,
    device: str | None = None,
) -> Profile:
    """Measure one training step: its storages, operations, saved tensors and their times, as `solve` needs them.

    The step is run on a copy of the model without data; where that cannot be, one real step is run with activations in
    a file.  Each distinct operation is run alone for its time and workspace.  Where plans would make opaque calls again
    (of an `autograd.Function` with a kernel of its own, an operator of `torch.library`, a compiled function), the
    smallest plan is run, too, for only that shows whether they bear it; where the device has no room for that, their
    names are in `Profile.unproven`.  The model, the optimizer and the batch are afterwards what they were.

        profile = tightfit.measure(model, batch, loss=loss_fn, optimizer=optimizer)
        plan = tightfit.solve(profile, budget_bytes=8 * 2**30)

    Args:
        model: any module with parameters that train, all on one device; it is not changed. Of several models a list, a
            tuple or a mapping, which `loss` is called with.
        batch: one batch as training will give it. Without `loss`, a mapping becomes keyword arguments, a tuple
            positional arguments, anything else one argument.
        step: how a step runs, in one object; or give the keywords from `loss` to `clip_norm`.
        loss: called with (model, batch), returns a scalar tensor. None: the model's result, or its ``loss``, is one.
        optimizer: one, several, or None (then its state and step are in no figure).
        accumulation_steps: forward and backward passes for each optimizer step.
        autocast: dtype for torch.autocast around forward.
        clip_norm: total gradient norm to clip to before the optimizer step.
        exclude: modules that are left untouched, or patterns of their paths such as ``layers.*.attn``.
        cost_cache: use, and add to, the costs of single operations that this machine has measured before. The
            environment variable TIGHTFIT_COST_CACHE=off turns that off everywhere; TIGHTFIT_CACHE_DIR names the
            folder.
        device: a GPU that is not here: one of ``tightfit devices``, such as ``rtx4090-24gb``, or ``cuda:24GiB``. The
            model and the batch may then be anywhere, on PyTorch's ``meta`` device too, where they take no memory.
            Times are estimates from the card's rates. None: the device that the model is on.

    Of a model that is sharded by `fully_shard`, all its processes have to call this.

    Returns:
        `Profile`.

    Raises:
        UnsupportedInput: nothing to train, no scalar loss, a compiled model, several devices; or both `step` and single
            keywords; or `exclude` names no module; or `device` names no card, or the step cannot run without data.
    """
    card = None if device is None else card_for(device)
    step = as_step(step, loss, optimizer, accumulation_steps, autocast, clip_norm)
    one = as_model(model)
    check_model(one)
    step = replace(step, excluded=excluded_paths(one, exclude)).starting(one)
    if card is not None:
        return naming_unproven(measure_described(one, batch, step, DescribedDevice(card)))
    step = as_it_runs_now(step, one)
    with without_open_autocast(one), reducing_each_backward(one):
        return _proven(one, batch, step, measure_together(one, batch, step, cost_cache=cost_cache))


def naming_unproven(profile: Profile) -> Profile:
    """Return the profile with the names of the opaque calls that a plan may make again, as if no step had shown more.

    An operation that must not run again by itself is one of them where its whole module may be called again.
    """
    names: set[str] = set()
    for region in profile.regions:
        for op in profile.ops[region.first_op : region.first_op + region.op_count]:
            name = profile.signatures[op.signature].name
            if region.module_recomputable if op.keep_reason else describe(operation_named(name)).is_foreign:
                names.add(name)
    return replace(profile, unproven=tuple(sorted(names)))


def _proven(model: torch.nn.Module, batch: Any, step: Step, profile: Profile) -> Profile:
    """Return the profile with what a run of its smallest plan shows of opaque calls."""
    profile = naming_unproven(profile)
    if not profile.unproven or profile.is_sharded:  # ranks would have to agree on each step
        return profile
    progress("checking opaque calls")
    with Trial(model, batch, step) as trial:
        try:
            return confirm_smallest(trial, profile)
        except VerificationFailed as failure:
            _log.info("the smallest plan could not be run: %s", str(failure))
            return profile
