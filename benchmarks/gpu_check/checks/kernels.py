"""Llama by PyTorch's operations, by a custom operator and by Triton kernels: what a plan can drop, and is it exact."""

from __future__ import annotations

import torch
from torch import Tensor

import tightfit
from benchmarks.gpu_check.flash_attention import flash_attend
from benchmarks.gpu_check.models import trained_llama
from benchmarks.gpu_check.registry import Report, check
from benchmarks.llama import RmsNorm, attend, rotary, rotate, silu_times
from benchmarks.llama_kernels import LayerBytes, variants
from tightfit.solver.solver import Solver


@check("kernels", place=14, seconds=90, shows="what is droppable of Llama's saved bytes, by whose kernels it runs on")
def kernels(report: Report) -> None:
    """Measure Llama at the sizes of 8 B with several kernels, and verify the plans that drop the most."""
    _claim_all_alike(report)
    for case, parts in variants().items():
        model, tokens, step = trained_llama(parts)
        profile = tightfit.measure(model, tokens, step=step)
        layer = LayerBytes.of(profile)
        solver = Solver(profile)
        report.note(
            case, method=profile.method, saved_by_layer_bytes=layer.saved, held_by_layer_bytes=layer.held,
            droppable=layer.droppable,
            smallest_above_resident_bytes=solver.smallest().peak_bytes - profile.baseline_bytes,
            plain_above_resident_bytes=solver.plain(0).predicted_peak_bytes - profile.baseline_bytes,
        )  # fmt: skip
        plan = solver.smallest_plan()
        verdict = tightfit.verify(model, tokens, plan, step=step, reference_budget_bytes=2**50)
        report.note(case, method=verdict.method, ok=verdict.ok, not_reproducible=len(verdict.not_reproducible),
                    replayed=verdict.replayed_ops, mismatches=verdict.mismatches, reason=verdict.reason)  # fmt: skip
        report.claim(case, "the smallest plan's step does not differ", not verdict.differing, needs_results=True)
        report.claim(case, "it runs as planned", verdict.mismatches == 0)
        del model, tokens, step
        torch.cuda.empty_cache()


def _claim_all_alike(report: Report) -> None:
    x, y = (torch.randn(64, 512, device="cuda", requires_grad=True) for _ in range(2))
    shape = (2, 4, 256, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    _claim_alike(report, "attention", attend(q, k, v), flash_attend(q, k, v), q)
    try:
        from benchmarks.gpu_check.triton_kernels import TritonRmsNorm, triton_rotate, triton_silu_times
    except ImportError as error:
        report.note("kernels by Triton", reason=f"not run: Triton cannot be imported: {error}")
        return
    _claim_alike(report, "norm", RmsNorm(512).to("cuda")(x), TritonRmsNorm(512).to("cuda")(x), x)
    _claim_alike(report, "gate", silu_times(x, y), triton_silu_times(x, y), x)
    angles = rotary(256, 64, q)
    _claim_alike(report, "rotation", rotate(q, *angles), triton_rotate(q, *angles), q)


def _claim_alike(report: Report, case: str, ours: Tensor, theirs: Tensor, x: Tensor) -> None:
    """Claim that kernels compute what PyTorch computes, or the figures would be of something else."""
    given = torch.randn_like(ours)
    gradients = [torch.autograd.grad(result, x, given)[0] for result in (ours, theirs)]
    allowed = 3e-2 if x.dtype is torch.bfloat16 else 1e-4
    close = torch.allclose(ours, theirs, atol=allowed) and torch.allclose(*gradients, atol=allowed)
    report.claim(case, "the kernel computes what PyTorch computes", close, needs_results=True)
