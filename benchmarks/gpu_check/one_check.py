"""Run one check in this process: ``python -m benchmarks.gpu_check.one_check NAME FILE_DESCRIPTOR``."""

from __future__ import annotations

import os
import sys

from benchmarks.gpu_check.registry import Check, Report, Skip, all_checks

PASSED, FAILED, SKIPPED = 0, 1, 77


def main(check: Check, descriptor: int) -> int:
    """Run the check, with its records written to an open file, and return the exit status."""
    os.set_inheritable(descriptor, False)  # what the check starts must not hold it open
    with open(descriptor, "w", encoding="utf-8") as file:
        report = Report(check.name, file)
        try:
            check.run(report)
        except Skip as reason:
            report.note("skipped", reason=str(reason))
            return FAILED if report.failed else SKIPPED
        return FAILED if report.failed else PASSED


if __name__ == "__main__":
    sys.exit(main(all_checks()[sys.argv[1]], int(sys.argv[2])))
