"""Starting the processes of this node by PyTorch's elastic launch: one that dies takes all down, and is named."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tightfit.errors import TightfitError
from tightfit.train.launch.roles import RUN_ID_PREFIX, Starter

#: Exit codes of a process for bad input or a signal: the whole run then ends with the same.
_EXIT_CODES = (2, 130, 143)


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
            logging.getLogger(name).setLevel(logging.ERROR)  # what they warn of, `ProcessFailed` says
    several = starter.nodes > 1
    if "OMP_NUM_THREADS" not in os.environ:  # else each process would take all cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, _cores() // starter.processes))
    # The profiler, which meters memory on a CPU, warns of each block that is older than itself; DDP frees such.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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
    )
    try:
        with notes:
            elastic_launch(config, sys.executable)("-m", "tightfit", *arguments)
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        raise ProcessFailed(_exit_code(first.exitcode), _describe(rank, first)) from None
    except SignalException as caught:
        number = int(caught.sigval)
        raise ProcessFailed(128 + number, f"ended by {signal.Signals(number).name}; so were its processes") from None


@contextmanager
def noting_failure() -> Iterator[None]:
    """Record an error that is raised inside for the elastic agent that started this process, if one did: it then knows
    which process failed first.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        yield
    except Exception as problem:
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(problem)
        raise


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _exit_code(code: int) -> int:
    return code if code in _EXIT_CODES else 1


def _describe(rank: int, first: object) -> str:
    code = getattr(first, "exitcode", 1)
    pid = getattr(first, "pid", 0)
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        hint = " The system may have had no more memory." if code == -signal.SIGKILL else ""
    else:
        how, hint = f"ended with exit code {code}", " Its message is above."
    return f"rank {rank} (process {pid}) {how}, so the run was ended.{hint}"
