"""Does a budget hold on a GPU: predicted, allocated, reserved and total peaks, and thirty steps after fitting."""

from __future__ import annotations

import gc
import math
import os
from typing import Any

import torch
from torch import nn

import tightfit
from benchmarks.gpu_check.models import trained_llama
from benchmarks.gpu_check.registry import Report, check
from tests.emulated_cuda.counters import is_active
from tightfit.device import device_for
from tightfit.solver.solver import Solver

_STEPS = 30
_SHARES = (0.75, 0.5, 0.3)
_EXPANDABLE = "expandable_segments:True"


@check("budgets", place=6, seconds=80, shows="four Llama-8B blocks stay within three budgets, in 30 steps each")
def budgets(report: Report) -> None:
    """Fit with the allocator as it is by default."""
    _fit_and_train(report, _SHARES)


@check(
    "expandable-segments", place=7, seconds=60, shows="what segments that can grow save of a budget",
    environment={"PYTORCH_ALLOC_CONF": _EXPANDABLE, "PYTORCH_CUDA_ALLOC_CONF": _EXPANDABLE},
)  # fmt: skip
def expandable_segments(report: Report) -> None:
    """Fit the same budgets."""
    _fit_and_train(report, _SHARES[1:])


@check("memory-cap", place=8, seconds=60, shows="a budget that the allocator itself enforces")
def memory_cap(report: Report) -> None:
    """Fit the same budgets with the allocator capped."""
    _fit_and_train(report, _SHARES[1:], memory_cap=True)


def _fit_and_train(report: Report, shares: tuple[float, ...], **settings: Any) -> None:
    model, tokens, step = trained_llama()
    profile = tightfit.measure(model, tokens, step=step)
    solver = Solver(profile)
    smallest, plain = solver.smallest().peak_bytes, solver.plain(0).predicted_peak_bytes
    report.note("predicted", smallest_bytes=smallest, plain_bytes=plain, resident_bytes=profile.baseline_bytes)
    for share in shares:
        case = f"{share:.0%} of what can be saved is kept"
        budget = int(smallest + share * (plain - smallest))
        try:
            applied = tightfit.fit(model, tokens, budget=budget, step=step, profile=profile, **settings)
        except tightfit.BudgetInfeasible as error:
            report.claim(
                case,
                "the budget can be kept",
                False,
                budget_bytes=error.budget_bytes,
                required_bytes=error.required_bytes,
            )
            continue
        peaks = _train(applied, model, tokens, step)
        verdict, plan = applied.verdict, applied.plan
        assert verdict is not None
        retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        applied.remove()
        report.note(
            case,
            budget_bytes=budget,
            predicted_bytes=plan.predicted_peak_bytes,
            predicted_allocated_bytes=plan.predicted_allocated_bytes,
            predicted_reserved_bytes=plan.predicted_reserved_bytes,
            measured_by_fit_bytes=verdict.measured_peak_bytes,
            **peaks,
            correction_bytes=applied.profile.correction_bytes if applied.profile is not None else None,
            slack=(budget - peaks["highest_total_bytes"]) / budget,
            predicted_step_ms=plan.predicted_step_ms,
            predicted_plain_step_ms=plan.plain_step_ms,
            step_ms=verdict.step_ms,
            plain_step_ms=verdict.plain_step_ms,
            plain_step_source=verdict.plain_step_source,
            allocator_retries=retries,
        )
        report.claim(case, "fit's own step is within the budget", verdict.measured_peak_bytes <= budget)
        report.claim(case, f"{_STEPS} steps are within the budget", peaks["highest_total_bytes"] <= budget)
        report.claim(case, "the planned step is the plain one", verdict.ok is not False, reason=verdict.reason)


