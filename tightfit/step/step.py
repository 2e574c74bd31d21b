"""`Step`: how one optimizer step runs: forward and backward for each microbatch, clipping, the optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tightfit.device import device_for
from tightfit.errors import UnsupportedInput
from tightfit.interrupts import safe_point
from tightfit.step.microbatch import Microbatch
from tightfit.step.models import ModelSet, first_of, given_as
from tightfit.step.reached import reached_by
from tightfit.step.resident import Gradients, untrained

#: Called with the model, or the container of several, and the batch.
LossFunction = Callable[[Any, Any], torch.Tensor]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """How one optimizer step runs, without the model and the batch that it runs on.

    `measure`, `fit` and `verify` take it as ``step=`` instead of single keywords, and `apply` for `Applied.loss`:

        step = tightfit.Step(
            loss=loss_fn, optimizer=optimizer, autocast=torch.bfloat16, clip_norm=1.0
        )
        profile = tightfit.measure(model, batch, step=step)
        applied = tightfit.fit(model, batch, budget="8GiB", step=step, profile=profile)

    Args:
        loss: called with (model, batch), or with the container of several models as it was given; returns a scalar
            tensor. None: the batch is unpacked into the model's call (a
            mapping as keyword arguments, a tuple as positional ones, anything else as one), and the result, or its
            ``loss``, is a scalar.
        optimizer: one, several, or None: then optimizer state and the optimizer's step are in no figure.
        accumulation_steps: forward and backward passes for each optimizer step.
        autocast: run forward under `torch.autocast` with this dtype.
        clip_norm: clip the total norm of the gradients to this before the optimizer step.
        retain_graph: further backwards follow over the same graph, so that all but the last are called with
            ``retain_graph=True`` and autograd holds what it saved until the last. Training in which a plan sees such a
            backward is planned so from the next step on, whatever is said here.
        idle_optimizer: one, several, or None: they do not step here, but hold their state meanwhile, as the critic's
            does in the generator's half of a step. `fit` with a mapping of steps knows them by itself.
        around_loss: returns a context in which model and loss run; an installed plan's `Applied.step`, for example.

    Attributes:
        optimizers: `optimizer` as a tuple.
        all_optimizers: those that step, and then those that are idle.

    Raises:
        UnsupportedInput: an optimizer that needs a closure, or fewer than one accumulation step.
    """

    loss: LossFunction | None = None
    optimizer: Optimizers = None
    accumulation_steps: int = 1
    autocast: torch.dtype | None = None
    clip_norm: float | None = None
    retain_graph: bool = False
    idle_optimizer: Optimizers = None
    around_loss: Callable[[], Any] = field(default=nullcontext, repr=False)
    excluded: tuple[str, ...] = field(default=(), repr=False)
    """Paths of the modules that plans leave untouched, as `exclude=` names them."""
    kind: str = field(default="", repr=False)
    """Its name among the kinds of steps of one plan; empty where there is one kind."""
    other_losses: tuple[LossFunction | None, ...] = field(default=(), repr=False)
    """Those of the kinds of steps that take turns with this one."""
    gradients: Gradients = field(default_factory=Gradients, repr=False, compare=False)
    """Which parameters hold gradients all the time."""
    optimizers: tuple[torch.optim.Optimizer, ...] = field(init=False, repr=False)
    all_optimizers: tuple[torch.optim.Optimizer, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.accumulation_steps < 1:
            raise UnsupportedInput(
                f"accumulation_steps={self.accumulation_steps} leaves out forward and backward, so there is no step. "
                "Give 1 or more."
            )
        optimizers = _as_tuple(self.optimizer)
        each = {id(one): one for one in (*optimizers, *_as_tuple(self.idle_optimizer))}
        object.__setattr__(self, "optimizers", optimizers)
        object.__setattr__(self, "all_optimizers", tuple(each.values()))

    def starting(self, model: torch.nn.Module) -> Step:
        """Return the step for a model (or `ModelSet`) of which no backward was seen yet."""
        take_turns = bool(self.other_losses) or len(self.all_optimizers) > len(self.optimizers)
        return replace(self, gradients=Gradients(untrained(model, self.all_optimizers), take_turns=take_turns))

    def reached(self, model: torch.nn.Module) -> tuple[Any, ...]:
        """Return the modules, tensors and generators that only losses reach: its own, and those that take turns."""
        found = [thing for loss in (self.loss, *self.other_losses) for thing in reached_by(loss, model)]
        return tuple({id(thing): thing for thing in found}.values())

    def run_loss(self, model: Any, batch: Any) -> torch.Tensor:
        """Run the forward of model and loss, and return the loss: a scalar tensor, times a `Microbatch`'s weight.

        `model`: one, or the container of several.

        Raises:
            UnsupportedInput: the result is not one.
        """
        microbatch = batch if isinstance(batch, Microbatch) else Microbatch(batch)
        batch = microbatch.batch
        with self.around_loss(), self._autocast(model):
            if self.loss is not None:
                result = self.loss(given_as(model), batch)
            elif isinstance(model, ModelSet) or not isinstance(model, torch.nn.Module):
                raise UnsupportedInput(
                    "several models were given without a loss function. Only that can tell in which order they are "
                    "called and on what. Pass loss=, a function (models, batch) -> scalar tensor."
                )
            elif isinstance(batch, Mapping):
                result = model(**batch)
            elif isinstance(batch, tuple):
                result = model(*batch)
            else:
                result = model(batch)
            return microbatch.weighted(check_loss(result, given=self.loss is not None))

    def run(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Run the whole step and return the last loss, detached. Gradients are added to those that are there."""
        for _ in range(self.accumulation_steps):
            safe_point()
            loss = self.run_loss(model, batch)
            safe_point()
            whole = loss / self.accumulation_steps if self.accumulation_steps > 1 else loss
            whole.backward(retain_graph=self.retain_graph)
            del whole
            loss = loss.detach()
        self.run_optimizers(model)
        return loss

    def run_optimizers(self, model: torch.nn.Module) -> None:
        """Clip the gradients and step the optimizers."""
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.clipped(model.parameters()), self.clip_norm)
        for optimizer in self.optimizers:
            safe_point()
            optimizer.step()

    def clipped(
        self, parameters: Iterable[torch.Tensor], optimizers: Sequence[torch.optim.Optimizer] | None = None
    ) -> list[torch.Tensor]:
        """Return those parameters whose gradients are clipped: where other optimizers are idle, the step's own alone.

        `optimizers`: copies of the step's own.
        """
        if len(self.all_optimizers) == len(self.optimizers):
            return list(parameters)
        own = self.optimizers if optimizers is None else optimizers
        stepped = {id(p) for one in own for group in one.param_groups for p in group["params"]}
        return [parameter for parameter in parameters if id(parameter) in stepped]

    @contextmanager
    def _autocast(self, model: Any) -> Iterator[None]:
        if self.autocast is None:
            yield
        else:
            with device_for(first_of(model)).autocast(self.autocast):
                yield


