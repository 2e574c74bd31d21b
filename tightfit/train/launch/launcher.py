"""Starting the processes of this node by PyTorch's elastic launch: one that dies takes all down, and is named."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tightfit.errors import TightfitError
from tightfit.train.launch.orphans import LAUNCHER
from tightfit.train.launch.roles import RUN_ID_PREFIX, Starter
from tightfit.train.signals import ending_signals

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

#: Exit codes of a process for bad input or a signal: the whole run then ends with the same.
_EXIT_CODES = (2, *(128 + number for number in (1, 2, 10, 15)))
#: The file in which the first process that fails names itself.
_FIRST = "first"
#: Exit codes of those that the agent has ended, as another had failed.
_BY_THE_AGENT = (-signal.SIGTERM, 128 + signal.SIGTERM)
#: SIGKILL, which not every system has.
_KILLED = 9


class ProcessFailed(TightfitError):
    """A process of the run has ended with an error."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch(starter: Starter, arguments: Sequence[str], timeout_s: float) -> None:
    """Run ``tightfit ARGUMENTS`` in each process of this node, and wait for all of them.

    Raises:
        ProcessFailed: one ended with an error; the first is named.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what they tell, `ProcessFailed` says
    several = starter.nodes > 1
    if "OMP_NUM_THREADS" not in os.environ:  # else each process would take all cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // starter.processes))
    # The profiler, which meters memory on a CPU, warns of each block that is older than itself; DDP frees such.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ[LAUNCHER] = str(os.getpid())
    # Where a process that fails writes how; PyTorch's own choice would be left behind.
    notes = tempfile.TemporaryDirectory(prefix="tightfit-")
    config = LaunchConfig(
        min_nodes=starter.nodes,
        max_nodes=starter.nodes,
        nproc_per_node=starter.processes,
        # All nodes must agree on it.
        run_id=RUN_ID_PREFIX + ("nodes" if several else secrets.token_hex(8)),
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=starter.rendezvous or "127.0.0.1:0",
        rdzv_configs={"rank": starter.node_rank, "timeout": timeout_s} if several else {},
        max_restarts=0,
        monitor_interval=0.1,
        local_addr=None if several else "127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=notes.name),
        # The processes get the same one, and end with a checkpoint. Of these SIGUSR1 is not among the agent's own.
        signals_to_handle=",".join(["SIGQUIT", *(number.name for number in ending_signals())]),
    )
    try:
        with notes:
            try:
                elastic_launch(config, sys.executable)("-m", "tightfit", *arguments)
            except ChildFailedError as failed:
                raise _process_failed(failed, Path(notes.name)) from None
    except SignalException as caught:
        number = int(caught.sigval)
        raise ProcessFailed(128 + number, f"ended by {signal.Signals(number).name}; so were its processes") from None


@contextmanager
def noting_failure() -> Iterator[None]:
    """Record an error that is raised inside for the elastic agent that started this process, if one did.

    Where `launch` started that, also note which process failed first, and whether by a signal: others fail as soon as
    they wait for it, and the agent, which compares whole seconds, may see these before.
    """
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as problem:  # also a signal's: the others only fail as this one is gone
        note_failure(problem)
        raise


def note_failure(problem: BaseException) -> None:
    """Record an error as `noting_failure` does, for who cannot raise it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        get_error_handler().record_exception(problem)
        if os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN_ID_PREFIX):
            with suppress(FileExistsError), (Path(file).parents[1] / _FIRST).open("x") as note:
                note.write(f"{os.environ['RANK']} {os.getpid()} {int(not isinstance(problem, Exception))}")


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _process_failed(failed: ChildFailedError, notes: Path) -> ProcessFailed:
    # The agent counts those that it has ended itself, too.
    others = {r: one for r, one in failed.failures.items() if one.exitcode not in _BY_THE_AGENT} or failed.failures
    # Who is killed has no note of when, and those that wait for it fail next.
    rank, failure = min(others.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
    code, process = failure.exitcode, failure.pid
    noted = [int(word) for note in notes.glob(f"*/attempt_*/{_FIRST}") for word in note.read_text().split()]
    if len(noted) == 3 and code > 0:  # who is killed by a signal notes nothing
        rank, process, by_signal = noted
        first = failed.failures if by_signal else others  # of the others, not if the agent ended it on its way out
        if rank in first:
            code = first[rank].exitcode
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        hint = " The system may have had no more memory." if code == -_KILLED else ""
    else:
        how, hint = f"ended with exit code {code}", " Its message is above."
    message = f"rank {rank} (process {process}) {how}, so the run was ended.{hint}"
    return ProcessFailed(code if code in _EXIT_CODES else 1, message)
