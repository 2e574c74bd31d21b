"""Did the fake run take the way that a real run takes?

A model may look at its input before it chooses one (a mask left out where nothing is padded), and go another way where
the input has no data.  A real forward from which autograd keeps nothing needs little memory, and shows.  As it runs the
user's own objects, it is left to models whose code is known to ask; of others, a plan's trial run finds out.
"""

from __future__ import annotations

from typing import Any

import torch

from tightfit._torch_private import DispatchMode, current_graph_task
from tightfit.operators.facts import describe
from tightfit.profiling.observation import Observation
from tightfit.step.snapshot import TrainingState
from tightfit.step.step import Step

#: Packages whose modules ask whether a tensor is fake: transformers then leaves no mask out.
_ASKING = ("transformers",)


class _NeedsSaved(Exception):
    """Forward reads what autograd saved."""


class _Names(DispatchMode):
    """Notes which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        info = describe(func)
        if not info.is_view and current_graph_task() < 0:
            self.found.append(info.name)
        return func(*args, **(kwargs or {}))


def _refuse(_: object) -> torch.Tensor:
    raise _NeedsSaved


def ran_otherwise(seen: Observation, model: torch.nn.Module, batch: Any, step: Step) -> bool:
    """Whether a real forward runs other operations than the observed one; False where that is not asked."""
    if not any(type(module).__module__.partition(".")[0] in _ASKING for module in model.modules()):
        return False
    state = TrainingState(model, step.optimizers, also=(batch,))
    names = _Names()
    try:
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(lambda _: None, _refuse),
            names,
        ):
            step.run_loss(model, batch)
    except _NeedsSaved:
        return False
    finally:
        state.restore()
    return names.found != [op.name for op in seen.ops]
