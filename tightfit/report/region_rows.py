"""What a plan does with each kind of region: bytes kept and recomputed, time paid, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tightfit.records import Plan, Profile, Recipe
from tightfit.report.plan_table import region_labels
from tightfit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class RegionRow:
    """Regions that a plan treats alike; figures are of all their calls together."""

    label: str
    calls: int
    kept_bytes: int | None
    """Held from forward to backward; None where no profile says it."""
    recomputed_bytes: int
    """Saved by the plain step, and not held."""
    recompute_ms: float
    reason: str


def region_rows(plan: Plan, profile: Profile | None) -> list[RegionRow]:
    """Return the rows, those that save most memory first."""
    saved = None if profile is None else saved_bytes_by_region(profile)
    shared = {place for tape in plan.shared_tapes for place in range(tape.first, tape.first + tape.count)}
    groups: dict[tuple[str, str], list[int]] = {}
    for place, label in enumerate(region_labels(plan)):
        region = plan.regions[place]
        if region.recipe >= 0:
            reason = _reason_of(plan.recipes[region.recipe], is_shared=place in shared)
        else:
            reason = _why_untouched(plan, region.key, None if saved is None else saved[place])
        groups.setdefault((label, reason), []).append(place)
    rows = []
    for (label, reason), places in groups.items():
        recipes = [plan.recipes[plan.regions[place].recipe] for place in places if plan.regions[place].recipe >= 0]
        kept = sum(recipe.held_bytes for recipe in recipes)
        untouched = [place for place in places if plan.regions[place].recipe < 0]
        rows.append(
            RegionRow(
                label=label,
                calls=len(places),
                kept_bytes=None if untouched and saved is None else kept + sum((saved or {})[p] for p in untouched),
                recomputed_bytes=sum(recipe.dropped_bytes for recipe in recipes),
                recompute_ms=sum(recipe.replay_ms for recipe in recipes),
                reason=reason,
            )
        )
    return sorted(rows, key=lambda row: (-row.recomputed_bytes, -(row.kept_bytes or 0)))


def saved_bytes_by_region(profile: Profile) -> dict[int, int]:
    """Return the bytes that autograd saves in each region, resident ones left out; what several save is the first's."""
    saved = dict.fromkeys(range(len(profile.regions)), 0)
    counted: set[int] = set()
    for slot in profile.slots:
        storage = profile.values[slot.value].storage
        if storage not in counted and profile.storages[storage].component == "activation":
            counted.add(storage)
            saved[slot.region] += profile.storages[storage].nbytes
    return saved


def _reason_of(recipe: Recipe, *, is_shared: bool) -> str:
    how = "recomputed as a whole module" if recipe.executor == "module" else "recomputed operation by operation"
    if is_shared:
        how = "recomputed recursively: what regions pass to each other, too"
    kept: Counter[str] = Counter()
    for value in recipe.kept_for_safety:
        kept[f"{value.op}: {value.reason}"] += value.nbytes
    whys = "".join(f"; kept {format_bytes(nbytes)} of {why}" for why, nbytes in kept.most_common(2))
    return how + whys


def _why_untouched(plan: Plan, key: str, saved_bytes: int | None) -> str:
    path = key.rpartition("#")[0]
    if any(path == excluded or path.startswith(f"{excluded}.") for excluded in plan.excluded):
        return "left untouched, as asked"
    if saved_bytes == 0:
        return "saves nothing for backward"
    return "kept: the plain step fits" if plan.is_plain else "kept: recomputing it is not needed"
