"""The rendezvous: how the processes of a run find each other and become a process group.

Before the group exists they sign in at a store, so that errors can say what is wrong: ranks that are missing or there
twice, a port that is taken, a rank 0 that cannot be reached.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # documented

from tightfit.device import device_for
from tightfit.distributed.notes import Notes
from tightfit.distributed.process_group import CommunicationFailed, ProcessGroup, Whereabouts
from tightfit.errors import UnsupportedInput, first_line
from tightfit.train.launch.roles import Member
from tightfit.train.launch.roll_call import RollCall

#: Between two looks at who has signed in.
_LOOK_S = 0.05
#: For the others to read why the run cannot begin.
_READING_S = 10.0


_has_joined = False


def was_in_a_group() -> bool:
    """Return whether this process has ever been one of a group."""
    return _has_joined


@contextmanager
def process_group(
    member: Member, *, backend: str, device: torch.device, timeout_s: float, give_up: Callable[[Exception], None]
) -> Iterator[ProcessGroup]:
    """Make this process one of its group inside the context.

    Args:
        member: which process it is.
        backend: of the collectives on gradients.
        device: of this process.
        timeout_s: how long to wait for the others, at the rendezvous, in every collective, and to hear of them at all.
        give_up: ends this process, in whatever it waits, with the error that it is given.

    Raises:
        UnsupportedInput: a rank is missing or there twice, or the rendezvous cannot be reached.
        CommunicationFailed: another rank does not answer; it is named.
    """
    timeout = timedelta(seconds=timeout_s)
    store = sign_in(member, timeout_s)
    whereabouts = Whereabouts()
    roll_call = RollCall(
        store,
        rank=member.rank,
        world_size=member.world_size,
        whereabouts=whereabouts,
        silence_s=timeout_s,
        give_up=give_up,
    )
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("gradients", store),
            rank=member.rank,
            world_size=member.world_size,
            timeout=timeout,
            device_id=None if device_for(device).is_host else device,
        )
    except (RuntimeError, ValueError) as error:
        raise UnsupportedInput(
            f"the processes have found each other, but {backend} cannot connect them ({first_line(error)}). "
            f"Choose another --dist-backend: gloo works everywhere, nccl on NVIDIA GPUs."
        ) from error
    global _has_joined
    _has_joined = True
    try:
        control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        group = ProcessGroup(
            rank=member.rank,
            world_size=member.world_size,
            control=control,
            whereabouts=whereabouts,
            notes=Notes(PrefixStore("notes", store)),
        )
        with roll_call:
            try:
                yield group
            except CommunicationFailed as problem:
                raise roll_call.explain(problem) from problem
        with suppress(RuntimeError):  # nobody leaves while another may still need it, unless that one is gone
            dist.barrier(group=control)
    finally:
        gc.collect()  # what still holds the group's threads, as DDP does, must not outlive it
        dist.destroy_process_group()


def sign_in(member: Member, timeout_s: float) -> Store:
    """Wait until all ranks have signed in, each once.

    Raises:
        UnsupportedInput: as `process_group`.
    """
    deadline = time.monotonic() + timeout_s
    store = PrefixStore(f"tightfit-{member.attempt}", _store(member, timeout_s))
    try:
        if store.add(f"came-{member.rank}", 1) > 1:
            raise UnsupportedInput(
                f"rank {member.rank} is there twice, so the ranks are not those of one run. "
                f"Give each its own --rank (or RANK); {member.rendezvous} may also be in use by another run."
            )
        if member.rank == 0:
            store.set("verdict", _verdict(store, member, deadline))
        # Rank 0 waits for all of the time; the others may have come earlier than it.
        store.wait(["verdict"], timedelta(seconds=2 * timeout_s + 5))
        verdict = store.get("verdict").decode()
        if member.rank > 0:
            store.add("read", 1)
        elif verdict:  # the store ends with rank 0: not before the others know why
            _await_readers(store, member)
    except UnsupportedInput:
        raise
    except RuntimeError as error:
        raise UnsupportedInput(
            f"rank {member.rank} has lost rank 0 at {member.rendezvous} ({first_line(error)}), so the run "
            f"cannot begin. See what rank 0 printed."
        ) from error
    if verdict:
        raise UnsupportedInput(verdict)
    return store


def _await_readers(store: Store, member: Member) -> None:
    there = sum(store.check([f"came-{rank}"]) for rank in range(1, member.world_size))
    deadline = time.monotonic() + _READING_S
    while store.add("read", 0) < there and time.monotonic() < deadline:
        time.sleep(_LOOK_S)


def _verdict(store: Store, member: Member, deadline: float) -> str:
    """Return the error for ranks that did not sign in before the deadline; empty once all have."""
    while True:
        missing = [rank for rank in range(member.world_size) if not store.check([f"came-{rank}"])]
        if not missing:
            return ""
        if time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:16])) + (" and more" if len(missing) > 16 else "")
            return (
                f"{len(missing)} of {member.world_size} processes did not reach the rendezvous {member.rendezvous} in "
                f"time: {'rank' if len(missing) == 1 else 'ranks'} {shown}. Start them, too, or give the number of "
                f"processes that there are as --world-size; --dist-timeout is how long to wait."
            )
        time.sleep(_LOOK_S)


def _store(member: Member, timeout_s: float) -> Store:
    timeout = timedelta(seconds=timeout_s)
    kind, _, place = member.rendezvous.partition("://")
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
                f"the port of {member.rendezvous} is in use, by another run or by a second rank 0, so the processes "
                f"cannot find each other. Choose another port in --dist-url or MASTER_PORT; "
                f"--multiprocessing-distributed finds a free one by itself."
            ) from None
        raise UnsupportedInput(
            f"rank {member.rank} cannot reach {member.rendezvous} ({first_line(error)}), where rank 0 should be. "
            f"Check that rank 0 runs, and the address in --dist-url or MASTER_ADDR and MASTER_PORT."
        ) from None
