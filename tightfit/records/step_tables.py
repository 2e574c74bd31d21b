"""What a profile's tables hold: a step's storages, values, operations, regions, saved tensors and events.

How a step is described
-----------------------
A *storage* is a piece of memory; a *value* is what one storage holds between two writes, so an in-place operation makes
a new value in an old storage.  Bytes are always accounted per storage, never per tensor or view.

Forward is cut into *regions* that follow each other in time: one call of one module, or a stretch of a container's own
operations between two such calls (a *segment*), or a stretch of code outside the model (``<loss>``).  The operations of
a region are contiguous in `Profile.ops`.  What a backward inside forward runs for a region's nodes of autograd's graph
(``create_graph=True``) comes after the region's own operations, though others ran in between.  Values made in one
region and used in another are that other region's *external* values: they are never dropped, only held.

A *slot* is one save of one value by autograd.  The *events* tell, in the order in which they happen in one plain
training step, when storages appear, when the last reference other than autograd's dies, when autograd saves, reads and
releases, and which operation ran in between.  From them `simulate` knows the memory at every moment, for any decision
about what to drop.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

#: What a storage belongs to; "reached" is what only the loss function reaches, such as a teacher.  All but "activation"
#: are alive during the whole step and make up the baseline.
COMPONENTS = ("parameters", "buffers", "gradients", "optimizer_state", "batch", "reached", "activation")


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """One piece of memory."""

    nbytes: int
    """Its size, rounded up to the allocator's granule."""
    component: str = "activation"
    """One of `COMPONENTS`."""
    stream: int = 0
    """The device's stream on which it was allocated, in the order in which they appear: what one frees, no other is
    given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """What one storage holds between two writes."""

    storage: int
    """Index into `Profile.storages`."""
    op: int = -1
    """Index into `Profile.ops` of the operation that made it; -1 if no recorded operation did."""
    output: int = 0
    """Which of the operation's results: 0, 1, ... for returned tensors; -1, -2, ... for mutated arguments, in order."""
    overwritten: bool = False
    """Its storage is written again later in forward, so it cannot be held as a source for replay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """A distinct operation: name, shapes, strides, dtypes, scalars. What it costs was measured by running it alone."""

    name: str
    """The overload's name, e.g. ``aten.mm.default``."""
    ms: float = 0.0
    """Milliseconds that one run takes the host (minimum of several): until it is done, or submitted to a device."""
    device_ms: float = 0.0
    """Milliseconds that it takes a device which works beside the host."""
    workspace_bytes: int = 0
    """Most memory it holds inside, beyond its inputs and outputs."""
    note: str = ""
    """Where the figures are estimates: why. Empty if the operation was run alone as it is."""

    @property
    def slower_ms(self) -> float:
        """What it takes in the middle of others like it: the longer of its two times."""
        return max(self.ms, self.device_ms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One operation of forward, or of a backward inside forward. Pure views are not recorded: an argument is a value
    seen through a geometry.
    """

    signature: int
    """Index into `Profile.signatures`."""
    inputs: tuple[int, ...] = ()
    """Values read, in argument order, a value named once for each argument that it appears in."""
    outputs: tuple[int, ...] = ()
    """Values made; a mutated argument's new value is among them."""
    mutates: tuple[int, ...] = ()
    """Those of `inputs` whose storage it overwrites."""
    keep_reason: str = ""
    """Why its results must be kept (not replayable); empty if it may be replayed."""
    random_state_bytes: int = 0
    """Size of the generator's state that a tape holds for it, where that counts: 5 KB for a random operation on CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """One call of one module, a segment of a container, or a stretch of ``<loss>``."""

    key: str
    """``layers.3#0``: module path, ``#`` call index, and ``/n`` for the n-th segment of a container."""
    first_op: int
    """Index into `Profile.ops`."""
    op_count: int
    class_id: int
    """Regions with the same id have the same operations, wiring, sizes and saved tensors: one solve serves them all."""
    module_recomputable: bool = False
    """Its module can be called a second time as a whole: it was called with tensors and constants only, and has no
    hooks inside."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One save of one value by autograd: a saved tensor."""

    value: int
    region: int
    """Index of the region in which it was saved. What a backward inside forward saves again (``create_graph=True``) is
    of the region that saved it first."""


class EventKind(IntEnum):
    """What happened. The event's number `a` is an index into the named table."""

    ALLOC = 0
    """Storage `a` appeared."""
    FREE = 1
    """The last reference to storage `a`, other than autograd's saved tensors, died."""
    OP = 2
    """Operation `a` of forward, or of a backward inside forward, ran (its new storages were announced just before)."""
    OTHER_OP = 3
    """An operation of backward or of the optimizer ran, with signature `a`."""
    SAVE = 4
    """Autograd saved slot `a`."""
    UNPACK = 5
    """Backward read slot `a`."""
    RELEASE = 6
    """Autograd let go of slot `a`."""
    ENTER = 7
    """Region `a` began."""
    EXIT = 8
    """Region `a` ended."""
    BACKWARD = 9
    """Backward began."""
    OPTIMIZER = 10
    """The optimizer step began."""
    READ = 11
    """Backward was done with slot `a`, of a graph that is kept: autograd has it until its RELEASE."""
    KEEPING = 12
    """A backward that keeps its graph (``create_graph=True``, ``retain_graph=True``) began (`a` is 1) or ended (0)."""


class Event(NamedTuple):
    """One moment of the timeline."""

    kind: EventKind
    a: int = 0
