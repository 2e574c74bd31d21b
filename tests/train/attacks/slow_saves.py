"""The run that is attacked, with checkpoints that threads write slowly, or cannot write.

SLOW_SAVES says for how many seconds a part is being written, and where that is noted; FAILING_SAVE of which rank and
step there is no room on the disk.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

from torch import nn

from tests.train.attacks import subject
from tightfit.train.checkpoint import Draft


def model() -> nn.Module:
    """Patches what saves, in the process that makes it."""
    write = Draft.write_tensors
    seconds, _, notes = os.environ.get("SLOW_SAVES", "0:").partition(":")
    failing = os.environ.get("FAILING_SAVE", "")

    def slowly(self: Draft, temporary: Path, rank: int = 0) -> Any:
        if threading.current_thread() is threading.main_thread():
            return write(self, temporary, rank)
        if notes:
            Path(notes, f"{rank}-{self.step}").touch()
        time.sleep(float(seconds) / 2)
        if failing == f"{rank}:{self.step}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(self, temporary, rank)
        time.sleep(float(seconds) / 2)
        return written

    Draft.write_tensors = slowly  # type: ignore[method-assign]  # in this process only
    return subject.model()
