"""What tests of plans for several shapes share: measured and solved once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.planning.shape_case import LONG, MIDDLE, Case, adamw
from tests.support.shape_models import Transformer, batch_of, next_word_loss
from tightfit.profiling.measure import measure_step
from tightfit.profiling.remeasure import measure_reshaped
from tightfit.records import Profile
from tightfit.solver.solver import Solver
from tightfit.step.step import Step


@pytest.fixture(scope="session")
def reference() -> Profile:
    model = Transformer()
    step = Step(loss=next_word_loss, optimizer=(adamw(model),))
    return measure_step(model, batch_of(MIDDLE), step)


@pytest.fixture(scope="session")
def budget_bytes(reference: Profile) -> int:
    """What the longest batch can just do with: 15 % of the way from its smallest peak to its plain one."""
    model = Transformer()
    step = Step(loss=next_word_loss, optimizer=(adamw(model),))
    solver = Solver(measure_reshaped(model, batch_of(LONG), step, reference, 2**40))
    smallest, plain = solver.minimum_budget()[0], solver.plain(0).plain_peak_bytes
    return smallest + (plain - smallest) * 15 // 100


@pytest.fixture
def case(budget_bytes: int) -> Iterator[Case]:
    case = Case(Transformer(), budget_bytes)
    yield case
    case.applied.remove()
    assert not any("forward" in vars(module) for module in case.model.modules())
