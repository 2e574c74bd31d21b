"""The time of a step on a device beside the host, against a queue that is walked by hand."""

from __future__ import annotations

import random
from functools import reduce

import pytest

from tightfit.records import StepWork, Stretch, step_ms


def queue_ms(operations: list[tuple[float, float]]) -> float:
    """Submit operations one after another; return when the host and the device are done."""
    now = ready = 0.0
    for host_ms, device_ms in operations:
        now += host_ms
        ready = max(ready, now) + device_ms
    return max(now, ready)


def some_operations(rng: random.Random, count: int) -> list[tuple[float, float]]:
    return [(rng.random(), rng.choice((0.0, 0.3, 1.0, 4.0)) * rng.random()) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_a_stretch_ends_as_a_queue_does(seed: int) -> None:
    rng = random.Random(seed)
    operations = some_operations(rng, rng.randrange(1, 12))
    stretches = [Stretch.of(*operation) for operation in operations]
    whole = reduce(Stretch.then, stretches)
    assert whole.ms == pytest.approx(queue_ms(operations))
    middle = rng.randrange(len(operations) + 1)
    halves = [reduce(Stretch.then, part, Stretch()) for part in (stretches[:middle], stretches[middle:])]
    assert halves[0].then(halves[1]).ms == pytest.approx(whole.ms)
    for count in (1, 2, 3, 7):
        assert whole.times(count).ms == pytest.approx(queue_ms(operations * count))


@pytest.mark.parametrize("seed", range(20))
def test_a_step_ends_as_a_queue_does(seed: int) -> None:
    """With passes, an optimizer, and work that is added within events."""
    rng = random.Random(seed)
    once, optimizer = some_operations(rng, 8), some_operations(rng, 2)
    added = {time: Stretch.of(rng.random(), rng.random()) for time in rng.sample(range(8), 3)}
    plain = StepWork(*zip(*(once + optimizer), strict=True), 8)
    one_pass: list[tuple[float, float]] = []
    for time, operation in enumerate(once):
        one_pass.append(operation)
        if time in added:
            one_pass.append((added[time].host_ms, added[time].device_ms))
    for passes in (1, 3):
        assert step_ms(plain, added, passes) == pytest.approx(queue_ms(one_pass * passes + optimizer))


def test_where_the_host_computes_times_add_up() -> None:
    assert step_ms(StepWork([1.0, 2.0, 4.0], [0.0] * 3, 2), {1: Stretch.of(0.5)}, 2) == 11.0


def test_work_of_the_host_is_free_where_the_device_is_behind_and_counts_where_it_waits() -> None:
    behind = StepWork([1.0] * 4, [5.0] * 4, 4)
    waiting = StepWork([5.0] * 4, [1.0] * 4, 4)
    more = {1: Stretch.of(2.0)}
    assert step_ms(behind, more, 1) == step_ms(behind, {}, 1) == 21.0
    assert step_ms(waiting, more, 1) == step_ms(waiting, {}, 1) + 2.0 == 23.0
