"""Checkpoints: all that a run needs to resume bit for bit.

A checkpoint is a folder ``step-00000100`` with three files: ``training.safetensors`` (every tensor of weights,
optimizer, moving average and random generators), ``state.json`` (everything else: the step, the run's identity and
progress, and where each tensor belongs) and ``manifest.json`` (sizes and digests of the two).  Reading one never runs
code.

It is written under another name, flushed to disk and renamed; only then do the links ``latest`` and ``best`` move. So a
process may be killed at any moment: ``latest`` names a complete checkpoint, before or after. Later damage is noticed
by the digests; then the newest complete checkpoint is taken, and the damaged one is named and set aside.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tightfit.errors import UnsupportedInput
from tightfit.train.files import flush_to_disk
from tightfit.train.manifest import Damaged, check_manifest, format_of, write_manifest
from tightfit.train.parallel.fsdp import shards_of_model, shards_of_optimizer
from tightfit.train.plain_state import pack, unpack

FORMAT_VERSION = 5
_RECOLLECT_FORMATS = (1, 2, 3)
LATEST, BEST = "latest", "best"
TENSORS = "training.safetensors"
STATE = "state.json"
_FOLDER = re.compile(r"step-(\d{8,})")
#: What reading a file ends in that was not written as we write it.
_NOT_OURS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
#: A state is some kilobytes for each thousand tensors; whatever is larger was not written by us, and is not parsed.
_MOST_STATE_BYTES = 256 * 2**20


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
    damaged: tuple[Path, ...] = ()
    """Newer ones that are not complete, and were passed over for this one."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints of a run stay; the latest and the best always do."""

    last: int | None = None
    """So many of the newest; None: all of them, or with `every` the latest alone."""
    every: int | None = None
    """Those whose step is a multiple of this."""

    def stays(self, step: int, newer: int) -> bool:
        """Tell whether the checkpoint of a step stays, of which so many are newer."""
        if self.last is None and self.every is None:
            return True
        return newer < (self.last or 1) or (self.every is not None and step % self.every == 0)


