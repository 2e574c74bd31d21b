"""Somebody else's training loop in the model of the allocator: what its variables keep, and when its gradients go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tightfit.records import AllocatorState
from tightfit.simulation.caching_allocator import OutOfDeviceMemory
from tightfit.simulation.levers import Request, Requests
from tightfit.simulation.step_requests import BECOMES_GRADIENT, StepRequests
from tightfit.simulation.training_loop import Clearing, run_loop, smallest_cap_bytes

MIB = 2**20
STATE = AllocatorState(settings="", capacity_bytes=2**36, beside_bytes=0, outside_bytes=0)


def a_step(*, output: int = 0) -> StepRequests:
    """100 MiB of weights, 60 of activations, 100 of gradients; perhaps an output that outlives the step."""
    forward = [Request(1, 60 * MIB)] + ([Request(2, output)] if output else [])
    backward = [Request(3, 100 * MIB), Request(1, 0), Request(3, BECOMES_GRADIENT)]
    return StepRequests(
        held=(100 * MIB,),
        batch=(10 * MIB,),
        gradients=(100 * MIB,),
        states=(),
        forward_backward=Requests([*forward, *backward]),
        backward_at=len(forward),
    )


@pytest.mark.parametrize(
    ("clearing", "peak"),
    [
        # The next batch is there before the last one goes; gradients are made beside the activations.
        (Clearing.LAST, 100 + 10 + 60 + 100),
        (Clearing.FIRST, 100 + 10 + 60 + 100),
        (Clearing.BEFORE_BACKWARD, 100 + 10 + 60 + 100),
        # What is added to a gradient is there beside it.
        (Clearing.NEVER, 100 + 10 + 100 + 60 + 100),
    ],
)
def test_where_gradients_are_cleared_decides_what_is_beside_them(clearing: Clearing, peak: int) -> None:
    assert run_loop(a_step(), STATE, iterations=3, clearing=clearing).allocated_bytes == peak * MIB


def test_the_last_output_is_there_until_the_next_one() -> None:
    plain = run_loop(a_step(), STATE, iterations=2, clearing=Clearing.LAST)
    once = run_loop(a_step(output=150 * MIB), STATE, iterations=1, clearing=Clearing.LAST)
    again = run_loop(a_step(output=150 * MIB), STATE, iterations=2, clearing=Clearing.LAST)
    assert once.allocated_bytes == plain.allocated_bytes + 150 * MIB
    # Weights, batch, activations and both outputs, the old one until backward: no gradients beside them.
    assert again.allocated_bytes == max(once.allocated_bytes, (100 + 10 + 60 + 2 * 150) * MIB)


def test_a_batch_whose_names_are_the_hosts_again_is_freed_before_the_next_one() -> None:
    step = replace(a_step(), batch=(50 * MIB,), forward_backward=Requests(), gradients=())
    kept, freed = (
        run_loop(step, STATE, iterations=2, clearing=Clearing.LAST, keeps_batch=keeps).allocated_bytes
        for keeps in (True, False)
    )
    assert (kept, freed) == (200 * MIB, 150 * MIB)


def test_each_thread_has_its_workspace_from_its_first_product_on() -> None:
    """Two of 8 MiB share a segment of 20; one of 16 would have one of its own."""
    step = replace(a_step(), held=(), batch=(), gradients=(), forward_backward=Requests())
    peaks = run_loop(step, replace(STATE, beside_bytes=16 * MIB), iterations=3, clearing=Clearing.LAST)
    assert (peaks.allocated_bytes, peaks.reserved_bytes) == (16 * MIB, 20 * MIB)
    # While forward runs, there is one only.
    forward = Requests([Request(1, 60 * MIB), Request(1, 0)])
    step = replace(step, forward_backward=forward, backward_at=len(forward))
    peaks = run_loop(step, replace(STATE, beside_bytes=16 * MIB), iterations=1, clearing=Clearing.LAST)
    assert peaks.allocated_bytes == (60 + 8) * MIB


def test_an_optimizer_may_make_its_state_before_the_first_step() -> None:
    step = replace(a_step(), states=(40 * MIB,))
    late, early = (
        run_loop(step, STATE, iterations=1, clearing=Clearing.LAST, begins_with_states=begins).allocated_bytes
        for begins in (False, True)
    )
    assert (late, early) == (270 * MIB, 310 * MIB)


def test_a_loop_runs_under_its_smallest_cap_and_not_below() -> None:
    step = a_step(output=20 * MIB)
    uncapped = run_loop(step, STATE, iterations=4, clearing=Clearing.FIRST)
    cap = smallest_cap_bytes(step, STATE, iterations=4, clearing=Clearing.FIRST)
    assert uncapped.allocated_bytes <= cap <= uncapped.reserved_bytes
    run_loop(step, STATE, iterations=4, clearing=Clearing.FIRST, cap_bytes=cap)
    with pytest.raises(OutOfDeviceMemory):
        run_loop(step, STATE, iterations=4, clearing=Clearing.FIRST, cap_bytes=cap - 2 * MIB)
