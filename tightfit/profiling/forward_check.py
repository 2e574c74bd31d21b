"""Check that the fake run executed the same ops as a real forward.

A model may branch on the content of its input (transformers leaves out an attention mask where nothing is padded) and
take another branch where the input has no data.  A real forward from which autograd saves nothing needs little memory
and shows the difference.  But it runs the user's own objects, so it is made only for models whose code is known to
branch like that.  For others, the trial run of a plan finds the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tightfit._torch_private.autograd import current_graph_task, forbids_saved_tensor_hooks
from tightfit._torch_private.dispatch import DispatchMode
from tightfit.operators._checkpoint_private import CheckpointCall, taking_over
from tightfit.operators.checkpoint_calls import checkpoint_path
from tightfit.operators.facts import describe, is_opaque
from tightfit.operators.wrapper_tensors import any_wrapper
from tightfit.profiling.observation import Observation
from tightfit.step.snapshot import TrainingState
from tightfit.step.step import Step

#: Packages whose modules ask whether a tensor is fake: transformers then keeps the mask.
_CHECKED_PACKAGES = ("transformers",)


class _BackwardInForward(Exception):
    """Forward runs a backward of its own, which reads saved tensors."""


class _OpNames(DispatchMode):
    """Collects the names of the ops of forward, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any_wrapper(types, args):
            return NotImplemented
        info = describe(func)
        if not info.is_view and current_graph_task() < 0:
            self.names.append(info.name)
        return func(*args, **(kwargs or {}))


def _refuse_unpack(_: object) -> torch.Tensor:
    raise _BackwardInForward


def _plainly(call: CheckpointCall, checkpoints: Mapping[str, str]) -> AbstractContextManager[object] | None:
    return None if checkpoints.get(checkpoint_path(call.function), "not seen") else nullcontext()


def asks_for_fakes(model: torch.nn.Module) -> bool:
    """Tell whether the model's code is known to ask whether a tensor is fake."""
    return any(type(module).__module__.partition(".")[0] in _CHECKED_PACKAGES for module in model.modules())


def forward_differs(
    observation: Observation, checkpoints: Mapping[str, str], model: torch.nn.Module, batch: Any, step: Step
) -> bool:
    """Tell whether a real forward runs other ops than the observed one.

    `checkpoints`: which checkpointed functions were taken over there, as `Profile.checkpoints`.

    The model, batch and optimizers are restored.  False for models that are not checked (see the module's docstring),
    and for a forward that runs a backward of its own, or forbids to look at what is saved.
    """
    if not asks_for_fakes(model):
        return False
    state = TrainingState(model, step.all_optimizers, also=(batch, *step.reached(model)))
    ops = _OpNames()
    try:
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(lambda _: None, _refuse_unpack),
            ops,
            taking_over(lambda call: _plainly(call, checkpoints)),
        ):
            step.run_loss(model, batch)
    except _BackwardInForward:
        return False
    except RuntimeError as error:
        if not forbids_saved_tensor_hooks(error):
            raise
        return False
    finally:
        state.restore()
    return ops.names != [op.name for op in observation.ops if op.node < 0 and not is_opaque(op.name)]
