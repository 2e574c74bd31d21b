"""Talk to HiGHS, here and nowhere else: a linear program or a mixed-integer one, as rows and columns.

HiGHS is imported when the first program is solved, so that reading and simulating plans needs neither it nor numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

INFINITY = float("inf")

#: Nodes of the search tree after which the best answer so far is taken. Counted, not timed, so that the answer does not
#: depend on how busy the machine is.
_NODES = 60


@dataclass(slots=True)
class Program:
    """Minimise cost subject to rows; fill it with `variable` and `row`, then call `solve`."""

    costs: list[float] = field(default_factory=list)
    uppers: list[float] = field(default_factory=list)
    integers: list[bool] = field(default_factory=list)
    entries: list[dict[int, float]] = field(default_factory=list)
    bounds: list[tuple[float, float]] = field(default_factory=list)

    def variable(self, cost: float, upper: float = INFINITY, *, integer: bool = False) -> int:
        """Add a variable from 0 to `upper`; return its number."""
        self.costs.append(cost)
        self.uppers.append(upper)
        self.integers.append(integer)
        return len(self.costs) - 1

    def row(self, entries: dict[int, float], lower: float, upper: float) -> int:
        """Add `lower` <= sum of coefficient x variable <= `upper`; return the row's number."""
        self.entries.append(entries)
        self.bounds.append((lower, upper))
        return len(self.bounds) - 1

    def model(self, *, relaxed: bool = False) -> Any:
        """Return the program as HiGHS takes it: a `highspy.HighsLp`. `relaxed` forgets that variables are integer."""
        import highspy
        import numpy as np

        model = highspy.HighsLp()
        model.num_col_ = len(self.costs)
        model.num_row_ = len(self.bounds)
        model.col_cost_ = np.array(self.costs, dtype=np.double)
        model.col_lower_ = np.zeros(len(self.costs))
        model.col_upper_ = np.array(self.uppers, dtype=np.double)
        model.row_lower_ = np.array([low for low, _ in self.bounds], dtype=np.double)
        model.row_upper_ = np.array([high for _, high in self.bounds], dtype=np.double)
        starts, places, values = [0], [], []
        for entries in self.entries:
            places += list(entries)
            values += list(entries.values())
            starts.append(len(places))
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.array(starts, dtype=np.int32)
        model.a_matrix_.index_ = np.array(places, dtype=np.int32)
        model.a_matrix_.value_ = np.array(values, dtype=np.double)
        if not relaxed and any(self.integers):
            kinds = highspy.HighsVarType
            model.integrality_ = [kinds.kInteger if flag else kinds.kContinuous for flag in self.integers]
        return model

    def solve(
        self,
        *,
        relaxed: bool = False,
        gap: float = 0.0,
        nodes: int = _NODES,
        effort: int | None = None,
        seconds: float = INFINITY,
    ) -> Solution | None:
        """Return the optimum, or None if no solution exists. `relaxed` forgets that variables are integer.

        For integer programs: `gap` is how far (in cost) the answer may be from the optimum, `nodes` how many nodes of
        the search tree are looked at, at most.  `effort` ends the search, with the best answer so far, when HiGHS has
        asked whether to go on so often that the number of variables times the number of questions reaches it: a count
        that grows with the time taken, also within one node, and does not depend on the machine.  `seconds` ends it by
        the clock, as a last resort.
        """
        import highspy

        integer = not relaxed and any(self.integers)
        highs = highspy._core._Highs()  # the class beneath `highspy.Highs`, which prints a banner when it is made
        highs.setOptionValue("output_flag", False)
        highs.setOptionValue("threads", 1)  # the same answer on every machine
        highs.setOptionValue("mip_rel_gap", 0.0)
        highs.setOptionValue("mip_abs_gap", gap)
        highs.setOptionValue("mip_max_nodes", nodes)
        if integer:
            highs.setOptionValue("time_limit", max(0.0, seconds))
        highs.passModel(self.model(relaxed=relaxed))
        if integer and effort is not None:
            _end_after(highs, effort // len(self.costs))
        highs.run()
        status = highs.getModelStatus()
        proven = status == highspy.HighsModelStatus.kOptimal
        info = highs.getInfo()
        cost = float(info.objective_function_value)
        statuses = highspy.HighsModelStatus
        ended = status in (statuses.kSolutionLimit, statuses.kInterrupt, statuses.kTimeLimit)
        if not proven and not (integer and ended and cost < INFINITY):
            return None
        solution = highs.getSolution()
        duals = [] if integer else [float(dual) for dual in solution.row_dual]
        bound = float(info.mip_dual_bound) if integer else cost
        return Solution([float(value) for value in solution.col_value], duals, cost, min(bound, cost))


def load_solver() -> None:
    """Load HiGHS's library now, where it is not yet; the first program that is solved would."""
    import highspy  # noqa: F401  # to have it loaded


def _end_after(highs: Any, questions: int) -> None:
    """Let a search end when it asks for the `questions`-th time whether to go on."""
    import highspy

    left = count(questions, -1)

    def answer(kind: Any, message: str, found: Any, reply: Any, user: Any) -> None:
        reply.user_interrupt = next(left) <= 0

    highs.setCallback(answer, None)
    highs.startCallback(highspy._core.cb.HighsCallbackType.kCallbackMipInterrupt)


@dataclass(frozen=True, slots=True)
class Solution:
    """An optimum."""

    values: list[float]
    duals: list[float]
    """One for each row of a linear program: change of the cost for each unit more on the row's bound."""
    cost: float
    bound: float
    """No solution costs less: the cost itself, unless the search ended early."""
