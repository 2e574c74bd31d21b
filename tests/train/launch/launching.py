"""Starting runs of several processes in tests: on this machine, on the CPU, with models whose steps are short."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support import warm_start
from tightfit.cli.main import main

#: How long anything may take on a busy machine; nothing waits for it to pass.
PATIENCE_S = 600
#: Where it matters how a process is started; elsewhere they come from `warm_start`.
REAL = [sys.executable, "-m", "tightfit"]
#: No dropout and no BatchNorm, so that the number of processes must not matter.
GPT = ["train", "--model", "gpt-tiny", "--model-args", "dropout=0.0", "--log-every", "1", "--eval-samples", "40",
       "--batch-size", "8", "--sequence-length", "32"]  # fmt: skip
TWO = ["--multiprocessing-distributed", "--nproc-per-node", "2"]


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str


def environment(**variables: str) -> dict[str, str]:
    """This process's, without any launcher's variables, and with one thread, like this process."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith(("SLURM_", "TORCHELASTIC_"))}
    return {**kept, "OMP_NUM_THREADS": str(torch.get_num_threads()), **variables}


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def logged(process: subprocess.Popen[str], run_name: str, lines: int) -> None:
    """Wait until a run has logged so many steps."""
    path = Path("runs") / run_name / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_S
    while not (path.exists() and len(path.read_text().splitlines()) >= lines):
        assert time.monotonic() < deadline, "it logs nothing"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)


def alone(*words: str) -> None:
    """``tightfit`` in this process: where being a process is not the point, its start need not be paid for."""
    assert main(list(words)) == 0


def start(*words: str, command: list[str] | None = None, **variables: str) -> subprocess.Popen[str]:
    """``tightfit`` (or another command) with these words, in a session of its own."""
    command = command or [warm_start.python(), "-m", "tightfit"]
    return subprocess.Popen(
        [*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**variables),
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout_s: float = PATIENCE_S) -> Ended:
    """Wait for it; kill all of its session if it takes too long."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"it did not end in {timeout_s} s:\n{out}\n{err}") from None
    return Ended(process.returncode, out, err)


def run(*words: str, command: list[str] | None = None, **variables: str) -> Ended:
    """Start and finish; it must end well."""
    ended = finish(start(*words, command=command, **variables))
    assert ended.code == 0, ended.err
    return ended


def clients_beside(process: subprocess.Popen[str]) -> list[int]:
    """The processes that a run which `start` started has started in turn, in the order of their numbers."""
    shown = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    ours = (line.split(maxsplit=1) for line in shown.splitlines() if str(Path(warm_start.python()).parent) in line)
    found = {int(number) for number, words in ours if "-m tightfit train" in words}
    return sorted(found - {process.pid})


def torchrun(processes: int, python: str | None = None) -> list[str]:
    """The command that starts ``tightfit`` in several processes."""
    options = ["--standalone", "--nproc-per-node", str(processes)]
    return [python or warm_start.python(), "-m", "torch.distributed.run", *options, "-m", "tightfit"]


def metrics(mark: str, dataset: str = "python-source") -> list[dict[str, Any]]:
    """The logged steps of a run."""
    path = Path("runs") / dataset / mark / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(mark: str) -> list[float]:
    """Of the logged steps."""
    return [line["loss"] for line in metrics(mark)]


def weights(mark: str) -> dict[str, torch.Tensor]:
    """At the end of a run."""
    return load_file(Path("runs") / "python-source" / mark / "model.safetensors")


def equal_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same keys, and the same bits under each."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
