"""Resuming: checking that a checkpoint is of the same run, restoring everything from it, and telling a run's end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.amp import GradScaler

from tightfit.errors import UnsupportedInput
from tightfit.interrupts import waiting_interrupts
from tightfit.step.snapshot import TrainingState
from tightfit.train.checkpoint import Checkpoint, fitting, load_checkpoint
from tightfit.train.config import TrainConfig
from tightfit.train.ema import MovingAverage
from tightfit.train.parallel.ddp import settling_steps
from tightfit.train.progress import Progress
from tightfit.train.random_state import random_state, restore_random_state, seed_everything, seed_of
from tightfit.train.step_meter import TakesSteps
from tightfit.train.workload import Workload

#: Of a setting, in a message; a checkpoint that somebody made up may hold any.
_SHOWN = 200


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
    """What a checkpoint holds that is for later; nothing, if a run begins."""

    random_state: Mapping[str, Any] | None = None
    """Of this process's generators."""
    is_seeded_anew: bool = False
    """Because the checkpoint is of another number of processes, and has the generators of those."""

    def restore_random_state(self) -> None:
        """Put the generators where the checkpoint left them.

        Call it last before the first step: planning and everything else before it may draw from them.
        """
        if self.random_state is not None:
            restore_random_state(self.random_state)


def restore(
    config: TrainConfig,
    work: Workload,
    checkpoint: Checkpoint,
    identity: dict[str, object],
    average: MovingAverage,
    scaler: GradScaler,
) -> Restored:
    """Put model, optimizer, average and scaler where the checkpoint left them, and return what is for later.

    Of a run with another number of processes, the generators are seeded anew.

    Raises:
        UnsupportedInput: the checkpoint is of another run, or does not fit the model.
    """
    _check_identity(checkpoint, identity)
    group = work.group
    extra, states = load_checkpoint(
        checkpoint, model=work.model, optimizer=work.optimizer, rank=group.rank, world_size=group.world_size
    )
    progress_of(checkpoint)
    before = random_state()
    is_seeded_anew = states is None
    with fitting(checkpoint):
        if average.state_dict():
            average.load_state_dict(extra["average"])
        scaler.load_state_dict(extra["scaler"])
        if states is None:
            seed_everything(seed_of(config.seed, group.rank, checkpoint.step))
            states = random_state()
        restore_random_state(states)  # better found now to be none than after planning
    restore_random_state(before)
    return Restored(random_state=states, is_seeded_anew=is_seeded_anew)


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
    except (TypeError, ValueError):
        raise UnsupportedInput(
            f"{checkpoint.folder} does not say how its run went so far, so this version cannot resume from it. "
            f"Begin another run with --mark NAME."
        ) from None


def _check_identity(checkpoint: Checkpoint, identity: dict[str, object]) -> None:
    for key, now in identity.items():
        then = checkpoint.identity.get(key)
        if then != now:
            raise UnsupportedInput(
                f"the checkpoint {checkpoint.folder} was written with {key.replace('_', ' ')} {_shown(then)}, but now "
                f"it is {_shown(now)}, so going on would not be the same run. Use the old value, or begin another run "
                f"with --mark NAME."
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
