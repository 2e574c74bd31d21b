"""Gathering the state of a run from its processes, and writing it as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tightfit.errors import first_line
from tightfit.train.checkpoint import Retention, save_checkpoint
from tightfit.train.ema import MovingAverage
from tightfit.train.failures import TrainingFailed
from tightfit.train.parallel.fsdp import unsharded
from tightfit.train.progress import Progress
from tightfit.train.random_state import random_state
from tightfit.train.workload import Workload
from tightfit.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class CheckpointWriter:
    """Writes the checkpoints of a run: rank 0 writes, and all processes learn whether it could."""

    folder: Path
    """Of all checkpoints of the run."""
    work: Workload
    average: MovingAverage
    scaler: torch.amp.GradScaler
    progress: Progress
    identity: Mapping[str, object]
    retention: Retention

    def save(self, step: int, *, is_best: bool) -> None:
        """Save the state after step ``step`` (the first is 1).  All processes call this.

        Raises:
            TrainingFailed: there is no room on the disk.
        """
        group = self.work.group
        random_states = group.all_gather(random_state())
        state = unsharded(
            {
                "model": self.work.model.state_dict(),
                "optimizer": self.work.optimizer.state_dict(),
                "average": self.average.state_dict(),
            },
            keep=group.is_main_process,
        )
        group.run_on_all(
            lambda: self._write(step, state, random_states, is_best=is_best) if group.is_main_process else None
        )

    def _write(self, step: int, state: dict[str, Any], random_states: list[dict[str, Any]], *, is_best: bool) -> None:
        extra: dict[str, Any] = {"scaler": self.scaler.state_dict()}
        if state["average"]:
            extra["average"] = state["average"]
        try:
            save_checkpoint(
                self.folder,
                step=step,
                identity=self.identity,
                progress=self.progress.to_json(),
                random_states=random_states,
                model=state["model"],
                optimizer=state["optimizer"],
                extra=extra,
                is_best=is_best,
                retention=self.retention,
            )
        except (OSError, SafetensorError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else first_line(problem)
            weights_bytes = sum(tensor.nbytes for tensor in state["model"].values() if torch.is_tensor(tensor))
            raise TrainingFailed(
                f"the checkpoint of step {step} could not be written to {self.folder} ({reason}); the weights alone "
                f"take {format_bytes(weights_bytes)}. The checkpoints written before are complete. Make room there and "
                f"go on with --resume auto."
            ) from problem
