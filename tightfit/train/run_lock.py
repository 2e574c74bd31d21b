"""One run at a time in a folder: a lock that the system takes back from a process that ends, however it ends."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tightfit.errors import UnsupportedInput

try:
    import fcntl
except ModuleNotFoundError:  # not a POSIX system: two runs at once are not noticed
    _HAS_LOCKS = False
else:
    _HAS_LOCKS = True

LOCK = ".lock"
#: A run whose launcher was killed ends within this (`orphans`); the same command, given again at once, then goes on.
_WAIT_S = 30.0
_LOOK_S = 0.1


@contextmanager
def only_run_in(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder's lock inside the context; what was made for it alone is removed afterwards.

    Record locks (`lockf`) are not inherited: a data loader's worker that outlives its run does not keep the folder.

    Raises:
        UnsupportedInput: another process keeps holding it.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = folder / LOCK
    try:
        descriptor = _take(lock, say)
        try:
            yield
        finally:
            with suppress(OSError):  # left there it locks nobody out, and the run's own error is worth more
                lock.unlink()
            os.close(descriptor)
    finally:
        with suppress(OSError):  # a run has begun there
            for path in missing:
                path.rmdir()


def _take(lock: Path, say: Callable[[str], None]) -> int:
    deadline = time.monotonic() + _WAIT_S
    told = False
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open(lock)
        except FileNotFoundError:  # who made the folder for its lock alone has just removed it
            if time.monotonic() > deadline:
                raise
            continue
        if _is_locked_by_us(descriptor) and _is_at(lock, descriptor):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        holder = os.read(descriptor, 200).decode("utf-8", errors="replace") or "another process"
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise UnsupportedInput(
                f"{holder} is training in {lock.parent}, and two runs in one folder would overwrite each other. "
                f"Wait until it has ended, or begin another run with --mark NAME."
            )
        if not told:
            say(f"waiting for {holder}, which is training in {lock.parent}")
            told = True
        time.sleep(_LOOK_S)


def _open(lock: Path) -> int:
    """Open the lock's file, or make it; one that somebody has put there to lead elsewhere is not written to."""
    made_up = UnsupportedInput(
        f"{lock} is not the file that a run makes there to lock its folder, so nothing is written to it. Remove it."
    )
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as problem:
        if problem.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise made_up from None
        raise
    described = os.fstat(descriptor)
    if not stat.S_ISREG(described.st_mode) or described.st_nlink > 1:
        os.close(descriptor)
        raise made_up
    return descriptor


def _is_locked_by_us(descriptor: int) -> bool:
    if not _HAS_LOCKS:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _is_at(lock: Path, descriptor: int) -> bool:
    """Tell whether the file that was opened is still there: who held it may have removed it since."""
    try:
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
