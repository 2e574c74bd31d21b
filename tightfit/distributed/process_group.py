"""Collectives on small Python objects between the processes of a run, on the CPU and apart from gradients."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tightfit.distributed.notes import Notes
from tightfit.errors import BudgetInfeasible, PlanMismatch, TightfitError, UnsupportedInput, first_line

Result = TypeVar("Result")


class CommunicationFailed(TightfitError):
    """Another process of the run has ended or does not answer."""


class RankFailed(TightfitError):
    """Work on another rank raised an error.

    Attributes:
        rank: the rank that failed.
        is_bad_input: whether its error was about the user's input, and not a failure while running.
    """

    def __init__(self, rank: int, text: str, *, is_bad_input: bool) -> None:
        super().__init__(f"rank {rank}: {text}")
        self.rank = rank
        self.is_bad_input = is_bad_input


@dataclass
class Whereabouts:
    """What a process does at the moment, for others to say when it hangs."""

    text: str = ""


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """The processes of a run, as one rank sees them.

    Every rank has to make the same calls in the same order.  With one process, each collective returns its input.
    A collective raises `CommunicationFailed` when another process has ended or does not answer in time.
    """

    rank: int = 0
    world_size: int = 1
    control: Any = None
    """The `torch.distributed` group for these messages: gloo, whichever backend carries the gradients."""
    whereabouts: Whereabouts = field(default_factory=Whereabouts)
    notes: Notes | None = None
    """For what threads have to tell those of other processes; None: they cannot."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, the only one that writes files and prints."""
        return self.rank == 0

    @property
    def is_single_process(self) -> bool:
        """Whether the run has no other process to talk to."""
        return self.world_size == 1 and self.control is None

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over all ranks, in float64."""
        if self.is_single_process:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with _as_communication_failed():
            dist.all_reduce(tensor, group=self.control)
        return [float(value) for value in tensor]

    def all_gather(self, thing: Result) -> list[Result]:
        """Collect each rank's object, in order of rank."""
        if self.is_single_process:
            return [thing]
        gathered: list[Any] = [None] * self.world_size
        with _as_communication_failed():
            dist.all_gather_object(gathered, thing, group=self.control)
        return gathered

    def broadcast(self, thing: Result) -> Result:
        """Return rank 0's object on every rank."""
        if self.is_single_process:
            return thing
        objects: list[Any] = [thing]
        with _as_communication_failed():
            dist.broadcast_object_list(objects, group_src=0, group=self.control)
        result: Result = objects[0]
        return result

    def processes_here(self) -> int:
        """Count the processes on this one's host, it included.  All processes call this."""
        return self.all_gather(socket.gethostname()).count(socket.gethostname())

    def run_on_all(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every rank; if it raises on one, raise on all, so that no rank waits for it forever.

        Raises:
            Exception: what `work` raised on this rank.
            RankFailed: what it raised on another.
        """
        if self.is_single_process:
            return work()
        problem: Exception | None = None
        result: Result | None = None
        try:
            result = work()
        except CommunicationFailed:
            raise
        except Exception as raised:
            problem = raised
        is_input = isinstance(problem, UnsupportedInput | BudgetInfeasible | PlanMismatch)
        failures = self.all_gather(None if problem is None else (str(problem), is_input))
        try:
            if problem is not None and (self.is_main_process or failures[0] is None or failures[0][0] != str(problem)):
                raise problem
            for rank, failure in enumerate(failures):
                if failure is not None:  # an error that all ranks share is reported by rank 0 only
                    raise RankFailed(rank, failure[0], is_bad_input=failure[1]) from problem
        finally:
            # This frame is in the error's traceback. If it still held the error, that cycle would keep the group's
            # threads alive until Python shuts down; they may then ask for the GIL, which aborts the process.
            del problem
        return result  # type: ignore[return-value]  # `work` has returned


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def _as_communication_failed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise communication_failed(error) from error


def communication_failed(error: BaseException) -> CommunicationFailed:
    """Build the `CommunicationFailed` that explains what a failed collective raised."""
    return CommunicationFailed(
        f"the other processes of the run do not answer ({first_line(error)}): one of them has ended or hangs, "
        f"and this one cannot go on without it. See that process's output for the cause; resume a training run from "
        f"its last checkpoint with --resume auto."
    )


def is_communication_failure(error: BaseException) -> bool:
    """Tell whether PyTorch raised `error` because the connection between processes failed.

    Backends raise a plain RuntimeError, so its message decides.
    """
    text = str(error).lower()
    signs = (
        "connection closed",
        "connection reset",
        "broken pipe",
        "gloo",
        "nccl",
        "process group",
        "timed out waiting",
    )
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(s in text for s in signs))
