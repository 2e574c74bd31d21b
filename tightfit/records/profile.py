"""The plain records that the four verbs exchange: Profile, Plan, Verdict.

F0: no tensors, no torch.  `codec` (below) turns the records into versioned JSON and back.

How a step is described
-----------------------
A *storage* is a piece of memory; a *value* is what one storage holds between two writes, so an in-place operation makes
a new value in an old storage.  Bytes are always accounted per storage, never per tensor or view.

Forward is cut into *regions* that follow each other in time: one call of one module, or a stretch of a container's own
operations between two such calls (a *segment*), or a stretch of code outside the model (``<loss>``).  The operations of
a region are contiguous in `Profile.ops`.  Values made in one region and used in another are that other region's
*external* values: they are never dropped, only held.

A *slot* is one saving of one value by autograd.  The *events* tell, in the order in which they happen in one plain
training step, when storages appear, when the last reference other than autograd's dies, when autograd saves, reads and
releases, and which operation ran in between.  From them `simulate` knows the memory at every moment, for any decision
about what to drop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path
from typing import NamedTuple

from tightfit.records import json_codec as codec
from tightfit.records.recompute_tree import Nest

#: What a storage belongs to. All but "activation" are alive during the whole step and make up the baseline.
COMPONENTS = ("parameters", "buffers", "gradients", "optimizer_state", "batch", "activation")

#: Python objects in host memory that a planned step holds: for each operation that may be replayed, and for each value
#: that is dropped. Upper estimates, measured with tracemalloc; not part of the budget.
TAPED_OP_HOST_BYTES = 1600
DROPPED_VALUE_HOST_BYTES = 1400

#: A region's keep set: (operation's position in the region, output's index) of each value that is held instead of
#: replayed. ``None`` instead of a keep set leaves the region untouched: it runs as plain PyTorch.
KeepSet = frozenset[tuple[int, int]]


class Rerun(Enum):
    """Instead of a keep set: no tape; PyTorch's checkpoint runs the whole module's forward again in backward."""

    RERUN = "rerun"


RERUN = Rerun.RERUN
Decision = KeepSet | Rerun | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """One piece of memory."""

    nbytes: int
    """Its size, rounded up to the allocator's granule."""
    component: str = "activation"
    """One of `COMPONENTS`."""


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
    """Time of one run in milliseconds (minimum of several)."""
    scratch_bytes: int = 0
    """Most memory it holds inside, beyond its inputs and outputs."""
    note: str = ""
    """Where the figures are estimates: why. Empty if the operation was run alone as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One operation of forward. Pure views are not recorded: an argument is a value seen through a geometry."""

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
    """Regions with the same id have the same operations, wiring, sizes and savings: one solve serves all of them."""
    may_rerun: bool = False
    """Its module's forward may be run a second time as a whole: the module is of kinds known to be pure, and was called
    with tensors and constants only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One saving of one value by autograd."""

    value: int
    region: int
    """Index of the region in which it was saved."""


class EventKind(IntEnum):
    """What happened. The event's number `a` is an index into the named table."""

    ALLOC = 0
    """Storage `a` appeared."""
    FREE = 1
    """The last reference to storage `a`, other than autograd's savings, died."""
    OP = 2
    """Forward operation `a` ran (its new storages were announced just before)."""
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


