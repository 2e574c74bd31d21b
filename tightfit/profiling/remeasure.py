"""Measure a step again for a batch of another size, in a fraction of the time.

What does not depend on the batch is taken from a profile of the same model that was measured in full: the optimizer's
step, the mechanism's own cost, and times, scaled by the bytes that each operation handles.  Sizes, lifetimes and each
operation's workspace are measured anew, so that the peak is as exact as in any profile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tightfit.collector import uncollected
from tightfit.profiling.measure import measure_step
from tightfit.records import Event, EventKind, Op, Profile, Signature, Storage
from tightfit.step.step import Step


def measure_reshaped(model: torch.nn.Module, batch: Any, step: Step, reference: Profile, budget_bytes: int) -> Profile:
    """Measure a step on `batch`: in full where it is not the reference's at another size.

    Measuring stays within `budget_bytes`, as `measure_step` does.  A step that had to be run for real to be measured is
    run for real again.
    """
    if not reference.data_dependent:
        forward = measure_step(
            model,
            batch,
            replace(step, optimizer=None, idle_optimizer=None, clip_norm=None),
            concrete=reference.method == "real",
            untimed=True,
            budget_bytes=budget_bytes - reference.baseline["optimizer_state"],
        )
        completed = complete(forward, reference)
        if completed is not None:
            return completed
    return measure_step(model, batch, step, budget_bytes=budget_bytes)


def operations(profile: Profile) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return each region's key and the names of its operations: what two profiles of one model have in common."""
    names = [profile.signatures[op.signature].name for op in profile.ops]
    return tuple((r.key, tuple(names[r.first_op : r.first_op + r.op_count])) for r in profile.regions)


@uncollected()
def complete(profile: Profile, reference: Profile) -> Profile | None:
    """Complete `profile` with the optimizer and the times of `reference`; None if the two do not match."""
    others = [event.a for event in profile.events if event.kind == EventKind.OTHER_OP]
    theirs, tail = _backward_and_optimizer(reference)
    names = [profile.signatures[signature].name for signature in others]
    if (
        profile.method != reference.method
        or operations(profile) != operations(reference)
        or names != [reference.signatures[signature].name for signature in theirs]
    ):
        return None
    ops = tuple(
        replace(op, keep_reason=op.keep_reason or other.keep_reason)  # what a self-check refused there is refused here
        for op, other in zip(profile.ops, reference.ops, strict=True)
    )
    timed = _scaled_times(profile, reference, others, theirs)
    return _with_optimizer(replace(profile, ops=ops, signatures=timed), reference, tail)


def _backward_and_optimizer(reference: Profile) -> tuple[list[int], list[Event]]:
    """Return the signatures of the operations after forward, up to the optimizer, and the events from there on."""
    start = next((t for t, e in enumerate(reference.events) if e.kind == EventKind.OPTIMIZER), len(reference.events))
    others = [event.a for event in reference.events[:start] if event.kind == EventKind.OTHER_OP]
    return others, list(reference.events[start + 1 :])


def _scaled_times(profile: Profile, reference: Profile, others: list[int], theirs: list[int]) -> tuple[Signature, ...]:
    """Return the signatures with the reference's times, scaled by the bytes that the operations read and make.

    Submitting an operation takes the host as long whatever its size, so beside a device only that one's time is scaled.
    """
    times_ms: dict[int, tuple[float, float]] = {}
    ours_bytes = theirs_bytes = 0
    beside = reference.has_device_times

    def scaled(signature: Signature, ratio: float) -> tuple[float, float]:
        return signature.ms if beside else signature.ms * ratio, signature.device_ms * ratio

    for op, other in zip(profile.ops, reference.ops, strict=True):
        mine, yours = _handled_bytes(profile, op), _handled_bytes(reference, other)
        ours_bytes += mine
        theirs_bytes += yours
        ratio = mine / yours if yours else 1.0
        times_ms.setdefault(op.signature, scaled(reference.signatures[other.signature], ratio))
    overall = ours_bytes / theirs_bytes if theirs_bytes else 1.0
    for signature, other_signature in zip(others, theirs, strict=True):
        times_ms.setdefault(signature, scaled(reference.signatures[other_signature], overall))
    timed = []
    for place, untimed in enumerate(profile.signatures):
        ms, device_ms = times_ms.get(place, (0.0, 0.0))
        timed.append(replace(untimed, ms=round(ms, 6), device_ms=round(device_ms, 6)))
    return tuple(timed)


def _handled_bytes(profile: Profile, op: Op) -> int:
    values = {*op.inputs, *op.outputs}
    return sum(profile.storages[profile.values[value].storage].nbytes for value in values)


def _with_optimizer(profile: Profile, reference: Profile, tail: list[Event]) -> Profile | None:
    """Append the reference's optimizer step; None if that touches what was there before it."""
    storages: list[Storage] = list(profile.storages)
    signatures: list[Signature] = list(profile.signatures)
    storage_of: dict[int, int] = {}
    signature_of: dict[int, int] = {}
    events: list[Event] = list(profile.events)
    for kind, a in tail:
        if kind == EventKind.ALLOC:
            storage_of[a] = len(storages)
            storages.append(reference.storages[a])
            events.append(Event(kind, storage_of[a]))
        elif kind == EventKind.FREE and a in storage_of:
            events.append(Event(kind, storage_of[a]))
        elif kind == EventKind.OTHER_OP:
            if a not in signature_of:
                signature_of[a] = len(signatures)
                signatures.append(reference.signatures[a])
            events.append(Event(kind, signature_of[a]))
        else:
            return None
    return replace(
        profile,
        storages=tuple(storages),
        signatures=tuple(signatures),
        events=tuple(events),
        baseline={**profile.baseline, "optimizer_state": reference.baseline["optimizer_state"]},
        optimizer=reference.optimizer,
        forward_ms_per_op=reference.forward_ms_per_op,
        backward_ms_per_op=reference.backward_ms_per_op,
        mode_ms_per_op=reference.mode_ms_per_op,
        tape_ms_per_op=reference.tape_ms_per_op,
        replay_ms_per_op=reference.replay_ms_per_op,
        region_ms_per_call=reference.region_ms_per_call,
        untouched_ms_per_region=reference.untouched_ms_per_region,
        planned_ms_per_step=reference.planned_ms_per_step,
        module_ms_per_op=reference.module_ms_per_op,
        module_ms_per_call=reference.module_ms_per_call,
    )
