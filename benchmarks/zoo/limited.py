"""Run something in a process of its own, within a time and a memory limit."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

#: Imported once, before processes are forked: some take longer than a row.
_PRELOADED = (
    "benchmarks.zoo.row",
    "timm",
    "torchvision.models.detection",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "diffusers.models.modeling_utils",
    "torch_geometric.nn",
    "monai.networks.nets",
    "peft",
)

_WALL = 12


def preload() -> None:
    """Import what the rows need, as far as it is installed."""
    for name in _PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)


@dataclass(frozen=True)
class Limits:
    seconds: int
    """Of processor time; on the wall it may take twelve times that, as the computer may be busy."""
    memory_bytes: int
    """Of data and of what is mapped privately, beside what the libraries' code takes."""


@dataclass
class Ended:
    """How a process ended."""

    told: list[Any] = field(default_factory=list)
    """What it told before."""
    failure: str = ""
    """"" if it came to its end; else timeout, memory, killed, or an error with its place."""
    seconds: float = 0.0


def run_limited(work: Callable[..., None], *args: Any, limits: Limits) -> Ended:
    """Call `work(*args, tell)` in a process of its own; what it tells comes back, even if a limit stops it."""
    begin = time.perf_counter()
    # A fork of this process, which never runs an operation and so has no threads of PyTorch's.
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(work, args, limits, there), daemon=True)
    process.start()
    there.close()
    ended = Ended(failure="timeout")
    try:
        while here.poll(max(0.0, begin + _WALL * limits.seconds - time.perf_counter())):
            kind, value = here.recv()
            if kind == "told":
                ended.told.append(value)
            else:
                ended.failure = value
                break
    except EOFError:
        process.join()
        timed_out = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        ended.failure = "timeout" if timed_out else f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    ended.seconds = time.perf_counter() - begin
    return ended


def _serve(work: Callable[..., None], args: tuple[Any, ...], limits: Limits, connection: Connection) -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        # Cold: what planning costs somebody who trains this model for the first time.
        os.environ["TIGHTFIT_CACHE_DIR"] = folder
        try:
            work(*args, lambda value: connection.send(("told", value)))
            connection.send(("ended", ""))
        except BaseException as error:
            connection.send(("ended", _failure(error)))


def _failure(error: BaseException) -> str:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "memory"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "tightfit" in frame.filename]
    place = f" in {os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())[:300]}"