KEEP_ALL = Retention()


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
    retention: Retention = KEEP_ALL,
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
        retention: which earlier ones stay.

    Raises:
        UnsupportedInput: the state holds something that only code could load again.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    _remove_temporary(checkpoints)
    folder = checkpoints / f"step-{step:08d}"
    temporary = checkpoints / f".{folder.name}.{os.getpid()}.tmp"
    temporary.mkdir()
    tensors, training = pack(
        {"model": model, "optimizer": optimizer, "random": list(random_states), "extra": dict(extra)}
    )
    save_file(tensors, temporary / TENSORS)
    state: dict[str, Any] = {"step": step}
    for name, plain in (("identity", identity), ("progress", progress)):
        state[name] = {key: pack(value)[1] for key, value in plain.items()}
    state["training"] = training
    (temporary / STATE).write_text(json.dumps(state, allow_nan=False) + "\n", encoding="utf-8")
    for path in temporary.iterdir():
        path.chmod(0o666 & ~_umask())  # safetensors lets only the owner read
    write_manifest(temporary, FORMAT_VERSION)
    if folder.exists():  # left by a run that was killed, or that went on from an earlier step
        folder.rename(checkpoints / f".{folder.name}.replaced.{os.getpid()}.tmp")
    temporary.rename(folder)
    for name in (LATEST, *((BEST,) if is_best else ())):
        _point(name, folder)
    _prune(checkpoints, retention)
    _remove_temporary(checkpoints)
    return folder


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check ``folder`` and read its state, without loading its tensors.

    Raises:
        UnsupportedInput: it is not a complete checkpoint.
    """
    try:
        _refuse_other_formats(folder)
        check_manifest(folder, (TENSORS, STATE))
        if (folder / STATE).stat().st_size > _MOST_STATE_BYTES:
            raise Damaged(f"{STATE} is too large to be one")
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        step = state["step"]
        named = _FOLDER.fullmatch(folder.resolve().name)
        if type(step) is not int or step < 1 or (named is not None and int(named[1]) != step):
            raise Damaged(f"it is of step {step}, which is not what its name says")
        return Checkpoint(
            folder=folder.resolve(),
            step=step,
            identity={key: unpack(value, {}) for key, value in state["identity"].items()},
            progress={key: unpack(value, {}) for key, value in state["progress"].items()},
        )
    except Damaged as problem:
        raise _incomplete(folder, str(problem)) from None
    except OSError as problem:
        raise _incomplete(folder, f"{Path(problem.filename or folder).name}: {problem.strerror}") from None
    except _NOT_OURS as problem:
        if isinstance(problem, UnsupportedInput):
            raise
        raise _incomplete(folder, f"{STATE} cannot be understood") from None


def _refuse_other_formats(folder: Path) -> None:
    try:
        version: int | None = format_of(folder)
    except Damaged:
        version = _format_without_manifest(folder)
        if version is None:
            raise
    if version in _RECOLLECT_FORMATS:
        raise UnsupportedInput(
            f"{folder} was written by recollect 0.1, as tightfit was called before, in checkpoint format "
            f"{version}. This version reads format {FORMAT_VERSION} only, so it cannot resume from there. Begin "
            f"another run with --mark NAME."
        )
    if version != FORMAT_VERSION:
        raise _incomplete(folder, f"its format is {version}, this version reads {FORMAT_VERSION}")


def _format_without_manifest(folder: Path) -> int | None:
    """Return the format of a checkpoint that an earlier version wrote, which had no manifest; None: it is not one."""
    state = folder / STATE
    try:
        if state.stat().st_size > _MOST_STATE_BYTES:
            return None
        version = json.loads(state.read_text(encoding="utf-8")).get("format_version")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return version if type(version) is int and version < FORMAT_VERSION else None


def newest_checkpoint(checkpoints: Path) -> Checkpoint | None:
    """Find the one that ``latest`` names if it is complete, else the newest complete one; None if there is none.

    Raises:
        UnsupportedInput: there are checkpoints, but none is complete.
    """
    if not checkpoints.is_dir():
        return None
    numbered = _numbered(checkpoints)
    latest = checkpoints / LATEST
    # Followed only within the folder, whoever made it.
    if latest.is_symlink() and (named := checkpoints / latest.readlink().name) in numbered:
        numbered.remove(named)
        numbered.insert(0, named)
    damaged: list[Path] = []
    problem = None
    for candidate in numbered:
        try:
            return replace(read_checkpoint(candidate), damaged=tuple(damaged))
        except UnsupportedInput as found:
            problem = problem or found
            damaged.append(candidate)
    if problem is not None:
        raise problem
    return None


def set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint a name under which nothing looks for one, and return that."""
    aside = folder.with_name(f"{folder.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged-{number}")
    return folder.rename(aside)


def read_training_state(folder: Path) -> Mapping[str, Any]:
    """Read the tensors of a checkpoint that `read_checkpoint` has checked: ``model``, ``optimizer``, and others.

    Raises:
        UnsupportedInput: they are not as `save_checkpoint` writes them.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        saved = unpack(state["training"], load_file(folder / TENSORS))
        return {name: saved[name] for name in ("model", "optimizer", "random", "extra")}
    except (OSError, SafetensorError, *_NOT_OURS, RuntimeError) as problem:
        raise _incomplete(folder, f"what it holds cannot be understood ({problem})") from None


def load_checkpoint(
    checkpoint: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, world_size: int = 1
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Load model and optimizer.

    Returns:
        What was given as ``extra``, and the state of this process's random generators; None where the run had another
        number of processes.
    """
    saved = read_training_state(checkpoint.folder)
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


def _numbered(checkpoints: Path) -> list[Path]:
    """Return the folders of checkpoints, the newest first."""
    found = [path for path in checkpoints.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _prune(checkpoints: Path, retention: Retention) -> None:
    """Remove what does not stay, one after the other, each first under a name that a later save would remove."""
    always = {(checkpoints / name).resolve() for name in (LATEST, BEST)}
    for newer, folder in enumerate(_numbered(checkpoints)):
        if not retention.stays(_step_of(folder), newer) and folder.resolve() not in always:
            shutil.rmtree(folder.rename(checkpoints / f".{folder.name}.pruned.{os.getpid()}.tmp"))


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
