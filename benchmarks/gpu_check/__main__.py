"""Run the checks that need a GPU: ``python -m benchmarks.gpu_check [--only NAMES] [--output FOLDER]``.

Records are printed and written to FOLDER/results.jsonl as they come; a table comes last.  Exit status 1: a check
failed, or was not run for want of time.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.gpu_check.registry import all_checks
from benchmarks.gpu_check.runner import run_checks, table

#: PyTorch looks once, before cuBLAS is first used.
_DETERMINISTIC_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def main() -> int:
    """Run what the command line asks for, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of checks, with spaces or commas between")
    parser.add_argument("--output", type=Path, help="folder for the results (default: runs/gpu-check/TIME)")
    parser.add_argument("--seconds", type=float, default=500, help="for all checks together")
    parser.add_argument("--patience", type=float, default=1, help="multiplies the time of each check")
    parser.add_argument("--list", action="store_true", help="list the checks, and run none")
    given = parser.parse_args()
    checks = all_checks()
    if given.list:
        for check in checks.values():
            print(f"{check.name:22} {check.seconds:4} s  {check.shows}")
        return 0
    names = given.only.replace(",", " ").split() or list(checks)
    unknown = [name for name in names if name not in checks]
    if unknown:
        parser.error(f"there is no check {', '.join(unknown)}; --list shows all")
    folder = given.output or Path("runs/gpu-check") / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    # Costs of operations are measured in this run, and then known to all checks of it.
    os.environ["TIGHTFIT_CACHE_DIR"] = str((folder / "costs").absolute())
    os.environ.update({**_DETERMINISTIC_CUBLAS, **os.environ})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the check that runs, too
    begin = time.monotonic()
    outcomes = run_checks([checks[name] for name in names], folder, seconds=given.seconds, patience=given.patience)
    text = table(outcomes)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{time.monotonic() - begin:.0f} s; written to {folder}")
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
