"""Every model of the suite at its tiny size: predicted peaks, kept budgets, and the bits of the plain step."""

from __future__ import annotations

import pytest

from tests.suite import SUITE, build
from tests.suite.running import train
from tightfit.planning.search import search
from tightfit.profiling.measure import measure_step
from tightfit.solver.solver import solver_of
from tightfit.step.step import Step
from tightfit.verification.trial import Trial

pytest.importorskip("transformers")

STEPS = 2
#: Of the plain peak that was predicted without a real step.
WORST_ERROR = 0.0005


#: Models that are built of what others have, too.
FURTHER = ("llama", "bert", "whisper", "vit", "swin", "convnext", "unet", "densenet", "gru", "lora", "mixtral", "t5")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in FURTHER else name for name in SUITE]
)
@pytest.mark.slow
def test_budgets_are_kept_and_bits_are_the_plain_steps(name: str) -> None:
    case = build(name)
    profile = measure_step(case.model, case.batch, Step(loss=case.loss, optimizer=case.optimizers()))
    solver = solver_of(profile)
    plain = train(build(name), STEPS)
    plain_bytes = solver.plain(2**62).predicted_peak_bytes - profile.margin_bytes
    assert abs(plain_bytes / plain.peak_bytes - 1) <= WORST_ERROR

    smallest_bytes, _ = solver.minimum_budget()
    budget_bytes = (smallest_bytes + plain.peak_bytes) // 2
    case = build(name)
    with Trial(case.model, case.batch, Step(loss=case.loss, optimizer=case.optimizers())) as trial:
        applied, _ = search(trial, budget_bytes, profile=profile)
    with applied:
        applied.statistics.reset()
        planned = train(case, STEPS, loss=lambda: applied.loss(case.model, case.batch))
    assert planned.peak_bytes <= budget_bytes
    assert plain.differences(planned) == []
    assert (applied.statistics.mismatches, applied.statistics.unplanned_calls) == (0, 0)
    if budget_bytes < plain.peak_bytes:
        assert applied.statistics.replayed_ops > 0
