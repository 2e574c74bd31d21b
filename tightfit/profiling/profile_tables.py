"""Build a profile's tables from an observation: cut forward into regions and find the identical ones."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from tightfit.collector import uncollected
from tightfit.operators.differing_calls import GAVE_OTHER_BITS
from tightfit.operators.facts import OpInfo, describe, operation_named
from tightfit.operators.region_names import LOSS, RegionCursor
from tightfit.profiling.observation import ModuleEvent, Observation
from tightfit.records import Event, EventKind, Op, Region, Signature, Slot, Storage, Value

#: How the names of operations begin that no second call may run: between processes, and with random state that is made
#: at the first call in a process and kept outside of PyTorch's generators.
_ONCE = ("c10d", "_c10d", "aten._cudnn_rnn", "aten._cudnn_init_dropout_state")


@dataclass(slots=True)
class _Cut:
    """Forward cut into regions; the lists are by region."""

    keys: list[str] = field(default_factory=list)
    region_of_op: list[int] = field(default_factory=list)
    """By operation, in the order in which they ran."""
    events: list[Event] = field(default_factory=list)
    slot_region: dict[int, int] = field(default_factory=dict)
    plain_calls: set[str] = field(default_factory=set)
    """Keys of the module calls whose arguments are all tensors and constants."""
    read_in_forward: set[int] = field(default_factory=set)
    """Regions of which a backward inside forward reads what was saved and keeps it, or whose nodes it runs."""


@uncollected()
def build_tables(
    observation: Observation,
    region_paths: Sequence[str],
    signatures: Sequence[Signature],
    again_paths: AbstractSet[str] = frozenset(),
) -> Mapping[str, Any]:
    """Build the tables of a `Profile`, by field name: storages, values, ops, regions, slots, events.

    Args:
        observation: what was recorded of the step.
        region_paths: paths of the modules that are regions.
        signatures: the signatures that the ops refer to.
        again_paths: paths of the modules that can be recomputed by calling the module again.
    """
    cut = _cut(observation, frozenset(region_paths))
    left = _left_to_backward(observation, cut)
    # Region by region: what a backward inside forward runs for the nodes of a region comes after its own operations.
    order = sorted(set(range(len(observation.ops))) - left, key=lambda op: (cut.region_of_op[op], op))
    place = {op: number for number, op in enumerate(order)} | dict.fromkeys(left, -1) | {-1: -1}
    op_counts = Counter(cut.region_of_op[op] for op in order)
    storages = tuple(Storage(nbytes=s.nbytes, component=s.component, stream=s.stream) for s in observation.storages)
    values = tuple(
        Value(storage=v.storage, op=place[v.op], output=v.output, overwritten=v.overwritten) for v in observation.values
    )
    ops = tuple(
        Op(
            signature=op.signature,
            inputs=op.inputs,
            outputs=tuple(op.outputs),
            mutates=op.mutates,
            keep_reason=op.keep_reason,
            random_state_bytes=op.random_state_bytes,
        )
        for op in (observation.ops[number] for number in order)
    )
    slots = tuple(Slot(value=value, region=cut.slot_region[index]) for index, value in enumerate(observation.slots))
    slots_of_region: list[list[int]] = [[] for _ in cut.keys]
    for slot in slots:
        slots_of_region[slot.region].append(slot.value)
    # A module with regions inside is cut into segments, none of which is one call of it.
    around_regions = {path[:place] for path in region_paths for place, sign in enumerate(path) if sign == "."}
    unsplit = set(again_paths) - around_regions
    keys = set(cut.keys)
    infos = [describe(operation_named(signature.name)) for signature in signatures]
    classes: dict[Any, int] = {}
    regions = []
    first = count = 0
    for index, key in enumerate(cut.keys):
        first, count = first + count, op_counts[index]
        structure = _structure_of(
            range(first, first + count), ops, values, storages, slots_of_region[index], signatures
        )
        recomputable = (
            key in cut.plain_calls
            and key.partition("#")[0] in unsplit
            and keys.isdisjoint((f"{key}/1", f"{key}~1"))
            and index not in cut.read_in_forward
            and all(_may_run_again(infos[op.signature], op) for op in ops[first : first + count])
        )
        class_id = classes.setdefault((structure, recomputable), len(classes))
        regions.append(
            Region(key=key, first_op=first, op_count=count, class_id=class_id, module_recomputable=recomputable)
        )
    return {
        "storages": storages,
        "values": values,
        "ops": ops,
        "regions": tuple(regions),
        "slots": slots,
        "events": tuple(_renumbered(event, place, observation) for event in cut.events),
    }


def _left_to_backward(observation: Observation, cut: _Cut) -> set[int]:
    """Return the operations of backwards inside forward that are no region's after all.

    They are of regions that run under saved-tensor hooks of somebody else, which no tape records, or that write into
    views, of whose backward autograd makes other operations without data.
    """
    ops, region_of_op = observation.ops, cut.region_of_op
    regions = {region_of_op[op] for op in observation.under_hooks if ops[op].node < 0}
    regions |= {region_of_op[op] for op in observation.of_view_writes}
    return {index for index, op in enumerate(ops) if op.node >= 0 and region_of_op[index] in regions}


def _renumbered(event: Event, place: Mapping[int, int], observation: Observation) -> Event:
    if event.kind != EventKind.OP:
        return event
    if place[event.a] < 0:
        return Event(EventKind.OTHER_OP, observation.ops[event.a].signature)
    return Event(EventKind.OP, place[event.a])


def _may_run_again(info: OpInfo, op: Op) -> bool:
    """Tell whether an operation may give the same bits when its module is called again in backward."""
    if info.name.startswith(_ONCE):
        return False
    if not op.keep_reason:
        return True
    return not info.is_convolution and op.keep_reason not in (GAVE_OTHER_BITS, info.blocker_with_atomics)


def _cut(observation: Observation, region_paths: frozenset[str]) -> _Cut:
    cursor = RegionCursor()
    cursor.push(LOSS)
    cut = _Cut()
    calls: list[bool] = []  # for each open module call: whether it is a region
    slots = 0
    keeping = 0  # backwards that run and keep their graphs
    positions, makers = [0], [0]  # from which position in autograd's graph on nodes are of which region; -1: of none

    def begin() -> None:
        cut.events.append(Event(EventKind.ENTER, len(cut.keys)))
        cut.keys.append(cursor.key)

    def note_maker(place: int, region: int) -> None:
        if place in observation.positions:
            positions.append(observation.positions[place])
            makers.append(region)

    def maker_of(node: int | None) -> int:
        return -1 if node is None or node < 0 else makers[bisect_right(positions, node) - 1]

    def end() -> None:
        cut.events.append(Event(EventKind.EXIT, len(cut.keys) - 1))

    forward = True
    begin()
    for place, event in enumerate(observation.events):
        if isinstance(event, ModuleEvent):
            if not forward:
                continue
            if event.path is not None:
                calls.append(event.path in region_paths)
                if calls[-1]:
                    end()
                    cursor.push(event.path)
                    begin()
                    if event.has_plain_arguments:
                        cut.plain_calls.add(cursor.key)
            elif calls.pop():
                end()
                cursor.pop()
                begin()
            note_maker(place, len(cut.keys) - 1)
            continue
        if event.kind == EventKind.BACKWARD and forward:
            end()
            forward = False
        elif event.kind == EventKind.KEEPING and forward:
            if event.a:
                end()
                cursor.interrupt()
                begin()
            keeping += 1 if event.a else -1
            note_maker(place, len(cut.keys) - 1 if not keeping else -1)
        elif event.kind == EventKind.OP:
            maker = maker_of(observation.ops[event.a].node)
            cut.region_of_op.append(maker if maker >= 0 else len(cut.keys) - 1)
            if maker >= 0:
                cut.read_in_forward.add(maker)
        elif event.kind == EventKind.SAVE:
            maker = maker_of(observation.node_of_slot.get(slots))
            read = observation.saved_again.get(slots)
            here = maker if maker >= 0 else len(cut.keys) - 1
            cut.slot_region[slots] = here if read is None else cut.slot_region[read]
            slots += 1
        elif event.kind == EventKind.UNPACK and keeping:
            cut.read_in_forward.add(cut.slot_region[event.a])
        cut.events.append(event)
    return cut


def _structure_of(
    op_range: range,
    ops: Sequence[Op],
    values: Sequence[Value],
    storages: Sequence[Storage],
    saved: Sequence[int],
    signatures: Sequence[Signature],
) -> Any:
    """Return all that decides what a region's tape can drop and replay; equal for identical regions.

    Values are numbered by first appearance.
    """
    numbers: dict[int, int] = {}

    def number(value: int) -> tuple[int, int, str, bool]:
        record = values[value]
        storage = storages[record.storage]
        return numbers.setdefault(value, len(numbers)), storage.nbytes, storage.component, record.overwritten

    rows = []
    for index in op_range:
        op = ops[index]
        rows.append(
            (
                signatures[op.signature].name,
                op.signature,
                tuple(number(v) for v in op.inputs),
                tuple((number(v), values[v].output) for v in op.outputs),
                tuple(number(v) for v in op.mutates),
                op.keep_reason,
            )
        )
    return tuple(rows), tuple(number(v) for v in saved)
