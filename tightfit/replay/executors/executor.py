"""The interface of an executor: how a region's call carries out what its recipe says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tightfit._torch_private.modules import modules_in
from tightfit.records import Action, Recipe
from tightfit.replay.executors.module_state import NO_MOVES, Moves
from tightfit.replay.statistics import Statistics


@dataclass(slots=True)
class RegionCall:
    """One call of a region's module."""

    module: torch.nn.Module
    forward: Callable[..., Any]
    """The module's own forward."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    statistics: Statistics
    """What to count in."""
    moves: Moves = NO_MOVES
    """What the call changes, where it is to be made again."""
    inside: Callable[[], AbstractContextManager[object]] = nullcontext
    """What it is made in, each time."""
    refuse: Callable[[torch.Tensor], object] = lambda written: None
    """Told of a tensor that was written unseen, so that calls of this region are not made again any more."""
    differs: Callable[[], object] = lambda: None
    """Told that the second call was another one, so that calls of modules like this are not made again any more."""
    _modules: list[torch.nn.Module] | None = None

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The module and all below it, itself first, as they were when this was asked first."""
        if self._modules is None:
            self._modules = modules_in(self.module)
        return self._modules

    def run_forward(self) -> Any:
        """Make the call as it is."""
        return self.forward(*self.args, **self.kwargs)


class Executor(Protocol):
    """A way to carry out a recipe while its region's forward runs, and in backward."""

    name: str
    actions: frozenset[Action]
    """What it can do with a saved value."""
    on_tape: bool
    """The session's tape follows the recipe while `run` runs; otherwise the session keeps out of the call."""

    def accepts(self, call: RegionCall | None) -> bool:
        """Return whether it can carry out this call; where it cannot, a tape drops as much.

        `call` is None where the region is no call's beginning: a later segment of a container, or the loss.
        """

    def run(self, call: RegionCall, recipe: Recipe) -> Any:
        """Make the call and return its result; only after `accepts`."""

    def find_moves(self, call: RegionCall, recipe: Recipe) -> Moves | None:
        """Find out, before `run` does it for the first time, what making this call again has to put back.

        None if it must not be made again, whatever is put back.
        """
