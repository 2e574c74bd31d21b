"""What measuring found: one training step, by the tables of `step_tables`, and what all of it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tightfit.records import json_codec
from tightfit.records.allocator_state import AllocatorState
from tightfit.records.checks import require
from tightfit.records.step_tables import COMPONENTS, Event, EventKind, Op, Region, Signature, Slot, Storage, Value
from tightfit.records.stretch import StepWork, step_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What `measure` found about one training step of one model on one batch.

        profile = tightfit.measure(model, batch, loss=loss_fn, optimizer=optimizer)
        profile.save("profile.json")
        plan = tightfit.solve(tightfit.Profile.load("profile.json"), budget_bytes=8 * 2**30)

    How a step is described, ``help(tightfit.records.step_tables)`` tells.

    Attributes:
        model: the model's class name.
        device: the device that it was measured on.
        torch_version: the PyTorch that it was measured with.
        threads: how many threads PyTorch computed with.
        storages: every piece of memory that appears in the step.
        values: what the storages hold, between two writes.
        signatures: each distinct operation, with its time and workspace.
        ops: the operations of forward, region by region.
        regions: the pieces of forward, in the order in which they run.
        slots: each save of a value by autograd.
        events: the timeline of the step.
    """

    model: str
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
    """What runs depends on the data, so another batch may need more: a plan leaves a part of the budget free."""
    switched_off: tuple[str, ...] = ()
    """Who keeps a part of the step from being recomputed: checkpointing that is on in the model, saved-tensor hooks of
    somebody else's."""
    unproven: tuple[str, ...] = field(default=(), metadata={json_codec.ADDED: True})
    """Opaque calls, and operations inside modules that are called again, of which no step has shown that a second run
    gives the same: a plan may need more than it says, until `fit` has run it."""
    margin_bytes: int = 0
    """Added to every moment: what collectives between processes may take, or what no trial run will confirm."""
    correction_bytes: int = 0
    """Added to every moment: what a trial run measured beyond (or below) the prediction."""
    allocator: AllocatorState | None = None
    """The device's caching allocator before the step; None where all that is freed goes back to the system."""
    forward_ms_per_op: float = 0.0
    """Time of the host's for each operation of forward, beside what it takes alone: modules, autograd. Only where a
    device works beside the host."""
    backward_ms_per_op: float = 0.0
    """The same for each operation of backward."""
    mode_ms_per_op: float = 0.0
    """Time that a planned region costs for each operation that runs in it."""
    tape_ms_per_op: float = 0.0
    """Further time for each operation that is written to the tape."""
    replay_ms_per_op: float = 0.0
    """Further time for each operation that is replayed, beside its own."""
    region_ms_per_call: float = 0.0
    """Further time for each region that has a tape."""
    untouched_ms_per_region: float = field(default=0.0, metadata={json_codec.ADDED: True})
    """Time that each region costs under a plan, whatever that decides."""
    planned_ms_per_step: float = field(default=0.0, metadata={json_codec.ADDED: True})
    """Further time of each forward under a plan."""
    module_ms_per_op: float = 0.0
    """Time that calling a module a second time costs for each operation, beside the operation's own time."""
    module_ms_per_call: float = 0.0
    """Further time for each module call that is recomputed."""
    random_state_bytes: int = 0
    """Size of the default generator's state, where that counts (on a CPU): noted for each call that is recomputed."""
    is_sharded: bool = False
    """Each process holds a part of every parameter (FSDP2), so that nothing is replayed outside its own region's
    backward: the weights would not be there."""
    excluded: tuple[str, ...] = ()
    """Paths of the modules that are left untouched: nothing that runs inside them is recomputed."""
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    """Functions to which the model itself applies `torch.utils.checkpoint`: empty where a plan takes that over, else
    why it is left to PyTorch. Where plans take it over, plain means the step without."""
    measuring_ms: Mapping[str, float] = field(default_factory=dict)
    """What measuring itself took, by part: "observing" the step, the "workspace" and the "times" of operations that ran
    alone (next to nothing where the cost cache knew them), the "mechanism" of replay, and "tables"."""
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
    def has_device_times(self) -> bool:
        """Whether a device works beside the host, so that the longer of two times counts (see `Stretch`)."""
        return any(signature.device_ms for signature in self.signatures)

    @property
    def plain_step_ms(self) -> float:
        """Predicted time of the plain step: each operation that ran, as it does alone."""
        return step_ms(self.plain_work(), {}, self.accumulation_steps)

    def plain_work(self) -> StepWork:
        """Return what the plain step takes the host and the device within each event."""
        host_ms, device_ms = [0.0] * len(self.events), [0.0] * len(self.events)
        optimizer = len(self.events)
        beside_ms = self.backward_ms_per_op
        keeping = 0
        for time, (kind, a) in enumerate(self.events):
            if kind == EventKind.OP:
                signature = self.signatures[self.ops[a].signature]
                more_ms = self.backward_ms_per_op if keeping else self.forward_ms_per_op
                host_ms[time], device_ms[time] = signature.ms + more_ms, signature.device_ms
            elif kind == EventKind.KEEPING:
                keeping += 1 if a else -1
            elif kind == EventKind.OTHER_OP:
                signature = self.signatures[a]
                host_ms[time], device_ms[time] = signature.ms + beside_ms, signature.device_ms
            elif kind == EventKind.OPTIMIZER and optimizer > time:
                optimizer, beside_ms = time, 0.0
        return StepWork(host_ms, device_ms, optimizer)

    def saved_bytes(self, *, only: str = "") -> int:
        """Return the bytes of the storages that autograd saves, resident ones left out.

        Args:
            only: a module path, or ``<loss>``; empty for all.
        """
        kept = {
            self.values[slot.value].storage
            for slot in self.slots
            if not only or self.regions[slot.region].key.rpartition("#")[0] == only
        }
        storages = [self.storages[storage] for storage in kept]
        return sum(storage.nbytes for storage in storages if storage.component == "activation")

    def with_unit_times(self) -> Profile:
        """Return the profile with every operation taking one millisecond and no lever costing anything beside.

        What is left is structure and bytes.
        """
        return replace(
            self,
            signatures=tuple(replace(signature, ms=1.0, device_ms=0.0) for signature in self.signatures),
            forward_ms_per_op=0.0,
            backward_ms_per_op=0.0,
            mode_ms_per_op=0.0,
            tape_ms_per_op=0.0,
            replay_ms_per_op=0.0,
            region_ms_per_call=0.0,
            untouched_ms_per_region=0.0,
            planned_ms_per_step=0.0,
            module_ms_per_op=0.0,
            module_ms_per_call=0.0,
        )

    @property
    def keeps_graph(self) -> bool:
        """Whether the step's own backwards but the last one keep the graph."""
        kinds = [event.kind for event in self.events]
        return EventKind.KEEPING in kinds[kinds.index(EventKind.BACKWARD) if EventKind.BACKWARD in kinds else 0 :]

    def with_kept_graph(self) -> Profile:
        """Return the profile of the step whose backward keeps the graph (``retain_graph=True``) for further ones.

        What autograd has let go of in backward it then holds until backward ends.
        """
        kinds = [event.kind for event in self.events]
        if EventKind.BACKWARD not in kinds or self.keeps_graph:
            return self
        begin = kinds.index(EventKind.BACKWARD)
        end = kinds.index(EventKind.OPTIMIZER) if EventKind.OPTIMIZER in kinds else len(kinds)
        backward = self.events[begin:end]
        released = tuple(event for event in backward if event.kind == EventKind.RELEASE)
        kept = tuple(Event(EventKind.READ, e.a) if e.kind == EventKind.RELEASE else e for e in backward[1:])
        kept = (backward[0], Event(EventKind.KEEPING, 1), *kept, Event(EventKind.KEEPING, 0))
        return replace(self, events=(*self.events[:begin], *kept, *released, *self.events[end:]))

    def save(self, path: str | Path) -> None:
        """Write the profile to a file, as JSON."""
        json_codec.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile from a file. Raises `PlanMismatch` if the file is not one."""
        return json_codec.load(cls, path)


def _check_sizes(profile: Profile) -> None:
    require(set(profile.baseline) <= set(COMPONENTS) - {"activation"}, "baseline names an unknown component")
    require(all(size >= 0 for size in profile.baseline.values()), "baseline holds a negative size")
    require(profile.margin_bytes >= 0, "margin_bytes is negative")
    require(profile.accumulation_steps >= 1, "accumulation_steps is below 1")
    require(all(part >= 0 for part in profile.measuring_ms.values()), "measuring_ms holds a negative time")
    for part in ("forward", "backward", "mode", "tape", "replay"):
        require(getattr(profile, f"{part}_ms_per_op") >= 0, "a time per operation is negative")
    for part in ("region_ms_per_call", "untouched_ms_per_region", "planned_ms_per_step"):
        require(getattr(profile, part) >= 0, f"{part} is negative")
    for place, storage in enumerate(profile.storages):
        require(storage.nbytes >= 0, f"storages[{place}] has a negative size")
        require(storage.component in COMPONENTS, f"storages[{place}] is of no known component")
    for place, signature in enumerate(profile.signatures):
        require(min(signature.ms, signature.device_ms) >= 0, f"signatures[{place}] has a negative time")
        require(signature.workspace_bytes >= 0, f"signatures[{place}] has a negative size")


def _check_wiring(profile: Profile) -> None:
    values = profile.values
    for place, value in enumerate(values):
        require(0 <= value.storage < len(profile.storages), f"values[{place}] names no storage")
        require(-1 <= value.op < len(profile.ops), f"values[{place}] names no operation")
        if value.op >= 0:
            require(place in profile.ops[value.op].outputs, f"values[{place}] is no output of its operation")
    region_of_op = [index for index, region in enumerate(profile.regions) for _ in range(region.op_count)]
    require(len(region_of_op) == len(profile.ops), "regions do not cover the operations")
    for place, op in enumerate(profile.ops):
        require(0 <= op.signature < len(profile.signatures), f"ops[{place}] names no signature")
        require(all(0 <= v < len(values) for v in (*op.inputs, *op.outputs)), f"ops[{place}] names no value")
        makers = [maker for v in op.inputs if (maker := values[v].op) >= place]
        is_later = any(region_of_op[maker] == region_of_op[place] for maker in makers)
        require(not is_later, f"ops[{place}] reads a value that is made later")
        require(all(values[v].op == place for v in op.outputs), f"ops[{place}] makes a value of another operation")
        names = {values[v].output for v in op.outputs}
        require(len(names) == len(op.outputs), f"ops[{place}] makes two values under one name")
        require(set(op.mutates) <= set(op.inputs), f"ops[{place}] mutates what it does not read")
    first = 0
    for region in profile.regions:
        require(
            region.first_op == first and region.op_count >= 0, f"region {region.key} does not follow the one before"
        )
        first += region.op_count
    keys = {region.key for region in profile.regions}
    require(len(keys) == len(profile.regions), "regions name one region twice")
    for place, slot in enumerate(profile.slots):
        require(0 <= slot.value < len(values), f"slots[{place}] names no value")
        require(0 <= slot.region < len(profile.regions), f"slots[{place}] names no region")


def _check_timeline(profile: Profile) -> None:
    tables = {
        EventKind.ALLOC: len(profile.storages),
        EventKind.FREE: len(profile.storages),
        EventKind.OP: len(profile.ops),
        EventKind.OTHER_OP: len(profile.signatures),
        EventKind.SAVE: len(profile.slots),
        EventKind.UNPACK: len(profile.slots),
        EventKind.RELEASE: len(profile.slots),
        EventKind.READ: len(profile.slots),
        EventKind.ENTER: len(profile.regions),
        EventKind.EXIT: len(profile.regions),
    }
    saved: set[int] = set()
    released: set[int] = set()
    ran: set[int] = set()
    for place, (kind, a) in enumerate(profile.events):
        require(kind not in tables or 0 <= a < tables[kind], f"events[{place}] names nothing that exists")
        if kind == EventKind.OP:
            require(a not in ran, f"events[{place}] runs an operation again")
            ran.add(a)
        elif kind == EventKind.SAVE:
            require(a not in saved, f"events[{place}] saves a slot again")
            saved.add(a)
        elif kind in (EventKind.UNPACK, EventKind.READ, EventKind.RELEASE):
            require(a in saved and a not in released, f"events[{place}] reads a slot that is not saved")
            if kind == EventKind.RELEASE:
                released.add(a)
