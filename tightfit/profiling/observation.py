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
    stream: int = 0
    """Number of the stream on which it was allocated, in the order in which they appeared; 0: the step's own."""


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
    node: int = -1
    """The position in autograd's graph of the node whose backward ran it, if a backward inside forward did."""


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
    under_hooks: set[int] = field(default_factory=set)
    """Operations that ran under saved-tensor hooks of somebody else."""
    of_view_writes: set[int] = field(default_factory=set)
    """Operations of the backward of a write into a view: without data autograd takes another way there."""
    saved_again: dict[int, int] = field(default_factory=dict)
    """Slots that a backward saved of what it had read from another one (``create_graph=True``), and that one."""
    node_of_slot: dict[int, int] = field(default_factory=dict)
    """Slots that a backward saved, and the position in autograd's graph of the node whose backward it was."""
    positions: dict[int, int] = field(default_factory=dict)
    """How many nodes autograd's graph had before an event that may end a region, or after a backward."""
    events: list[Event | ModuleEvent] = field(default_factory=list)
