"""Run an installed plan once, and learn from it: what is solved again knows better."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from torch.utils.checkpoint import CheckpointError

from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.errors import RanOutOfMemory, VerificationFailed, first_line
from tightfit.installation.applied import Applied
from tightfit.profiling.measure import measure_step
from tightfit.records import Plan, Profile
from tightfit.replay.refusals import CannotRebuild
from tightfit.replay.values import AS_A_WHOLE
from tightfit.units import format_bytes
from tightfit.verification.trial import Outcome, Trial

_log = logging.getLogger(__name__)


def try_plan(trial: Trial, applied: Applied, profile: Profile) -> tuple[Outcome | None, Profile]:
    """Run the installed plan.  Return the outcome if it held; else None, and a profile that knows better."""
    plan = applied.plan
    outcome: Outcome | None = None
    try:
        outcome = trial.run_self_checked(applied)
        measured_bytes, mismatches = outcome.peak_bytes, outcome.mismatches
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            if not trial.group.is_single_process:
                raise ran_out_of_memory(plan, error) from error
            measured_bytes, mismatches = plan.budget_bytes + _room_bytes(plan), 0
        elif applied.refused and trial.group.is_single_process:  # a self-check said where replay would be wrong
            measured_bytes, mismatches = 0, applied.statistics.mismatches + applied.statistics.unplanned_calls
        elif isinstance(error, CannotRebuild | CheckpointError):
            what = first_line(error)
            raise VerificationFailed(f"it raises {type(error).__name__} where it recomputes ({what})") from error
        else:
            raise
    if mismatches and profile.is_sharded:  # such a model cannot be measured by running it; its tapes keep it right
        _log.warning("%d region calls ran other operations than measured: more may be held than planned", mismatches)
    elif mismatches and profile.method == "fake":  # first: positions that were refused are not this profile's either
        _log.info("%d region calls ran other operations than measured; measuring with a real step", mismatches)
        applied.remove()
        trial.restore()  # measuring begins with the model as it was given, and needs the memory
        return None, measure_step(trial.model, trial.batch, trial.step, concrete=True, budget_bytes=plan.budget_bytes)
    # What one process found, all heed: they have to come to the same decision.
    refused: dict[str, set[int]] = {}
    for positions in trial.group.all_gather(applied.refused):
        for key, found in positions.items():
            refused.setdefault(key, set()).update(found)
    if refused:
        _log.info("self-checks refused operations in %d regions; solving again", len(refused))
        return None, without_refused(profile, refused)
    over_bytes = max(trial.group.all_gather(measured_bytes - plan.budget_bytes))
    if over_bytes <= 0:
        return outcome, profile
    excess_bytes = max(trial.group.all_gather(measured_bytes - plan.predicted_peak_bytes))
    _log.info("the trial run took %s more than predicted; solving again", format_bytes(excess_bytes))
    correction_bytes = profile.correction_bytes + max(excess_bytes, over_bytes)
    return None, replace(profile, correction_bytes=correction_bytes)


def ran_out_of_memory(plan: Plan, error: BaseException) -> RanOutOfMemory:
    """Return what to raise where a rank ran out of memory, as `error` says, in a step that all ranks take together.

    FSDP2 cannot leave a backward in its midst, and the other ranks wait in theirs.
    """
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    smaller_bytes = max(plan.budget_bytes - _room_bytes(plan), plan.budget_bytes // 2)
    return RanOutOfMemory(plan.budget_bytes, plan.predicted_peak_bytes, smaller_bytes, reason)


def _room_bytes(plan: Plan) -> int:
    """Return by how much a plan has exceeded its budget, where all that is known is that it ran out of memory."""
    return max(plan.budget_bytes // 20, 1 << 20)


def without_refused(profile: Profile, refused: Mapping[str, AbstractSet[int]]) -> Profile:
    """Return the profile with the refused operations marked as not replayable."""
    ops = list(profile.ops)
    regions = list(profile.regions)
    for place, region in enumerate(profile.regions):
        for position in refused.get(region.key, ()):
            if position == AS_A_WHOLE:
                regions[place] = replace(region, module_recomputable=False)
                continue
            if position >= region.op_count:  # this call ran more operations than the measured one
                continue
            index = region.first_op + position
            ops[index] = replace(ops[index], keep_reason="self-check: a second run gave other bits or changed inputs")
    return replace(profile, ops=tuple(ops), regions=tuple(regions))
