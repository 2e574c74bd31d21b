"""The processes of one run, and what they say to each other beside gradients: small things, on the processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tightfit.errors import BudgetInfeasible, PlanMismatch, TightfitError, UnsupportedInput

Result = TypeVar("Result")


class CommunicationFailed(TightfitError):
    """Another process of the run has ended or does not answer."""


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """The processes of a run, as one of them sees it.  With one process, everything here does nothing."""

    rank: int = 0
    world_size: int = 1
    control: Any = None
    """The process group for messages: gloo, whatever carries gradients."""

    @property
    def is_main_process(self) -> bool:
        """Rank 0: the one that writes and speaks."""
        return self.rank == 0

    @property
    def is_single_process(self) -> bool:
        """There is one process."""
        return self.world_size == 1 and self.control is None

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, exact to float64."""
        if self.is_single_process:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with _naming_loss():
            dist.all_reduce(tensor, group=self.control)
        return [float(value) for value in tensor]

    def all_gather(self, thing: Result) -> list[Result]:
        """What each process gave, by rank."""
        if self.is_single_process:
            return [thing]
        found: list[Any] = [None] * self.world_size
        with _naming_loss():
            dist.all_gather_object(found, thing, group=self.control)
        return found

    def broadcast(self, thing: Result) -> Result:
        """What rank 0 gave."""
        if self.is_single_process:
            return thing
        found: list[Any] = [thing]
        with _naming_loss():
            dist.broadcast_object_list(found, group_src=0, group=self.control)
        result: Result = found[0]
        return result

    def run_on_all(self, work: Callable[[], Result]) -> Result:
        """Do `work` on every process; where it fails on one of them it fails on all, instead of some waiting forever.

        Raises:
            Exception: what `work` raised here; else what it raised elsewhere, as `RankFailed`.
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
                if failure is not None:  # the same everywhere is said once
                    raise RankFailed(rank, failure[0], is_bad_input=failure[1]) from problem
        finally:
            # An error whose frame holds it would keep the group's threads alive until Python ends, and they may then
            # ask for Python's lock, which aborts the process.
            del problem
        return result  # type: ignore[return-value]  # `work` has returned


class RankFailed(TightfitError):
    """What another process says."""

    def __init__(self, rank: int, text: str, *, is_bad_input: bool) -> None:
        super().__init__(f"rank {rank}: {text}")
        self.rank = rank
        self.is_bad_input = is_bad_input


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def _naming_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise communication_failed(error) from error


def communication_failed(error: BaseException) -> CommunicationFailed:
    """What a failed message between processes means."""
    return CommunicationFailed(
        f"the other processes of the run do not answer ({str(error).splitlines()[0]}): one of them has ended or hangs, "
        f"and this one cannot go on without it. See what it said; a training run goes on from its last checkpoint with "
        f"--resume auto."
    )


def is_communication_failure(error: BaseException) -> bool:
    """Whether an error that PyTorch raised in a step comes from the connection between processes."""
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
