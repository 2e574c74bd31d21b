"""Module recomputation as a lever: a module's whole call is made again in backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tightfit.records import Decision, Event, EventKind, Recipe
from tightfit.simulation.levers.lever import RegionModel
from tightfit.simulation.levers.module_model import ModuleModel
from tightfit.simulation.levers.recipes import op_names_of, replay_ms_of
from tightfit.simulation.profile_index import ProfileIndex
from tightfit.simulation.second_call import made_storages


class ModuleLever:
    """Drops all that a module's call saves, and makes the call again."""

    name = "module"
    executor = "module"

    def offers(self, index: ProfileIndex, regions: Sequence[int]) -> Iterable[Decision]:
        """Return the one decision that there is, if all the regions allow it."""
        return [Decision(self.name)] if all(can_recompute_module(index, region) for region in regions) else []

    def model(self, index: ProfileIndex, region: int, decision: Decision) -> RegionModel:
        """Return what the region holds."""
        return ModuleModel(index, region, _second_call(index, region))

    def recipe(self, index: ProfileIndex, region: int, decision: Decision) -> Recipe:
        """Return what the executor needs to know."""
        profile = index.profile
        record = profile.regions[region]
        facts = index.facts[region]
        ops = range(record.first_op, record.first_op + record.op_count)
        again = sorted({a for kind, a in _second_call(index, region) if kind == EventKind.OP})
        made = made_storages(index.events_between(region))
        arguments = {profile.values[v].storage for op in ops for v in profile.ops[op].inputs} - made
        dropped = {profile.slots[slot].value for slot in facts.again}
        return Recipe(
            class_id=record.class_id,
            op_names=op_names_of(index, region),
            lever=self.name,
            executor=self.executor,
            keep=(),
            drop=tuple(sorted(index.local(value) for value in dropped if profile.values[value].op in ops)),
            replay=tuple(op - record.first_op for op in again),
            held_bytes=sum(profile.storages[s].nbytes for s in arguments if not index.is_resident(s)),
            dropped_bytes=sum(profile.storages[s].nbytes for s in {profile.values[v].storage for v in dropped}),
            replay_ms=replay_ms_of(index, again),
        )


def can_recompute_module(index: ProfileIndex, region: int) -> bool:
    """Return whether the region's module may be called again, as far as its operations tell."""
    return bool(index.facts[region].again)


def _second_call(index: ProfileIndex, region: int) -> list[Event]:
    """Return what happens when the module is called again: its forward, up to the last tensor that autograd saves."""
    window = index.events_between(region)
    last = max(place for place, (kind, _) in enumerate(window) if kind == EventKind.SAVE)
    return list(window[: last + 1])