class Event(NamedTuple):
    """One moment of the timeline."""

    kind: EventKind
    a: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What `measure` found about one training step of one model on one batch."""

    model: str
    """The model's class name."""
    fingerprint: str
    """Digest of the names, shapes and dtypes of parameters and buffers: says whether a plan is of this model."""
    batch: str
    """The batch's shapes and dtypes, for people."""
    device: str
    torch_version: str
    threads: int
    baseline: Mapping[str, int]
    """Bytes alive during the whole step, by component (all of `COMPONENTS` but "activation")."""
    storages: tuple[Storage, ...]
    values: tuple[Value, ...]
    signatures: tuple[Signature, ...]
    ops: tuple[Op, ...]
    regions: tuple[Region, ...]
    region_paths: tuple[str, ...]
    """Module paths that are regions: what `apply` wraps."""
    slots: tuple[Slot, ...]
    events: tuple[Event, ...]
    optimizer: str = ""
    """The optimizer's class name; empty when measured without one (its state and step are then not in any figure)."""
    accumulation_steps: int = 1
    """Forward and backward passes for each optimizer step: they cost time, not memory, as gradients are resident."""
    method: str = "fake"
    """"fake": from a run on fake tensors. "real": from a real step, because the fake run failed or differed from it."""
    data_dependent: bool = False
    """Shapes depend on the data, so another batch may need more."""
    margin_bytes: int = 0
    """Added to every moment: the stated margin of a data-dependent profile, or of exchanges between processes."""
    correction_bytes: int = 0
    """Added to every moment: what a guarded run measured beyond (or below) the prediction."""
    mode_ms_per_op: float = 0.0
    """Time that a planned region costs for each operation that runs in it."""
    tape_ms_per_op: float = 0.0
    """Further time for each operation written to the tape and replayed."""
    rerun_ms_per_op: float = 0.0
    """Time that running a module's forward again costs for each operation, beside the operation's own time."""
    rerun_ms_per_call: float = 0.0
    """Further time for each module call that is run again."""
    random_state_bytes: int = 0
    """Size of the default generator's state, where that counts (on a CPU): noted for each call that is run again."""
    is_sharded: bool = False
    """Each process holds a part of every parameter (FSDP2), so that nothing is replayed outside its own region's
    backward: the weights would not be there."""
    measuring_ms: Mapping[str, float] = field(default_factory=dict)
    """What measuring itself took, by part: "observing" the step, the "scratch" and the "times" of operations run alone
    (next to nothing where the cost cache knew them), the "mechanism" of replay, and "tables"."""
    baseline_bytes: int = field(init=False)
    """Sum of `baseline`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "baseline_bytes", sum(self.baseline.values()))

    def check(self) -> None:
        """Raise ValueError where an index or a size cannot be right, so that nothing that reads the profile crashes."""
        _check_sizes(self)
        _check_wiring(self)
        _check_timeline(self)

    @property
    def plain_step_ms(self) -> float:
        """Predicted time of the plain step: each operation that ran, alone."""
        total_ms = 0.0
        passes = self.accumulation_steps
        for event in self.events:
            if event.kind == EventKind.OP:
                total_ms += passes * self.signatures[self.ops[event.a].signature].ms
            elif event.kind == EventKind.OTHER_OP:
                total_ms += passes * self.signatures[event.a].ms
            elif event.kind == EventKind.OPTIMIZER:
                passes = 1
        return total_ms

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        codec.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile. Raises `PlanMismatch` if the file is not one."""
        return codec.load(cls, path)


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptValue:
    """A value that is kept for safety, whatever the budget, and why."""

    op: str
    reason: str
    nbytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What to do in a region: shared by all regions of one class with the same decision."""

    class_id: int
    op_names: tuple[str, ...]
    """The operations that the decision was made for: the live tape follows it only as long as they agree."""
    keep: tuple[tuple[int, int], ...]
    """The keep set, sorted."""
    drop: tuple[tuple[int, int], ...]
    """(position, output) of each saved value that is dropped and replayed, sorted. Any other saved value is held."""
    replay: tuple[int, ...]
    """Positions of the operations that replay needs, sorted: only these are taped."""
    held_bytes: int
    """Bytes this region holds from the end of its forward to its backward, parameters and batch apart."""
    dropped_bytes: int
    """Bytes that autograd saves in the plain step and that this recipe does not hold."""
    replay_ms: float
    """Time of the replayed operations."""
    rerun: bool = False
    """There is no tape: PyTorch's checkpoint runs the module's forward again, up to the last operation in `replay`."""
    kept_for_safety: tuple[KeptValue, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRegion:
    """The decision for one region."""

    key: str
    recipe: int = -1
    """Index into `Plan.recipes`; -1 leaves the region untouched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Consecutive regions that share one tape: what passes between them is dropped and rebuilt, too."""

    first: int
    """Index of the first region, in `Profile.regions` and `Plan.regions`."""
    count: int
    nest: Nest
    """What replay holds at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A decision for every region, with what it is predicted to cost."""

    budget_bytes: int
    """The budget it was solved for."""
    predicted_peak_bytes: int
    """Predicted peak of the whole step, in the budget's terms."""
    peak_where: str
    """When the peak is reached: a region's key, ``backward of KEY`` or ``optimizer step``."""
    baseline_bytes: int
    """Parameters, buffers, gradients, optimizer state, batch."""
    breakdown: Mapping[str, int]
    """Bytes at the moment of the peak, by component; they add up to `predicted_peak_bytes`."""
    predicted_step_ms: float
    plain_step_ms: float
    plain_peak_bytes: int
    overhead_ratio: float
    """`predicted_step_ms` / `plain_step_ms` - 1."""
    lower_bound_ms: float
    """No plan of the plan space is faster than this at this budget."""
    regions: tuple[PlannedRegion, ...]
    recipes: tuple[Recipe, ...]
    region_paths: tuple[str, ...]
    """Module paths that are regions."""
    groups: tuple[Group, ...] = ()
    """Regions that share tapes, in order; empty unless the budget is below what one level of replay needs."""
    model: str
    fingerprint: str
    """See `Profile.fingerprint`."""
    batch: str
    device: str
    optimizer: str
    """Empty when the optimizer was not measured: its state and step are then not in the figures."""
    exactness: str = "bitwise"
    """"bitwise": gradients are bit for bit those of the plain step. "rounding": summation order may differ."""

    def check(self) -> None:
        """Raise ValueError where an index or a size cannot be right."""
        sizes = {"budget_bytes": self.budget_bytes, "baseline_bytes": self.baseline_bytes}
        for name, size in sizes.items():
            _require(size >= 0, f"{name} is negative")
        _require(self.exactness in ("bitwise", "rounding"), f"exactness is {self.exactness!r}")
        _require(
            sum(self.breakdown.values()) == self.predicted_peak_bytes,
            "breakdown does not add up to predicted_peak_bytes",
        )
        keys = [region.key for region in self.regions]
        _require(len(set(keys)) == len(keys), "regions name one region twice")
        for region in self.regions:
            _require(-1 <= region.recipe < len(self.recipes), f"{region.key} names recipe {region.recipe}")
        _check_groups(self)
        for place, recipe in enumerate(self.recipes):
            count = len(recipe.op_names)
            _require(all(0 <= op < count for op in recipe.replay), f"recipes[{place}].replay names no operation")
            pairs = (*recipe.keep, *recipe.drop)
            _require(
                all(0 <= op < count for op, _ in pairs), f"recipes[{place}] keeps or drops what no operation makes"
            )
            _require(recipe.held_bytes >= 0 and recipe.dropped_bytes >= 0, f"recipes[{place}] has negative bytes")

    @property
    def tape_host_bytes(self) -> int:
        """Host memory that the tapes' own Python objects take, at most: beside the budget, not within it."""
        planned = [self.recipes[region.recipe] for region in self.regions if region.recipe >= 0]
        planned = [recipe for recipe in planned if not recipe.rerun]
        taped, dropped = sum(len(r.replay) for r in planned), sum(len(r.drop) for r in planned)
        return taped * TAPED_OP_HOST_BYTES + dropped * DROPPED_VALUE_HOST_BYTES

    @property
    def is_plain(self) -> bool:
        """True when nothing is dropped: applying the plan installs nothing."""
        return all(region.recipe < 0 for region in self.regions)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        codec.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. Raises `PlanMismatch` if the file is not one."""
        return codec.load(cls, path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What `verify` found. A field is None where it was not checked."""

    ok: bool | None
    """Everything that was compared is bit-for-bit equal and the measured peak is within the budget; None when a part
    could not be compared."""
    method: str
    """"whole-step": plain and planned steps compared. "per-region": each region class plain and replayed from identical
    inputs. "guarded": only the planned step was run, and its peak measured."""
    loss_equal: bool | None
    gradients_equal: bool | None
    buffers_equal: bool | None
    rng_equal: bool | None
    max_abs_difference: float | None
    """Largest absolute difference in any compared tensor."""
    differing: tuple[str, ...]
    """Names of tensors that differ from the plain step."""
    plain_reproducible: bool | None
    """Two plain steps from the same state gave the same bits."""
    not_reproducible: tuple[str, ...]
    """Names of tensors that differ between two plain steps: never blamed on the plan."""
    unverified: tuple[str, ...]
    """Regions that were not compared, because they did not fit."""
    steps: int
    """Optimizer steps (or forward-backward passes without an optimizer) that were compared."""
    budget_bytes: int
    plain_peak_bytes: int
    plain_peak_source: str
    """"measured" or "predicted"."""
    predicted_peak_bytes: int
    measured_peak_bytes: int
    plain_step_ms: float
    plain_step_source: str
    """"measured" or "predicted"."""
    step_ms: float
    overhead_ratio: float
    """`step_ms` / `plain_step_ms` - 1."""
    replayed_ops: int
    """Operations replayed in one step, counted by the engine."""
    mismatches: int
    """Region calls whose operations were not those of the plan (handled safely, but not as planned)."""
    tape_host_bytes: int = 0
    """Host memory that the tapes' own Python objects took, at most, by the operations and values that were counted."""

    def save(self, path: str | Path) -> None:
        """Write the verdict as JSON."""
        codec.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Verdict:
        """Read a verdict. Raises `PlanMismatch` if the file is not one."""
        return codec.load(cls, path)


