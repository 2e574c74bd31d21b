"""Run a script under an independent meter: what PyTorch's profiler says its allocator held, from the script's begin.

    python -m tests.explanation.metered_script SCRIPT ARGS...

prints, as JSON on the last line, the peak until the end of the second step.  Shares nothing with `tightfit`.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import warnings
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

STEPS = 2


def peak_of(profile: Any) -> int:
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def main() -> None:
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    first: list[torch.optim.Optimizer] = []
    steps = 0

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal steps
        first.append(optimizer)
        steps += optimizer is first[0]
        if steps == STEPS:
            profile.__exit__(None, None, None)
            sys.stdout.write("\n" + json.dumps({"peak_bytes": peak_of(profile)}) + "\n")
            sys.stdout.flush()
            os._exit(0)

    register_optimizer_step_post_hook(after_step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        profile.__enter__()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
