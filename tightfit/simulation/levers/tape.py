"""The tape as a lever: any choice of values is held, and the others are recomputed operation by operation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tightfit.records import (
    DROPPED_SLOT_HOST_BYTES,
    TAPED_OP_HOST_BYTES,
    Decision,
    KeptValue,
    Profile,
    Recipe,
    SharedTape,
    ValueName,
)
from tightfit.simulation.levers.lever import Happening, RegionModel, ValueCosts
from tightfit.simulation.levers.recipes import op_names_of, replay_ms_of
from tightfit.simulation.levers.tape_model import TapeModel
from tightfit.simulation.levers.tape_script import script_of
from tightfit.simulation.profile_index import ProfileIndex, RegionFacts

_OVERWRITTEN = "overwritten later"
_NO_WAY_BACK = "made from a value that is overwritten later or must be kept"


class TapeLever:
    """Holds the values that a decision keeps, and replays the operations that make the others."""

    name = "tape"
    executor = "tape"

    def offers(self, index: ProfileIndex, regions: Sequence[int]) -> Iterable[Decision]:
        """Return nothing: which values to keep is searched."""
        return ()

    def decide(self, kept: Collection[ValueName]) -> Decision:
        """Return the decision that keeps these values and drops all others that may be dropped."""
        return Decision(self.name, frozenset(kept))

    def costs(self, profile: Profile) -> ValueCosts:
        """Return what its decisions cost beside the operations that are recomputed."""
        return ValueCosts(
            profile.region_ms_per_call, profile.mode_ms_per_op, profile.tape_ms_per_op, profile.replay_ms_per_op
        )

    def model(self, index: ProfileIndex, region: int, decision: Decision) -> RegionModel:
        """Return what the region holds under a decision."""
        return TapeModel(index, region, [decision])

    def happenings(
        self, index: ProfileIndex, region: int, decision: Decision
    ) -> tuple[Sequence[Happening], Sequence[int]] | None:
        """Return all that a decision does in a region, and the operations recomputed; None where the model has to."""
        script = script_of(index, region)
        return None if script is None else script.play(decision.kept)

    def shared_model(
        self, index: ProfileIndex, shared: SharedTape, decisions: Sequence[Decision | None]
    ) -> RegionModel:
        """Return what regions hold that share a tape; a decision for each of them."""
        return TapeModel(index, shared.first, decisions, shared.tree)

    def recipe(self, index: ProfileIndex, region: int, decision: Decision) -> Recipe | None:
        """Return what the executor needs to know; None if nothing is replayed."""
        tape = _tape(index, region, [decision])
        return self._recipe(tape, region) if tape.needed else None

    def shared_recipes(
        self, index: ProfileIndex, shared: SharedTape, decisions: Sequence[Decision | None]
    ) -> list[Recipe]:
        """Return the recipe of each region that shares the tape."""
        tape = _tape(index, shared.first, decisions)
        return [self._recipe(tape, region) for region in range(shared.first, shared.first + shared.count)]

    def _recipe(self, tape: _Tape, region: int) -> Recipe:
        """Return the part of a tape that is about one of its regions."""
        index, facts = tape.index, tape.facts
        profile = index.profile
        record = profile.regions[region]
        ops = range(record.first_op, record.first_op + record.op_count)
        own = {value for op in ops for value in profile.ops[op].outputs}
        needed = [op for op in ops if op in tape.needed]
        saved, kept = tape.saved & own, tape.kept & own
        dropped = saved - kept
        read = {value for op in needed for value in profile.ops[op].inputs}
        sources = {v for v in read if v not in facts.own or v in tape.kept or v not in facts.droppable}
        slots = set(facts.slots)
        fixed = {profile.slots[slot].value for slot in index.slots_of_region[region] if slot not in slots}
        held = {profile.values[v].storage for v in sources | (saved & kept) | fixed}
        return Recipe(
            class_id=record.class_id,
            op_names=op_names_of(index, region),
            lever=self.name,
            executor=self.executor,
            keep=tuple(sorted(index.local(v) for v in kept & (saved | tape.read))),
            drop=tuple(sorted(index.local(v) for v in dropped)),
            replay=tuple(op - record.first_op for op in needed),
            held_bytes=sum(profile.storages[s].nbytes for s in held if not index.is_resident(s)),
            dropped_bytes=sum(
                profile.storages[s].nbytes
                for s in {profile.values[v].storage for v in dropped} - held
                if not index.is_resident(s)
            ),
            replay_ms=replay_ms_of(index, needed),
            host_bytes=len(needed) * TAPED_OP_HOST_BYTES
            + sum(index.saves[v] for v in dropped) * DROPPED_SLOT_HOST_BYTES,
            kept_for_safety=_kept_for_safety(index, fixed & own),
        )


@dataclass(frozen=True, slots=True)
class _Tape:
    """What the tape of a region, or of several that share it, keeps and replays."""

    index: ProfileIndex
    facts: RegionFacts
    kept: frozenset[int]
    needed: frozenset[int]
    read: frozenset[int]
    """Values that replay reads."""
    saved: frozenset[int]
    """Values that are saved and may be dropped."""


def _tape(index: ProfileIndex, first: int, decisions: Sequence[Decision | None]) -> _Tape:
    profile = index.profile
    facts = index.tape_facts(first, len(decisions))
    kept = index.kept_values(facts, decisions)
    needed = index.rebuilding_ops(facts, kept)
    return _Tape(
        index,
        facts,
        kept,
        needed,
        read=frozenset(value for op in needed for value in profile.ops[op].inputs),
        saved=frozenset(profile.slots[slot].value for slot in facts.slots),
    )


def _kept_for_safety(index: ProfileIndex, fixed: Iterable[int]) -> tuple[KeptValue, ...]:
    profile = index.profile
    kept = []
    for value in sorted(fixed):
        op = profile.ops[profile.values[value].op]
        reason = op.keep_reason or (_OVERWRITTEN if profile.values[value].overwritten else _NO_WAY_BACK)
        if not index.is_free(value):
            name = profile.signatures[op.signature].name
            kept.append(KeptValue(op=name, reason=reason, nbytes=index.nbytes(value)))
    return tuple(kept)
