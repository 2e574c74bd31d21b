"""The processes of one run, and what they say to each other beside gradients: small things, on the processor.

Before the group exists its processes sign in at a store, so that what goes wrong has a name: ranks that are missing,
ranks that came twice, a port that is taken, a rank 0 that cannot be reached.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # documented

from recollect.errors import BudgetInfeasible, PlanMismatch, RecollectError, UnsupportedInput
from recollect.train.distributed.roles import Member

Result = TypeVar("Result")

#: Between two looks at who has signed in.
_LOOK_S = 0.05
#: For the others to hear why the run cannot begin.
_HEARING_S = 10.0


class GroupBroken(RecollectError):
    """Another process of the run has ended or does not answer."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes of a run, as one of them sees it.  With one process, everything here does nothing."""

    rank: int = 0
    world_size: int = 1
    control: Any = None
    """The process group for messages: gloo, whatever carries gradients."""

    @property
    def is_first(self) -> bool:
        """Rank 0: the one that writes and speaks."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """There is one process."""
        return self.world_size == 1 and self.control is None

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, exact to float64."""
        if self.is_alone:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        with _naming_loss():
            dist.all_reduce(tensor, group=self.control)
        return [float(value) for value in tensor]

    def gather(self, thing: Result) -> list[Result]:
        """What each process gave, by rank."""
        if self.is_alone:
            return [thing]
        found: list[Any] = [None] * self.world_size
        with _naming_loss():
            dist.all_gather_object(found, thing, group=self.control)
        return found

    def from_first(self, thing: Result) -> Result:
        """What rank 0 gave."""
        if self.is_alone:
            return thing
        found: list[Any] = [thing]
        with _naming_loss():
            dist.broadcast_object_list(found, src=0, group=self.control)
        result: Result = found[0]
        return result

    def together(self, work: Callable[[], Result]) -> Result:
        """Do `work` on every process; where it fails on one of them it fails on all, instead of some waiting forever.

        Raises:
            Exception: what `work` raised here; else what it raised elsewhere, as `FailedElsewhere`.
        """
        if self.is_alone:
            return work()
        problem: Exception | None = None
        result: Result | None = None
        try:
            result = work()
        except GroupBroken:
            raise
        except Exception as raised:
            problem = raised
        is_input = isinstance(problem, UnsupportedInput | BudgetInfeasible | PlanMismatch)
        failures = self.gather(None if problem is None else (str(problem), is_input))
        try:
            if problem is not None and (self.is_first or failures[0] is None or failures[0][0] != str(problem)):
                raise problem
            for rank, failure in enumerate(failures):
                if failure is not None:  # the same everywhere is said once
                    raise FailedElsewhere(rank, failure[0], is_bad_input=failure[1]) from problem
        finally:
            # An error whose frame holds it would keep the group's threads alive until Python ends, and they may then
            # ask for Python's lock, which aborts the process.
            del problem
        return result  # type: ignore[return-value]  # `work` has returned


class FailedElsewhere(RecollectError):
    """What another process says."""

    def __init__(self, rank: int, text: str, *, is_bad_input: bool) -> None:
        super().__init__(f"rank {rank}: {text}")
        self.rank = rank
        self.is_bad_input = is_bad_input


ALONE = Group()


@contextmanager
def _naming_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise group_broken(error) from error


def group_broken(error: BaseException) -> GroupBroken:
    """What a failed message between processes means."""
    return GroupBroken(
        f"the other processes of the run do not answer ({str(error).splitlines()[0]}): one of them has ended or hangs, "
        f"and this one cannot go on without it. See what it said; a training run goes on from its last checkpoint with "
        f"--resume auto."
    )


def is_group_broken(error: BaseException) -> bool:
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


