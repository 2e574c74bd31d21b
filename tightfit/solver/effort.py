"""Limit what one search may take: by work that is counted, and by time only where all else fails.

Work is counted in operations walked while decisions are evaluated, and the size of integer programs is converted to
that.  A count is the same on every machine and however busy it is, so that plans are, too.  When it is used up, the
search ends with what it has found, and the plan's lower bound says how far from the best that may be.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)

#: Work of a search over all budgets, and of one solve after it: some seconds each.
SEARCH_WORK = 4_000_000
SOLVE_WORK = 4_000_000
#: Seconds of the processor after which a search is cut off, whatever it has counted: many times what the work takes on
#: a slow machine, and not those of the clock, which go on while others keep the processor busy.
_LAST_RESORT_S = 600.0
#: Operations walked in the time that one row or column of an integer program takes.
_PER_LINE = 25


class Effort:
    """What one search has taken, and what is left."""

    def __init__(self, work: int) -> None:
        self._left = work
        self._reserved = 0  # for what comes later
        self._ends_s = time.process_time() + _LAST_RESORT_S
        self._cut_off = False

    @contextmanager
    def part(self, share: float) -> Iterator[None]:
        """Let what runs inside use no more than this share of what is left."""
        before = self._reserved
        self._reserved += math.ceil((1 - share) * max(0, self._left - before))
        try:
            yield
        finally:
            self._reserved = before

    def spend(self, ops: int) -> None:
        """Count operations that were walked."""
        self._left -= ops

    def spend_on_program(self, lines: int) -> None:
        """Count an integer program of so many rows and columns."""
        self._left -= _PER_LINE * lines

    @property
    def is_spent(self) -> bool:
        """Whether to end with what there is."""
        return self._left <= self._reserved or self.seconds_left <= 0

    @property
    def seconds_left(self) -> float:
        """Return the processor's seconds until the last resort; at most 0 when it is over."""
        left_s = self._ends_s - time.process_time()
        if left_s <= 0 and not self._cut_off:
            self._cut_off = True
            _log.warning(
                "solving was cut off after %d seconds of the processor, with the best plan so far, which on a "
                "faster one might be better. How far from the best it may be, the plan's lower_bound_ms says.",
                round(_LAST_RESORT_S),
            )
        return left_s
