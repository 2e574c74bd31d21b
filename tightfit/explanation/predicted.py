"""The breakdown of a step that was measured: what each module holds at the plain peak, as the simulator predicts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from tightfit._torch_private.tensors import storage_key
from tightfit.device import device_for
from tightfit.explanation.breakdown import BATCH, LOSS, MODEL, OPTIMIZER, OTHER, Breakdown, Tally, largest_first
from tightfit.records import EventKind, Profile
from tightfit.simulation.simulator import Simulation, simulate
from tightfit.solver.solver import solver_of


def predicted_breakdown(
    profile: Profile, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Breakdown:
    """Return who holds what at the peak of the plain step."""
    solver = solver_of(profile)
    walked = simulate(solver.index, [None] * len(profile.regions))
    tally = Tally()
    add_resident(tally, profile, model, optimizers)
    held = _add_activations(tally, profile, walked)
    tally.add(OTHER, "other", walked.breakdown["correction"] + solver.plain(0).plain_peak_bytes - walked.peak_bytes)
    return Breakdown(moment=_moment(walked.peak_where), parts=tally.parts(), held_for_backward=largest_first(held))


def add_resident(
    tally: Tally, profile: Profile, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Add what is alive during the whole step to its modules; the state of optimizers, which a measured copy had, by
    the size of what they train.
    """
    round_up = device_for(model).round_up
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    parameters: Counter[str] = Counter()
    gradients: Counter[str] = Counter()
    states: Counter[str] = Counter()
    buffers: Counter[str] = Counter()
    seen: set[int] = set()
    for path, module in model.named_modules():
        owner = _region_of(path, profile.region_paths)
        for parameter in module.parameters(recurse=False):
            if storage_key(parameter) in seen:
                continue
            seen.add(storage_key(parameter))
            nbytes = round_up(parameter.untyped_storage().nbytes())
            parameters[owner] += nbytes
            if parameter.requires_grad:
                gradients[owner] += nbytes
            if id(parameter) in stepped and parameter.requires_grad:
                states[owner] += nbytes
        for buffer in module.buffers(recurse=False):
            if storage_key(buffer) not in seen:
                seen.add(storage_key(buffer))
                buffers[owner] += round_up(buffer.untyped_storage().nbytes())
    weights = {"parameters": parameters, "gradients": gradients, "optimizer_state": states, "buffers": buffers}
    for component, nbytes in profile.baseline.items():
        if component in weights:
            tally.spread(component, nbytes, weights[component])
        else:
            tally.add(LOSS if component == "reached" else BATCH, component, nbytes)


def _add_activations(tally: Tally, profile: Profile, walked: Simulation) -> dict[str, int]:
    """Add what is alive at the peak beside that; return what is held for backward when that begins, by owner."""
    paths = [_owner(region.key) for region in profile.regions]
    nbytes_of = [storage.nbytes if storage.component == "activation" else 0 for storage in profile.storages]
    count = [0] * len(nbytes_of)
    saved = [0] * len(nbytes_of)
    owner_of = [LOSS] * len(nbytes_of)
    for_backward: dict[str, int] = {}
    current = LOSS
    in_backward = False
    at_peak: dict[int, str] = {}
    peak_owner = current
    for time, (kind, a) in enumerate(profile.events):
        if kind == EventKind.ENTER:
            current = paths[a]
        elif kind == EventKind.BACKWARD:
            in_backward, current = True, LOSS
            held = Counter[str]()
            for storage, slots in enumerate(saved):
                if slots:
                    held[owner_of[storage]] += nbytes_of[storage]
            for_backward = {owner: nbytes for owner, nbytes in held.items() if nbytes}
        elif kind == EventKind.OPTIMIZER:
            current = OPTIMIZER
        elif kind in (EventKind.SAVE, EventKind.UNPACK, EventKind.RELEASE):
            storage = profile.values[profile.slots[a].value].storage
            if in_backward:
                current = paths[profile.slots[a].region]
            change = {EventKind.SAVE: 1, EventKind.UNPACK: 0, EventKind.RELEASE: -1}[kind]
            count[storage] += change
            saved[storage] += change
        elif kind == EventKind.ALLOC:
            count[a] += 1
            owner_of[a] = current
        elif kind == EventKind.FREE:
            count[a] -= 1
        if time == walked.peak_event:
            at_peak = {storage: owner_of[storage] for storage, alive in enumerate(count) if alive}
            peak_owner = current
    for storage, owner in at_peak.items():
        tally.add(owner, "activations", nbytes_of[storage])
    tally.add(peak_owner, "workspace", walked.breakdown["workspace"])
    return for_backward


def _region_of(path: str, region_paths: Sequence[str]) -> str:
    """Return the innermost region around a module, in whose terms activations are known; else the module."""
    around = [region for region in region_paths if path == region or path.startswith(f"{region}.")]
    return max(around, key=len, default=path) or MODEL


def _owner(key: str) -> str:
    return key.rpartition("#")[0]


def _moment(where: str) -> str:
    """Return a peak's name without the numbers of calls and segments.

    >>> _moment("backward of layers.3#0/1"), _moment("optimizer step")
    ('backward of layers.3', 'optimizer step')
    """
    return where.rpartition("#")[0] or where