@contextmanager
def joined(member: Member, *, backend: str, device: torch.device, timeout_s: float) -> Iterator[Group]:
    """Inside, this process is one of its group.

    Args:
        member: who it is.
        backend: what carries gradients.
        device: of this process.
        timeout_s: how long to wait for the others, now and in every exchange.

    Raises:
        UnsupportedInput: not all came, one came twice, or the meeting place is not to be had.
    """
    timeout = timedelta(seconds=timeout_s)
    store = sign_in(member, timeout_s)
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("gradients", store),
            rank=member.rank,
            world_size=member.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise UnsupportedInput(
            f"the processes have met, but {backend} cannot connect them ({str(error).splitlines()[0]}). "
            f"Choose another --dist-backend: gloo works everywhere, nccl on NVIDIA GPUs."
        ) from error
    try:
        control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        yield Group(rank=member.rank, world_size=member.world_size, control=control)
        with suppress(RuntimeError):  # nobody leaves while another is still talking to it, unless that is gone
            dist.barrier(group=control)
    finally:
        gc.collect()  # what still holds the group's threads, as DDP does, must not outlive it
        dist.destroy_process_group()


def sign_in(member: Member, timeout_s: float) -> Store:
    """Meet the others; afterwards all ranks are there, each once.

    Raises:
        UnsupportedInput: see `joined`.
    """
    deadline = time.monotonic() + timeout_s
    store = PrefixStore(f"recollect-{member.attempt}", _store(member, timeout_s))
    try:
        if store.add(f"came-{member.rank}", 1) > 1:
            raise UnsupportedInput(
                f"rank {member.rank} is there twice, so the processes cannot be told apart. "
                f"Give each its own --rank (or RANK); {member.meeting} may also be in use by another run."
            )
        if member.rank == 0:
            store.set("verdict", _verdict(store, member, deadline))
        # Rank 0 waits for all of the time; the others may have come earlier than it.
        store.wait(["verdict"], timedelta(seconds=2 * timeout_s + 5))
        verdict = store.get("verdict").decode()
        if member.rank > 0:
            store.add("heard", 1)
        elif verdict:  # the store ends with rank 0: not before the others know why
            _await_hearers(store, member)
    except UnsupportedInput:
        raise
    except RuntimeError as error:
        raise UnsupportedInput(
            f"rank {member.rank} has lost rank 0 at {member.meeting} ({str(error).splitlines()[0]}), so the run cannot "
            f"begin. See what rank 0 said."
        ) from error
    if verdict:
        raise UnsupportedInput(verdict)
    return store


def _await_hearers(store: Store, member: Member) -> None:
    there = sum(store.check([f"came-{rank}"]) for rank in range(1, member.world_size))
    deadline = time.monotonic() + _HEARING_S
    while store.add("heard", 0) < there and time.monotonic() < deadline:
        time.sleep(_LOOK_S)


def _verdict(store: Store, member: Member, deadline: float) -> str:
    """Empty once all have come; else who has not."""
    while True:
        missing = [rank for rank in range(member.world_size) if not store.check([f"came-{rank}"])]
        if not missing:
            return ""
        if time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:16])) + (" and more" if len(missing) > 16 else "")
            return (
                f"{len(missing)} of {member.world_size} processes did not come to {member.meeting} in time: "
                f"{'rank' if len(missing) == 1 else 'ranks'} {shown}. Start them, too, or give the number of those "
                f"that there are as --world-size; --dist-timeout is how long to wait."
            )
        time.sleep(_LOOK_S)


def _store(member: Member, timeout_s: float) -> Store:
    timeout = timedelta(seconds=timeout_s)
    kind, _, place = member.meeting.partition("://")
    try:
        if kind == "file":
            return FileStore(place, member.world_size)
        host, _, port = place.rpartition(":")
        hosts = member.rank == 0 and not member.agent_hosts
        return TCPStore(host, int(port), None, hosts, timeout, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        text = str(error)
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise UnsupportedInput(
                f"the port of {member.meeting} is in use, by another run or by a second rank 0, so the processes "
                f"cannot meet there. Choose another port in --dist-url or MASTER_PORT; --multiprocessing-distributed "
                f"finds a free one by itself."
            ) from None
        raise UnsupportedInput(
            f"rank {member.rank} cannot reach {member.meeting} ({text.splitlines()[0]}), where rank 0 should be. "
            f"Check that rank 0 runs, and the address in --dist-url or MASTER_ADDR and MASTER_PORT."
        ) from None
