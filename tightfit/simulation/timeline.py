"""The memory of one step as it goes by: what `simulate` counts within each event, over the predicted time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tightfit.records import Decision, EventKind, Profile, SharedTape, StepWork
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.simulator import Moment, simulate

#: The parts of a timeline, from the bottom up.  The first four are resident: alive during the whole step.  Others are
#: buffers, what only the loss reaches, a device's context and what is held beside the step.
PARTS = (
    "parameters", "gradients", "optimizer state", "batch and others", "activations", "recomputed", "workspace",
)  # fmt: skip
_RESIDENT = {"parameters": "parameters", "gradients": "gradients", "optimizer_state": "optimizer state"}


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The memory of one forward and backward pass with the optimizer's step, by part.

    Where the profile accumulates gradients over several passes, one of them is shown.
    """

    ms: tuple[float, ...]
    """When each column begins, from 0, by the predicted times of the operations one after another."""
    end_ms: float
    """When the last column ends."""
    parts: dict[str, tuple[int, ...]]
    """By part of `PARTS`, bytes at each column's highest moment; they add up to what is held there."""
    peak_column: int
    peak_bytes: int
    """The highest column's bytes: as allocated, without what an allocator caches beside that."""
    backward_ms: float | None
    """When backward begins; None for a step without one."""
    optimizer_ms: float | None
    """When the optimizer's step begins; None for a step without one."""


def memory_timeline(
    profile: Profile,
    decisions: Sequence[Decision | None],
    shared_tapes: Sequence[SharedTape] = (),
    *,
    index: ProfileIndex | None = None,
    columns: int = 240,
) -> Timeline:
    """Return the memory of a step under one decision per region, in at most so many columns of equal time.

    Of each column the highest moment is kept, so that no peak is lost.
    """
    index = ProfileIndex(profile) if index is None else index
    trace: list[Moment] = []
    simulate(index, decisions, shared_tapes, trace=trace)
    begins, end_ms = _times(index.work_under(decisions), trace)
    highest: dict[int, Moment] = {}
    for begin, moment in zip(begins, trace, strict=True):
        column = min(int(columns * begin / end_ms), columns - 1) if end_ms else 0
        if column not in highest or moment.total_bytes > highest[column].total_bytes:
            highest[column] = moment
    moments = list(highest.values())
    resident = dict.fromkeys(PARTS[:4], 0)
    for component, nbytes in profile.baseline.items():
        resident[_RESIDENT.get(component, "batch and others")] += nbytes
    resident["batch and others"] += profile.correction_bytes + profile.margin_bytes
    if profile.allocator is not None:
        resident["batch and others"] += profile.allocator.beside_bytes + profile.allocator.outside_bytes
    parts = {part: (nbytes,) * len(moments) for part, nbytes in resident.items()}
    parts["activations"] = tuple(m.total_bytes - m.recomputed_bytes - m.workspace_bytes for m in moments)
    parts["recomputed"] = tuple(m.recomputed_bytes for m in moments)
    parts["workspace"] = tuple(m.workspace_bytes for m in moments)
    totals = [sum(held) for held in zip(*parts.values(), strict=True)]
    peak_bytes = max(totals, default=sum(resident.values()))
    starts = {moment.event: begin for begin, moment in zip(begins, trace, strict=True)}
    begin_of = {kind: starts.get(time) for time, (kind, _) in reversed(list(enumerate(profile.events)))}
    return Timeline(
        ms=tuple(end_ms * column / columns for column in highest),
        end_ms=end_ms,
        parts=parts,
        peak_column=totals.index(peak_bytes) if totals else 0,
        peak_bytes=peak_bytes,
        backward_ms=begin_of.get(EventKind.BACKWARD),
        optimizer_ms=begin_of.get(EventKind.OPTIMIZER),
    )


def _times(work: StepWork, trace: Sequence[Moment]) -> tuple[list[float], float]:
    """Return when each moment begins, and when the last ends; an operation takes the longer of its two times."""
    begins, now_ms = [], 0.0
    for moment in trace:
        begins.append(now_ms)
        now_ms += max(work.host_ms[moment.event], work.device_ms[moment.event]) + moment.added_ms
    return begins, now_ms
