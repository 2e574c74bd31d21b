"""Find the decisions that are worth having on offer: enumeration, sweeps and column generation.

The pool of columns is made once for a profile and does not depend on the budget that is asked for.  All budgets choose
among the same columns, so a larger budget is never slower, and a frontier costs one pool.

What levers list (`Lever.offers`) is on offer from the start.  The decisions of the lever that chooses value by value
(`BY_VALUE`), each a set of kept values, are searched:

1. A class with few useful values is enumerated: every set is on offer, and the choice is exact.
2. For larger classes, a greedy descent gives sets whose recomputation peaks low, and a sweep over the price of a held
   byte gives the lower hull of time against held bytes (each point exact by minimum cut).
3. Column generation (Dantzig & Wolfe 1960) at a ladder of budgets: the master's relaxation prices bytes at the moments
   that bind, pricing finds the set that these prices want, until none is new.  Where what recomputation holds on its
   way matters, a descent by single exchanges on the exact column starts from the best columns known.
4. All of these lie on the hull, or near it. Where a class has few regions, no mixture of such columns comes near the
   points between two of them, so some are sought: the fastest sets within so many held bytes (Haimes et al. 1971), or,
   in long regions, sets that are as one of the hull up to an operation and as its neighbour from there on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, combinations

from tightfit.interrupts import safe_point
from tightfit.progress import progress
from tightfit.records import Decision
from tightfit.simulation.levers import BY_VALUE, LEVERS
from tightfit.solver.columns import Column, ColumnSource, keeping, useful_values
from tightfit.solver.effort import SEARCH_WORK, Effort
from tightfit.solver.master import Master, Relaxation
from tightfit.solver.pricing import Prices, PricingModel
from tightfit.solver.proposals import between, low_peaks, spliced, sweep, tries
from tightfit.solver.region_mip import RegionProgram
from tightfit.solver.time_cuts import Cut

#: A class is enumerated when that takes at most so many columns over all its regions.
ENUMERATE_AT_MOST = 1500
#: Points sought between those of the hull: for each class, for all regions of a class together, and operations in their
#: programs.
_BETWEEN_AT_MOST = 24
_BETWEEN_ALL = 240
_BETWEEN_OPS_AT_MOST = 2400
#: Budgets at which columns are generated, between the smallest peak and the plain one.
_LADDER = (0.01, 0.04, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.92)
#: Regions of a class from which a descent is tried in one round, until one finds something: for the smallest peak,
#: where memory during replay is all that matters, and at the budgets of the ladder.
_DESCENTS = (10, 2)
#: What a better decision has to promise, in parts of the plain step, to be looked for in a way that takes long.
_WORTH = 1e-3
#: How near to the best the integer program of a region is solved then, in parts of what is to be gained.
_GAP = 0.1
#: Operations in the programs of one class that are solved to find columns, at most: those of long regions take long,
#: and what they could gain is found by recursive recomputation (`recursive`).
_PROGRAM_OPS_AT_MOST = 1000
#: The same for rows and columns of these programs.
_PROGRAM_LINES_AT_MOST = 20_000
#: The same for descents: operations walked in all of them.
_DESCENTS_OPS_AT_MOST = 400_000
#: Rounds of column generation at one budget.
_ROUNDS = 12


@dataclass(slots=True)
class ColumnPool:
    """The columns of a profile, with the pricing models that found them."""

    source: ColumnSource
    structure: ColumnPool | None = None
    """The pool of the same profile without measured times (`Profile.with_unit_times`): its columns are on offer here,
    too. None: this is that pool, and columns are only generated for the smallest peak."""
    enumerate_at_most: int = field(default_factory=lambda: ENUMERATE_AT_MOST)  # looked up late: tests set it
    master: Master = field(init=False)
    members: dict[int, list[int]] = field(init=False)
    """Class to its regions."""
    enumerated: set[int] = field(default_factory=set)
    """Classes of which every decision is on offer."""
    _shared: frozenset[int] = field(init=False)
    _models: dict[int, PricingModel] = field(init=False)
    _programs: dict[int, RegionProgram] = field(init=False)
    _program_ops: Counter[int] = field(init=False)
    """Class to the operations in programs that were solved for it."""
    _program_lines: Counter[int] = field(init=False)
    """The same for rows and columns of these programs."""
    _descent_ops: Counter[int] = field(init=False)
    """Class to the operations that its descents have walked."""
    smallest: tuple[int, list[Decision | None]] = field(init=False)
    """The smallest peak in bytes, and its decisions, among the columns of `structure`: no measured time has a part in
    it, so that two measurements of one model name the same smallest budget."""

    def __post_init__(self) -> None:
        index = self.source.index
        effort = self.source.effort = Effort(SEARCH_WORK)  # it counts from now on
        self.master = Master(self.source)
        self._shared = frozenset(storage for storage, regions in self.source.holders.items() if len(regions) > 1)
        self._models = {}
        self._programs = {}
        self._program_ops = Counter()
        self._program_lines = Counter()
        self._descent_ops = Counter()
        self.members = {}
        for region, record in enumerate(index.profile.regions):
            self.members.setdefault(record.class_id, []).append(region)
        for class_id, regions in self.members.items():
            self._open(class_id, regions)
        larger = {
            class_id: regions
            for class_id, regions in self.members.items()
            if class_id not in self.enumerated and any(self.may_drop(region) for region in regions)
        }
        if self.structure is None and larger:
            with effort.part(1 / 2):
                self._generate(None)  # from few columns and again from many: descents end elsewhere
        for class_id, regions in larger.items():
            for cut in self.source.cuts.first:
                middle = regions[len(regions) // 2]
                for decision in sweep(self.source, self.model(middle), middle, cut):
                    self._offer(class_id, decision)
        if self.structure is None:
            if larger:
                self._generate(None)
            self.smallest = self.master.smallest()
            return
        self.smallest = self.structure.smallest
        if not larger:
            return
        smallest, _ = self.smallest
        plain = float(self.source.peaks(self.master.chosen([None] * len(index.profile.regions))).max())
        for number, share in enumerate(_LADDER):
            progress("searching what to recompute", number, len(_LADDER))
            with effort.part(1 / (len(_LADDER) + 1 - number)):  # one more for what is sought between them
                self._generate(smallest + math.ceil((plain - smallest) * share))
        for class_id, regions in larger.items():
            for cut in self.source.cuts.first:
                for decision in self._between(class_id, regions, cut):
                    self._offer(class_id, decision)

    @property
    def is_complete(self) -> bool:
        """Whether every decision of the plan space is on offer."""
        return all(
            class_id in self.enumerated or not any(self.may_drop(region) for region in regions)
            for class_id, regions in self.members.items()
        )

    def may_drop(self, region: int) -> bool:
        """Return whether there is something in the region that recomputation could drop."""
        return bool(self.source.index.facts[region].slots)

    def model(self, region: int) -> PricingModel:
        """Return the region's pricing problem."""
        found = self._models.get(region)
        if found is None:
            found = self._models[region] = PricingModel(self.source.index, region, self._shared)
        return found

    def program(self, region: int) -> RegionProgram:
        """Return the region's integer program."""
        found = self._programs.get(region)
        if found is None:
            found = self._programs[region] = RegionProgram(self.source.index, region, self._shared)
        return found

    def least_known(self, region: int, prices: Prices) -> float:
        """Return what the region's best decision on offer costs at these prices."""
        class_id = self.source.index.profile.regions[region].class_id
        return min(self.cost(self.source.column(region, d), prices) for d in self.master.decisions[class_id])

    def listed(self, region: int) -> list[Decision]:
        """Return what levers list for the region: decisions that no search leads to."""
        known = self.master.decisions[self.source.index.profile.regions[region].class_id]
        return [decision for decision in known if decision is not None and decision.lever != BY_VALUE.name]

    def least_listed(self, region: int, prices: Prices) -> float:
        """Return what the best decision that levers list costs at these prices; infinite if there is none."""
        costs = (self.cost(self.source.column(region, decision), prices) for decision in self.listed(region))
        return min(costs, default=math.inf)

    def alike(self, regions: Iterable[int], prices: Prices) -> list[list[int]]:
        """Return the regions in groups whose decisions all cost the same at these prices."""
        times = [*prices.private, *(cut.event for cut in prices.times)]
        with_parts = {region for _, _, region in prices.shared}
        groups: dict[Hashable, list[int]] = {}
        for region in regions:
            timeline = self.source.timelines[region]
            places = tuple(timeline.place(time) for time in times)
            key = (timeline.pattern, places, region if region in with_parts else -1)
            groups.setdefault(key, []).append(region)
        return list(groups.values())

    def _open(self, class_id: int, regions: list[int]) -> None:
        """Offer the first decisions of a class."""
        index = self.source.index
        for lever in LEVERS:
            for decision in lever.offers(index, regions):
                self.master.offer(class_id, decision)
        if not any(self.may_drop(region) for region in regions):
            return
        useful = useful_values(index, regions[0])
        if len(regions) << len(useful) <= self.enumerate_at_most:
            self.enumerated.add(class_id)
            for values in chain.from_iterable(combinations(useful, size) for size in range(len(useful) + 1)):
                self._offer(class_id, keeping(index, values))
            return
        self._offer(class_id, keeping(index, ()))
        if self.structure is not None:
            for known in self.structure.master.decisions[class_id]:
                self.master.offer(class_id, known)
            return
        for region in dict.fromkeys((regions[0], regions[-1])):
            for decision in low_peaks(self.source, region):
                self._offer(class_id, decision)

    def _between(self, class_id: int, regions: list[int], cut: Cut) -> Iterator[Decision | None]:
        """Yield decisions between those of the hull, for a class of few regions."""
        region = regions[len(regions) // 2]
        points = min(_BETWEEN_AT_MOST, _BETWEEN_ALL // len(regions))
        if points < 2:
            return iter(())
        known = self.master.decisions[class_id]
        ops = self.source.index.profile.regions[region].op_count
        if points * ops > _BETWEEN_OPS_AT_MOST or not self.program(region).usable:
            return spliced(self.source, known, region, points)
        return between(self.source, self.program(region), known, region, points, cut)

    def _offer(self, class_id: int, decision: Decision | None) -> bool:
        """Offer what a search found, unless it drops nothing and so is None with more effort."""
        if decision is None or not self.source.index.needed_ops(self.members[class_id][0], decision.kept):
            return False
        return self.master.offer(class_id, decision)

    def _generate(self, budget_bytes: int | None) -> None:
        """Generate columns at one budget, or for the smallest peak."""
        for number in range(_ROUNDS):
            safe_point()
            if budget_bytes is None:
                progress("searching the smallest peak", number, _ROUNDS)
            if self.source.effort.is_spent:
                return
            relaxation = self.master.relaxed(budget_bytes)
            if relaxation is None or not self._price_all(relaxation):
                return

    def _price_all(self, relaxation: Relaxation) -> bool:
        """Offer what the prices want in every class that is not enumerated; True if anything is new."""
        prices = relaxation.prices
        worth_ms = _WORTH * self.source.index.plain_step_ms
        most = _DESCENTS[0 if prices.time_weight == 0 else 1]
        new = False
        for class_id, regions in self.members.items():
            if class_id in self.enumerated:
                continue
            # What levers list is on offer from the start, and leads to no other column.
            listed = set(self.listed(regions[0]))
            known = [decision for decision in self.master.decisions[class_id] if decision not in listed]
            loose: list[tuple[float, int, Column]] = []
            for region, *_ in self.alike(filter(self.may_drop, regions), prices):
                bound, decision = self.model(region).best(prices)
                new |= self._offer(class_id, decision)
                cost, place = min((self.cost(self.source.column(region, d), prices), i) for i, d in enumerate(known))
                slack = cost - bound
                if slack > 1e-6 * abs(bound) + max(1e-9, prices.time_weight * worth_ms):
                    loose.append((slack, region, self.source.column(region, known[place])))
            if new:
                continue  # the cheap way has not come to its end yet
            loose.sort(key=lambda entry: (-entry[0], entry[1]))
            for slack, _, start in loose[:most]:  # where memory during replay matters most
                if self.source.effort.is_spent:
                    break
                found = self._better(start, prices, _GAP * slack)
                if found is not None and self._offer(class_id, found):
                    new = True
                    break
        return new

    def cost(self, column: Column, prices: Prices) -> float:
        """Return what a column costs at these prices, in full."""
        total = sum(weight * column.added_ms(cut) for cut, weight in prices.times.items())
        storages = self.source.index.profile.storages
        for time, price in prices.private.items():
            level, held = column.at(time)
            total += price * level
            for storage in held:
                total += prices.shared.get((time, storage, column.region), 0.0) * storages[storage].nbytes
        return total

    def _better(self, start: Column, prices: Prices, gap: float) -> Decision | None:
        """Return a decision that costs less at these prices than the column; None if none is found.

        `gap`: how far from the best one it may be, in cost.
        """
        # For the smallest peak, what rises within an event is most of the matter, which only the exact column shows.
        record = self.source.index.profile.regions[start.region]
        left = self._program_ops[record.class_id] + record.op_count <= _PROGRAM_OPS_AT_MOST
        left &= self._program_lines[record.class_id] < _PROGRAM_LINES_AT_MOST
        if prices.time_weight > 0 and left and (program := self.program(start.region)).usable:
            self._program_ops[record.class_id] += record.op_count
            _, decision = program.bound(prices, self.source.effort, gap)
            self._program_lines[record.class_id] += program.lines
            least = self.cost(start, prices)
            if self.cost(self.source.column(start.region, decision), prices) < least - 1e-9 * abs(least):
                return decision
        if prices.time_weight > 0:
            if self._descent_ops[record.class_id] > _DESCENTS_OPS_AT_MOST:
                return None
            self._descent_ops[record.class_id] += record.op_count * tries(self.source, start.region)
        return self._descend(start, prices)

    def _descend(self, start: Column, prices: Prices) -> Decision | None:
        """Find a better decision by keeping single values more, or fewer; None if there is none."""
        index = self.source.index
        useful = useful_values(index, start.region)
        kept = frozenset(useful) if start.decision is None else index.keep_values(start.region, start.decision.kept)
        best = self.cost(start, prices)
        found: Decision | None = None
        left = tries(self.source, start.region)
        improved = True
        while improved and left > 0:
            improved = False
            for value in useful[:left]:
                if self.source.effort.is_spent:
                    return found
                trial = keeping(index, kept ^ {value})
                left -= 1
                cost = self.cost(self.source.column(start.region, trial), prices)
                if cost < best - 1e-9 * abs(best):
                    best, kept, found, improved = cost, kept ^ {value}, trial, True
        return found
