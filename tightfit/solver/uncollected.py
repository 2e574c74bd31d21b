"""Pause the garbage collector where much is made, and nothing that refers to itself in a circle.

The collector looks through the whole heap, a training program's own, whenever enough new objects have lasted a while.
Walking a long step makes tens of thousands for each plan, and drops them all at the end.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the collector, if it is on."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