def _train(applied: tightfit.Applied, model: nn.Module, tokens: torch.Tensor, step: tightfit.Step) -> dict[str, int]:
    """Train as a user does, and return the highest peaks of the steps."""
    device = device_for("cuda")
    torch.cuda.reset_peak_memory_stats()
    outside = 0
    for number in range(_STEPS):
        for parameter in model.parameters():
            if number % 2 and parameter.grad is not None:
                parameter.grad.zero_()
            elif not number % 2:
                parameter.grad = None
        applied.loss(model, tokens).backward()
        step.run_optimizers(model)
        outside = max(outside, device.held_bytes() - device.reserved_bytes())
    torch.cuda.synchronize()
    reserved = torch.cuda.max_memory_reserved()
    return {
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_peak_bytes": reserved,
        "outside_pytorch_bytes": outside,
        "highest_total_bytes": reserved + outside,
    }


@check("auto", place=9, seconds=60, shows='fit("auto") beside memory that is taken; a sharded model of one process')
def auto(report: Report) -> None:
    """Leave less than the plain step needs, then less still."""
    model, tokens, step = trained_llama()
    profile = tightfit.measure(model, tokens, step=step)
    solver = Solver(profile)
    smallest, plain = solver.smallest().peak_bytes, solver.plain(0).predicted_peak_bytes
    gc.collect()
    torch.cuda.empty_cache()
    for share in (0.7, 0.4):
        left = int(smallest + share * (plain - smallest))
        device = device_for("cuda")
        free_and_held = device.free_bytes() + device.held_bytes()
        taken = torch.empty(max(0, free_and_held - left), dtype=torch.uint8, device="cuda")
        case = f"{share:.0%} of what can be saved fits beside what is taken"
        retries = torch.cuda.memory_stats().get("num_ooms", 0)
        try:
            with tightfit.fit(model, tokens, budget="auto", step=step, profile=profile) as applied:
                for _ in range(3):
                    applied.loss(model, tokens).backward()
                    step.run_optimizers(model)
                    for parameter in model.parameters():
                        parameter.grad = None
                verdict = applied.verdict
            assert verdict is not None
            out_of_memory = torch.cuda.memory_stats().get("num_ooms", 0) - retries
            report.note(
                case, budget_bytes=verdict.budget_bytes, taken_bytes=taken.numel(), ok=verdict.ok,
                predicted_bytes=verdict.predicted_peak_bytes, measured_bytes=verdict.measured_peak_bytes,
                ran_out_of_memory=out_of_memory,
            )  # fmt: skip
            report.claim(case, "the step fits, and is the plain one", verdict.ok is not False, reason=verdict.reason)
        except (tightfit.BudgetInfeasible, torch.OutOfMemoryError) as error:
            # The first is a proper end, but not the wanted one; the second is none.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            report.claim(case, "the step fits, and is the plain one", False, reason=reason)
        del taken
        for parameter in model.parameters():
            parameter.grad = None
        torch.cuda.empty_cache()
    del model, step, tokens
    _fit_sharded(report)


def _fit_sharded(report: Report) -> None:
    """Fit a model that `fully_shard` has sharded among one process."""
    case = "sharded among one process"
    if is_active():
        report.note(case, reason="not run: collectives by NCCL are not emulated")
        return
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"})
    init_process_group("nccl", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)) for _ in "1234"])
        model = model.to("cuda")
        for block in model:
            fully_shard(block)
        fully_shard(model)
        batch = torch.randn(4096, 1024, device="cuda")
        step = tightfit.Step(
            loss=lambda model, batch: model(batch).pow(2).mean(), optimizer=torch.optim.AdamW(model.parameters())
        )
        profile = tightfit.measure(model, batch, step=step)
        solver = Solver(profile)
        smallest, plain = solver.smallest().peak_bytes, solver.plain(0).predicted_peak_bytes
        budget = math.ceil((smallest + plain) / 2) + 2**30
        with tightfit.fit(model, batch, budget=budget, step=step, profile=profile) as applied:
            verdict = applied.verdict
        assert verdict is not None
        report.note(case, budget_bytes=budget, measured_bytes=verdict.measured_peak_bytes, ok=verdict.ok)
        report.claim(case, "it is planned and proven", verdict.ok is not False, reason=verdict.reason)
    finally:
        destroy_process_group()
