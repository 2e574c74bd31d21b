"""What all sessions of one applied plan share: what was decided, and what the first calls showed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tightfit.operators._checkpoint_private import CheckpointCall, taking_over
from tightfit.operators.checkpoint_calls import checkpoint_path, reason_to_leave
from tightfit.replay.executors import RegionCall
from tightfit.replay.executors.module_state import NO_MOVES, Moves
from tightfit.replay.rebuilt import Rebuilt
from tightfit.replay.recipe import ResolvedRecipe
from tightfit.replay.repeats import Repeats
from tightfit.replay.saved_bytes import SavedBytes
from tightfit.replay.statistics import Statistics
from tightfit.replay.values import AS_A_WHOLE
from tightfit.replay.write_watch import WriteWatch


def as_a_whole(key: str) -> str:
    """Return what `PlanState.checked` holds where the call of the region's module has been judged."""
    return f"{key} as a whole"


class Listener(Protocol):
    """Hears where a forward leaves what its plan promises."""

    def hooks_around(self, key: str) -> None:
        """Hear that saved-tensor hooks of others are active around a region in which something would be dropped."""

    def region_alone(self, path: str) -> None:
        """Hear that a region was called with neither the model nor a step open around it."""

    def other_loss(self) -> None:
        """Hear that what ran as the loss is not what was planned."""

    def compiled(self) -> None:
        """Hear that `torch.compile` was called on what is planned, which stays eager."""

    def written_unseen(self) -> None:
        """Hear that memory was written, past PyTorch, that a plan recomputes from: what reads it is kept since."""


@dataclass(kw_only=True)
class PlanState:
    """What all sessions of one applied plan share."""

    recipes: Mapping[str, ResolvedRecipe | None]
    """By region key; None leaves the region untouched. A key that is missing has no decision: all that is provably
    replayable is dropped."""
    around_excluded: frozenset[str] = frozenset()
    """Paths of the regions that run excluded modules among their own operations: what no plan decides about is kept."""
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    """The model's own checkpointed functions, as `Plan.checkpoints`; what is not in it is left alone."""
    region_paths: frozenset[str] = frozenset()
    """Paths of all regions."""
    enabled: bool = True
    """Off: regions run as plain PyTorch."""
    self_check: bool = True
    """Whether each region's replay is checked at its first call."""
    statistics: Statistics = field(default_factory=Statistics)
    refused: dict[str, set[int]] = field(default_factory=dict)
    """Positions, by region key, of operations that a self-check refused."""
    checked: set[str] = field(default_factory=set)
    """Keys of regions whose self-check is done, and `as_a_whole` of those whose module is known to bear a second call
    or not."""
    moves: dict[str, tuple[tuple[type, ...], Moves]] = field(default_factory=dict)
    """What a call moves that is made again, by region key, and the classes of the modules of which that is known."""
    repeats: Repeats = field(default_factory=Repeats)
    """Which calls gave the same bits twice."""
    writes: WriteWatch = field(default_factory=WriteWatch)
    rebuilt: Rebuilt = field(default_factory=Rebuilt)
    fast_paths: Sequence[torch.nn.Module] = ()
    """See `with_fast_paths`: while one of them is in eval mode, handed-out memory is not watched."""
    listener: Listener | None = None
    loss_saves: SavedBytes | None = None
    """Counts what an untouched loss saves, in a step in which that is asked for."""
    loss_is_own: bool = False
    """The loss that runs now is the planned one, whichever operations it runs."""

    def takes_checkpoint(self, call: CheckpointCall) -> bool:
        """Return whether a checkpointed function of the model's runs as any other code."""
        reason = self.checkpoints.get(checkpoint_path(call.function), "it was not seen when the step was measured")
        return not (reason or reason_to_leave(call))

    def taking_checkpoints(self) -> AbstractContextManager[None]:
        """Return a context in which checkpointed functions are no more than functions, in forward and in backward."""
        return taking_over(lambda call: nullcontext() if self.takes_checkpoint(call) else None)

    def run_as_a_whole(self, recipe: ResolvedRecipe, key: str, call: RegionCall) -> Any:
        """Make a call that may be made again in backward; the first time, only if it bears that."""
        if not all(self.checkpoints.values()):
            call.inside = self.taking_checkpoints
        kinds = tuple(map(type, call.modules))
        known, moves = self.moves.get(key, ((), NO_MOVES))
        if self.self_check and known != kinds:
            self.checked.add(as_a_whole(key))
            found = recipe.find_moves(call)
            if found is None:
                self.refused.setdefault(key, set()).add(AS_A_WHOLE)
                self.statistics.refused_ops += 1
                return call.run_forward()
            moves = found
            self.moves[key] = kinds, moves
        call.moves = moves

        def refuse(written: torch.Tensor) -> None:
            self.writes.notice(written)
            self.refused.setdefault(key, set()).add(AS_A_WHOLE)

        def differs() -> None:
            like_this = {other for other, (found, _) in self.moves.items() if found == kinds}
            for other in {key} | like_this:
                self.refused.setdefault(other, set()).add(AS_A_WHOLE)

        call.refuse, call.differs = refuse, differs
        return recipe.carry_out(call)
