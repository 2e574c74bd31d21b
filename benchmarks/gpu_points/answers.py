"""What tightfit predicts for a point: the peaks of its loop, and whether it runs under each limit."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import tightfit
from benchmarks.gpu_points.models import built
from benchmarks.gpu_points.points import Point
from tightfit.device.described.cards import card_for
from tightfit.device.described.gpu import DescribedDevice
from tightfit.distributed.pretended import pretended_group
from tightfit.errors import UnsupportedInput
from tightfit.profiling.measure import measure_described
from tightfit.records import AllocatorState
from tightfit.simulation.caching_allocator import OutOfDeviceMemory
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.step_requests import StepRequests, requests_of
from tightfit.simulation.training_loop import LoopPeaks, run_loop
from tightfit.step.step import Step


@dataclass
class Answer:
    """The prediction for one point."""

    name: str
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    """The most that is reserved without a cap."""
    fits: list[bool] = field(default_factory=list)
    """For each outcome, whether it was said to run."""
    fits_live: list[bool] = field(default_factory=list)
    """What the allocated bytes alone would say."""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    problem: str = ""
    """Why there is no answer; empty if there is one."""


def answer(point: Point, profiles: Path | None = None) -> Answer:
    """Predict a point; `profiles`: a folder that keeps what was measured, which takes nearly all of the time."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    try:
        found = _predicted(point, _profile(point, profiles))
    except Exception as error:  # a row without an answer is a wrong one, and the others go on
        found = Answer(point.name, problem=f"{type(error).__name__}: {str(error)[:300]}")
    found.seconds = round(time.perf_counter() - begin, 2)
    found.cpu_seconds = round(time.process_time() - cpu_begin, 2)
    return found


def _profile(point: Point, folder: Path | None) -> tightfit.Profile:
    kept = None if folder is None else folder / f"{point.name.replace(' ', '-').replace(':', '-')}.json"
    if kept is not None and kept.exists():
        return tightfit.Profile.load(kept)
    if point.no_answer:
        raise UnsupportedInput(point.no_answer)
    device = DescribedDevice(card_for(point.card), point.allocator)
    with pretended_group(point.processes):
        model, batch, loss, optimizer = built(point)
        step = Step(loss=loss, optimizer=optimizer, autocast=torch.float16 if point.half else None)
        profile = measure_described(model, batch, step.starting(model), device, as_it_is=True)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        profile.save(kept)
    return profile


def _predicted(point: Point, profile: tightfit.Profile) -> Answer:
    assert profile.allocator is not None
    state = replace(profile.allocator, cap_bytes=None)
    step = requests_of(ProfileIndex(profile), [None] * len(profile.regions))
    peaks = _run(point, step, state)
    card = card_for(point.card)
    beside_bytes = card.context_bytes if point.context_bytes is None else point.context_bytes
    of_card = card.capacity_bytes - beside_bytes
    limits = [of_card if one.limit_bytes is None else one.limit_bytes for one in point.outcomes]
    return Answer(
        point.name,
        allocated_bytes=peaks.allocated_bytes,
        reserved_bytes=peaks.reserved_bytes,
        fits=[_runs(point, step, state, limit) for limit in limits],
        fits_live=[peaks.allocated_bytes <= limit for limit in limits],
    )


def _runs(point: Point, step: StepRequests, state: AllocatorState, limit_bytes: int) -> bool:
    try:
        _run(point, step, state, limit_bytes)
    except OutOfDeviceMemory:
        return False
    return True


def _run(point: Point, step: StepRequests, state: AllocatorState, cap_bytes: int | None = None) -> LoopPeaks:
    return run_loop(
        step,
        state,
        iterations=point.iterations,
        clearing=point.clearing,
        cap_bytes=cap_bytes,
        keeps_batch=point.keeps_batch,
        begins_with_states=point.optimizer == "Adagrad",
    )
