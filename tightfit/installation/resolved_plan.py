"""Resolve a plan so that it can be active: its operators, its executors, and what self-checks found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tightfit.operators.region_names import LOSS
from tightfit.records import Plan, Profile
from tightfit.replay.executors.module_state import Moves
from tightfit.replay.recipe import ResolvedRecipe


@dataclass(eq=False, kw_only=True)
class ResolvedPlan:
    """A plan that can be active: by region key, what the engine follows."""

    plan: Plan | None
    """None: there is none, and either everything that is provably replayable is dropped, or nothing."""
    recipes: Mapping[str, ResolvedRecipe | None]
    """By region key, see `PlanState.recipes`."""
    region_paths: tuple[str, ...]
    """Modules whose forward must be wrapped; none where nothing is dropped."""
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    """See `PlanState.checkpoints`."""
    refused: dict[str, set[int]] = field(default_factory=dict)
    """Positions of operations, by region key, that a self-check refused. Shared by plans of equal operations."""
    checked: set[str] = field(default_factory=set)
    """Keys of regions whose self-check is done. Shared likewise."""
    moves: dict[str, tuple[tuple[type, ...], Moves]] = field(default_factory=dict)
    """See `PlanState.moves`. Shared likewise."""
    may_find_bytes: int = 0
    """What the process may hold where a step begins, with what larger ones that share the cache have left there; above
    it the cache is given back if in doubt."""

    def needs_no_more_than(self, other: ResolvedPlan) -> bool:
        """Tell whether it shares the cache with another plan, whose steps reserve as much or more."""
        if self.plan is None or other.plan is None or not other.may_find_bytes:
            return False
        return self.plan.predicted_reserved_bytes <= other.plan.predicted_reserved_bytes

    @cached_property
    def loss_bytes(self) -> int:
        """Bytes that the plan drops outside the model, in the loss."""
        return sum(
            recipe.recipe.dropped_bytes
            for key, recipe in self.recipes.items()
            if recipe is not None and key.startswith(f"{LOSS}#")
        )

    @cached_property
    def drops_in_loss(self) -> bool:
        """Whether the loss runs on a tape, which sees by itself that it is another one."""
        return any(recipe is not None and key.startswith(f"{LOSS}#") for key, recipe in self.recipes.items())

    @classmethod
    def of(cls, plan: Plan, like: ResolvedPlan | None = None) -> ResolvedPlan:
        """Resolve a plan; `like` is a plan for the same operations, whose self-checks count for this one."""
        resolved = [ResolvedRecipe(recipe) for recipe in plan.recipes]
        recipes = {r.key: resolved[r.recipe] if r.recipe >= 0 else None for r in plan.regions}
        for shared in plan.shared_tapes:
            for place, region in enumerate(plan.regions[shared.first : shared.first + shared.count]):
                recipes[region.key] = ResolvedRecipe(plan.recipes[region.recipe], shared, place)
        return cls(
            plan=plan,
            recipes=recipes,
            region_paths=() if plan.is_plain else plan.region_paths,
            checkpoints=plan.checkpoints,
            refused=like.refused if like else {},
            checked=like.checked if like else set(),
            moves=like.moves if like else {},
        )

    @classmethod
    def dropping_everything(cls, like: Plan | Profile) -> ResolvedPlan:
        """Return no plan: the live tape drops what it proves replayable, in regions as those of `like`."""
        return cls(plan=None, recipes={}, region_paths=like.region_paths, checkpoints=like.checkpoints)

    @classmethod
    def dropping_nothing(cls) -> ResolvedPlan:
        """Return no plan, as none is needed: the model runs as plain PyTorch, and as it checkpoints itself."""
        return cls(plan=None, recipes={}, region_paths=())
