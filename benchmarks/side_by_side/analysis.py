"""What the figures say: the best peer in each cell, and how tightfit compares to it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.side_by_side.run import FamilyResult, Row

#: Overheads below this are noise here: ratios are of overheads of at least this much.
NOISE = 0.01
#: Where the best peer's overhead is below this, a tie is enough.
SMALL = 0.05


@dataclass(frozen=True)
class Cell:
    """tightfit and the best peer at one budget."""

    family: str
    fraction: float
    budget_bytes: int
    ours: Row
    peer: Row | None
    """The fastest eager peer whose peak is within the budget and whose loss and gradients are plain's."""

    @property
    def ratio(self) -> float:
        """tightfit's overhead over the best peer's."""
        return max(NOISE, overhead(self.ours)) / max(NOISE, overhead(self.peer)) if self.peer else math.nan

    @property
    def recompute_ratio(self) -> float:
        """The same of modelled recomputation, where the peer recomputes at all."""
        if self.peer is None or not self.peer.setup.recompute_ms:
            return math.nan
        return (self.ours.setup.recompute_ms or 0.0) / self.peer.setup.recompute_ms

    @property
    def is_kept(self) -> bool:
        """The measured peak is within the budget."""
        return self.ours.setup.peak_bytes <= self.budget_bytes


def overhead(row: Row) -> float:
    """Median over the rounds."""
    return statistics.median(row.overheads)


def quartiles(row: Row) -> tuple[float, float]:
    """First and third quartile of the overhead over the rounds."""
    if len(row.overheads) < 2:
        return row.overheads[0], row.overheads[0]
    first, _, third = statistics.quantiles(row.overheads, n=4, method="inclusive")
    return first, third


def peers(result: FamilyResult) -> list[Row]:
    """Eager peers that ran, with the right loss and gradients."""
    return [
        row
        for row in result.rows
        if row.setup.method.name not in ("plain", "tightfit")
        and row.setup.method.backend == "eager"
        and not row.setup.failure
        and row.setup.equal
    ]


def cells(result: FamilyResult, fractions: Sequence[float]) -> list[Cell]:
    """One for each budget at which tightfit ran."""
    found = []
    for fraction, budget in zip(fractions, result.budgets_bytes, strict=True):
        ours = result.row("tightfit", budget)
        if ours.setup.failure:
            continue
        fitting = [row for row in peers(result) if row.setup.peak_bytes <= budget]
        found.append(Cell(result.family, fraction, budget, ours, min(fitting, key=overhead, default=None)))
    return found


def geometric_mean(ratios: Sequence[float]) -> float:
    """NaN where there is nothing."""
    known = [ratio for ratio in ratios if not math.isnan(ratio) and ratio > 0]
    return math.exp(statistics.fmean(math.log(ratio) for ratio in known)) if known else math.nan


@dataclass(frozen=True)
class Smallest:
    """The smallest step of tightfit and of the peers."""

    family: str
    ours: Row
    peer: Row

    @property
    def ratio(self) -> float:
        """Bytes above the baseline, over the best peer's."""
        base = self.ours.setup.baseline_bytes
        return (self.ours.setup.peak_bytes - base) / (self.peer.setup.peak_bytes - base)


def smallest(result: FamilyResult) -> Smallest | None:
    """None where tightfit's smallest plan did not run."""
    ours = result.row("tightfit", 0)
    if ours.setup.failure:
        return None
    return Smallest(result.family, ours, min(peers(result), key=lambda row: row.setup.peak_bytes))
