"""A Python that has imported PyTorch already, for the processes that tests start.

Importing costs some five seconds of a core in each process, much more than the few steps that it then takes.  `python`
is the path of an executable that takes the place of ``python`` where a module is run by ``-m``: a small client, which
has a server fork itself, so that the new process finds everything imported.  Environment, working folder, standard
streams, signals and exit code are as if it had been started; whoever kills the client kills it.  What a process is by
its start (its command line, what it imports) is tested with the real one.
"""

from __future__ import annotations

import atexit
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_CLIENT, _SERVER = (Path(__file__).with_name(name) for name in ("client.py", "server.py"))


@functools.cache
def python() -> str:
    """Start this process's server; return the path of the executable that asks it for processes."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    address, executable = folder / "server", folder / "python"
    command = shlex.join([sys.executable, "-IS", str(_CLIENT), str(address), os.environ["PYTHONPATH"]])
    executable.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    executable.chmod(0o755)
    ours, theirs = os.pipe()  # its end of file tells the server that this process is gone
    server = subprocess.Popen(
        [sys.executable, _SERVER, address, executable, str(ours)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=[ours], start_new_session=True,
        env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"},  # read at import; so it is in what the launcher starts
    )  # fmt: skip
    os.close(ours)
    assert server.stdout is not None
    assert server.stdout.read(1) == b"\n", "the server of processes did not start"

    def end() -> None:
        os.close(theirs)
        server.wait()
        shutil.rmtree(folder)

    atexit.register(end)
    return str(executable)
