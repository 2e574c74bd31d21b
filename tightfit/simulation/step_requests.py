"""Write down what a planned step asks of the device's allocator, in order: `simulate` with names instead of sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tightfit.records import Decision, EventKind, Profile, SharedTape
from tightfit.simulation.levers import NOTHING, Requests
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import OF_A_REGION, models_of

#: By which autograd adds to a gradient that is there already.
_ACCUMULATION = "aten.add_.Tensor"
#: In place of a size: freed if the gradient was there before, else it becomes the gradient.
BECOMES_GRADIENT = -1


@dataclass(frozen=True, slots=True)
class StepRequests:
    """What one step asks for, and what is there before it."""

    held: tuple[int, ...]
    """Sizes of parameters and buffers, in the order in which they are there."""
    batch: tuple[int, ...]
    gradients: tuple[int, ...]
    """Sizes of what backward makes where no gradients are there."""
    states: tuple[int, ...]
    """Sizes of the optimizer's state, which its first step makes."""
    forward_backward: Requests = field(default_factory=Requests)
    """One pass; a step may consist of several."""
    backward_at: int = 0
    """The place in it at which backward begins."""
    optimizer: Requests = field(default_factory=Requests)
    given_gradients: tuple[int, ...] = ()
    """Sizes of gradients that whoever gives them makes in other pieces, or elsewhere, than backward does."""


def requests_of(
    index: ProfileIndex, decisions: Sequence[Decision | None], shared_tapes: Sequence[SharedTape] = ()
) -> StepRequests:
    """Walk the step with one decision per region (`None`: untouched)."""
    profile = index.profile
    accumulated = _accumulated(profile)
    gradients = _resident(profile, "gradients")
    given: tuple[int, ...] = ()
    if reduced := _reduced(profile):
        given, gradients = gradients, tuple(nbytes for nbytes in reduced.values() if nbytes)
        accumulated |= reduced.keys()
    found = StepRequests(
        held=_resident(profile, "parameters") + _resident(profile, "buffers") + _resident(profile, "reached"),
        batch=_resident(profile, "batch"),
        gradients=gradients,
        states=_resident(profile, "optimizer_state"),
        given_gradients=given,
    )
    models = models_of(index, decisions, shared_tapes)
    now = found.forward_backward
    for model in models:
        model.requests = now
    nbytes_of = index.activation_bytes
    held = [0] * len(nbytes_of)
    backward_at = 0

    def change(storage: int, by: int, instead: int = 0) -> None:
        before = held[storage]
        held[storage] = before + by
        if not before:
            now.make(storage, nbytes_of[storage], profile.storages[storage].stream)
        elif not held[storage]:
            now.free(storage, nbytes_of[storage], instead)

    for time, (kind, a) in enumerate(profile.events):
        if kind == EventKind.ALLOC:
            change(a, +1)
        elif kind == EventKind.FREE:
            change(a, -1, BECOMES_GRADIENT if time in accumulated else 0)
        elif kind == EventKind.BACKWARD:
            backward_at = len(now)
        elif kind == EventKind.OPTIMIZER:
            now = found.optimizer
        elif kind == EventKind.KEEPING:
            for model in {id(model): model for model in models}.values():
                model.handle(kind, a)
        elif kind == EventKind.OTHER_OP:
            now.work(index.fixed_spikes.get(time, 0))
        elif kind in OF_A_REGION:
            if kind == EventKind.OP:
                now.work(index.fixed_spikes.get(time, 0))
            owner = index.region_of_op[a] if kind == EventKind.OP else a
            if kind not in (EventKind.OP, EventKind.EXIT):
                owner = index.region_of_slot[a]
            model = models[owner]
            moment = model.handle(kind, a)
            if a in index.fixed_slots and a not in model.slots and kind in (EventKind.SAVE, EventKind.RELEASE):
                change(profile.values[profile.slots[a].value].storage, 1 if kind == EventKind.SAVE else -1)
            if moment is not NOTHING:
                for storage in moment.acquired:
                    change(storage, +1)
                for storage in moment.released:
                    change(storage, -1)
    return replace(found, backward_at=backward_at)


def _resident(profile: Profile, component: str) -> tuple[int, ...]:
    return tuple(one.nbytes for one in profile.storages if one.component == component and one.nbytes)


def _accumulated(profile: Profile) -> set[int]:
    """Return the events at which what is freed has just been added to a gradient.

    A profile's gradients are there before the step.  Where they are not, autograd keeps what it would have added.
    """
    missing = Counter(_resident(profile, "gradients"))
    found = set()
    events = profile.events
    for time, (kind, a) in enumerate(events[:-1]):
        after = events[time + 1]
        if kind != EventKind.OTHER_OP or after.kind != EventKind.FREE:
            continue
        nbytes = profile.storages[after.a].nbytes
        if profile.signatures[a].name == _ACCUMULATION and missing[nbytes]:
            missing[nbytes] -= 1
            found.add(time + 1)
    return found


def _reduced(profile: Profile) -> dict[int, int]:
    """Return the events at which what a sharded step has reduced is freed, with its size, if gradients are there.

    A group's gradients are pieces of one storage, which is made on the stream of the collective.
    """
    if not profile.is_sharded:
        return {}
    sizes = _resident(profile, "gradients")
    runs = {sum(sizes[first:last]) for first in range(len(sizes)) for last in range(first + 1, len(sizes) + 1)}
    before = {0}  # streams on which forward allocates: weights are gathered there
    found: dict[int, int] = {}
    is_backward = False
    for time, (kind, a) in enumerate(profile.events):
        if kind == EventKind.BACKWARD:
            is_backward = True
        elif kind == EventKind.ALLOC and not is_backward:
            before.add(profile.storages[a].stream)
        elif kind == EventKind.FREE and is_backward:
            storage = profile.storages[a]
            if storage.stream not in before and storage.nbytes in runs:
                found[time] = storage.nbytes
    return found
