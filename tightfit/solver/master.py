"""Choose one column for every region, so that memory holds at the moments that bind: the master problem.

A multiple-choice program over the columns at hand, with one row for each moment considered so far (`Master.moments`);
moments are added when a choice violates them, so that the answer holds at every moment of the step while the program
stays small.  Regions of one class whose columns have equal coefficients in all rows are one group with a count, so that
many identical layers cost no more than one, and the search is not lost in their symmetry.

A storage that two regions may hold counts once: the row has a variable for it, at least as large as each region's part.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np

from tightfit.records import Decision
from tightfit.solver.columns import Column, ColumnSource
from tightfit.solver.groups import NO_LINKS, Group, Levels, Links, undominated
from tightfit.solver.highs import INFINITY, Program, Solution
from tightfit.solver.pricing import Prices
from tightfit.solver.region_timelines import neighbourhoods
from tightfit.solver.time_cuts import Array, Cut

#: Moments added at once, at most: the worst of as many stretches of the timeline.
_MOMENTS_PER_ROUND = 12
#: What a millisecond of added work weighs beside one of the step's time: of equally fast plans the one of least work is
#: taken.
_WORK = 1e-6


@dataclass(frozen=True, slots=True)
class _Link:
    """A shared storage at the moments at which the same columns hold it."""

    storage: int
    moments: list[int]
    rows: dict[int, int]
    """Region to the row that says: the storage is there if a column of this region holds it."""


@dataclass(slots=True)
class _Built:
    program: Program
    groups: list[Group]
    variables: list[list[int]]
    """For each group, one variable for each column."""
    moment_rows: list[int]
    cut_rows: list[int]
    """None where there is but one way, whose time is the cost."""
    links: list[_Link]


@dataclass(slots=True)
class Master:
    """The program over columns; give it decisions with `offer`, then ask `relaxed`, `fastest` or `smallest`."""

    source: ColumnSource
    moments: list[int] = field(default_factory=list)
    decisions: dict[int, dict[Decision | None, None]] = field(default_factory=dict)
    """Class to the decisions on offer, in order of arrival."""
    unit: int = field(init=False)
    """Greatest common divisor of all sizes: bytes are counted in it."""
    cuts: list[Cut] = field(init=False)
    """Of the ways considered so far, see `time_cuts`."""
    _classes: list[int] = field(init=False)
    _stretches: Array = field(init=False)
    _places: list[list[tuple[int, bool]]] = field(init=False)
    """Region, moment: where the moment is in the region's timeline."""
    _cut_places: list[list[tuple[int, bool]]] = field(init=False)
    """The same for the ways' cuts."""
    _vectors: list[list[list[tuple[int, tuple[int, ...]]]]] = field(init=False)
    """Region, decision, moment: what the column says at the moment; for the regions that were looked up."""
    _holding: list[dict[int, set[int]]] = field(default_factory=list)
    """Moment to shared storage to the regions that have a column which holds it."""

    def __post_init__(self) -> None:
        profile = self.source.index.profile
        sizes = [s.nbytes for s in profile.storages] + [s.workspace_bytes for s in profile.signatures]
        self.unit = gcd(*sizes) or 1
        self.cuts = list(self.source.cuts.first)
        self._classes = [region.class_id for region in profile.regions]
        for class_id in self._classes:
            self.decisions.setdefault(class_id, {None: None})
        self._stretches = np.array(neighbourhoods(self.source.index))
        self._vectors = [[] for _ in self._classes]
        self._places = [[] for _ in self._classes]
        self._cut_places = [[] for _ in self._classes]
        plain = self.source.peaks([(self.source.column(r, None), 1) for r in range(len(self._classes))])
        self.add_moments(plain, 0)

    def offer(self, class_id: int, decision: Decision | None) -> bool:
        """Put a decision on offer to all regions of a class; True if it is new."""
        if decision in self.decisions[class_id]:
            return False
        self.decisions[class_id][decision] = None
        return True

    def add_moments(self, peaks: Array, limit: float) -> bool:
        """Add the worst moment of each stretch that is above `limit` bytes; return whether one is new."""
        times = np.flatnonzero(peaks > limit)
        if not times.size:
            return False
        stretches = self._stretches[times]
        order = np.lexsort((times, -peaks[times], stretches))  # stretch by stretch, the worst first
        _, first = np.unique(stretches[order], return_index=True)
        worst = np.sort(times[order[first]])
        new = worst[~np.isin(worst, self.moments)]
        new = new[np.argsort(-peaks[new], kind="stable")][:_MOMENTS_PER_ROUND]
        self.moments += new.tolist()
        return bool(new.size)

    def add_cut(self, chosen: Sequence[tuple[Column, float]], known_ms: float) -> bool:
        """Add the longest way for these columns, unless no way is longer than `known_ms`; return whether it is new."""
        if self.source.cuts.is_single:
            return False
        cut, ms = self.source.longest_way(chosen)
        if not self.source.cuts.is_longer(ms, known_ms) or cut in self.cuts:
            return False
        self.cuts.append(cut)
        return True

    def _build(self, budget_bytes: int | None, *, relaxed: bool = False) -> _Built:
        """Build the program. With a budget: least time within it; without: least peak, which is the last variable."""
        source = self.source
        program = Program()
        groups = self._groups(pruned=not relaxed)
        rows: list[dict[int, float]] = [{} for _ in self.moments]
        holders: dict[tuple[int, int], dict[int, list[int]]] = {}  # (moment, storage) -> region -> variables
        variables: list[list[int]] = []
        is_single = self.source.cuts.is_single
        ways: list[dict[int, float]] = [{} for _ in self.cuts]
        for group in groups:
            size = len(group.regions)
            numbers = []
            for column, levels, linked, times in zip(
                group.columns, group.levels, group.linked, group.times, strict=True
            ):
                cost = times[0] if is_single else _WORK * column.work_ms
                number = program.variable(cost if budget_bytes is not None else 0.0, size, integer=True)
                numbers.append(number)
                for entries, added_ms in zip(ways, times, strict=True):
                    if added_ms:
                        entries[number] = added_ms
                for entries, level in zip(rows, levels, strict=True):
                    if level:
                        entries[number] = level // self.unit
                for key in linked:
                    holders.setdefault(key, {}).setdefault(column.region, []).append(number)
            program.row(dict.fromkeys(numbers, 1.0), size, size)
            variables.append(numbers)
        links = self._link(program, rows, holders)
        peak = program.variable(1.0) if budget_bytes is None else -1
        moment_rows = []
        for time, entries in zip(self.moments, rows, strict=True):
            if budget_bytes is None:
                moment_rows.append(program.row({**entries, peak: -1.0}, -INFINITY, -source.base[time] / self.unit))
            else:
                moment_rows.append(program.row(entries, -INFINITY, (budget_bytes - source.base[time]) // self.unit))
        cut_rows = []
        if budget_bytes is not None and not is_single:
            step = program.variable(1.0)
            for cut, entries in zip(self.cuts, ways, strict=True):
                base_ms = self.source.cuts.base_ms(cut)
                cut_rows.append(program.row({**entries, step: -1.0}, -INFINITY, -base_ms))
        return _Built(program, groups, variables, moment_rows, cut_rows, links)

    def _link(
        self,
        program: Program,
        rows: list[dict[int, float]],
        holders: dict[tuple[int, int], dict[int, list[int]]],
    ) -> list[_Link]:
        """Count each shared storage once: a variable, at least each region's part, in the rows of its moments."""
        patterns: dict[tuple[int, tuple[tuple[int, tuple[int, ...]], ...]], list[int]] = {}
        for (place, storage), held in holders.items():
            pattern = tuple((region, tuple(numbers)) for region, numbers in sorted(held.items()))
            patterns.setdefault((storage, pattern), []).append(place)
        links = []
        for (storage, pattern), places in patterns.items():
            there = program.variable(0.0)
            for place in places:
                rows[place][there] = self.source.index.profile.storages[storage].nbytes // self.unit
            of_region = {
                region: program.row({**dict.fromkeys(numbers, 1.0), there: -1.0}, -INFINITY, 0.0)
                for region, numbers in pattern
            }
            links.append(_Link(storage, [self.moments[place] for place in places], of_region))
        return links

    def _look_up(self, region: int) -> list[list[tuple[int, tuple[int, ...]]]]:
        """Return what each of the region's columns says at each moment."""
        vectors = self._vectors[region]
        for place, decision in enumerate(self.decisions[self._classes[region]]):
            if place == len(vectors):
                vectors.append([])
            vector = vectors[place]
            if len(vector) < len(self.moments):
                column = self.source.column(region, decision)
                for moment in range(len(vector), len(self.moments)):
                    found = column.at(self.moments[moment])
                    vector.append(found)
                    for storage in found[1]:
                        self._holding[moment].setdefault(storage, set()).add(region)
        return vectors

    def _groups(self, *, pruned: bool) -> list[Group]:
        """Put regions with equal coefficients together; if `pruned`, without columns that another equals or beats."""
        self._holding += [{} for _ in self.moments[len(self._holding) :]]
        # Regions with one pattern, in which the moments fall on the same places, have the same columns.
        same: dict[Hashable, list[int]] = {}
        for region, (timeline, places) in enumerate(zip(self.source.timelines, self._places, strict=True)):
            places += [timeline.place(time) for time in self.moments[len(places) :]]
            ways = self._cut_places[region]
            ways += [timeline.place(cut.event) for cut in self.cuts[len(ways) :]]
            same.setdefault((timeline.pattern, tuple(places), tuple(ways)), []).append(region)
        with_shared: list[int] = []
        alike: dict[Hashable, tuple[list[int], list[Levels], list[Links]]] = {}
        for key, regions in same.items():
            vectors = self._look_up(regions[0])
            if any(held for vector in vectors for _, held in vector):
                with_shared += regions
            else:
                levels = [tuple(level for level, _ in vector) for vector in vectors]
                alike[key] = regions, levels, [NO_LINKS] * len(levels)
        for region in with_shared:
            self._look_up(region)
        for region in with_shared:
            levels, linked = self._coefficients(region)
            key = (self._classes[region], tuple(levels), tuple(linked), tuple(self._times(region)))
            alike.setdefault(key, ([], levels, linked))[0].append(region)
        groups = []
        for regions, levels, linked in sorted(alike.values(), key=lambda entry: entry[0][0]):
            decisions = self.decisions[self._classes[regions[0]]]
            columns = [self.source.column(regions[0], decision) for decision in decisions]
            group = Group(regions, columns, levels, linked, self._times(regions[0]))
            groups.append(undominated(group) if pruned else group)
        return groups

    def _times(self, region: int) -> list[tuple[float, ...]]:
        """Return, for each column of a region, what it adds to each way."""
        columns = (self.source.column(region, decision) for decision in self.decisions[self._classes[region]])
        return [tuple(column.added_ms(cut) for cut in self.cuts) for column in columns]

    def _coefficients(self, region: int) -> tuple[list[Levels], list[Links]]:
        """Return, for each column of a region, bytes, and what is shared, at each moment."""
        storages = self.source.index.profile.storages
        all_levels, all_linked = [], []
        for vector in self._vectors[region]:
            linked: list[tuple[int, int]] = []
            levels = [level for level, _ in vector]
            for place, (_, held) in enumerate(vector):
                for storage in held:
                    if len(self._holding[place][storage]) > 1:
                        linked.append((place, storage))
                    else:
                        levels[place] += storages[storage].nbytes
            all_levels.append(tuple(levels))
            all_linked.append(frozenset(linked))
        return all_levels, all_linked

    def relaxed(self, budget_bytes: int | None) -> Relaxation | None:
        """Solve the linear relaxation, over the moments of all its own violations; None if even it has no solution."""
        while True:
            built = self._build(budget_bytes, relaxed=True)
            solution = built.program.solve(relaxed=True)
            if solution is None:
                return None
            weights = [
                (self.source.column(region, column.decision), value / len(group.regions))
                for group, numbers in zip(built.groups, built.variables, strict=True)
                for column, number in zip(group.columns, numbers, strict=True)
                if (value := solution.values[number]) > 1e-9
                for region in group.regions
            ]
            limit = budget_bytes if budget_bytes is not None else solution.cost * self.unit
            grown = self.add_moments(self.source.peaks(weights), limit * (1 + 1e-9) + 1e-3)
            if budget_bytes is not None:
                grown |= self.add_cut(weights, self._step_ms(built, solution))
            if not grown:
                return Relaxation(self._prices(built, solution, budget_bytes), solution.cost)

    def _prices(self, built: _Built, solution: Solution, budget_bytes: int | None) -> Prices:
        private = {}
        for time, row in zip(self.moments, built.moment_rows, strict=True):
            price = -solution.duals[row] / self.unit
            if price > 1e-15:
                private[time] = price
        shared = {
            (time, storage, next(iter(regions))): private[time]
            for time, holding in zip(self.moments, self._holding, strict=False)
            for storage, regions in holding.items()
            if len(regions) == 1 and time in private
        }
        for link in built.links:
            whole = sum(private.get(time, 0.0) for time in link.moments)
            nbytes = self.source.index.profile.storages[link.storage].nbytes
            parts = {region: max(0.0, -solution.duals[row]) / nbytes for region, row in link.rows.items() if nbytes}
            total = sum(parts.values())
            if whole > 0 and total > 0:  # the parts add up to the whole price, but for the solver's tolerance
                factor = min(1.0, whole / total) / whole
                for region, part in parts.items():
                    for time in link.moments:
                        if time in private:
                            shared[time, link.storage, region] = part * factor * private[time]
        return Prices(times=self._weights(built, solution, budget_bytes), private=private, shared=shared)

    def _weights(self, built: _Built, solution: Solution, budget_bytes: int | None) -> dict[Cut, float]:
        """Return what each way weighs in the relaxation's time."""
        if budget_bytes is None:
            return {}
        if not built.cut_rows:
            return dict.fromkeys(self.cuts, 1.0)
        weights = {
            cut: weight
            for cut, row in zip(self.cuts, built.cut_rows, strict=False)
            if (weight := -solution.duals[row]) > 1e-12
        }
        whole = max(1.0, sum(weights.values()))  # more than 1 only by the solver's tolerance
        return {cut: weight / whole for cut, weight in weights.items()}

    def _step_ms(self, built: _Built, solution: Solution) -> float:
        """Return what the longest of the ways considered adds in a solution."""
        return solution.values[-1] if built.cut_rows else solution.cost

    def fastest(self, budget_bytes: int, gap_ms: float) -> tuple[list[Decision | None], float] | None:
        """Return the decisions of least time that hold at every moment; None if there are none.

        And added ms that no choice among the columns on offer is below.
        """
        tightened = budget_bytes
        bound_ms = 0.0
        while True:
            built = self._build(tightened)
            solution = built.program.solve(gap=gap_ms)
            if solution is None:
                return None
            if tightened == budget_bytes:  # and some moments left out: fewer rows, so no choice is left out
                bound_ms = max(bound_ms, solution.bound - self._most_work_ms(built))
            decisions = self._decisions(built, solution)
            chosen = self.chosen(decisions)
            peaks = self.source.peaks(chosen)
            longer = self.add_cut(chosen, self._step_ms(built, solution))
            if peaks.max() <= budget_bytes:
                if longer:
                    continue
                return decisions, bound_ms
            if not self.add_moments(peaks, budget_bytes):  # the solver's tolerance was more than a byte
                tightened -= max(self.unit, int(peaks.max()) - budget_bytes)

    @staticmethod
    def _most_work_ms(built: _Built) -> float:
        """Return how much of a solution's cost may be the price of work instead of time."""
        if not built.cut_rows:
            return 0.0
        most = (len(group.regions) * max(column.work_ms for column in group.columns) for group in built.groups)
        return _WORK * sum(most)

    def smallest(self) -> tuple[int, list[Decision | None]]:
        """Return the least peak in bytes that the columns on offer can reach, and decisions that reach it."""
        best: tuple[int, list[Decision | None]] | None = None
        while True:
            built = self._build(None)
            solution = built.program.solve(gap=0.5)
            assert solution is not None, "without a budget there is always a choice"
            decisions = self._decisions(built, solution)
            peaks = self.source.peaks(self.chosen(decisions))
            if best is None or peaks.max() < best[0]:
                best = (int(peaks.max()), decisions)
            bound = solution.cost * self.unit
            if best[0] <= bound + self.unit / 2 or not self.add_moments(peaks, bound + self.unit / 2):
                return best

    def chosen(self, decisions: Sequence[Decision | None]) -> list[tuple[Column, float]]:
        """Return the columns of one decision for each region."""
        return [(self.source.column(region, decision), 1) for region, decision in enumerate(decisions)]

    def _decisions(self, built: _Built, solution: Solution) -> list[Decision | None]:
        decisions: list[Decision | None] = [None] * len(self._classes)
        for group, numbers in zip(built.groups, built.variables, strict=True):
            picks: list[Decision | None] = []
            for column, number in zip(group.columns, numbers, strict=True):
                picks += [column.decision] * round(solution.values[number])
            for region, pick in zip(group.regions, picks, strict=True):
                decisions[region] = pick
        return decisions


@dataclass(frozen=True, slots=True)
class Relaxation:
    """What the linear relaxation says."""

    prices: Prices
    cost: float
    """Least added time in ms; or least peak in units when no budget was given."""
