"""A plan that can be put in force: its operators resolved, and what calibration found out while it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tightfit.records import Plan
from tightfit.replay.recipe import LiveRecipe


@dataclass(eq=False, kw_only=True)
class ResolvedPlan:
    """See the module."""

    plan: Plan | None
    """None: there is none, and either everything that is provably replayable is dropped, or nothing."""
    recipes: Mapping[str, LiveRecipe | None]
    """By region key, see `Installed.recipes`."""
    region_paths: tuple[str, ...]
    """Modules whose forward must be wrapped; none where nothing is dropped."""
    refused: dict[str, set[int]] = field(default_factory=dict)
    """Positions of operations, by region key, that calibration refused. Shared by plans of equal operations."""
    calibrated: set[str] = field(default_factory=set)
    """Keys of regions that are calibrated. Shared likewise."""

    @classmethod
    def of(cls, plan: Plan, like: ResolvedPlan | None = None) -> ResolvedPlan:
        """The plan, resolved; `like` is a plan for the same operations, whose calibration counts for this one."""
        resolved = [LiveRecipe(recipe) for recipe in plan.recipes]
        recipes = {r.key: resolved[r.recipe] if r.recipe >= 0 else None for r in plan.regions}
        for shared in plan.shared_tapes:
            for place, region in enumerate(plan.regions[shared.first : shared.first + shared.count]):
                recipes[region.key] = LiveRecipe(plan.recipes[region.recipe], shared, place)
        return cls(
            plan=plan,
            recipes=recipes,
            region_paths=() if plan.is_plain else plan.region_paths,
            refused=like.refused if like else {},
            calibrated=like.calibrated if like else set(),
        )

    @classmethod
    def dropping_everything(cls, region_paths: tuple[str, ...]) -> ResolvedPlan:
        """No plan: the live tape drops what it proves replayable."""
        return cls(plan=None, recipes={}, region_paths=region_paths)

    @classmethod
    def dropping_nothing(cls) -> ResolvedPlan:
        """No plan, because none is needed: the model runs as plain PyTorch."""
        return cls(plan=None, recipes={}, region_paths=())