def _require(holds: bool, trouble: str) -> None:
    if not holds:
        raise ValueError(trouble)


def _check_groups(plan: Plan) -> None:
    end = 0
    for place, group in enumerate(plan.groups):
        _require(group.first >= end and group.count >= 1, f"groups[{place}] does not follow the one before")
        end = group.first + group.count
        _require(end <= len(plan.regions), f"groups[{place}] names no region")
        recipes = [region.recipe for region in plan.regions[group.first : end]]
        _require(all(recipe >= 0 for recipe in recipes), f"groups[{place}] has an untouched region")
        nest = group.nest
        _require(len(nest.depths) == len(nest.cuts), f"groups[{place}].nest has cuts without depth")
        _require(list(nest.cuts) == sorted(set(nest.cuts)), f"groups[{place}].nest has cuts out of order")
        _require(
            all(0 <= region < group.count and position >= 0 for region, position in nest.cuts)
            and all(depth >= 0 for depth in nest.depths),
            f"groups[{place}].nest names no place in its regions",
        )


def _check_sizes(profile: Profile) -> None:
    _require(set(profile.baseline) <= set(COMPONENTS) - {"activation"}, "baseline names an unknown component")
    _require(all(size >= 0 for size in profile.baseline.values()), "baseline holds a negative size")
    _require(profile.margin_bytes >= 0, "margin_bytes is negative")
    _require(profile.accumulation_steps >= 1, "accumulation_steps is below 1")
    _require(all(part >= 0 for part in profile.measuring_ms.values()), "measuring_ms holds a negative time")
    _require(profile.mode_ms_per_op >= 0 and profile.tape_ms_per_op >= 0, "a time per operation is negative")
    for place, storage in enumerate(profile.storages):
        _require(storage.nbytes >= 0, f"storages[{place}] has a negative size")
        _require(storage.component in COMPONENTS, f"storages[{place}] is of no known component")
    for place, signature in enumerate(profile.signatures):
        _require(signature.ms >= 0, f"signatures[{place}] has a negative time")
        _require(signature.scratch_bytes >= 0, f"signatures[{place}] has a negative size")


