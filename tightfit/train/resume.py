"""Resuming: checking that a checkpoint is of the same run, and restoring everything from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tightfit.errors import UnsupportedInput
from tightfit.train.checkpoint import Checkpoint, load_checkpoint
from tightfit.train.config import TrainConfig
from tightfit.train.progress import Progress
from tightfit.train.random_state import seed_everything, seed_of
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


def restore(
    config: TrainConfig, work: Workload, checkpoint: Checkpoint, identity: dict[str, object]
) -> Mapping[str, Any]:
    """Put model, optimizer and random generators where the checkpoint left them; returns its extra state.

    Raises:
        UnsupportedInput: the checkpoint is of another run, or does not fit the model.
    """
    _check_identity(checkpoint, identity)
    group = work.group
    extra, knows_random = load_checkpoint(
        checkpoint, model=work.model, optimizer=work.optimizer, rank=group.rank, world_size=group.world_size
    )
    if not knows_random:
        seed_everything(seed_of(config.seed, group.rank, checkpoint.step))
    return extra


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
