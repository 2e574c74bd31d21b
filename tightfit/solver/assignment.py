"""Assign one column to every region, and keep the memory of every moment up to date while columns are exchanged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tightfit.records import Decision
from tightfit.solver.columns import Column, ColumnSource
from tightfit.solver.time_cuts import Array


class Assignment:
    """One column for every region of a step."""

    def __init__(self, source: ColumnSource, decisions: Sequence[Decision | None]) -> None:
        self.columns = [source.column(region, decision) for region, decision in enumerate(decisions)]
        self._source = source
        self._peaks = self._walk(self.columns)

    def _walk(self, columns: Sequence[Column]) -> Array:
        return self._source.peaks((column, 1) for column in columns)

    def exchange(self, column: Column, budget_bytes: int) -> bool:
        """Take a column for its region if every moment stays within the budget; return whether it was taken."""
        region = column.region
        old = self.columns[region]
        if old.shape.shared or column.shape.shared:  # what others hold at the same time counts once
            trial = [*self.columns[:region], column, *self.columns[region + 1 :]]
            peaks = self._walk(trial)
            if peaks.max() > budget_bytes:
                return False
            self.columns, self._peaks = trial, peaks
            return True
        moments = column.timeline.moments
        start, end = moments[0], moments[-1]
        ranks = np.array(moments[:-1], dtype=np.int64) - start
        levels = np.zeros(len(ranks))
        for one, sign in ((column, 1), (old, -1)):
            for rank, delta in one.shape.deltas:
                if rank < len(levels):
                    levels[rank] += sign * delta
        levels = np.cumsum(levels)
        change = np.repeat(levels, np.diff(np.append(ranks, end - start)))
        for one, sign in ((column, 1), (old, -1)):
            for rank, extra in one.shape.extras.items():
                change[ranks[rank]] += sign * extra
        window = self._peaks[start:end] + change
        if window.max(initial=0) > budget_bytes:
            return False
        self._peaks[start:end] = window
        self.columns[region] = column
        return True
