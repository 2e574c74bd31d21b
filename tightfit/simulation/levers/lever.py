"""The interface of a lever: a way of not holding what autograd saves."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tightfit.records import Decision, EventKind, Profile, Recipe, SharedTape, Stretch
from tightfit.simulation.profile_index import ProfileIndex


@dataclass(slots=True)
class Moment:
    """What one event does to what a region holds, storages acquired and let go and bytes of its own; and its time."""

    acquired: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    memo_delta: int = 0
    """Lasting change of the bytes that recomputation holds."""
    spike: int = 0
    """Highest level of those bytes within the event, above their level before it."""
    added: Stretch | None = None
    """What it adds to the step's time."""


#: What an event does that does nothing. Not to be changed.
NOTHING = Moment()

#: An event of the profile, and what it does.
Happening = tuple[int, Moment]


class Request(NamedTuple):
    """One thing asked of the allocator: memory for something, or to free it."""

    thing: int
    """Which: a storage by its index; what recomputation makes by other numbers."""
    nbytes: int
    """Its size; 0: it is freed."""
    stream: int = 0
    """The stream that it is allocated on."""


#: The thing that is the workspace of the operation that runs. It is freed before the next one begins.
_WORKSPACE = -(2**62)


class Requests(list[Request]):
    """What is asked of the allocator, in order; nothing is asked for what takes no bytes."""

    def make(self, thing: int, nbytes: int, stream: int = 0) -> None:
        """Ask for memory."""
        if nbytes:
            self.append(Request(thing, nbytes, stream))

    def free(self, thing: int, nbytes: int, instead: int = 0) -> None:
        """Free what took so many bytes."""
        if nbytes:
            self.append(Request(thing, instead))

    def work(self, nbytes: int) -> None:
        """Ask for an operation's workspace, and free it."""
        self.make(_WORKSPACE, nbytes)
        self.free(_WORKSPACE, nbytes)


class RegionModel(Protocol):
    """What a region (or several that share a tape) holds under its decision, event by event."""

    slots: frozenset[int]
    """Saved tensors that the decision is about."""
    replayed_ops: list[int]
    """Operations recomputed so far, in order, as often as they are."""

    requests: Requests | None
    """Where recomputation writes down what it asks of the allocator; None: nowhere."""

    def handle(self, kind: EventKind, a: int) -> Moment:
        """Return what an event does: OP, SAVE, UNPACK, READ, RELEASE or EXIT of the model's regions, or KEEPING, in
        their order.
        """


class Lever(Protocol):
    """A way of not holding what autograd saves: what it holds when, what it costs, what it offers, what executes it."""

    name: str
    executor: str
    """Name of the executor that carries out its decisions, see `tightfit.replay.executors`."""

    def offers(self, index: ProfileIndex, regions: Sequence[int]) -> Iterable[Decision]:
        """Return the decisions from which the solver may choose in each of these regions, which are of one class."""

    def model(self, index: ProfileIndex, region: int, decision: Decision) -> RegionModel:
        """Return what the region holds under a decision of this lever."""

    def recipe(self, index: ProfileIndex, region: int, decision: Decision) -> Recipe | None:
        """Return what the executor needs to know, with its figures; None if the decision changes nothing."""


class ValueCosts(NamedTuple):
    """What choosing value by value costs, in milliseconds."""

    region_ms: float
    """For a region in which anything is recomputed, when forward runs."""
    region_ms_per_op: float
    """For each operation of a region in which anything is recomputed, when forward runs."""
    tape_ms_per_op: float
    """Further for each that may be recomputed then."""
    replay_ms_per_op: float
    """For each recomputed operation, beside its own time, when backward wants it."""


class ValueLever(Lever, Protocol):
    """A lever that decides value by value: its decisions are too many to list, so that the solver searches them.

    It can also make regions share a tape (recursive recomputation).
    """

    def decide(self, kept: Collection[tuple[int, int]]) -> Decision:
        """Return the decision that keeps these values and drops all others that may be dropped."""

    def costs(self, profile: Profile) -> ValueCosts:
        """Return what its decisions cost beside the operations that are recomputed."""

    def happenings(
        self, index: ProfileIndex, region: int, decision: Decision
    ) -> tuple[Sequence[Happening], Sequence[int]] | None:
        """Return all that a decision does in a region, in order, and the operations recomputed: what walking its model
        says, sooner. None where only the model tells.
        """

    def shared_model(
        self, index: ProfileIndex, shared: SharedTape, decisions: Sequence[Decision | None]
    ) -> RegionModel:
        """Return what regions hold that share a tape; a decision for each of them."""

    def shared_recipes(
        self, index: ProfileIndex, shared: SharedTape, decisions: Sequence[Decision | None]
    ) -> list[Recipe]:
        """Return the recipe of each region that shares the tape."""
