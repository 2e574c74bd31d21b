"""Have a script explained in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.device.described.cards import card_for
from tightfit.errors import TightfitError, UnsupportedInput
from tightfit.explanation.address_space import surroundings
from tightfit.units import parse_bytes

#: SIGKILL, which not every system has.
_KILLED = 9


class ScriptFailed(TightfitError):
    """A script ended before there was a step to explain; it has the exit code that the script ended with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class ExplainedScript:
    """What was found of a script's step."""

    explanation: dict[str, Any]
    """As `Explanation.to_json`."""
    text: str
    exit_code: int
    """That of the script, where it ended by itself; 0 where it was ended after its step."""


def explain_script(
    script: Path, arguments: Sequence[str] = (), *, memory: str = "auto", device: str | None = None
) -> ExplainedScript:
    """Run a script until its first complete step and explain that.  What the script prints goes to stderr.

    `memory`: what there is for a step, as a budget; ``auto``: what there was, where it ran out.
    `device`: a GPU that is not here, as for `measure`: whether the step would fit there is said, too.

    Raises:
        UnsupportedInput: there is no such file, or `memory` is no budget, or `device` no card.
        ScriptFailed: it ended without a step to explain.
    """
    if not script.is_file():
        what = "is a folder" if script.is_dir() else "does not exist"
        raise UnsupportedInput(f"the script {script} {what}, so there is nothing to run. Name a Python file.")
    _check_memory(memory)  # before anything runs
    card = "" if device is None else card_for(device).name
    with tempfile.TemporaryDirectory(prefix="tightfit-") as folder:
        found_in = Path(folder, "found.json")
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tightfit.explanation.session",
                str(found_in),
                memory,
                card,
                str(script),
                *arguments,
            ],
            stdout=sys.stderr.fileno() if _has_file() else None,
            env={**surroundings(), **os.environ},
        )
        exit_code = _wait(process)
        text = found_in.read_text(encoding="utf-8") if found_in.exists() else ""
    if not text:
        raise ScriptFailed(_killed(script, exit_code), 128 - exit_code if exit_code < 0 else exit_code or 1)
    found = json.loads(text)
    if "problem" in found:
        raise ScriptFailed(found["problem"], found["exit_code"])
    return ExplainedScript(**found)


def _check_memory(memory: str) -> None:
    """Raise `UnsupportedInput` for what is no size; whether the device has as much is told when it is known."""
    size = memory.partition("+")[0].strip()
    try:
        if memory != "auto" and not (size.endswith("%") and 0 < float(size[:-1]) <= 100):
            parse_bytes(size)
    except ValueError:
        raise UnsupportedInput(
            f"--memory {memory!r} is not a memory size, so nothing can be ranked by it. Write it like 8GiB, 8GB or "
            f"512MiB, as a share of the device's memory like 75%, or auto."
        ) from None


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for the script; what ends this process ends it, too."""
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _has_file() -> bool:
    try:
        sys.stderr.fileno()
    except (OSError, ValueError):
        return False
    return True


def _killed(script: Path, exit_code: int) -> str:
    if exit_code == -_KILLED:
        return (
            f"{script} was killed by the system, most likely because the machine had no more memory, so its step was "
            f"not seen to the end. Limit the process's memory first (ulimit -v), so that PyTorch can say what it asked "
            f"for, and explain it again."
        )
    how = f"was ended by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with code {exit_code}"
    return f"{script} {how} past tightfit, so its step was not seen. Run it with `python` until it trains."
