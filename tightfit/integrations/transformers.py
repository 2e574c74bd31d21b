"""Training with the `Trainer` of transformers (and of TRL, sentence-transformers) inside a memory budget.

    trainer.add_callback(TightfitCallback(budget="8GiB"))

The step that is planned is the trainer's own: its `compute_loss` (label smoothing, what subclasses compute instead of
the model's loss), its mixed precision, accumulation and clipping, on the model as accelerate has prepared it, with the
optimizer that it uses.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from accelerate.utils import recursively_apply, send_to_device
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tightfit.distributed.fsdp import unreduced_gradient_bytes
from tightfit.errors import BudgetInfeasible, UnsupportedInput
from tightfit.installation.applied import Applied
from tightfit.integrations.contexts import (
    budget_beside,
    closed_autocast,
    forgetting_casts,
    log_plan,
    modules_held,
    same_random_state,
)
from tightfit.planning.fit import fit
from tightfit.step.batch import batch_tensors

_log = logging.getLogger("tightfit")

#: Samples whose size is looked at to find the largest batch; of more, as many are looked at, evenly spaced.
_MOST_SAMPLES = 5_000


class TightfitCallback(TrainerCallback):
    """Keeps the training steps of a `Trainer` inside a memory budget; evaluation and generation run as ever.

        trainer = Trainer(model, args, train_dataset=data)
        trainer.add_callback(TightfitCallback(budget="8GiB"))
        trainer.train()

    The plan is made when training begins, and taken off when it ends.  Gradient checkpointing and the offload of
    activations that the arguments ask for are replaced by it.  What is raised, `train` raises: when training begins, or
    at a batch that is larger than any before.

    Args:
        budget: as for `tightfit.fit`.
        plan_first: the batch that is planned before the first step: the "largest" that the dataset's samples can make,
            so that one that does not fit is told now; or the "first" that comes, where no such batch ever will, or
            where the trainer makes its batches itself (rollouts). Batches of other sizes are planned when they come.
        options: more keywords of `tightfit.fit`, such as `exclude`, `on_failure`, `memory_cap`.

    Attributes:
        applied: what `fit` returned; None while no training runs.

    Raises:
        BudgetInfeasible, VerificationFailed: as `tightfit.fit`.
        UnsupportedInput: as `tightfit.fit`; or the trainer runs DeepSpeed, `torch_compile` or `DataParallel`.
    """

    def __init__(
        self, budget: int | str = "auto", *, plan_first: Literal["largest", "first"] = "largest", **options: Any
    ) -> None:
        self.applied: Applied | None = None
        self._budget = budget
        self._plan_first = plan_first
        self._options = options
        self._remove: Callable[[], None] = lambda: None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **about: Any
    ) -> None:
        """Plan the trainer's step, and have it run under the plan."""
        self.remove()  # of a training that an error has ended
        trainer = _trainer_of(self)
        _check(trainer)
        _replace_checkpointing(trainer)
        put_offload_back = _replace_offload(trainer)
        loss = trainer.compute_loss
        plan = _Planned(trainer, loss, self._budget, self._options)

        def compute_loss(model: Any, inputs: Any, *more: Any, **keywords: Any) -> Any:
            if not torch.is_grad_enabled() or not trainer.model.training:
                return loss(model, inputs, *more, **keywords)
            batch = dict(inputs), keywords.get("num_items_in_batch")
            with self._told_to(trainer):
                if self.applied is None:
                    self.applied = plan.make(batch)
                else:
                    plan.prepare(self.applied, batch)
            # The trainer has opened its autocast already; a step has it inside, here as when it was planned.
            autocast = trainer.compute_loss_context_manager
            with closed_autocast(model), self.applied.step(batch), forgetting_casts(), autocast():
                return loss(model, inputs, *more, **keywords)

        own = vars(trainer).get("compute_loss")
        trainer.compute_loss = compute_loss

        def remove() -> None:
            del trainer.compute_loss
            if own is not None:  # the user's, on this trainer alone
                trainer.compute_loss = own
            put_offload_back()
            if self.applied is not None:
                self.applied.remove()
                self.applied = None

        self._remove = remove
        if self._plan_first == "largest":
            with self._told_to(trainer):
                largest = _largest_batch(trainer, about["train_dataloader"])
                if largest is not None:
                    self.applied = plan.make(largest)

    @contextmanager
    def _told_to(self, trainer: Trainer) -> Iterator[None]:
        """Tell a trainer that looks for a batch that fits (`auto_find_batch_size`) of one that does not."""
        try:
            yield
        except BudgetInfeasible as problem:
            if not trainer.args.auto_find_batch_size:
                raise
            self.remove()  # the trainer wraps the model anew
            # These words of a RuntimeError are what accelerate reads as too large a batch.
            raise RuntimeError(f"a batch of {_batch_size(trainer)} samples is out of memory. {problem}") from problem

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **about: Any,
    ) -> None:
        """Add to a logged step what its plan predicts."""
        plan = None if self.applied is None else self.applied.active_plan
        if plan is not None and logs is not None and "loss" in logs:
            figures = {
                "memory_budget_bytes": plan.budget_bytes,
                "memory_peak_bytes": plan.predicted_peak_bytes,
                "recompute_overhead": round(plan.overhead_ratio, 4),
            }
            logs.update(figures)
            if state.log_history:
                state.log_history[-1].update(figures)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **about: Any) -> None:
        """Take the plan off."""
        self.remove()

    def remove(self) -> None:
        """Take the plan off now: after an error has ended a training, for one."""
        remove, self._remove = self._remove, lambda: None
        remove()


