"""Training with Lightning's `Trainer` inside a memory budget.

    trainer = Trainer(callbacks=[TightfitCallback(budget="8GiB")])

The step that is planned is the module's own `training_step`, under the trainer's precision, with the optimizer, the
accumulation and the clipping that it uses, on the model as the strategy has placed it.  One that optimizes by hand is
planned in `lightning_phases`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:  # its older package
    from pytorch_lightning import Callback, LightningModule, Trainer

from tightfit.errors import UnsupportedInput
from tightfit.installation.applied import Applied
from tightfit.integrations.contexts import (
    budget_beside,
    closed_autocast,
    forgetting_casts,
    log_plan,
    modules_held,
    same_random_state,
)
from tightfit.integrations.lightning_phases import Call, Phases
from tightfit.planning.fit import fit
from tightfit.step.step import Step

#: What `training_step` may call to note something, which is not of a training step while one is planned.
_NOTING = ("log", "log_dict")


class TightfitCallback(Callback):
    """Keeps the training steps of a Lightning `Trainer` inside a memory budget; validation and tests run as ever.

        trainer = Trainer(callbacks=[TightfitCallback(budget="8GiB")])
        trainer.fit(module, data)

    The plan is made of the first batch that is trained on, before its step, and taken off when training ends.  Batches
    of other sizes are planned when they come.  What is raised, `trainer.fit` raises.

    Args:
        budget: as for `tightfit.fit`.
        options: more keywords of `tightfit.fit`, such as `exclude`, `on_failure`, `memory_cap`.

    Attributes:
        applied: what `fit` returned; None while no training runs.

    Raises:
        BudgetInfeasible, VerificationFailed: as `tightfit.fit`.
        UnsupportedInput: as `tightfit.fit`; or the trainer runs DeepSpeed; or the module optimizes by hand without
            `manual_backward`, or in a `training_step` that cannot run without gradients.
    """

    def __init__(self, budget: int | str = "auto", **options: Any) -> None:
        self.applied: Applied | None = None
        self._budget = budget
        self._options = options
        self._remove: Callable[[], None] = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the steps of this training run under a plan."""
        self._end()  # of a training that an error has ended
        if "DeepSpeed" in type(trainer.strategy).__name__:
            raise UnsupportedInput(
                "the trainer runs DeepSpeed, whose engine takes the steps itself and shards or offloads what tightfit "
                "would plan. Take another strategy (DDP is supported), or leave TightfitCallback out."
            )
        training_step = pl_module.training_step
        by_hand: list[Phases] = []
        arguments: list[Any] = []  # of the step that runs: it may go another way by the batch's number
        call = partial(_call, arguments=arguments)

        def planned(batch: Any, *more: Any, **keywords: Any) -> Any:
            arguments[:] = more, keywords
            if self.applied is None:
                with closed_autocast(pl_module), same_random_state():
                    if not pl_module.automatic_optimization:
                        by_hand.append(Phases(trainer, pl_module, call, batch))
                    self.applied = self._plan(trainer, pl_module, batch, call, by_hand)
            if by_hand:
                with by_hand[0].planned(pl_module, self.applied, batch):
                    return training_step(batch, *more, **keywords)
            # The trainer has opened its autocast already; a step has it inside, here as when it was planned.
            autocast = trainer.precision_plugin.train_step_context
            with closed_autocast(pl_module), self.applied.step(batch), forgetting_casts(), autocast():
                return training_step(batch, *more, **keywords)

        own = vars(pl_module).get("training_step")
        vars(pl_module)["training_step"] = planned

        def remove() -> None:
            del vars(pl_module)["training_step"]
            if own is not None:  # the user's, on this module alone
                vars(pl_module)["training_step"] = own
            if self.applied is not None:
                self.applied.remove()
                self.applied = None

        self._remove = remove

    def _plan(
        self, trainer: Trainer, module: LightningModule, batch: Any, call: Call, by_hand: list[Phases]
    ) -> Applied:
        def loss(model: Any, batch: Any) -> Any:
            with forgetting_casts(), trainer.precision_plugin.train_step_context():
                found = call(model, batch)
            return found["loss"] if isinstance(found, Mapping) else found

        clip = trainer.gradient_clip_val if trainer.gradient_clip_algorithm in (None, "norm") else None
        steps: Step | dict[str, Step] = Step(
            loss=loss,
            optimizer=trainer.optimizers,
            accumulation_steps=trainer.accumulate_grad_batches,
            clip_norm=clip or None,
        )
        if by_hand:
            steps = by_hand[0].steps if len(by_hand[0].steps) > 1 else next(iter(by_hand[0].steps.values()))
        held = [value for callback in trainer.callbacks for value in vars(callback).values()]
        budget = budget_beside(self._budget, module, batch, others=0, held=modules_held(held, module))
        applied = fit(module, batch, budget=budget, step=steps, **self._options)
        log_plan(applied)
        return applied

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the plan off."""
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the plan off."""
        self._end()

    def _end(self) -> None:
        remove, self._remove = self._remove, lambda: None
        remove()


def _call(module: LightningModule, batch: Any, arguments: Sequence[Any]) -> Any:
    """Call the `training_step` of a module, or of its copy, to plan it: what it logs is not logged.

    `arguments`: further ones, those with names apart.
    """
    more, keywords = arguments
    with _noting_nothing(module):
        return type(module).training_step(module, batch, *more, **keywords)


@contextmanager
def _noting_nothing(module: LightningModule) -> Iterator[None]:
    for name in _NOTING:
        vars(module)[name] = _nothing
    try:
        yield
    finally:
        for name in _NOTING:
            del vars(module)[name]


def _nothing(*_: Any, **__: Any) -> None:
    pass
