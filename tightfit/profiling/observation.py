"""What was seen of one training step: storages, the values that they held, operations, and events in order."""

from __future__ import annotations

from dataclasses import dataclass, field

from tightfit.records import Event


@dataclass(slots=True)
class RawStorage:
    """A piece of memory as observed."""

    nbytes: int
    component: str
    current: int = -1
    """Index of the value that it holds now."""


@dataclass(slots=True)
class RawValue:
    """Contents between two writes."""

    storage: int
    op: int = -1
    output: int = 0
    overwritten: bool = False


@dataclass(slots=True)
class RawOp:
    """One operation of forward."""

    name: str
    signature: int
    inputs: tuple[int, ...]
    mutates: tuple[int, ...]
    keep_reason: str
    random_state_bytes: int
    outputs: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ModuleEvent:
    """A module call began (`path` set) or ended (`path` None)."""

    path: str | None
    has_plain_arguments: bool = False
    """It was called with tensors and constants only."""


@dataclass(slots=True)
class Observation:
    """Everything that was seen, in order."""

    storages: list[RawStorage] = field(default_factory=list)
    values: list[RawValue] = field(default_factory=list)
    ops: list[RawOp] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    """The value of each slot."""
    events: list[Event | ModuleEvent] = field(default_factory=list)
