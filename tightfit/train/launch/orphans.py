"""Ending with the launcher: a process of a group whose launcher was killed would train on, alone and unseen."""

from __future__ import annotations

import os
import signal
import threading
import time

#: The process of `launch`; a process may come to life only after that was killed.
LAUNCHER = "TIGHTFIT_LAUNCHER"
_LOOK_S = 0.5
#: For the step and its checkpoint. A process that waits for one that is gone ends without.
_GRACE_S = 20.0


def end_with_parent() -> None:
    """Watch the process that started this one, and end as on SIGTERM when it is gone: with a checkpoint, if it can."""
    parent = int(os.environ.get(LAUNCHER) or os.getppid())
    threading.Thread(target=_watch, args=(parent,), name="end-with-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(128 + signal.SIGTERM)
