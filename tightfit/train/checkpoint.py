"""Checkpoints: all that a run needs to resume bit for bit.

A checkpoint is a folder ``step-00000100`` with two files: ``training.pt`` (weights, optimizer, moving average, loss
scaler, random generators; loads with ``weights_only=True``) and ``state.json`` (the step, the run's identity and
progress, size and digest of ``training.pt``).

It is written under another name, flushed to disk and renamed; only then do the links ``latest`` and ``best`` move. So a
process may be killed at any moment: ``latest`` names a complete checkpoint, before or after. Later damage is noticed
by the digest; then the newest complete checkpoint is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tightfit.errors import UnsupportedInput
from tightfit.train.files import flush_to_disk
from tightfit.train.parallel.fsdp import shards_of_model, shards_of_optimizer

FORMAT_VERSION = 4
_RECOLLECT_FORMATS = (1, 2, 3)
LATEST, BEST = "latest", "best"
_TENSORS = "training.pt"
_STATE = "state.json"
_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    """Optimizer steps done."""
    identity: Mapping[str, object]
    """The settings and data of the run, which may not change when it is resumed."""
    progress: Mapping[str, Any]
    """How the run went so far, as `Progress.to_json` gives it."""


def save_checkpoint(
    checkpoints: Path,
    *,
    step: int,
    identity: Mapping[str, object],
    progress: Mapping[str, Any],
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    random_states: Sequence[Mapping[str, Any]],
    extra: Mapping[str, Any],
    is_best: bool,
) -> Path:
    """Write ``checkpoints/step-…`` and let ``checkpoints/latest`` name it, and ``best`` too if it is the best.

    Args:
        checkpoints: the folder of all checkpoints of the run.
        step: optimizer steps done.
        identity, progress: see `Checkpoint`.
        model, optimizer: state dicts of what is trained, unsharded.
        random_states: `random_state` of each process of the run, by rank.
        extra: more state, of tensors and plain data.
        is_best: it is the best so far.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    _remove_temporary(checkpoints)
    folder = checkpoints / f"step-{step:08d}"
    temporary = checkpoints / f".{folder.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    tensors = temporary / _TENSORS
    torch.save(
        {
            "model": model,
            "optimizer": optimizer,
            "random": [dict(state) for state in random_states],
            "extra": dict(extra),
        },
        tensors,
    )
    state = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "identity": dict(identity),
        "progress": dict(progress),
        "size_bytes": tensors.stat().st_size,
        "sha256": _digest(tensors),
    }
    (temporary / _STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    for path in (tensors, temporary / _STATE, temporary):
        flush_to_disk(path)
    if folder.exists():  # left by a run that was killed, or that went on from an earlier step
        folder.rename(checkpoints / f".{folder.name}.replaced.{os.getpid()}.tmp")
    temporary.rename(folder)
    for name in (LATEST, *((BEST,) if is_best else ())):
        _point(name, folder)
    _remove_temporary(checkpoints)
    return folder


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check ``folder`` and read its state, without loading its tensors.

    Raises:
        UnsupportedInput: it is not a complete checkpoint.
    """
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        tensors = folder / _TENSORS
        version = state["format_version"]
        if version in _RECOLLECT_FORMATS:
            raise UnsupportedInput(
                f"{folder} was written by recollect 0.1, as tightfit was called before, in checkpoint format "
                f"{version}. This version reads format {FORMAT_VERSION} only, so it cannot resume from there. Begin "
                f"another run with --mark NAME."
            )
        if version != FORMAT_VERSION:
            raise _incomplete(folder, f"its format is {version}, this version reads {FORMAT_VERSION}")
        if tensors.stat().st_size != state["size_bytes"] or _digest(tensors) != state["sha256"]:
            raise _incomplete(folder, f"{_TENSORS} is not what was written (its digest differs)")
        return Checkpoint(
            folder=folder.resolve(),
            step=int(state["step"]),
            identity=dict(state["identity"]),
            progress=dict(state["progress"]),
        )
    except OSError as problem:
        raise _incomplete(folder, f"{Path(problem.filename or folder).name}: {problem.strerror}") from None
    except (ValueError, KeyError, TypeError) as problem:
        if isinstance(problem, UnsupportedInput):
            raise
        raise _incomplete(folder, f"{_STATE} cannot be understood") from None


def newest_checkpoint(checkpoints: Path) -> Checkpoint | None:
    """Find the one that ``latest`` names if it is complete, else the newest complete one; None if there is none.

    Raises:
        UnsupportedInput: there are checkpoints, but none is complete.
    """
    if not checkpoints.is_dir():
        return None
    numbered = sorted((path for path in checkpoints.iterdir() if _FOLDER.fullmatch(path.name)), reverse=True)
    candidates = [checkpoints / LATEST, *numbered] if (checkpoints / LATEST).exists() else numbered
    problem = None
    for candidate in candidates:
        try:
            return read_checkpoint(candidate)
        except UnsupportedInput as damage:
            problem = problem or damage
    if problem is not None:
        raise problem
    return None


def load_checkpoint(
    checkpoint: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, world_size: int = 1
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Load model and optimizer.

    Returns:
        What was given as ``extra``, and the state of this process's random generators; None where the run had another
        number of processes.
    """
    saved = torch.load(checkpoint.folder / _TENSORS, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(shards_of_model(saved["model"], model))
        optimizer.load_state_dict(shards_of_optimizer(saved["optimizer"], optimizer))
    except (RuntimeError, ValueError, KeyError) as problem:
        raise UnsupportedInput(
            f"the checkpoint {checkpoint.folder} does not fit this model: {problem} "
            f"Resume with the model that wrote it."
        ) from None
    states = saved["random"]
    return saved["extra"], states[rank] if len(states) == world_size else None


def _incomplete(folder: Path, why: str) -> UnsupportedInput:
    return UnsupportedInput(
        f"{folder} is not a complete checkpoint: {why}. A run cannot be resumed from it. "
        f"Name another folder checkpoints/step-..., or use --resume auto to take the newest complete one."
    )


def _point(name: str, folder: Path) -> None:
    link = folder.with_name(f".{name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name, target_is_directory=True)
    os.replace(link, folder.with_name(name))
    flush_to_disk(folder.parent)


def _remove_temporary(checkpoints: Path) -> None:
    """Remove what a killed process left behind: names that begin with a dot and end with ``.tmp``."""
    for path in checkpoints.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
