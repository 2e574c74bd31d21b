"""Run a command on emulated CUDA devices: ``python -m tests.emulated_cuda.run python script.py``.

`python` in the command is this interpreter. The switches are environment variables; see docs/emulated-cuda.md.
"""

from __future__ import annotations

import os
import sys

from tests.emulated_cuda.build import CannotBuild, environment


def main(command: list[str]) -> None:
    """Become the command, in the environment of the emulated runtime."""
    if not command:
        sys.exit(
            "No command was given, so there is nothing to run. Say: python -m tests.emulated_cuda.run python script.py"
        )
    try:
        variables = environment()
    except CannotBuild as error:
        sys.exit(str(error))
    if command[0] in ("python", "python3"):
        command = [sys.executable, *command[1:]]
    os.execvpe(command[0], command, {**os.environ, **variables})


if __name__ == "__main__":
    main(sys.argv[1:])
