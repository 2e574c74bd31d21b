"""The folder of a run, ``ROOT_PATH/DATASET/MARK``: its configuration, log, metrics, checkpoints and model."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tightfit.device.registry import devices
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from tightfit.errors import UnsupportedInput, remedy_for
from tightfit.records import Plan, Profile
from tightfit.report.metric_rows import read_metric_rows
from tightfit.report.run_files import PAGE, PROFILE, read_run, refuse_made_up, refuse_recollect
from tightfit.report.run_page import render
from tightfit.train.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint, restore_replaced, set_aside
from tightfit.train.config import TrainConfig, to_yaml
from tightfit.train.data import data_name
from tightfit.train.failures import TrainingFailed
from tightfit.train.files import remove_temporary, replacing, write_text
from tightfit.train.parallel.fsdp import unsharded
from tightfit.train.registry import folder_name
from tightfit.train.run_lock import LOCK
from tightfit.train.shard_files import Piece, in_order, save_file

_PACKAGES = ("tightfit", "torch", "numpy", "highspy", "transformers")


class RunFolder:
    """The paths and files of one run. Only `open` and later writes touch the disk."""

    def __init__(self, config: TrainConfig) -> None:
        assert config.dataset is not None
        mark = folder_name(config.mark or config.model)
        self.path = Path(config.root_path) / data_name(config.dataset) / mark
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / "log.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.model = self.path / "model.safetensors"

    def check_place(self) -> None:
        """Raise `UnsupportedInput` if the folder cannot be made, or nothing can be written into it."""
        if self.path.exists() and not self.path.is_dir():
            raise UnsupportedInput(
                f"{self.path} is a file, but the run's folder belongs there. Choose another --mark or --root-path."
            )
        self._require_writable()

    def tidy(self) -> None:
        """Remove what a run that was killed had half written; the folder's lock must be held."""
        restore_replaced(self.checkpoints)
        remove_temporary(self.path)

    def find_checkpoint(self, resume: str | None) -> Checkpoint | None:
        """Find the checkpoint to resume from; None: begin at the first step.

        Raises:
            UnsupportedInput: the folder is in use and ``resume`` is None, or what ``resume`` names does not exist.
        """
        in_use = self.path.is_dir() and any(path.name != LOCK for path in self.path.iterdir())
        if in_use:
            refuse_made_up(self.path)
            refuse_recollect(self.path)
        if resume is None:
            if in_use:
                raise UnsupportedInput(
                    f"the run folder {self.path} already holds a run, and nothing is overwritten. "
                    f"Continue it with --resume auto, or begin another one with --mark NAME."
                )
            return None
        if resume == "auto":
            return newest_checkpoint(self.checkpoints)
        checkpoint = _named_checkpoint(Path(resume))
        if in_use and checkpoint.folder.parent != self.checkpoints.resolve():
            raise UnsupportedInput(
                f"--resume {resume} belongs to another run, but the run folder {self.path} already holds one, and "
                f"nothing is overwritten. Begin a new folder with --mark NAME."
            )
        return checkpoint

    def _require_writable(self) -> None:
        nearest = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not nearest.is_dir():
            raise UnsupportedInput(
                f"the run's folder {self.path} cannot be made, because {nearest} is a file. Choose another --root-path."
            )
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UnsupportedInput(
                f"nothing can be written to {nearest}, where the run's folder {self.path} belongs. "
                f"Choose another --root-path, or change the folder's permissions."
            )

    def open(
        self,
        config: TrainConfig,
        command: Sequence[str],
        plan: Plan,
        profile: Profile | None,
        checkpoint: Checkpoint | None,
    ) -> Sequence[str]:
        """Make the folder, or reopen it: drop metrics of steps that will be done again, and keep everything else.

        Returns what was found damaged there, and what became of it.
        """
        notes = self.set_damaged_aside(checkpoint)
        first_step = 0 if checkpoint is None else checkpoint.step
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for path in (*remove_temporary(self.path), *remove_temporary(self.checkpoints)):
            notes.append(f"{path} is left from before and cannot be removed; remove it, it is of no use")
        write_text(self.path / "config.yaml", to_yaml(config))
        with (self.path / "command.txt").open("a", encoding="utf-8") as stream:
            stream.write(shlex.join(command) + "\n")
        write_text(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        (self.path / PROFILE).unlink(missing_ok=True)
        with replacing(self.path / "plan.json") as temporary:
            plan.save(temporary)
        if profile is not None:  # what the plan was solved from
            with replacing(self.path / PROFILE) as temporary:
                profile.save(temporary)
        (self.path / PAGE).unlink(missing_ok=True)  # of the run's earlier end
        logged = read_metric_rows(self.metrics)
        if logged.damaged:
            aside = self.metrics.with_name(f"{self.metrics.name}.damaged")
            shutil.copy2(self.metrics, aside)
            notes.append(
                f"{logged.damaged} lines of {self.metrics.name} are damaged and left out; {aside.name} keeps them"
            )
        kept = [line for row, line in zip(logged.rows, logged.lines, strict=True) if row["step"] <= first_step]
        write_text(self.metrics, "".join(f"{line}\n" for line in kept))
        return notes

    def set_damaged_aside(self, checkpoint: Checkpoint | None) -> list[str]:
        """Rename checkpoints that were passed over for this one, and return what to say of it."""
        notes = []
        for folder in () if checkpoint is None else checkpoint.damaged:
            aside = set_aside(folder)
            notes.append(f"the checkpoint {folder.name} is damaged: it is set aside as {aside.name}, and not used")
        return notes

    def is_newest(self, checkpoint: Checkpoint) -> bool:
        """Tell whether nothing in the folder is after this checkpoint."""
        newest = newest_checkpoint(self.checkpoints)
        return newest is not None and newest.folder == checkpoint.folder

    def is_finished(self, step: int) -> bool:
        """Tell whether the model of a run that ended after `step` steps is written, or that of a later end.

        The page is written after the model, and dropped when the run goes on.
        """
        summary = read_run(self.path).summary if self.model.exists() else None
        steps = None if summary is None else summary.get("steps")
        return isinstance(steps, int) and steps >= step

    def save_model(self, state: Mapping[str, Any], step: int, group: ProcessGroup = SINGLE_PROCESS) -> None:
        """Write ``model.safetensors``, with each key of the state dict, also of tied weights.

        All processes call this.  Of a sharded model, one tensor after the other is gathered and written by rank 0.

        Raises:
            TrainingFailed: there is no room on the disk.
        """
        # A module's own extra state is in the checkpoints.
        pieces = in_order(Piece(name, tensor) for name, tensor in state.items() if isinstance(tensor, Tensor))
        contents = (unsharded(piece.tensor) for piece in pieces)
        problem = None
        if group.is_main_process:
            try:
                with replacing(self.model) as temporary:
                    save_file(temporary, pieces, contents)
            except OSError as error:
                problem = str(error)
        for _ in contents:
            pass  # the others take part in all of them
        problem = group.broadcast(problem)
        if problem is not None:
            raise TrainingFailed(
                f"the model could not be written to {self.model} ({problem}). The checkpoint of step {step} is "
                f"complete. {remedy_for(problem)}, and give the same command with --resume auto, which writes the "
                f"model."
            )

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the run's HTML page, with its summary."""
        write_text(self.path / PAGE, render(replace(read_run(self.path), summary=summary)))


def _named_checkpoint(path: Path) -> Checkpoint:
    """Find the checkpoint at ``path``: its own folder, or a run's folder."""
    if not path.exists():
        raise UnsupportedInput(
            f"there is no checkpoint at {path}, which --resume names; training from scratch instead would hide that. "
            f"Check the path, or use --resume auto."
        )
    if (path / "checkpoints").is_dir():
        checkpoint = newest_checkpoint(path / "checkpoints")
        if checkpoint is None:
            raise UnsupportedInput(
                f"the run folder {path} holds no checkpoint, so there is nothing to resume. Use --resume auto there."
            )
        return checkpoint
    return read_checkpoint(path)


def environment() -> dict[str, Any]:
    """Describe what this process runs on."""
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "accelerators": [device.name() for device in devices() if not device.is_host],
        "packages": {name: _version(name) for name in _PACKAGES} | {"torch": str(torch.__version__)},  # and its build
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
