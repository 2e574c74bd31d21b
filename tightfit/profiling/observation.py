"""Raw tables of one observed training step: storages, values, ops, saved tensors, and events in order."""

from __future__ import annotations

from dataclasses import dataclass, field

from tightfit.records import Event


@dataclass(slots=True)
class RawStorage:
    """One allocation."""

    nbytes: int
    component: str
    current: int = -1
    """Index of the value that it holds last."""


@dataclass(slots=True)
class RawValue:
    """The content of a storage between two writes."""

    storage: int
    op: int = -1
    """Index of the op of forward that made it; -1 if none did."""
    output: int = 0
    """Its position among that op's results; -1, -2, ... for the arguments that the op wrote in place."""
    overwritten: bool = False
    """Whether a later write ended it, or its content is uninitialised."""


@dataclass(slots=True)
class RawOp:
    """One op of forward."""

    name: str
    signature: int
    inputs: tuple[int, ...]
    """Values that it reads."""
    mutates: tuple[int, ...]
    """Values that it writes in place, as they were before."""
    keep_reason: str
    """Why it cannot be replayed; empty if it can."""
    random_state_bytes: int
    outputs: list[int] = field(default_factory=list)
    """Values that it makes, those of in-place writes included."""


@dataclass(frozen=True, slots=True)
class ModuleEvent:
    """The begin (`path` set) or end (`path` None) of a module call."""

    path: str | None
    has_plain_arguments: bool = False
    """Whether all arguments are tensors and constants."""


@dataclass(slots=True)
class Observation:
    """The tables; events are in order of time."""

    storages: list[RawStorage] = field(default_factory=list)
    values: list[RawValue] = field(default_factory=list)
    ops: list[RawOp] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    """The value of each slot: a slot is one tensor that autograd saved."""
    events: list[Event | ModuleEvent] = field(default_factory=list)