class _Planned:
    """Plans the step of a trainer."""

    def __init__(
        self, trainer: Trainer, loss: Callable[..., Any], budget: int | str, options: Mapping[str, Any]
    ) -> None:
        self._trainer = trainer
        self._loss = loss
        self._budget = budget
        self._options = options

    def make(self, batch: tuple[dict[str, Any], Any]) -> Applied:
        """Plan for a batch."""
        trainer, args = self._trainer, self._trainer.args
        # The trainer fetches the microbatches of a step all at once.
        budget = budget_beside(self._budget, trainer.model, batch, others=args.gradient_accumulation_steps - 1)
        if args.gradient_accumulation_steps > 1 and not _reduces_each_backward(trainer):
            budget = budget.reserving(unreduced_gradient_bytes(trainer.model))
        with _notes_of(trainer, with_tensors=True):
            applied = fit(
                trainer.model,
                batch,
                budget=budget,
                loss=partial(self._run_loss, beside=modules_held(vars(trainer).values(), trainer.model)),
                optimizer=_optimizer_of(trainer),
                accumulation_steps=args.gradient_accumulation_steps,
                clip_norm=args.max_grad_norm if args.max_grad_norm and args.max_grad_norm > 0 else None,
                **self._options,
            )
        log_plan(applied)
        return applied

    def prepare(self, applied: Applied, batch: tuple[dict[str, Any], Any]) -> None:
        """Plan for a batch of another size."""
        with _notes_of(self._trainer, with_tensors=True):
            applied.prepare(batch)

    def _run_loss(
        self, model: Any, batch: tuple[dict[str, Any], Any], *, beside: Sequence[torch.nn.Module] = ()
    ) -> Any:
        """Compute the loss as the trainer does; what it notes of it, as TRL's trainers do, is put back.

        `beside`: what the loss reaches, for `fit` to see.
        """
        inputs, items = batch
        keywords = {} if items is None else {"num_items_in_batch": items}
        trainer = self._trainer
        with (
            _notes_of(trainer), _without_others(trainer), forgetting_casts(), trainer.compute_loss_context_manager(),
        ):  # fmt: skip
            return self._loss(model, dict(inputs), **keywords)  # label smoothing takes the labels out


def _trainer_of(callback: TightfitCallback) -> Trainer:
    """Find the trainer that calls: it does not tell its callbacks who it is."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    raise UnsupportedInput(
        "TightfitCallback was called by something that is no transformers.Trainer, so there is no step to plan. "
        "Give it to a Trainer: trainer.add_callback(TightfitCallback(budget=...))."
    )


def _check(trainer: Trainer) -> None:
    if trainer.is_deepspeed_enabled:
        raise UnsupportedInput(
            "the Trainer runs DeepSpeed, whose engine takes the steps itself and shards or offloads what tightfit "
            "would plan. Leave `deepspeed` out of the TrainingArguments (accelerate's FSDP2 plugin is supported), or "
            "leave TightfitCallback out."
        )
    if trainer.args.torch_compile:
        raise UnsupportedInput(
            "the TrainingArguments ask for torch_compile, which compiles the model as a whole, where operations do not "
            "pass through PyTorch's dispatcher and cannot be planned yet. Leave `torch_compile` out, or compile the "
            "model's blocks one by one (block.compile()) before training begins."
        )
    if trainer.args.n_gpu > 1:
        raise UnsupportedInput(
            f"the Trainer spreads each batch over {trainer.args.n_gpu} GPUs by DataParallel, in threads of one "
            f"process, which no plan covers. Start one process for each GPU, with torchrun or accelerate launch."
        )


def _replace_checkpointing(trainer: Trainer) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    for now, before in (("is_activation_checkpointing", "activation_checkpointing_disable"),
                        ("is_gradient_checkpointing", "gradient_checkpointing_disable")):  # fmt: skip
        if hasattr(type(model), now) and hasattr(model, before):  # before v5.20 the second alone
            if getattr(model, now):
                _log.warning("gradient checkpointing is switched off: the plan decides what is recomputed")
                getattr(model, before)()
            return


def _replace_offload(trainer: Trainer) -> Callable[[], None]:
    """Switch TRL's offload of activations off; what is returned puts it back."""
    name = "maybe_activation_offload_context"
    before = getattr(trainer, name, None)
    if before is None or isinstance(before, nullcontext):
        return lambda: None
    _log.warning("the offload of activations is switched off: the plan decides what is held")
    setattr(trainer, name, nullcontext())
    return lambda: setattr(trainer, name, before)


