"""Checkpoints: all that a run needs to resume bit for bit.

A checkpoint is a folder ``step-00000100`` with three files: ``training.safetensors`` (every tensor of weights,
optimizer, moving average and random generators), ``state.json`` (everything else: the step, the run's identity and
progress, and where each tensor belongs) and ``manifest.json`` (sizes and digests of the others).  Of a sharded model,
each further process has a file of its own for its shards (``training-00001.safetensors``).  Reading never runs code.

It is written under another name, flushed to disk and renamed; only then do the links ``latest`` and ``best`` move. So a
process may be killed at any moment: ``latest`` names a complete checkpoint, before or after. Later damage is noticed
by the digests; then the newest complete checkpoint is taken, and the damaged one is named and set aside.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.distributed.dtensor import is_dtensor
from tightfit.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from tightfit.errors import UnsupportedInput
from tightfit.train.files import flush_to_disk, remove_temporary
from tightfit.train.manifest import Damaged, Written, check_manifest, format_of, write_manifest
from tightfit.train.optimizer_state import require_state_of
from tightfit.train.plain_state import pack, unpack
from tightfit.train.shard_files import Piece, ShardFiles, in_order, pieces_of, save_file
from tightfit.train.shard_targets import targets_of

FORMAT_VERSION = 5
_RECOLLECT_FORMATS = (1, 2, 3)
LATEST, BEST = "latest", "best"
_REPLACED = ".replaced."
TENSORS = "training.safetensors"
STATE = "state.json"
_FOLDER = re.compile(r"step-(\d{8,})")
#: What reading a file ends in that was not written as we write it.
_NOT_OURS = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
#: A state is some kilobytes for each thousand tensors; whatever is larger was not written by us, and is not parsed.
_MOST_STATE_BYTES = 256 * 2**20
#: No run takes more.
_MOST_STEPS = 2**53


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
    files: tuple[str, ...] = (TENSORS,)
    """Names of those with tensors."""
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


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A checkpoint as one process is about to write it.

    First `begin`, then `write_tensors` in each process that has any, then `commit`; first and last are rank 0's.
    """

    checkpoints: Path
    """The folder of all checkpoints of the run."""
    step: int
    state: Mapping[str, Any]
    """What ``state.json`` holds."""
    pieces: Sequence[Piece]
    """The tensors that this process writes."""
    is_best: bool
    retention: Retention = KEEP_ALL
    is_whole: bool = True
    """Rank 0 writes all of it: nothing is sharded."""

    def begin(self) -> Path:
        """Make the temporary folder; not the run's, which somebody may have moved."""
        self.checkpoints.mkdir(exist_ok=True)
        remove_temporary(self.checkpoints)
        temporary = self.checkpoints / f".{self._name}.{os.getpid()}.tmp"
        temporary.mkdir()
        return temporary

    def write_tensors(self, temporary: Path, rank: int = 0) -> Written | None:
        """Write this process's tensors; None: it has none."""
        if not self.pieces and rank:
            return None
        return save_file(temporary / (f"training-{rank:05d}.safetensors" if rank else TENSORS), in_order(self.pieces))

    def commit(self, temporary: Path, written: Sequence[Written]) -> Path:
        """Write all else, and give the folder its name: only now there is such a checkpoint."""
        (temporary / STATE).write_text(json.dumps(self.state, allow_nan=False) + "\n", encoding="utf-8")
        write_manifest(temporary, FORMAT_VERSION, written)
        folder = self.checkpoints / self._name
        replaced = self.checkpoints / f".{self._name}{_REPLACED}{os.getpid()}.tmp"
        if os.path.lexists(folder):  # left by a run that was killed, or that went on from an earlier step
            folder.rename(replaced)
        try:
            temporary.rename(folder)
        except OSError:
            if os.path.lexists(replaced):
                replaced.rename(folder)
            raise
        for name in (LATEST, *((BEST,) if self.is_best else ())):
            _point(name, folder)
        _prune(self.checkpoints, self.retention)
        remove_temporary(self.checkpoints)
        return folder

    def write(self) -> Path:
        """Do all of it in one process; where that fails, nothing is left of it."""
        temporary = self.begin()
        try:
            written = self.write_tensors(temporary)
            assert written is not None
            return self.commit(temporary, [written])
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full
            raise

    @property
    def _name(self) -> str:
        return f"step-{self.step:08d}"


def draft_checkpoint(
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
    group: ProcessGroup = SINGLE_PROCESS,
) -> Draft:
    """Take apart what a checkpoint is to hold; the draft shares its tensors.  All processes call this.

    Args:
        checkpoints: the folder of all checkpoints of the run.
        step: optimizer steps done.
        identity, progress: see `Checkpoint`.
        model, optimizer: state dicts of what is trained, sharded or not.
        random_states: `random_state` of each process of the run, by rank.
        extra: more state, of tensors and plain data.
        is_best: it is the best so far.
        retention: which earlier ones stay.
        group: the processes of the run.

    Raises:
        UnsupportedInput: the state holds something that only code could load again.
    """
    held = {"model": model, "optimizer": optimizer, "random": list(random_states), "extra": dict(extra)}
    tensors, training = pack(held, shares=True)
    state: dict[str, Any] = {"step": step}
    for name, plain in (("identity", identity), ("progress", progress)):
        state[name] = {key: pack(value)[1] for key, value in plain.items()}
    state["training"] = training
    pieces = pieces_of(tensors, group)
    return Draft(
        checkpoints=checkpoints,
        step=step,
        state=state,
        pieces=pieces,
        is_best=is_best,
        retention=retention,
        is_whole=not any(map(is_dtensor, tensors.values())),
    )


