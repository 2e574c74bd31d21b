"""A checkpoint that is written while steps go on: a thread of each process writes its part, from a copy of it.

Rank 0 makes the parts a checkpoint as soon as all are on disk.  It learns that from notes, which pass beside all
collectives, so that no step waits for it, and the checkpoint is complete long before the next one.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.distributed.process_group import ProcessGroup
from tightfit.errors import first_line
from tightfit.train.checkpoint import Draft
from tightfit.train.manifest import Written
from tightfit.train.shard_files import nbytes_of

Result = TypeVar("Result")
_LOOK_S = 0.02
#: For the parts of others when an error ends this process: one of them may be gone.
PATIENCE_S = 10.0


def tried(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Return what `work` gives, and why the disk or the memory did not let it."""
    try:
        return work(), None
    except (OSError, SafetensorError) as problem:
        return None, getattr(problem, "strerror", None) or first_line(problem)
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        return None, "there is no memory left to write it"


class BackgroundWrite:
    """What one process writes of a checkpoint, and, in rank 0, the rest of it.

    Args:
        draft: with copies of tensors, which nothing else changes or needs.
        temporary: the folder that rank 0 has begun.
        group: the processes of the run.
        others: ranks whose parts belong to it, besides that of rank 0.
        number: of this checkpoint among those of the run's present processes.
    """

    def __init__(
        self, draft: Draft, temporary: Path, group: ProcessGroup, others: Sequence[int] = (), number: int = 0
    ) -> None:
        self.step = draft.step
        self.nbytes = nbytes_of(draft.pieces)
        """Of this process's part."""
        self.problem: str | None = None
        """Why it could not be written; not known before it is over."""
        self._draft = draft
        self._temporary = temporary
        self._group = group
        self._others = others
        self._number = number
        self._has_part = threading.Event()
        self._is_given_up = threading.Event()
        self._is_over = threading.Event()
        try:
            threading.Thread(target=self._run, name="checkpoint").start()
        except RuntimeError:  # the system has no memory for one
            self._run()

    @property
    def is_over(self) -> bool:
        """Whether this process has nothing to do for it any more."""
        return self._is_over.is_set()

    @property
    def held_bytes(self) -> int:
        """Bytes that the copy takes at the moment."""
        return 0 if self._has_part.is_set() else self.nbytes

    def wait_for_part(self) -> None:
        """Wait until this process's part is written, or cannot be; its copy is gone then."""
        self._has_part.wait()

    def join(self, patience_s: float | None = None) -> None:
        """Wait until it is over; for other processes' parts so long at most."""
        self.wait_for_part()
        self._is_over.wait(patience_s)
        self._is_given_up.set()
        self._is_over.wait()

    def _run(self) -> None:
        try:
            written, self.problem = self._write_part()
        except Exception as unforeseen:  # a thread's error is nobody's: it must not pass for a checkpoint
            written, self.problem = None, first_line(unforeseen)
        self._draft = replace(self._draft, pieces=())
        self._has_part.set()
        try:
            if self._group.is_main_process:
                self._complete(written)
            elif self._group.notes is not None:
                self._group.notes.leave(
                    self._key(self._group.rank), [None if written is None else asdict(written), self.problem]
                )
        except Exception as unforeseen:
            self.problem = self.problem or first_line(unforeseen)
            if self._group.is_main_process:
                shutil.rmtree(self._temporary, ignore_errors=True)
        self._is_over.set()

    def _write_part(self) -> tuple[Written | None, str | None]:
        return tried(lambda: self._draft.write_tensors(self._temporary, self._group.rank))

    def _complete(self, written: Written | None) -> None:
        """Wait for the others' parts, and make all of them a checkpoint; where that fails, leave nothing."""
        parts = [] if written is None else [written]
        for rank in self._others:
            part, problem = self._part_of(rank)
            parts += [] if part is None else [part]
            self.problem = self.problem or problem
        if self.problem is None:
            _, self.problem = tried(lambda: self._draft.commit(self._temporary, parts))
        if self.problem is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)  # the disk may be full

    def _part_of(self, rank: int) -> tuple[Written | None, str | None]:
        assert self._group.notes is not None
        while True:
            note = self._group.notes.take(self._key(rank))
            if note is not None:
                part, problem = note
                return None if part is None else Written(**part), problem
            if self._is_given_up.is_set():
                return None, f"rank {rank} has not written its part"
            time.sleep(_LOOK_S)

    def _key(self, rank: int) -> str:
        return f"checkpoint/{self._number}/{rank}"
