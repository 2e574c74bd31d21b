"""Run a script that trains under a plan, and say what its proof and its further steps take.

    python -m tests.explanation.metered_plan SCRIPT ARGS...

prints, as JSON on the last line, the peaks of the proof and, by the profiler, of the second and third step after it.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import warnings
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.explanation.metered_script import peak_of
from tightfit.installation.applied import Applied

STEPS = 2


def resident_bytes() -> int:
    kinds = (torch.Tensor, torch.nn.Parameter)  # no fake ones, which planning leaves to the garbage collector
    tensors = [thing for thing in gc.get_objects() if type(thing) in kinds]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values() if storage.resizable())


def main() -> None:
    found: dict[str, Any] = {}
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    keep_promises = Applied.keep_promises
    steps = 0

    def after_fit(applied: Applied, *args: Any) -> None:
        keep_promises(applied, *args)
        assert applied.verdict is not None
        found["proof"] = {"ok": applied.verdict.ok, "peak_bytes": applied.verdict.measured_peak_bytes}
        found["budget_bytes"] = applied.plan.budget_bytes

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal steps
        steps += "proof" in found
        if steps == 1:  # what `fit` held for its proof is gone
            gc.collect()
            found["resident_bytes"] = resident_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                profile.__enter__()
        if steps == 1 + STEPS:
            profile.__exit__(None, None, None)
            found["step_peak_bytes"] = found["resident_bytes"] + peak_of(profile)
            sys.stdout.write("\n" + json.dumps(found) + "\n")
            sys.stdout.flush()
            os._exit(0)

    Applied.keep_promises = after_fit  # type: ignore[method-assign]  # to listen
    register_optimizer_step_post_hook(after_step)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
