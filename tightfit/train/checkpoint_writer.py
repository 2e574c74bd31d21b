"""Writing the checkpoints of a run: while it goes on, where a copy of its state fits beside the step, else at once.

Of a sharded model each process copies and writes its own shards.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tightfit.device import device_for
from tightfit.device.budget import Budget
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.records import Plan
from tightfit.report.reporter import Reporter
from tightfit.train.background_write import PATIENCE_S, BackgroundWrite, tried
from tightfit.train.checkpoint import Draft, Retention, draft_checkpoint
from tightfit.train.ema import MovingAverage
from tightfit.train.progress import Progress
from tightfit.train.random_state import random_state
from tightfit.train.run_metrics import MetricsFile
from tightfit.train.shard_files import Piece, nbytes_of
from tightfit.train.workload import Workload
from tightfit.units import format_bytes

#: Of the host memory that is free, what copies of the states of all its GPUs may take.
_SHARE_OF_HOST = 0.5


def copy_room_bytes(plan: Plan, budget: Budget, device: torch.device, processes: int = 1) -> int:
    """Return how many bytes a copy of the state may take while steps go on.

    On a CPU, that is what the plan leaves of the budget; of a GPU's state the copy lies in host memory, as do those of
    other `processes` of this host.
    """
    if device_for(device).is_host:
        return budget.step_bytes - plan.predicted_peak_bytes
    return int(_SHARE_OF_HOST * device_for("cpu").free_bytes() / processes)


@dataclass(kw_only=True)
class CheckpointWriter:
    """Writes the checkpoints of a run: each process its own shards, rank 0 what all have alike."""

    folder: Path
    """Of all checkpoints of the run."""
    work: Workload
    average: MovingAverage
    scaler: torch.amp.GradScaler
    progress: Progress
    identity: Mapping[str, object]
    retention: Retention
    metrics: MetricsFile | None
    """Must be on disk before a checkpoint that is after them; None: another process writes them."""
    reporter: Reporter
    room_bytes: int
    """For a copy of the state, beside all else."""
    last_step: int = 0
    """Of the newest checkpoint that is written."""
    _writing: BackgroundWrite | None = None
    _begun: int = 0
    """How many were begun to be written while steps go on."""
    _is_settled: bool = True
    """Whether all processes know what became of the last one of those."""
    _told_of_room: bool = False

    def save(self, step: int, *, is_best: bool, may_go_on: bool = False) -> str | None:
        """Save the state after step ``step`` (the first is 1).  All processes call this.

        Args:
            step: the step.
            is_best: it is the best so far.
            may_go_on: return before it is written, where there is room for a copy. A failure is then said, also a
                later one, and no reason to end the run.

        Returns:
            Why it could not be written, for example because the disk is full; None: it is, or is about to be.
        """
        self.finish()
        group = self.work.group
        draft = draft_checkpoint(
            self.folder,
            step=step,
            identity=self.identity,
            progress=self.progress.to_json(),
            model=self.work.model.state_dict(),
            optimizer=self.work.optimizer.state_dict(),
            random_states=group.all_gather(random_state()),
            extra=self._extra(),
            is_best=is_best,
            retention=self.retention,
            group=group,
        )
        problem = group.broadcast(tried(self._flush_metrics)[1])
        if problem is None and may_go_on:
            copies = self._copies_everywhere(draft)
            if copies is not None:
                return self._write_behind(replace(draft, pieces=copies))
        if problem is None:
            problem = self._write_together(draft)
        if problem is None:
            self.last_step = step
            return None
        return self._explained(step, nbytes_of(draft.pieces), problem, goes_on=may_go_on)

    def held_bytes(self) -> int:
        """Return the bytes of the budget's device that a copy takes at the moment."""
        is_here = self._writing is not None and device_for(self.work.device).is_host
        return self._writing.held_bytes if self._writing is not None and is_here else 0

    def look(self) -> None:
        """See whether a checkpoint is written by now."""
        if self._writing is not None and self._writing.is_over:
            self._settle(self._writing)

    def let_go(self) -> None:
        """Wait until no copy is held any more."""
        if self._writing is not None:
            self._writing.wait_for_part()

    def finish(self) -> bool:
        """Wait until nothing is being written any more; returns whether all of it was.  All processes call this.

        Raises:
            CommunicationFailed: a process is gone, for whose part rank 0 would wait.
        """
        group = self.work.group
        if not self._is_settled:
            if self._writing is not None and group.is_main_process:
                self.let_go()
            elif self._writing is not None:
                self._settle(self._writing)
            group.all_gather(None)
            self._is_settled = True
        was_written = True
        if self._writing is not None:
            was_written = self._settle(self._writing)
        was_written, self.last_step = group.broadcast((was_written, self.last_step))
        return was_written

    def close(self) -> None:
        """Wait until this process writes nothing any more, but not for ever for others."""
        if self._writing is not None:
            self._settle(self._writing, PATIENCE_S)

    def _settle(self, writing: BackgroundWrite, patience_s: float | None = None) -> bool:
        writing.join(patience_s)
        self._writing = None
        if writing.problem is not None:
            self._explained(writing.step, writing.nbytes, writing.problem, goes_on=True)
            return False
        self.last_step = writing.step
        return True

    def _copies_everywhere(self, draft: Draft) -> Sequence[Piece] | None:
        """Copy what this process writes, if all processes can; None, said once: they cannot."""
        group, copy_bytes = self.work.group, nbytes_of(draft.pieces)
        copies = self._copies(draft) if not copy_bytes or copy_bytes <= self.room_bytes else None
        can_tell = draft.is_whole or group.is_single_process or group.notes is not None
        everyones = group.all_gather((copies is not None and can_tell, copy_bytes, self.room_bytes))
        if all(is_made for is_made, _, _ in everyones):
            return copies
        rank, (_, copy_bytes, room_bytes) = next((rank, one) for rank, one in enumerate(everyones) if not one[0])
        if not self._told_of_room:
            where = "" if draft.is_whole else f" in rank {rank}"
            why = "does not fit beside the step, which leaves" if copy_bytes > room_bytes else "cannot be had, of"
            self.reporter.say(
                f"note    steps wait for checkpoints to be written: a copy of {format_bytes(copy_bytes)} to write them "
                f"from{where} {why} {format_bytes(max(0, room_bytes))}"
            )
        self._told_of_room = True
        return None

    def _copies(self, draft: Draft) -> Sequence[Piece] | None:
        try:
            return [piece.copied() for piece in draft.pieces]
        except (MemoryError, RuntimeError) as problem:
            if not is_out_of_memory(problem):
                raise
        return None

    def _write_behind(self, draft: Draft) -> str | None:
        """Begin to write a draft of copies while steps go on."""
        group = self.work.group
        temporary, problem = group.broadcast(tried(draft.begin) if group.is_main_process else (None, None))
        if problem is not None:
            return self._explained(draft.step, nbytes_of(draft.pieces), problem, goes_on=True)
        assert temporary is not None
        self._begun += 1
        self._is_settled = group.is_single_process or draft.is_whole
        if group.is_main_process or not draft.is_whole:
            others = () if draft.is_whole else range(1, group.world_size)
            self._writing = BackgroundWrite(draft, temporary, group, others, self._begun)
        return None

    def _write_together(self, draft: Draft) -> str | None:
        group = self.work.group
        temporary, problem = group.broadcast(tried(draft.begin) if group.is_main_process else (None, None))
        if problem is None:
            assert temporary is not None
            everyones = group.all_gather(tried(lambda: draft.write_tensors(temporary, group.rank)))
            problem = next((problem for _, problem in everyones if problem is not None), None)
            if problem is None and group.is_main_process:
                written = [one for one, _ in everyones if one is not None]
                _, problem = tried(lambda: draft.commit(temporary, written))
            if problem is not None and group.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full
        return group.broadcast(problem)

    def _explained(self, step: int, nbytes: int, problem: str, *, goes_on: bool) -> str:
        explained = (
            f"the checkpoint of step {step} could not be written to {self.folder} ({problem}); its tensors take "
            f"{format_bytes(nbytes)}. The checkpoints written before are complete."
        )
        if goes_on:
            self.reporter.say(f"{explained} The run goes on, and the next one is tried in its turn.", important=True)
        return explained

    def _flush_metrics(self) -> None:
        if self.metrics is not None:
            self.metrics.flush()

    def _extra(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"scaler": self.scaler.state_dict()}
        if average := self.average.state_dict():
            extra["average"] = average
        return extra
