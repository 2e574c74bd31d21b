"""Who holds what at one moment of a step: bytes by module and component."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tightfit.operators import region_names

#: The components, in the order in which they are shown.
COMPONENTS = (
    "parameters", "gradients", "optimizer_state", "buffers", "batch", "reached", "activations", "workspace", "other",
)  # fmt: skip

#: Owners that are no modules.
LOSS, MODEL = region_names.LOSS, region_names.ROOT
BATCH, OPTIMIZER, OTHER = "<batch>", "<optimizer>", "<other>"


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """The memory at one moment of a step.  Every byte has one owner and one component, so that all sums agree."""

    moment: str
    """A module's path, ``backward of PATH``, ``backward`` or ``optimizer step``."""
    parts: Mapping[str, Mapping[str, int]]
    """By owner (a module's path, or one of the names in angle brackets), bytes by component."""
    held_for_backward: Mapping[str, int] = field(default_factory=dict)
    """By owner, bytes of the activations that are held when backward begins, for backward."""

    @property
    def total_bytes(self) -> int:
        """All bytes held at that moment."""
        return sum(sum(part.values()) for part in self.parts.values())

    @property
    def components(self) -> dict[str, int]:
        """Bytes by component."""
        found = dict.fromkeys(COMPONENTS, 0)
        for part in self.parts.values():
            for component, nbytes in part.items():
                found[component] += nbytes
        return found

    @property
    def modules(self) -> dict[str, int]:
        """Bytes by owner."""
        return {owner: sum(part.values()) for owner, part in self.parts.items()}

    @property
    def held_for_backward_bytes(self) -> int:
        """All that is held for backward when backward begins."""
        return sum(self.held_for_backward.values())

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return {
            "total_bytes": self.total_bytes,
            "moment": self.moment,
            "components": self.components,
            "modules": {owner: dict(part) for owner, part in self.parts.items()},
            "held_for_backward_bytes": self.held_for_backward_bytes,
            "held_for_backward": dict(self.held_for_backward),
        }


class Tally:
    """Adds up who holds what."""

    def __init__(self) -> None:
        self._parts: dict[str, Counter[str]] = {}

    def add(self, owner: str, component: str, nbytes: int) -> None:
        """Add bytes to an owner's component."""
        if nbytes:
            self._parts.setdefault(owner, Counter())[component] += nbytes

    def spread(self, component: str, nbytes: int, weights: Mapping[str, int]) -> None:
        """Share bytes out among owners in proportion to their weights, to the byte; to the model where there are none.

        >>> tally = Tally()
        >>> tally.spread("gradients", 10, {"a": 1, "b": 2})
        >>> tally.parts()
        {'a': {'gradients': 3}, 'b': {'gradients': 7}}
        """
        whole = sum(weights.values())
        if not whole:
            self.add(MODEL, component, nbytes)
            return
        given = before = 0
        for owner, weight in weights.items():
            before += weight
            share = nbytes * before // whole - given
            given += share
            self.add(owner, component, share)

    def parts(self) -> dict[str, dict[str, int]]:
        """Return bytes by owner and component, the owner of most first."""
        return {
            owner: {name: part[name] for name in COMPONENTS if part[name]}
            for owner, part in sorted(self._parts.items(), key=lambda entry: (-entry[1].total(), entry[0]))
        }


def largest_first(held: Mapping[str, int]) -> dict[str, int]:
    """Return the entries in falling order."""
    return dict(sorted(held.items(), key=lambda entry: (-entry[1], entry[0])))


def grouped(owners: Iterable[str], most: int) -> dict[str, str]:
    """Return each owner's group: paths cut at a depth, where needed with the numbers in them starred, so that there are
    as many groups as `most` allows.

    >>> grouped(["layers.0.a", "layers.0.b", "layers.1.a", "head", "<batch>"], most=3)
    {'layers.0.a': 'layers.*', 'layers.0.b': 'layers.*', 'layers.1.a': 'layers.*', 'head': 'head', '<batch>': '<batch>'}
    """
    owners = list(owners)
    deepest = max((owner.count(".") + 1 for owner in owners), default=1)
    best: dict[str, str] = {}
    for starred in (True, False):
        for depth in range(1, deepest + 1):
            groups = {owner: _pattern(owner, depth, starred) for owner in owners}
            count = len(set(groups.values()))
            if not best or len(set(best.values())) < count <= most:
                best = groups
    return best


def _pattern(owner: str, depth: int, starred: bool) -> str:
    """Return a path's first `depth` names; a number says which of a list, and belongs to the list's name."""
    if owner.startswith("<"):
        return owner
    shown: list[str] = []
    names = 0
    after_name = False
    for part in owner.split("."):
        is_number = part.isdigit()
        if not (is_number and after_name):
            if names == depth:
                break
            names += 1
        after_name = not is_number
        shown.append("*" if is_number and starred else part)
    return ".".join(shown)
