"""Keep the garbage collector from looking through the whole heap again and again, and look through it ourselves.

The collector does so whenever enough new objects have lasted a while, and the heap of a training program has millions.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the collector: for work that makes much, and nothing that refers to itself in a circle."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def heap_aside() -> Iterator[None]:
    """Let the collector look only at what is made inside, as ever; what is garbage before goes first.

    Nothing is done where objects are frozen already: `gc.unfreeze` would undo that, too.
    """
    is_ours = gc.isenabled() and gc.get_freeze_count() == 0
    if is_ours:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()


def all_objects() -> list[Any]:
    """List all objects that the collector knows of, those that were frozen, too.

    What has been frozen is frozen again, with what was made since; garbage goes first, as it would stay.
    """
    if not gc.get_freeze_count():
        return gc.get_objects()
    gc.collect()
    gc.unfreeze()
    try:
        return gc.get_objects()
    finally:
        gc.freeze()
