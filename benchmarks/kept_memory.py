"""Run a benchmark in a process that keeps its memory.

By default, how a process's heap happens to lie decides whether each step gives some back to the system and takes it
again, page by page, whatever the method.
"""

from __future__ import annotations

import os
import sys

#: For glibc: never give memory back to the system.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def keep_memory(module: str) -> None:
    """Start the benchmark anew, by its module's name and with its arguments, unless its process keeps its memory."""
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **KEEP_MEMORY})