def _optimizer_of(trainer: Trainer) -> torch.optim.Optimizer:
    """Return the optimizer that accelerate has wrapped."""
    optimizer: Any = trainer.optimizer
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    found: torch.optim.Optimizer = optimizer
    return found


def _reduces_each_backward(trainer: Trainer) -> bool:
    """Tell whether each microbatch of a step reduces its gradients, so that a sharded model holds none whole."""
    asked: bool = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    return asked


def _largest_batch(trainer: Trainer, loader: Any) -> tuple[dict[str, Any], Any] | None:
    """Return a batch of the dataset's largest samples; None where no such batch comes.

    That is where samples have no numbers or batches no size, or where the trainer makes its batches itself (rollouts).
    """
    dataset, collate, size = loader.dataset, loader.collate_fn, _batch_size(trainer)
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__") or collate is None:
        return None
    with same_random_state(), torch.no_grad():
        stride = -(-len(dataset) // _MOST_SAMPLES)
        sizes = sorted(((_elements(dataset[n]), n) for n in range(0, len(dataset), stride)), reverse=True)
        batch = collate([dataset[number] for _, number in sizes[:size]])
        if not isinstance(batch, Mapping):  # the trainer makes its batches of it
            return None
        _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    return dict(send_to_device(batch, trainer.args.device)), items


def _batch_size(trainer: Trainer) -> int:
    """Return the samples of a batch now: `auto_find_batch_size` takes ever fewer than the arguments say."""
    found: int = trainer.state.train_batch_size or trainer.args.train_batch_size
    return found


def _elements(sample: Any) -> int:
    """Count the elements of the longest thing in a sample, or the letters of a text."""
    things = (
        sample.values() if isinstance(sample, Mapping) else sample if isinstance(sample, list | tuple) else [sample]
    )
    counts = [sum(tensor.numel() for tensor in batch_tensors([thing])) for thing in things]
    return max([*counts, *(len(thing) for thing in things if isinstance(thing, list | tuple | str))], default=0)


@contextmanager
def _notes_of(trainer: Trainer, *, with_tensors: bool = False) -> Iterator[None]:
    """Put back what the trainer notes in containers of plain data while it computes a loss.

    `with_tensors`: figures that are tensors, too, which cannot be copied while a step runs without data.
    """
    before = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if _is_plain(value, with_tensors)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


def _is_plain(value: Any, with_tensors: bool) -> bool:
    if isinstance(value, Mapping):
        home = type(value).__module__
        return home in ("builtins", "collections") and all(_is_plain(each, with_tensors) for each in value.values())
    if isinstance(value, list | tuple | deque):
        return all(_is_plain(each, with_tensors) for each in value)
    if isinstance(value, torch.Tensor):
        return with_tensors and value.numel() == 1 and not value.requires_grad
    return value is None or isinstance(value, bool | int | float | str)


@contextmanager
def _without_others(trainer: Trainer) -> Iterator[None]:
    """Have a loss that is computed for planning gather its figures from this process alone.

    Processes whose batches differ do not plan at the same time.  Those of a sharded model do, and have to.
    """
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1 or trainer.is_fsdp_enabled:
        yield
        return
    names = ("gather", "gather_for_metrics", "reduce", "pad_across_processes")
    vars(accelerator).update(dict.fromkeys(names, _of_this_process))
    try:
        yield
    finally:
        for name in names:
            del vars(accelerator)[name]


def _of_this_process(figures: Any, *_: Any, **__: Any) -> Any:
    return recursively_apply(lambda tensor: tensor.reshape(-1) if tensor.ndim == 0 else tensor, figures)
