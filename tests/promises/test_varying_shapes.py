"""Keep the budget at every step while lengths vary, with validation in between.

See https://github.com/pytorch/pytorch/issues/35901.

A run of 2,000 steps on more lengths is `benchmarks/random_lengths.py`.
"""

from __future__ import annotations

import gc
import random

import pytest
import torch

import tightfit
from tests.replay.helpers import differences
from tests.support.shape_models import Transformer, batch_of, gradients, next_word_loss, peak_of
from tightfit.device.memory import measure_peak, resident_bytes
from tightfit.planning.plan_cache import MOST_PLANS
from tightfit.solver.solver import Solver
from tightfit.step.step import Step

STEPS = 24
LENGTHS = (24, 32, 33, 48, 63, 72)
VALIDATE_EVERY = 6


@pytest.mark.slow
@pytest.mark.exhaustive
def test_random_lengths_with_validation_in_between() -> None:
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    longest = Solver(
        tightfit.measure(model, batch_of(LENGTHS[-1]), loss=next_word_loss, optimizer=optimizer)
    )  # a budget for which its plan has to drop nearly everything
    smallest, plain_bytes = longest.minimum_budget()[0], longest.plain(0).plain_peak_bytes
    budget = smallest + (plain_bytes - smallest) // 8
    with tightfit.fit(
        model, batch_of(48), budget=budget, loss=next_word_loss, optimizer=optimizer, reference_budget_bytes=2**40
    ) as applied:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        numbers = random.Random(0)
        peaks = []
        tensors_alive = []
        for step in range(STEPS):
            batch = batch_of(numbers.choice(LENGTHS), size=3 if step % 10 == 9 else 4)
            applied.prepare(batch)  # measuring runs PyTorch's profiler, and so does the meter: one at a time
            peaks.append(peak_of(model, batch, optimizer, lambda batch=batch: applied.loss(model, batch)))
            if step % VALIDATE_EVERY == VALIDATE_EVERY - 1:
                model.eval()
                with torch.no_grad():
                    validation = batch_of(LENGTHS[-1])
                    resident = resident_bytes(model, validation, optimizer)
                    peaks.append(measure_peak(lambda batch=validation: next_word_loss(model, batch), resident)[1])
                model.train()
                with applied.paused():
                    plain = gradients(model, lambda batch=batch: next_word_loss(model, batch))
                planned = gradients(model, lambda batch=batch: applied.loss(model, batch))
                assert differences(plain, planned) == []
                gc.collect()
                tensors_alive.append(sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor))
        assert max(peaks) <= budget < plain_bytes
        assert max(peaks) > 0.93 * budget  # the budget was binding
        assert applied.plans is not None
        counts = applied.plans.statistics
        assert len(applied.plans) <= 2 * len(LENGTHS) < MOST_PLANS
        assert counts.solved >= 1
        assert counts.reused >= 1
        assert (counts.mismatched_steps, counts.unplanned_calls) == (0, 0)
        assert applied.statistics.mismatches == 0
        # The last rounds left nothing behind.
        assert tensors_alive[-1] <= tensors_alive[1]


def test_a_batch_that_is_too_long_is_refused_before_it_runs_and_training_goes_on() -> None:
    model = Transformer()
    spec = Step(loss=next_word_loss)
    budget = Solver(tightfit.measure(model, batch_of(64), loss=next_word_loss)).minimum_budget()[0] + 50_000
    with tightfit.fit(model, batch_of(48), budget=budget, loss=next_word_loss) as applied:
        forwards = model.forwards
        with pytest.raises(tightfit.BudgetInfeasible) as caught:
            applied.loss(model, batch_of(250))
        assert caught.value.required_bytes > budget
        assert str(caught.value.required_bytes) in str(caught.value)
        assert model.forwards == forwards
        with applied.paused():
            plain = gradients(model, lambda: spec.run_loss(model, batch_of(48)))
        assert differences(plain, gradients(model, lambda: applied.loss(model, batch_of(48)))) == []
