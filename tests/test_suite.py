"""Every model of the suite at its tiny size: predicted peaks, kept budgets, and the bits of the plain step."""

from __future__ import annotations

import pytest

from tests.suite import SUITE, build
from tests.suite.running import train
from tightfit.planning import fit as planner
from tightfit.planning.fit import find_plan
from tightfit.profiling.measure import measure_step
from tightfit.solver.solver import Solver
from tightfit.step.step import Step

pytest.importorskip("transformers")

STEPS = 2
#: Of the plain peak that was predicted without a real step.
WORST_ERROR = 0.0005


@pytest.mark.parametrize("name", SUITE)
def test_budgets_are_kept_and_bits_are_the_plain_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build(name)
    profile = measure_step(case.model, case.batch, Step(loss=case.loss, optimizer=case.optimizers()))
    solver = Solver(profile)
    plain = train(build(name), STEPS)
    plain_bytes = solver.plain(2**62).predicted_peak_bytes - profile.margin_bytes
    assert abs(plain_bytes / plain.peak_bytes - 1) <= WORST_ERROR

    smallest_bytes, _ = solver.minimum_budget()
    budget_bytes = (smallest_bytes + plain.peak_bytes) // 2
    monkeypatch.setattr(planner, "measure_together", lambda *_, **__: profile)  # it is measured already
    case = build(name)
    spec = Step(loss=case.loss, optimizer=case.optimizers())
    with find_plan(case.model, case.batch, spec, budget_bytes) as applied:
        applied.statistics.reset()
        planned = train(case, STEPS, loss=lambda: applied.loss(case.model, case.batch))
    assert planned.peak_bytes <= budget_bytes
    assert plain.differences(planned) == []
    assert (applied.statistics.mismatches, applied.statistics.unplanned_calls) == (0, 0)
    if budget_bytes < plain.peak_bytes:
        assert applied.statistics.replayed_ops > 0