def save_checkpoint(checkpoints: Path, **held: Any) -> Path:
    """Write ``checkpoints/step-…`` and let ``checkpoints/latest`` name it, and ``best`` too if it is the best.

    Takes what `draft_checkpoint` takes, and raises what that raises.
    """
    return draft_checkpoint(checkpoints, **held).write()


def read_checkpoint(folder: Path) -> Checkpoint:
    """Check ``folder`` and read its state, without loading its tensors.

    Raises:
        UnsupportedInput: it is not a complete checkpoint.
    """
    try:
        _refuse_other_formats(folder)
        names = check_manifest(folder, (TENSORS, STATE))
        if (folder / STATE).stat().st_size > _MOST_STATE_BYTES:
            raise Damaged(f"{STATE} is too large to be one")
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        step = state["step"]
        named = _FOLDER.fullmatch(folder.resolve().name)
        if type(step) is not int or not 1 <= step <= _MOST_STEPS:
            raise Damaged("its step is none that a run can take")
        if named is not None and int(named[1]) != step:
            raise Damaged(f"it is of step {step}, which is not what its name says")
        return Checkpoint(
            folder=folder.resolve(),
            step=step,
            identity={key: unpack(value, {}) for key, value in state["identity"].items()},
            progress={key: unpack(value, {}) for key, value in state["progress"].items()},
            files=tuple(name for name in names if name.endswith(".safetensors")),
        )
    except Damaged as problem:
        raise _incomplete(folder, str(problem)) from None
    except OSError as problem:
        raise _incomplete(folder, f"{Path(problem.filename or folder).name}: {problem.strerror}") from None
    except (*_NOT_OURS, RuntimeError) as problem:
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
        if not state.is_file() or state.stat().st_size > _MOST_STATE_BYTES:
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


def set_aside(folder: Path, why: str = "damaged") -> Path:
    """Give a damaged checkpoint a name under which nothing looks for one, and return that."""
    aside = folder.with_name(f"{folder.name}.{why}")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = folder.with_name(f"{folder.name}.{why}-{number}")
    return folder.rename(aside)


def restore_replaced(checkpoints: Path) -> None:
    """Give its name back to a checkpoint that was being replaced when its run was killed, before the new one had it."""
    for path in checkpoints.glob(f".step-*{_REPLACED}*.tmp"):
        folder = checkpoints / path.name[1:].partition(_REPLACED)[0]
        if not os.path.lexists(folder):
            with suppress(OSError):  # without it, the one before is used
                path.rename(folder)


def read_training_state(folder: Path) -> Mapping[str, Any]:
    """Read the tensors of a checkpoint that `read_checkpoint` has checked: ``model``, ``optimizer``, and others, whole.

    Raises:
        UnsupportedInput: they are not as `save_checkpoint` writes them.
    """
    return _read_training(folder, sorted(folder.glob("*.safetensors")))


def load_checkpoint(
    checkpoint: Checkpoint, *, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0, world_size: int = 1
) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Load model and optimizer, each process its own shards.

    Returns:
        What was given as ``extra``, its average sharded as the parameters are, and the state of this process's random
        generators; None where the run had another number of processes.
    """
    files = [checkpoint.folder / name for name in checkpoint.files]
    with fitting(checkpoint):
        saved = _read_training(checkpoint.folder, files, model, optimizer)
        require_state_of(optimizer, saved["optimizer"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        states = saved["random"]
        return saved["extra"], states[rank] if len(states) == world_size else None


@contextmanager
def fitting(checkpoint: Checkpoint) -> Iterator[None]:
    """Inside, errors of what a checkpoint is loaded into say that it does not fit.

    Raises:
        UnsupportedInput: as it is of another model, or not as a run writes it.
    """
    try:
        yield
    except UnsupportedInput:
        raise
    except (RuntimeError, ArithmeticError, LookupError, *_NOT_OURS) as problem:
        if is_out_of_memory(problem):
            raise
        raise UnsupportedInput(
            f"the checkpoint {checkpoint.folder} does not fit this model ({problem}). "
            f"Resume with the model that wrote it, or begin another run with --mark NAME."
        ) from None


def _read_training(
    folder: Path,
    files: Sequence[Path],
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Mapping[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        found = ShardFiles(files)
        targets = targets_of(found, model, optimizer)
        found.read_into(targets)
        saved = unpack(state["training"], targets)
        return {name: saved[name] for name in ("model", "optimizer", "random", "extra")}
    except (OSError, SafetensorError, *_NOT_OURS, RuntimeError) as problem:
        raise _incomplete(folder, f"what it holds cannot be understood ({problem})") from None


def _incomplete(folder: Path, why: str) -> UnsupportedInput:
    return UnsupportedInput(
        f"{folder} is not a complete checkpoint: {why}. A run cannot be resumed from it. "
        f"Name another folder checkpoints/step-..., or use --resume auto to take the newest complete one."
    )


def _point(name: str, folder: Path) -> None:
    link = folder.with_name(f".{name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name, target_is_directory=True)
    place = folder.with_name(name)
    if place.exists() and not place.is_symlink():  # copying the run has followed its links, or written them as files
        set_aside(place, "copied")
    os.replace(link, place)
    flush_to_disk(folder.parent)


def _numbered(checkpoints: Path) -> list[Path]:
    """Return the folders of checkpoints, the newest first."""
    found = [path for path in checkpoints.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _prune(checkpoints: Path, retention: Retention) -> None:
    """Give what does not stay names that this save or a later one removes."""
    always = {(checkpoints / name).resolve() for name in (LATEST, BEST)}
    for newer, folder in enumerate(_numbered(checkpoints)):
        if not retention.stays(_step_of(folder), newer) and folder.resolve() not in always:
            with suppress(OSError):  # the checkpoint that was written is as good with it
                folder.rename(checkpoints / f".{folder.name}.pruned.{os.getpid()}.tmp")