def _check_wiring(profile: Profile) -> None:
    values = profile.values
    for place, value in enumerate(values):
        _require(0 <= value.storage < len(profile.storages), f"values[{place}] names no storage")
        _require(-1 <= value.op < len(profile.ops), f"values[{place}] names no operation")
        if value.op >= 0:
            _require(place in profile.ops[value.op].outputs, f"values[{place}] is no output of its operation")
    for place, op in enumerate(profile.ops):
        _require(0 <= op.signature < len(profile.signatures), f"ops[{place}] names no signature")
        _require(all(0 <= v < len(values) for v in (*op.inputs, *op.outputs)), f"ops[{place}] names no value")
        _require(all(values[v].op < place for v in op.inputs), f"ops[{place}] reads a value that is made later")
        _require(all(values[v].op == place for v in op.outputs), f"ops[{place}] makes a value of another operation")
        names = {values[v].output for v in op.outputs}
        _require(len(names) == len(op.outputs), f"ops[{place}] makes two values under one name")
        _require(set(op.mutates) <= set(op.inputs), f"ops[{place}] mutates what it does not read")
    first = 0
    for region in profile.regions:
        _require(
            region.first_op == first and region.op_count >= 0, f"region {region.key} does not follow the one before"
        )
        first += region.op_count
    _require(first == len(profile.ops), "regions do not cover the operations")
    keys = {region.key for region in profile.regions}
    _require(len(keys) == len(profile.regions), "regions name one region twice")
    for place, slot in enumerate(profile.slots):
        _require(0 <= slot.value < len(values), f"slots[{place}] names no value")
        _require(0 <= slot.region < len(profile.regions), f"slots[{place}] names no region")


def _check_timeline(profile: Profile) -> None:
    tables = {
        EventKind.ALLOC: len(profile.storages),
        EventKind.FREE: len(profile.storages),
        EventKind.OP: len(profile.ops),
        EventKind.OTHER_OP: len(profile.signatures),
        EventKind.SAVE: len(profile.slots),
        EventKind.UNPACK: len(profile.slots),
        EventKind.RELEASE: len(profile.slots),
        EventKind.ENTER: len(profile.regions),
        EventKind.EXIT: len(profile.regions),
    }
    saved: set[int] = set()
    released: set[int] = set()
    ran: set[int] = set()
    for place, (kind, a) in enumerate(profile.events):
        _require(kind not in tables or 0 <= a < tables[kind], f"events[{place}] names nothing that exists")
        if kind == EventKind.OP:
            _require(a not in ran, f"events[{place}] runs an operation again")
            ran.add(a)
        elif kind == EventKind.SAVE:
            _require(a not in saved, f"events[{place}] saves a slot again")
            saved.add(a)
        elif kind in (EventKind.UNPACK, EventKind.RELEASE):
            _require(a in saved and a not in released, f"events[{place}] reads a slot that is not saved")
            if kind == EventKind.RELEASE:
                released.add(a)
