"""Decisions of `torch.distributed._tools.sac_ilp`, PyTorch's own solver for an absolute budget.

It estimates on fake tensors.  Its cost model knows only GPUs; here stands a roofline for one CPU core in its place.  It
counts what it tracks (parameters, gradients, activations), as this benchmark does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.side_by_side.families import build
from tightfit.profiling.structural_copy import copy_batch, copy_model
from tightfit.step.step import Step

_FLOPS_PER_MS = 1e11 / 1e3
_BYTES_PER_MS = 1e10 / 1e3


def _roofline(cls: Any, func: Any, args: Any, kwargs: Any) -> tuple[Any, float]:
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    kwargs = kwargs or {}
    out = func(*args, **kwargs)
    tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
    packet = func._overloadpacket
    flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
    nbytes = sum(t.numel() * t.element_size() for t in tensors)
    return out, max(flops / _FLOPS_PER_MS, nbytes / _BYTES_PER_MS)


def decide(name: str, budgets_bytes: list[int]) -> list[dict[str, list[int] | None] | str]:
    """For each budget: by module path, which operations it saves (None: none of them); or why there is nothing."""
    from torch.distributed._tools.ilp_utils import aggregate_stats, parse_module_info
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed._tools.runtime_estimator import RuntimeEstimator
    from torch.distributed._tools.sac_estimator import SACEstimator
    from torch.distributed._tools.sac_ilp import get_optimal_checkpointing_policy_per_module, sac_milp

    RuntimeEstimator._roofline_estimate = classmethod(_roofline)
    family = build(name)
    mode = FakeTensorMode()
    model, _ = copy_model(family.model, mode)
    batch = copy_batch(family.batch, mode)
    spec = Step(loss=family.loss)

    def step() -> None:
        spec.run(model, batch)
        for parameter in model.parameters():
            parameter.grad = None

    with mode:
        step()
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            for number in range(2):
                step()
                if not number:
                    tracker.reset_mod_stats()
        runtime = RuntimeEstimator()
        with runtime("operator-level-cost-model"):
            step()
        estimator = SACEstimator()
        with estimator("operator-level-cost-model"):
            spec.run_loss(model, batch)
        graph = parse_module_info(aggregate_stats(model, tracker, runtime, estimator, torch.device("cpu")))
    found: list[dict[str, list[int] | None] | str] = []
    root = type(model).__name__
    for budget in budgets_bytes:
        ratios, _, peak = sac_milp(graph, memory_budget=budget / 2**30)
        if peak < 0:
            found.append("no solution")
            continue
        decisions: dict[str, list[int] | None] = {}
        for path, ratio in ratios.items():
            saved = (
                None
                if ratio >= 1
                else get_optimal_checkpointing_policy_per_module(estimator.sac_mod_stats[path], 1 - ratio)
            )
            decisions[path.removeprefix(root).removeprefix(".")] = saved
        found.append(decisions)
    return found
