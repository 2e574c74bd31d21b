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


class TrainingFailed(TightfitError):
    """A run that began well cannot go on."""


@contextmanager
def explaining_step_failures(
    microbatches: Sequence[Microbatch], plan: Plan, budget: Budget, group: ProcessGroup
) -> Iterator[None]:
    """Inside, out-of-memory errors and lost processes become errors that say what to do.

    Raises:
        TrainingFailed: the device has no more memory.
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
        reason = first_line(error)
        predicted_bytes = plan.predicted_peak_bytes + budget.beside_step_bytes
        raise TrainingFailed(
            f"a step on {shapes} ran out of memory ({reason}), though its predicted peak of "
            f"{format_bytes(predicted_bytes)} is within the budget of {format_bytes(budget.total_bytes)}: the device "
            f"has less than that to give, or something else took it. Go on from the last checkpoint with --resume auto "
            f"and a smaller --memory."
        ) from error
