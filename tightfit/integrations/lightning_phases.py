"""Steps of a Lightning module that optimizes by hand: each backward inside `training_step` ends one phase.

A phase is planned as a kind of step: its loss is what `training_step` gives to that `manual_backward`.  While it is
planned, the phases before it run without gradients, and no optimizer steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from tightfit._torch_private.autograd import graph_position, position_of_node
from tightfit.errors import PromiseWarning, UnsupportedInput
from tightfit.installation.applied import Applied
from tightfit.installation.promises import users_line
from tightfit.integrations.contexts import closed_autocast
from tightfit.step.snapshot import TrainingState
from tightfit.step.step import Step

Call = Callable[[Any, Any], Any]
"""`training_step`, given the module (or a copy of it) and a batch."""


class _LossFound(BaseException):
    """Leaves `training_step`; nobody who handles errors takes it for one."""


class Phases:
    """The phases of a module's `training_step`.

    Args:
        trainer: that of Lightning.
        module: that which is trained.
        training_step: called with the module, or a copy of it, and a batch.
        batch: one batch.

    Attributes:
        steps: for `tightfit.fit`, by the name of the phase.

    Raises:
        UnsupportedInput: `training_step` cannot run without gradients, or calls no `manual_backward`.
    """

    def __init__(self, trainer: Any, module: Any, training_step: Call, batch: Any) -> None:
        optimizers = module.optimizers()
        self._optimizers: Sequence[Any] = optimizers if isinstance(optimizers, list) else [optimizers]
        self._schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._training_step = training_step
        self._autocast: Callable[[], AbstractContextManager[object]] = trainer.precision_plugin.train_step_context
        self._toggling: set[int] = set()
        """Phases that switch `requires_grad` before they begin."""
        self._told = False
        steppers = self._rehearsed(module, batch)
        everyones = [each.optimizer for each in self._optimizers]  # those that the first batch does not step, too
        self.steps = {
            str(number): Step(
                loss=self._loss_of(number), optimizer=[each.optimizer for each in those], idle_optimizer=everyones
            )
            for number, those in enumerate(steppers)
        }

    def _rehearsed(self, module: Any, batch: Any) -> list[list[Any]]:
        """Run `training_step` without gradients; return which optimizers step after each backward."""
        steppers: list[list[Any]] = []
        state = TrainingState(module, [each.optimizer for each in self._optimizers], also=(batch,))
        try:
            idle = self._idle(
                module,
                backward=lambda _: steppers.append([]),
                stepped=lambda one: steppers[-1].append(one),
                toggled=lambda *_: self._toggling.add(len(steppers)),
            )
            with torch.no_grad(), self._autocast(), idle:
                self._training_step(module, batch)
        except Exception as error:
            raise UnsupportedInput(
                f"{type(module).__name__} optimizes by hand, and its training_step cannot run without gradients, by "
                f"which its losses are found ({type(error).__name__}: {error}). Use tightfit.fit inside it, or leave "
                f"TightfitCallback out."
            ) from error
        finally:
            state.restore()
        if not steppers:
            raise UnsupportedInput(
                f"{type(module).__name__} optimizes by hand, and its training_step calls no self.manual_backward, so "
                f"it cannot be seen which losses it has. Call that in place of loss.backward()."
            )
        return steppers

    def _loss_of(self, number: int) -> Call:
        def loss(module: Any, batch: Any) -> Any:
            found: list[Any] = []
            phase = 0

            def reached(one: Any) -> None:
                nonlocal phase
                if phase == number:
                    found.append(one)
                    raise _LossFound
                phase += 1
                torch.clear_autocast_cache()  # weights that were cast without gradients
                torch.set_grad_enabled(phase == number)

            idle = self._idle(module, reached)
            with torch.set_grad_enabled(number == 0), self._autocast(), idle:
                try:
                    self._training_step(module, batch)
                except _LossFound:
                    return found.pop()
            return torch.zeros(())  # another way through training_step than the first batch's: no loss, as `fit` tells

        return loss

    @contextmanager
    def _idle(
        self,
        module: Any,
        backward: Callable[[Any], None],
        stepped: Callable[[Any], None] = lambda _: None,
        toggled: Callable[..., None] = lambda *_: None,
    ) -> Iterator[None]:
        """Replace the module's backwards, and do nothing where it steps optimizers, clips, or moves learning rates."""

        def step_of(one: Any) -> Callable[..., None]:
            def step(closure: Callable[[], Any] | None = None, **_: Any) -> None:
                if closure is not None:
                    closure()
                stepped(one)

            return step

        replaced: list[tuple[Any, str, Any]] = [(module, "manual_backward", lambda loss, *_, **__: backward(loss))]
        # What `toggle_optimizer` does to requires_grad would have to stay until the backward that follows. A plan for
        # the live state is made when the first such phase comes.
        replaced += [(module, "toggle_optimizer", toggled), (module, "untoggle_optimizer", _nothing)]
        replaced += [(module, "clip_gradients", _nothing)]
        replaced += [(one, "zero_grad", _nothing) for one in self._optimizers]
        replaced += [(one, "step", step_of(one)) for one in self._optimizers]
        replaced += [(one, "step", _nothing) for one in self._schedulers]
        with ExitStack() as stack:
            for one, name, value in replaced:
                stack.enter_context(_attribute(one, name, value))
            yield

    @contextmanager
    def planned(self, module: Any, applied: Applied, batch: Any) -> Iterator[None]:
        """Open a context for a `training_step` whose phases run under their plans."""
        run_backward, toggle = module.manual_backward, module.toggle_optimizer
        number, begin = 0, 0
        with ExitStack() as phase, ExitStack() as replaced:

            def start() -> None:
                nonlocal begin
                begin = graph_position()
                if number not in self._toggling:
                    run()

            def run() -> None:
                if str(number) in self.steps:  # else one that the first batch did not have, and no plan is for
                    # The trainer's autocast stays open around: it keeps what it has cast until the last backward.
                    phase.enter_context(closed_autocast(module))
                    phase.enter_context(applied.step(batch, kind=str(number) if len(self.steps) > 1 else None))
                    phase.enter_context(self._autocast())

            def backward(loss: Any, *more: Any, **keywords: Any) -> None:
                nonlocal number
                phase.close()
                self._look_at(loss, begin if number else 0)
                run_backward(loss, *more, **keywords)
                number += 1
                start()

            def toggle_optimizer(optimizer: Any) -> None:
                toggle(optimizer)
                if number in self._toggling:
                    phase.close()
                    run()

            start()
            for name, value in {"manual_backward": backward, "toggle_optimizer": toggle_optimizer}.items():
                replaced.enter_context(_attribute(module, name, value))
            yield

    def _look_at(self, loss: Any, begin: int) -> None:
        """Tell once of a loss whose graph reaches into the phase before: its plan does not count what that holds."""
        if self._told or begin == 0 or not isinstance(loss, torch.Tensor):
            return
        pending, seen = [loss.grad_fn], {loss.grad_fn}
        for node in pending:  # which grows
            if node is None:
                continue
            if position_of_node(node) < begin:
                self._told = True
                file, line = users_line()
                warnings.warn_explicit(
                    "a manual_backward goes through what training_step has computed before an earlier backward, which "
                    "the plan does not count, so the budget may not be kept. Compute it anew after that backward.",
                    PromiseWarning, file, line, registry={},
                )  # fmt: skip
                return
            new = [child for child, _ in node.next_functions if child not in seen]
            seen.update(new)
            pending += new


@contextmanager
def _attribute(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute of its own, inside."""
    own = {name: vars(thing)[name]} if name in vars(thing) else {}
    vars(thing)[name] = value
    try:
        yield
    finally:
        del vars(thing)[name]
        vars(thing).update(own)


def _nothing(*_: Any, **__: Any) -> None:
    pass
