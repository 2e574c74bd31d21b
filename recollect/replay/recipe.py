"""A recipe of the plan with its operation names resolved to this PyTorch's operators."""

from __future__ import annotations

from typing import Any

from recollect._torch_private import find_overload
from recollect.records import Recipe


class LiveRecipe:
    """What a tape needs to follow a plan, in the form that is fastest to ask."""

    __slots__ = ("drop", "funcs", "keep", "length", "record")

    def __init__(self, recipe: Recipe) -> None:
        # An operator that this PyTorch lacks is None: the live tape then leaves the plan at that operation, safely.
        self.funcs: tuple[Any, ...] = tuple(find_overload(name) for name in recipe.op_names)
        self.length = len(self.funcs)
        needed = frozenset(recipe.replay)
        self.record = tuple(position in needed for position in range(self.length))
        self.keep = frozenset(recipe.keep)
        self.drop = frozenset(recipe.drop)
