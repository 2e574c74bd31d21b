"""Resuming: checking that a checkpoint is of the same run, restoring everything from it, and telling a run's end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.amp import GradScaler

from tightfit.errors import UnsupportedInput
from tightfit.interrupts import waiting_interrupts
from tightfit.step.snapshot import TrainingState
from tightfit.train.checkpoint import Checkpoint, load_checkpoint
from tightfit.train.config import TrainConfig
from tightfit.train.parallel.ddp import settling_steps
from tightfit.train.progress import Progress
from tightfit.train.random_state import random_state, restore_random_state, seed_everything, seed_of
from tightfit.train.step_meter import TakesSteps
from tightfit.train.workload import Workload


def identity_of(config: TrainConfig, work: Workload, total_steps: int) -> dict[str, object]:
    """Return the settings and data of a run that may not change when it is resumed."""
    names = (
        "model", "sequence_length", "batch_size", "microbatch_size", "accumulation_steps", "optimizer", "lr",
        "weight_decay", "momentum", "beta2", "clip_norm", "precision", "schedule", "warmup_steps", "min_lr_ratio",
        "ema_decay", "seed", "deterministic",
    )  # fmt: skip
    return {
        **{name: getattr(config, name) for name in names},
        "model_args": dict(config.model_args),
        "data": work.data.fingerprint,
        # A falling learning rate depends on where it is to arrive.
        "length_of_the_schedule": None if config.schedule == "constant" else total_steps,
    }


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a checkpoint holds besides the weights and the optimizer's state; nothing, if a run begins."""

    extra: Mapping[str, Any] = field(default_factory=dict)
    random_state: Mapping[str, Any] | None = None
    """Of this process's generators."""

    def restore_random_state(self) -> None:
        """Put the generators where the checkpoint left them.

        Call it last before the first step: planning and everything else before it may draw from them.
        """
        if self.random_state is not None:
            restore_random_state(self.random_state)


def restore(config: TrainConfig, work: Workload, checkpoint: Checkpoint, identity: dict[str, object]) -> Restored:
    """Put model and optimizer where the checkpoint left them, and return what else it holds.

    Of a run with another number of processes, the generators are seeded anew.

    Raises:
        UnsupportedInput: the checkpoint is of another run, or does not fit the model.
    """
    _check_identity(checkpoint, identity)
    group = work.group
    extra, states = load_checkpoint(
        checkpoint, model=work.model, optimizer=work.optimizer, rank=group.rank, world_size=group.world_size
    )
    if states is None:
        seed_everything(seed_of(config.seed, group.rank, checkpoint.step))
        states = random_state()
    return Restored(extra=extra, random_state=states)


@waiting_interrupts()
def settle_sums(steps: TakesSteps, model: nn.Module, work: Workload, scaler: GradScaler, steps_done: int) -> None:
    """Let DDP sum gradients as it does in the uninterrupted run, by its first steps; all but that is put back."""
    count = settling_steps(model, work.group, steps_done)
    if not count:
        return
    parameters = list(work.model.parameters())
    state, scaler_state = TrainingState(work.model, [work.optimizer]), scaler.state_dict()
    try:
        for step in range(count):
            steps.take(work.microbatches(step))
        gradients = [parameter.grad for parameter in parameters]
    finally:
        state.restore()
    scaler.load_state_dict(scaler_state)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient  # a part of a bucket: a later step zeroes it


def end_of_run(config: TrainConfig, work: Workload, checkpoint: Checkpoint, total_steps: int) -> str | None:
    """Say why there is nothing to train after the checkpoint, and how to train on; None: there is."""
    step, progress = checkpoint.step, progress_of(checkpoint)
    if step >= total_steps:
        return (
            f"has done {step} steps, and {total_steps} were asked for. "
            f"Train longer with --steps {2 * step}, or begin another run with --mark NAME."
        )
    if progress.has_stalled(config.early_stop):
        return (
            f"has ended: {progress.why_stopped(work.task)}. Train on with --early-stop "
            f"{2 * progress.evaluations_since_best} or without it, or begin another run with --mark NAME."
        )
    return None


def progress_of(checkpoint: Checkpoint) -> Progress:
    """Return how the checkpoint's run went so far.

    Raises:
        UnsupportedInput: it does not say so as this version does.
    """
    try:
        return Progress.from_json(checkpoint.progress)
    except TypeError:
        raise UnsupportedInput(
            f"{checkpoint.folder} does not say how its run went so far, so this version cannot resume from it. "
            f"Begin another run with --mark NAME."
        ) from None


def _check_identity(checkpoint: Checkpoint, identity: dict[str, object]) -> None:
    for key, now in identity.items():
        then = checkpoint.identity.get(key)
        if then != now:
            raise UnsupportedInput(
                f"the checkpoint {checkpoint.folder} was written with {key.replace('_', ' ')} {then!r}, but now it is "
                f"{now!r}, so going on would not be the same run. Use the old value, or begin another run with "
                f"--mark NAME."
            )
