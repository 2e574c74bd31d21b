"""Scripts in processes of their own, on devices with other settings."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def run_script(script: str, **settings: object) -> str:
    """Run the script with the settings, given without ``EMULATED_CUDA_``, and return what it printed."""
    variables = {f"EMULATED_CUDA_{name}": str(value) for name, value in settings.items()}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