def as_step(
    step: Step | None,
    loss: LossFunction | None,
    optimizer: Optimizers,
    accumulation_steps: int,
    autocast: torch.dtype | None,
    clip_norm: float | None,
) -> Step:
    """Return `step`, or the step of the single keywords.

    Raises:
        UnsupportedInput: both were given.
    """
    single = Step(
        loss=loss,
        optimizer=optimizer,
        accumulation_steps=accumulation_steps,
        autocast=autocast,
        clip_norm=clip_norm,
    )
    if isinstance(step, Mapping):
        raise UnsupportedInput(
            "a mapping of steps was given where one step is measured or compared. Only fit plans several kinds of "
            "steps at once. Give one of them, with the others' optimizers as its idle_optimizer=."
        )
    if step is None:
        return single
    if single != Step():
        raise UnsupportedInput(
            "step= and single keywords of it (loss, optimizer, accumulation_steps, autocast, clip_norm) were given "
            "together, so it is not clear which of them counts. Put all of them into the Step, or give no step=."
        )
    return step


def as_steps(
    step: Step | Mapping[str, Step] | None,
    loss: LossFunction | None,
    optimizer: Optimizers,
    accumulation_steps: int,
    autocast: torch.dtype | None,
    clip_norm: float | None,
) -> dict[str, Step]:
    """Return each kind of step by its name: one without a name, or those of a mapping.

    In each of several, the optimizers of the others are idle.

    Raises:
        UnsupportedInput: as `as_step`; or the mapping is empty, or names something that is no `Step`.
    """
    if not isinstance(step, Mapping):
        return {"": as_step(step, loss, optimizer, accumulation_steps, autocast, clip_norm)}
    as_step(Step(), loss, optimizer, accumulation_steps, autocast, clip_norm)
    for name, one in step.items():
        if not isinstance(one, Step) or not isinstance(name, str) or not name:
            raise UnsupportedInput(
                f"the mapping of steps holds a {type(one).__name__} under {name!r}. Each kind of step has a name, by "
                "which training tells which of them runs. Write step={'critic': tightfit.Step(...), ...}."
            )
    if not step:
        raise UnsupportedInput("the mapping of steps is empty, so there is no step to plan. Give a Step for each kind.")
    everyones = [optimizer for one in step.values() for optimizer in one.all_optimizers]
    losses = tuple(one.loss for one in step.values())
    return {name: replace(one, kind=name, idle_optimizer=everyones, other_losses=losses) for name, one in step.items()}


def _as_tuple(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    if optimizer is None:
        return ()
    optimizers = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    for one in optimizers:
        if isinstance(one, torch.optim.LBFGS):
            raise UnsupportedInput(
                "the optimizer LBFGS runs forward and backward several times inside its own step, through a closure. "
                "A plan is for steps that call step() without one. Use another optimizer, or measure with "
                "optimizer=None, which leaves the optimizer's memory out of the figures."
            )
    return optimizers


def check_loss(result: Any, *, given: bool) -> torch.Tensor:
    """Return the scalar in what a model or loss function returned.

    Raises:
        UnsupportedInput: there is none, or it needs no gradient.
    """
    loss = result
    if not isinstance(loss, torch.Tensor):
        attribute = getattr(result, "loss", None)
        if attribute is None and isinstance(result, Mapping):
            attribute = result.get("loss")
        loss = attribute
    what = "the loss function" if given else "the model"
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shape = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(result).__name__
        raise UnsupportedInput(
            f"{what} returned {shape}, which is not a scalar loss. Backward starts from one number. "
            "Pass loss=, a function (model, batch) -> scalar tensor, or reduce the loss with .mean() or .sum()."
        )
    if not loss.requires_grad:
        raise UnsupportedInput(
            f"the scalar that {what} returned does not depend on any parameter that requires a gradient. There is "
            "nothing to train. Unfreeze parameters with requires_grad_(True), and do not detach the loss."
        )
    return loss
