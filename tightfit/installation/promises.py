"""Tell the user, once each, where training leaves what a plan promises: gradients stay right, the budget is lost.

Nothing is said while `fit` runs its own steps, under no_grad, in eval mode, or after the plan is uninstalled.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path

import torch

from tightfit.errors import PromiseWarning
from tightfit.operators.region_names import LOSS
from tightfit.step.models import is_training, name_of
from tightfit.units import format_bytes

#: Frames of these files are not the user's.
_NOT_THE_USERS = (
    *(f"{Path(str(package.__file__)).parent}{os.sep}" for package in (torch, sys.modules["tightfit"])),
    str(contextlib.__file__),
)


class Promises:
    """What one installed plan promised, and which breaches were told."""

    def __init__(self, model: torch.nn.Module, budget_bytes: int) -> None:
        self._model = model
        self._budget = format_bytes(budget_bytes)
        self._told: set[str] = set()
        self.are_watched = False
        """From the end of `fit` or `apply` on, until the plan is uninstalled."""

    def hooks_around(self, key: str) -> None:
        """Tell that saved-tensor hooks of others are active where the plan drops something."""
        self._tell(
            "hooks",
            f"saved-tensor hooks that are not tightfit's (save_on_cpu, torch.utils.checkpoint, saved_tensors_hooks), "
            f"or torch.func, are active around {key}. Tensors that others take cannot be dropped, so this step "
            f"recomputes nothing there, and may exceed the budget of {self._budget}. Take the hooks off, or open them "
            f"inside the loss function that fit is given, so that they are planned with it.",
        )

    def unplanned_call(self, arguments: str) -> None:
        """Tell that the model was called, outside of any step, with arguments that no plan was made for."""
        self._tell(
            "arguments",
            f"the model was called outside applied.loss and applied.step with arguments, or in a state (modes, "
            f"autocast, parameters that train), that have no plan: {arguments}. All that can be is recomputed in such "
            f"a step, and whether it keeps the budget of {self._budget} was never tried. Train through "
            f"applied.loss(model, batch), or open `with applied.step(batch):` around the forward: both "
            f"make the plan first.",
        )

    def region_alone(self, path: str) -> None:
        """Tell that a region runs with neither the model's forward nor a step open around it."""
        if path != LOSS and is_training(self._model):
            self._tell(
                "forward",
                f"the planned module {path!r} runs outside the model's planned forward: it was called by itself, or "
                f"the model's forward was replaced or gone round (unwrapped, exported, scripted). Results are "
                f"right, but this step follows no plan as a whole and may exceed the budget of {self._budget}. "
                f"Call the model itself, or, also of several models, open `with applied.step(batch):` around the step; "
                f"wrap a model before fit.",
            )

    def parts_alone(self) -> None:
        """Tell that a step ran modules of the model, and not the model."""
        name = type(self._model).__name__
        self._tell(
            "forward",
            f"a step ran planned modules of {name}, but not {name} itself: it was unwrapped, or its forward was "
            f"replaced or gone round. Results are right, and what can be is recomputed, but this step is not the one "
            f"that was planned, and may exceed the budget of {self._budget}. Call the model that fit was given, or "
            f"call fit with the one that training calls.",
        )

    def other_operations(self, wrapper: str) -> None:
        """Tell that a wrapper has the model run operations that cannot be planned."""
        self._tell(
            "operations",
            f"called through {wrapper}, {type(self._model).__name__} runs other operations than its plan is for "
            f"(perhaps in another precision), and planning cannot call it so. Results are right, and what can be is "
            f"recomputed, but the budget of {self._budget} may not be kept. Call fit with the step as training runs "
            f"it: step=tightfit.Step(autocast=torch.bfloat16, ...), or a loss function that does what {wrapper} does.",
        )

    def compiled(self) -> None:
        """Tell that the model, or a planned module, was compiled after it got its plan, and runs eagerly."""
        self._tell(
            "compiled",
            f"torch.compile was called on {type(self._model).__name__}, or on what calls it, after it got its plan. A "
            f"planned forward runs eagerly, as what it recomputes is decided while it runs: results are right and the "
            f"budget of {self._budget} is kept, but nothing in it is compiled. Compile blocks (block.compile()) before "
            f"fit, which plans around them; or call applied.remove(), and train compiled without a plan.",
        )

    def forward_gone_round(self) -> None:
        """Tell that an optimizer stepped with new gradients, and no planned forward had run."""
        self._tell(
            "forward",
            f"an optimizer step used gradients that no planned forward of {name_of(self._model)} made: the "
            f"forward was replaced or gone round (unwrapped, compiled, exported, scripted, called through "
            f"__wrapped__). Results are right, but nothing was recomputed, so the budget of {self._budget} is not "
            f"kept. Train through the model itself or applied.loss(model, batch); wrap or unwrap a model before fit.",
        )

    def loss_outside(self, loss_bytes: int) -> None:
        """Tell that the loss, of which the plan drops saved tensors, is computed where no plan reaches it."""
        self._tell(
            "loss",
            f"the plan recomputes {format_bytes(loss_bytes)} of the loss, but the model was called outside "
            f"applied.loss and applied.step, where the loss keeps them. Such a step exceeds the budget of "
            f"{self._budget}. Train through applied.loss(model, batch), or open `with applied.step(batch):` around "
            f"forward and loss.",
        )

    def other_loss(self, more_bytes: int = 0) -> None:
        """Tell that the loss of a step is not the one that was planned."""
        found = f"saves {format_bytes(more_bytes)} more than" if more_bytes else "runs other operations than"
        self._tell(
            "loss",
            f"the loss of this step {found} the one that the plan was made for, so the budget of {self._budget} may "
            f"not be kept. A plan holds for one loss. Give fit the loss that training uses: loss=, called with "
            f"(model, batch).",
        )

    def written_unseen(self) -> None:
        """Tell that memory is written past PyTorch, so that what is computed from it is kept."""
        self._tell(
            "writes",
            f"a tensor from which the plan recomputes was written behind PyTorch's back (for example through NumPy, or "
            f"by a kernel of an extension), which it was not when the plan was made. What is computed from it is kept "
            f"from now on, and gradients are those of the plain step, but the budget of {self._budget} may not be "
            f"kept. Call fit once such writes have begun, or leave the module that does it untouched: "
            f"fit(..., exclude=module).",
        )

    def kept_graph(self) -> None:
        """Tell that a backward kept its graph, of which the plan does not know."""
        self._tell(
            "graph",
            f"a backward was called with retain_graph=True, so that autograd holds until the last one what the plan "
            f"counts on getting back. Such a step may exceed the budget of {self._budget}. Plan it as it is: "
            f"step=tightfit.Step(loss=..., retain_graph=True) for measure and apply, or use fit, which finds out.",
        )

    def kept_graph_until_now(self, peak_bytes: int) -> None:
        """Tell that backwards kept their graphs in steps that were planned without; later ones are planned with it."""
        self._tell(
            "graph",
            f"a backward was called with retain_graph=True, so that autograd held until the last one what the plan "
            f"counted on getting back: such a step took up to {format_bytes(peak_bytes)} of a budget of "
            f"{self._budget}. From now on steps are planned as they are. To keep the budget from the first step on, "
            f"say so before: fit(..., step=tightfit.Step(loss=..., retain_graph=True)).",
        )

    def uncounted_optimizer(self, name: str, more_bytes: int) -> None:
        """Tell that an optimizer of the model's parameters holds state that the plan does not count."""
        self._tell(
            "optimizer",
            f"{name} holds {format_bytes(more_bytes)} of state for the model's parameters that the plan does not "
            f"count, so the budget of {self._budget} is not kept. A plan counts the optimizers that fit was given. "
            f"Give fit the optimizer that training uses: optimizer=.",
        )

    def uncounted_model(self, name: str, more_bytes: int) -> None:
        """Tell that parameters outside the model are trained beside it."""
        self._tell(
            "model",
            f"{name} trains parameters outside the planned model, in turn with it: with gradients and state they take "
            f"{format_bytes(more_bytes)}, so the process exceeds the budget of {self._budget}, which counts the "
            f"planned model alone. Give fit all of them (a list or mapping of models, and of the steps that take "
            f"turns), or reserve their memory: budget=tightfit.Budget(total_bytes=..., beside_step_bytes=...).",
        )

    def _tell(self, promise: str, message: str) -> None:
        if not self.are_watched or promise in self._told:
            return
        self._told.add(promise)
        file, line = users_line()
        # With a registry of its own: once for each plan, not once for each place.
        warnings.warn_explicit(message, PromiseWarning, file, line, registry={})


def users_line() -> tuple[str, int]:
    """Return the file and line of the innermost frame that is neither tightfit's nor PyTorch's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
