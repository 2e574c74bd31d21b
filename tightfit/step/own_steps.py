"""Mark the steps that tightfit itself runs, to measure and to prove: they are nobody's training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_open = 0


@contextmanager
def own_steps() -> Iterator[None]:
    """Open a context in which all steps are tightfit's own."""
    global _open
    _open += 1
    try:
        yield
    finally:
        _open -= 1


def is_own_step() -> bool:
    """Tell whether a step that runs now is tightfit's own."""
    return _open > 0
