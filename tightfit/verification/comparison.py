"""Compare what plain and planned runs left behind, name by name, and count how much of the gradients that was."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tightfit.distributed.dtensor import local_shard
from tightfit.distributed.process_group import ProcessGroup
from tightfit.operators.region_names import ROOT
from tightfit.records import Plan
from tightfit.replay.executors import executor_of
from tightfit.step.host_copy import HostCopy, difference, same_contents
from tightfit.step.results import ATTRIBUTE, GRADIENT, Results
from tightfit.step.snapshot import RandomState
from tightfit.verification.marks import Mark

_MISSING = object()


@dataclass(kw_only=True)
class Comparison:
    """What was compared, and what of it differs."""

    names: set[str] = field(default_factory=set)
    """Of all that plain runs left behind."""
    differing: dict[str, float] = field(default_factory=dict)
    """Largest absolute difference by name; 0 for what is no tensor, and until `measure` for what was only marked."""
    unmeasured: dict[str, str] = field(default_factory=dict)
    """Own names of what differs by its mark alone, by their names here: copies tell by how much."""
    not_reproducible: set[str] = field(default_factory=set)
    """Names of what differs between two plain runs."""
    unverified: list[str] = field(default_factory=list)
    """Keys of regions that could not be compared."""
    parameters: set[str] = field(default_factory=set)
    """Names of the parameters whose gradients were compared."""
    called_again: frozenset[str] = frozenset()
    """Paths of modules whose forward runs a second time under the plan (see `paths_called_again`)."""

    def add(self, plain: Results, again: Results, planned: Results, key: str = "", path: str = "") -> None:
        """Compare two plain runs and a planned one: of the whole step, or of the region `key` of the module `path`."""
        for own_name, result in plain.items():
            name = f"{key}: {own_name}" if key else own_name
            self.names.add(name)
            if not _same(result, again.get(own_name, _MISSING)):
                self.not_reproducible.add(name)
                continue
            if own_name.startswith(GRADIENT):
                parameter = own_name.removeprefix(GRADIENT)
                self.parameters.add(f"{path}.{parameter}" if path else parameter)
            if not _same(result, planned.get(own_name, _MISSING)) and self._is_blamed(own_name, result, path):
                self.differing[name] = _difference(result, planned.get(own_name))
                if isinstance(result, Mark):
                    self.unmeasured[name] = own_name
        for own_name in planned.keys() - plain.keys() - again.keys():
            # Of what a container holds, its length tells: keys may be of each run alone (times, numbers of a sequence).
            if not own_name.endswith("]") and self._is_blamed(own_name, planned[own_name], path):
                self.differing[f"{key}: {own_name}" if key else own_name] = 0.0

    def measure(self, plain: Results, planned: Results) -> None:
        """Tell by how much that differs which was only marked, from runs that copied it."""
        for name, own_name in self.unmeasured.items():
            if own_name in plain:
                self.differing[name] = _difference(plain[own_name], planned.get(own_name))
        self.unmeasured = {}

    def _is_blamed(self, name: str, result: object, path: str) -> bool:
        """Tell whether a difference is the plan's doing.

        A value that Python code left in an attribute can only differ by the plan where that code runs again.
        Elsewhere it tells of the step itself: memory that is in use, callers on the stack, the time of day.
        """
        if not name.startswith(ATTRIBUTE) or isinstance(result, HostCopy | Mark):
            return True
        attribute = name.removeprefix(ATTRIBUTE)
        whole = f"{path}.{attribute}" if path else attribute
        return any(not one or whole.startswith(f"{one}.") for one in self.called_again)

    def include(self, other: Comparison) -> None:
        """Add what another comparison found."""
        self.names |= other.names
        self.not_reproducible |= other.not_reproducible
        self.unverified = list(dict.fromkeys((*self.unverified, *other.unverified)))
        self.parameters |= other.parameters
        for name, value in other.differing.items():
            self.differing[name] = max(value, self.differing.get(name, 0.0))

    def together(self, group: ProcessGroup) -> Comparison:
        """Return what all ranks have found: a gradient counts as compared where each could compare its shard."""
        if group.is_single_process:
            return self
        everyones = group.all_gather(self)
        found = Comparison()
        for one in everyones:
            found.include(one)
        found.parameters.intersection_update(*(one.parameters for one in everyones))
        for name in found.not_reproducible:
            found.differing.pop(name, None)
        return found

    def equal(self, kind: str, *more_kinds: str) -> bool | None:
        """Tell whether all results of these kinds are equal; None where none of the first kind could be compared."""
        if any(_is_of(name, (kind, *more_kinds)) for name in self.differing):
            return False
        names = {name for name in self.names if _is_of(name, (kind,))}
        return None if not self.names or (names and names <= self.not_reproducible) else True

    def reproduces(self, kind: str) -> bool:
        """Tell whether two plain runs gave the same for all results of this kind."""
        return not any(_is_of(name, (kind,)) for name in self.not_reproducible)

    def share(self, model: torch.nn.Module, group: ProcessGroup) -> float:
        """Return the share of the gradients, by bytes, that was compared, over all ranks."""
        aliases: dict[int, list[str]] = {}
        trained = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                aliases.setdefault(id(parameter), []).append(name)
                shard = local_shard(parameter)
                trained[id(parameter)] = shard.numel() * shard.itemsize
        compared = sum(nbytes for key, nbytes in trained.items() if not self.parameters.isdisjoint(aliases[key]))
        compared_bytes, all_bytes = group.all_reduce_sum([compared, sum(trained.values())])
        return compared_bytes / all_bytes if all_bytes else 0.0


def paths_called_again(plan: Plan) -> frozenset[str]:
    """Return the paths of the modules whose calls the plan makes again in backward; the model's own is empty."""
    keys = [
        region.key
        for region in plan.regions
        if region.recipe >= 0 and not executor_of(plan.recipes[region.recipe]).on_tape
    ]
    return frozenset("" if path == ROOT else path for path in (key.rpartition("#")[0] for key in keys))


def _is_of(name: str, kinds: tuple[str, ...]) -> bool:
    return name.rpartition(": ")[2].startswith(kinds)


def _same(a: object, b: object) -> bool:
    if isinstance(a, HostCopy):
        return isinstance(b, HostCopy) and same_contents(a, b)
    if isinstance(a, RandomState):
        return isinstance(b, RandomState) and a.equals(b)
    return type(a) is type(b) and (a == b or (a != a and b != b))  # NaN equals NaN


def _difference(a: object, b: object) -> float:
    return difference(a, b if isinstance(b, HostCopy) else None) if isinstance(a, HostCopy) else 0.0
