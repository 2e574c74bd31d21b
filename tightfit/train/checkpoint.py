"""Checkpoints: all that a run needs to go on bit for bit.

A checkpoint is a folder ``step-00000100`` with two files: ``training.pt`` (weights, optimizer, moving average, loss
scaler, random generators; loads with ``weights_only=True``) and ``state.json`` (the step, what the run is, how it went
so far, size and digest of ``training.pt``).

It is written under another name, flushed to disk and renamed; only then do the links ``latest`` and ``best`` move. So a
process may be killed at any moment: ``latest`` names a whole checkpoint, before or after. Damage that happens later is
noticed by the digest; then the newest whole checkpoint is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tightfit.device.process_state import device_random_states, set_device_random_states
from tightfit.errors import UnsupportedInput
from tightfit.train.files import flush_to_disk
from tightfit.train.parallel.fsdp import parts_of_model, parts_of_optimizer

FORMAT_VERSION = 3
LATEST, BEST = "latest", "best"
_TENSORS = "training.pt"
_STATE = "state.json"
_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    step: int
    """Optimizer steps done."""
    identity: Mapping[str, object]
    """What the run is: another identity cannot continue it."""
    progress: Mapping[str, Any]
    """How the run went so far; see `tightfit.train.progress`."""


def save_checkpoint(
    checkpoints: Path,
    *,
    step: int,
    identity: Mapping[str, object],
    progress: Mapping[str, Any],
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    random_states: Sequence[Mapping[str, Any]],
    further: Mapping[str, Any],
    is_best: bool,
) -> Path:
    """Write ``checkpoints/step-…`` and let ``checkpoints/latest`` name it, and ``best`` too if it is that.

    Args:
        checkpoints: the folder of all checkpoints of the run.
        step: optimizer steps done.
        identity, progress: see `Checkpoint`.
        model, optimizer: state dicts of what is trained, whole.
        random_states: `random_state` of each process of the run, by rank.
        further: more state, of tensors and plain data.
        is_best: it is the best so far.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(checkpoints)
    folder = checkpoints / f"step-{step:08d}"
    temporary = checkpoints / f".{folder.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    tensors = temporary / _TENSORS
    torch.save(
        {
            "model": model,
            "optimizer": optimizer,
            "random": [dict(state) for state in random_states],
            "further": dict(further),
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
    _remove_leftovers(checkpoints)
    return folder


def read_checkpoint(folder: Path) -> Checkpoint:
    """Judge ``folder`` without loading its tensors.

    Raises:
        UnsupportedInput: it is not a whole checkpoint.
    """
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        tensors = folder / _TENSORS
        if state["format_version"] != FORMAT_VERSION:
            raise _not_whole(folder, f"its format is {state['format_version']}, this version reads {FORMAT_VERSION}")
        if tensors.stat().st_size != state["size_bytes"] or _digest(tensors) != state["sha256"]:
            raise _not_whole(folder, f"{_TENSORS} is not what was written (its digest differs)")
        return Checkpoint(
            folder=folder.resolve(),
            step=int(state["step"]),
            identity=dict(state["identity"]),
            progress=dict(state["progress"]),
        )
    except OSError as problem:
        raise _not_whole(folder, f"{Path(problem.filename or folder).name}: {problem.strerror}") from None
    except (ValueError, KeyError, TypeError) as problem:
        if isinstance(problem, UnsupportedInput):
            raise
        raise _not_whole(folder, f"{_STATE} cannot be understood") from None


def newest_checkpoint(checkpoints: Path) -> Checkpoint | None:
    """The one that ``latest`` names if it is whole, else the newest whole one; None if none was ever written.

    Raises:
        UnsupportedInput: there are checkpoints, but none is whole.
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
) -> tuple[Mapping[str, Any], bool]:
    """Put model, optimizer and random generators back to where they were.

    Returns:
        What was given as ``further``, and whether the random generators of this process were among what was saved: they
        are not where the run had another number of processes.
    """
    saved = torch.load(checkpoint.folder / _TENSORS, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(parts_of_model(saved["model"], model))
        optimizer.load_state_dict(parts_of_optimizer(saved["optimizer"], optimizer))
    except (RuntimeError, ValueError, KeyError) as problem:
        raise UnsupportedInput(
            f"the checkpoint {checkpoint.folder} does not fit this model: {problem} "
            f"Resume with the model that wrote it."
        ) from None
    states = saved["random"]
    known = len(states) == world_size
    if known:
        _restore_random_state(states[rank])
    return saved["further"], known


def _not_whole(folder: Path, why: str) -> UnsupportedInput:
    return UnsupportedInput(
        f"{folder} is not a whole checkpoint: {why}. A run cannot go on from it. "
        f"Name another folder checkpoints/step-..., or use --resume auto to take the newest whole one."
    )


def _point(name: str, folder: Path) -> None:
    link = folder.with_name(f".{name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name, target_is_directory=True)
    os.replace(link, folder.with_name(name))
    flush_to_disk(folder.parent)


def _remove_leftovers(checkpoints: Path) -> None:
    """Remove what a killed process left half-written: names that begin with a dot and end with ``.tmp``."""
    for path in checkpoints.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def random_state() -> dict[str, Any]:
    """Of all random generators of this process, as plain data and tensors."""
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    return {
        "python": [version, list(internal), gauss],
        "numpy": {
            "key": numpy_state["state"]["key"].tolist(),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "devices": device_random_states(),
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(numpy_state["key"], dtype=np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    set_device_random_states(state["devices"])
