"""Errors that end a run that began well, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tightfit.device.budget import Budget
from tightfit.device.out_of_memory import is_out_of_memory
from tightfit.distributed.process_group import ProcessGroup, communication_failed, is_communication_failure
from tightfit.errors import TightfitError, first_line
from tightfit.records import Plan
from tightfit.step.batch import describe_batch
from tightfit.step.microbatch import Microbatch
from tightfit.units import format_bytes

_SHOWN_SAMPLES = 8


class TrainingFailed(TightfitError):
    """A run that began well cannot go on."""


class StepRanOutOfMemory(TrainingFailed):
    """The device had no more memory for a step, though its plan keeps the budget."""


@contextmanager
def explaining_step_failures(
    microbatches: Sequence[Microbatch], plan: Plan, budget: Budget, group: ProcessGroup
) -> Iterator[None]:
    """Inside, out-of-memory errors and lost processes become errors that say what to do.

    Raises:
        StepRanOutOfMemory: the device has no more memory.
        CommunicationFailed: another process of the run does not answer.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not group.is_single_process and is_communication_failure(error):
            raise communication_failed(error) from error
        if not is_out_of_memory(error):
            raise
        shapes = "; ".join(map(describe_batch, microbatches))
        predicted_bytes = plan.predicted_peak_bytes + budget.beside_step_bytes
        raise StepRanOutOfMemory(
            f"a step on {shapes} ran out of memory ({first_line(error)}), though its predicted peak of "
            f"{format_bytes(predicted_bytes)} is within the budget of {format_bytes(budget.total_bytes)}"
        ) from error


def shown_samples(numbers: Sequence[int]) -> str:
    """Return the numbers of samples for a message, the first of many."""
    shown = ", ".join(map(str, numbers[:_SHOWN_SAMPLES]))
    return shown + (f" and {len(numbers) - _SHOWN_SAMPLES} more" if len(numbers) > _SHOWN_SAMPLES else "")
